"""Sharded parameters (DTensor), every rule: what ranks make of their shards is what one process makes of the whole.

It is held against that process, and against the rule's reference in float64. Gradients are given; models that make
their own are in test_sharded_models.py. Left out: NCCL, meshes of three dimensions.
"""

import pytest
import torch
from cases import CASES
from cases import run as run_rule
from conduct import EACH, assert_exact, each_case
from ranks import run
from sharding import (
    FLAT,
    LAYOUTS,
    assert_whole,
    make,
    over,
    parameters,
    plain,
    ranks_agree,
    steps_of,
    tensors,
    told,
    train,
)

from layerfused import reference

CLIPPED = ("columns", "mixed", "hybrid", "column-parallel")
BY_NAME = {case.name: case for case in CASES}


def clip_of(layout):
    return 1.0 if layout in CLIPPED else None


def trained(laid, name, clip):
    params = parameters(laid, tensors())
    opt = make(BY_NAME[name], params, max_grad_norm=clip)
    train(opt, params, steps_of(), laid)
    return told(opt, params)


def on_ranks(names, layouts):
    return {(name, layout): trained(over(layout), name, clip_of(layout)) for name in names for layout in layouts}


def exact(case, clip):
    """Every tensor's final value in float64, by the rule's reference alone."""
    steps = [[g.double() for g in step] for step in steps_of()]
    norms = [torch.cat([g.flatten() for g in step]).norm() for step in steps]
    factors = [min(1.0, clip / norm) if clip else 1.0 for norm in norms]
    for i, p in enumerate(tensors()):
        own = [step[i].flatten() * factor for step, factor in zip(steps, factors, strict=True)]
        yield run_rule(getattr(reference, case.rule), case.hyper, p.flatten().double(), own)[0].view(p.shape)


def check(case, layouts, found):
    wanted = {clip: (trained(plain, case.name, clip), list(exact(case, clip))) for clip in (None, 1.0)}
    for layout in layouts:
        single, double = wanted[clip_of(layout)]
        ranks_agree([rank[case.name, layout] for rank in found])
        assert_whole(found[0][case.name, layout], single, tensors())
        for p, q, start in zip(found[0][case.name, layout]["params"], double, tensors(), strict=True):
            assert_exact(p, q, start)


@each_case
def test_four_ranks(case):
    check(case, LAYOUTS, run(on_ranks, 4, [case.name], LAYOUTS))


def test_two_ranks():
    found = run(on_ranks, 2, [case.name for case in EACH], FLAT)
    for case in EACH:
        check(case, FLAT, found)


@pytest.mark.all
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_option(case):
    check(case, LAYOUTS, run(on_ranks, 4, [case.name], LAYOUTS))


ROWS = ((5, 4), (5,), (5, 2, 3))  # over 4 ranks: 2, 2, 1 and none
CUTS = ("slices", 1, 5, (1, 3, 1), (4, 1), "group")
ALIKE = [layout for layout in LAYOUTS if layout not in ("mixed", "row-parallel")]  # cut matrices and vectors alike
PLACED = [(layer, layout) for layer in CUTS for layout in LAYOUTS if layer != "group" or layout in ALIKE]


def trained_in_pieces(laid, name, layer):
    params = parameters(laid, tensors(shapes=ROWS))
    opt = make(BY_NAME[name], [{"params": params, "layer": layer}])
    train(opt, params, steps_of(ROWS, 3), laid)
    return told(opt, params)


def pieces_on_ranks(name):
    return {(layer, layout): trained_in_pieces(over(layout), name, layer) for layer, layout in PLACED}


@pytest.mark.parametrize("name", ["lamb", "novograd", "setadam"])
def test_layers_that_are_no_tensors(name):
    """Rows count in the whole tensor, wherever they lie: a block of them may begin on one rank and end on another."""
    found = run(pieces_on_ranks, 4, name)
    wanted = {layer: trained_in_pieces(plain, name, layer) for layer in CUTS}
    for layer, layout in PLACED:
        ranks_agree([rank[layer, layout] for rank in found])
        assert_whole(found[0][layer, layout], wanted[layer], tensors(shapes=ROWS))
