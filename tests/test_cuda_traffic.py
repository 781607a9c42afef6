"""Bytes that the CUDA engine really loads and stores (device_traffic.py, too).

Counted on the host by what the compiler reports of each access (-fsanitize=thread), in p, g, m and v.
"""

import pytest
import torch
from cuda_cases import Cuda, on_host
from device_bits import displaced
from device_cases import operands
from device_traffic import *  # noqa: F403
from device_traffic import counted
from engines import NAMED, ONE_PER_RULE, starts, tame
from test_engine_storage import TYPES

ENGINE, pytestmark = Cuda, on_host
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)


# Production sizes and their tails, in every storage type, states too; leaves out options of a rule (device_traffic.py).
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("clip", [None, 2.0], ids=["", "clip"])
@RULES
def test_bytes_of_production_sizes(name, clip, dtype, engine):
    sizes = (0, 3, engine.whole - 1, engine.whole, engine.whole + 1, engine.chunk + 2)
    opt, _, params = built(engine, name, sizes, dtype, clip)
    assert counted(engine, opt, params) == opt.traffic()["requested"]


def built(engine, name, sizes, dtype=torch.float32, clip=None, offsets=(0, 0, 0, 0)):
    """An optimizer whose p, m and v lie `offsets` elements behind an aligned address, its gradients and parameters."""
    params = [torch.nn.Parameter(displaced(x.to(dtype), offsets[0])) for x in starts(sizes)]
    opt = engine.make(name, params, max_grad_norm=clip)
    for p in params:
        for key, offset in zip(opt.rule_of(opt.param_groups[0]).states, offsets[2:], strict=False):
            opt.state[p][key] = displaced(torch.zeros(p.numel(), dtype=dtype), offset)
    return opt, [displaced(g.to(dtype), offsets[1]) for g in next(tame(sizes, 1))], params


# One operand alone that vectors cannot move, and all: nothing is read twice for it, and no other operand more.
@pytest.mark.parametrize("offsets", [(1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 2, 0), (0, 0, 0, 1), (1, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", ["sgd-dampening", "lars", "lamb", "aida-k1", "setadam-coupled"])
def test_bytes_of_misaligned_operands(name, offsets, engine):
    engine.plans()
    opt, grads, params = built(engine, name, (5, 64, 65, 300), clip=2.0, offsets=offsets)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    assert sum(map(sum, engine.moved(opt, operands(opt, params)))) == opt.traffic()["requested"]


@RULES
def test_layers_on_chip_are_read_once_and_written_once(name, engine):
    """Each operand for itself: p, m and v read and written, g read."""
    sizes = (1, 7, engine.tile, engine.whole)
    opt, params = engine.train(name, starts(sizes), tame(sizes, 1))
    states = len(opt.rule_of(opt.param_groups[0]).states)
    once, read = [(4 * n, 4 * n) for n in sizes], [(4 * n, 0) for n in sizes]
    of_states = [pair for pair in once for _ in range(states)]
    assert engine.moved(opt, operands(opt, params)) == once + read + of_states
    assert opt.traffic()["requested"] == opt.traffic()["compulsory"]


def test_a_step_that_is_skipped_reads_gradients_once(engine):
    """For the norm; then it is known that nothing is to be done."""
    engine.plans()
    opt, params = engine.train("lamb", starts((5, 300)), tame((5, 300), 1), max_grad_norm=1.0)
    params[0].grad[2] = float("nan")
    assert engine.moved(opt, operands(opt, params)) == [(0, 0)] * 2 + [(20, 0), (1200, 0)] + [(0, 0)] * 4


@pytest.mark.parametrize("what", ["a sweep", "an element", "a gradient"])
def test_the_count_tells_what_is_too_much(what, engine):
    """The requested bytes are met exactly, so one element that a plan has twice or not at all shows."""
    engine.plans()
    opt, params = engine.train("lamb", starts((300,)), tame((300,), 1))
    requested = opt.traffic()["requested"]
    if what == "a sweep":
        opt.param_groups[0]["adapt"] = False
    elif what == "an element":
        opt, params = engine.train("lamb", starts((301,)), tame((301,), 1))
    else:
        opt.defaults["max_grad_norm"] = 1.0
    differs = {"a sweep": -3 * 1200, "an element": 10 * 4, "a gradient": 1200}[what]  # the second sweep reads p, m, v
    assert counted(engine, opt, params) == requested + differs


def test_every_rule_is_counted_in_production_sizes():
    assert {NAMED[name].rule for name in ONE_PER_RULE} == {case.rule for case in NAMED.values()}
