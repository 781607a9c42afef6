"""`precision` on the CUDA engine (device_precision.py, too): every way that p and v are stored by, all in one launch.

Leaves out what the words mean (the CPU engine's own tests) and predictions, which no launch with a way makes.
"""

import pytest
import torch
from cuda_cases import Cuda, on_host
from device_bits import displaced
from device_cases import operands, there, written
from device_precision import *  # noqa: F403
from engines import parameters, same_bits, starts, step, tame, wild
from host_cuda import capture, replay
from test_engine_bits import phase_by_phase
from test_engine_storage import HALVES, TYPES, set_gradient

from layerfused.plan import Phase
from layerfused.precision import RESTS, WAYS, way_of

ENGINE = Cuda
STATES = "bf16-states"
OF_P = [(dtype, way) for dtype in HALVES for way in WAYS if (dtype, way) != (torch.float16, "remainder")]
PLAIN = [(dtype, None) for dtype in TYPES]
OF_BOTH = [*((dtype, STATES) for dtype in TYPES), *((dtype, (way, STATES)) for dtype, way in OF_P)]
EVERY = [*OF_P, *PLAIN, *OF_BOTH]
# Without stats and with, p and v written by the first sweep, the second or both, coupled decay that reads p alone.
RULES = ["sgd-decay", "sgd-dampening", "adam-decay", "lars", "lamb", "novograd-decay", "aida-k1", "setadam-coupled"]
NAMES = pytest.mark.parametrize("name", RULES)
STEP = (Phase.REDUCE, Phase.FINISH, Phase.APPLY)


def grouped(kinds, **more):
    """A group for each of these, (type, precision), whose parameters come in turn."""

    def groups(params):
        each = len(params) // len(kinds)
        shares = zip(kinds, zip(*[iter(params)] * each, strict=True), strict=True)
        return [{"params": list(own), "precision": words, **more} for (_, words), own in shares]

    return groups


def values_of(kinds, sizes):
    return [x.to(dtype) for dtype, _ in kinds for x in starts(sizes)]


def gradients_of(kinds, grads):
    """Gradients of the parameters' types."""
    return [g.to(dtype) for dtype, _ in kinds for g in grads]


def rests_of(opt, params):
    return [opt.state[p][name] for p in params for name in RESTS.values() if name in opt.state[p]]


# On chip and of several chunks, slices that begin askew to a draw of eight, numbers that are infinite as float16.
@pytest.mark.parametrize("layer", ["tensor", "slices"])
@NAMES
def test_every_way_in_one_launch(name, layer, engine):
    engine.plans(tile=16, grid=3)
    sizes = (3 * 37, 3)
    values = [x.view(3, -1) for x in values_of(EVERY, sizes)]
    twins = engine.twins(name, values, grouped(EVERY, layer=layer, seed=2**40 + 5), max_grad_norm=2.0)
    for grads in (*tame(sizes, 2), *wild(sizes, 1)):
        twins.step([g.view(3, -1) for g in gradients_of(EVERY, grads)])
    assert len(twins.opts[1]._launches) == 1
    kept = {name for p in twins.params[1] for name in twins.opts[1].state[p]} & {*RESTS.values()}
    assert kept == {*RESTS.values()}


def both_ways(engine, name, kinds, sizes, steps):
    """What a step leaves that is one launch, and what one phase by phase: there nothing stays on chip."""
    found = []
    for phases in (None, STEP):
        params = parameters(there(values_of(kinds, sizes)))
        opt = engine.make(name, grouped(kinds)(params))
        for grads in tame(sizes, steps):
            grads = there(gradients_of(kinds, grads))
            if phases is None:
                for p, g in zip(params, grads, strict=True):
                    set_gradient(p, g)
                opt.step()
            else:
                phase_by_phase(opt, params, grads, 0.0, phases)
        found.append(written(opt))
    return found


@NAMES
def test_on_chip_is_as_in_two_sweeps(name, engine):
    """Leaves out states in 16 bits, which are not rounded between the sweeps where they stay on chip (next test)."""
    engine.plans(grid=2)
    same_bits(*both_ways(engine, name, OF_P, (5, 64, 300), 2))


# v of the first sweep, which the second reads unrounded on chip: that shows in p, and in v one step later.
@pytest.mark.parametrize("name", ["lamb", "setadam-coupled"])
def test_states_of_layers_on_chip(name, engine):
    engine.plans(grid=2)
    pair = both_ways(engine, name, OF_BOTH, (5, 64, 300), 1)
    one, two = ({key: x for key, x in found.items() if key.endswith(".exp_avg_sq")} for found in pair)
    assert one and all(x.dtype == torch.bfloat16 for x in one.values())
    same_bits(one, two)


# p, g, m, v and what is kept beside p, each alone and all of them: tiles that are full, and tails.
@pytest.mark.parametrize("name", ["adam-decay", "lamb", "aida-k1"])
def test_every_offset_of_every_operand(name, engine):
    engine.plans(tile=16, grid=2)
    kinds = [kind for kind in OF_BOTH if kind[0] != torch.float32]
    rows = [[n * (i == k) for i in range(5)] for k in range(5) for n in (1, 2, 3)] + [[3, 1, 5, 7, 2], [2, 4, 1, 6, 1]]
    size, (grads,) = 50, tame((50,), 1)

    def final(rows):
        groups, gradients = [], []
        for dtype, words in kinds:
            own = [torch.nn.Parameter(displaced(starts((size,))[0].to(dtype), row[0])) for row in rows]
            groups.append({"params": own, "precision": words})
            gradients += [displaced(grads[0].to(dtype), row[1]) for row in rows]
        opt = engine.make(name, groups)
        params = [p for group in groups for p in group["params"]]
        for i, p in enumerate(params):
            row, state = rows[i % len(rows)], opt.state[p]
            set_gradient(p, gradients[i])
            kept = [key for key in RESTS.values() if key in state] or [None]
            for key, offset in zip((*opt.rule_of(opt.param_groups[0]).states, *kept), row[2:], strict=True):
                if key:
                    state[key] = displaced(state[key].cpu(), offset)
        opt.step()
        return written(opt)

    same_bits(final(rows), final([[0] * 5] * len(rows)))


@on_host
@pytest.mark.parametrize("name", ["adam-decay", "lamb"])
def test_a_replay_draws_anew(name, engine):
    """The step's number is the device's."""
    engine.plans(grid=2)
    eager, opt = (engine.train(name, values_of(EVERY, (70,)), [], grouped(EVERY)) for _ in range(2))
    for one, params in (eager, opt):
        for p, g in zip(params, gradients_of(EVERY, next(tame((70,), 1))), strict=True):
            set_gradient(p, g)
        one.step()
    with capture():
        opt[0].step()
    for _ in range(2):
        replay()
        eager[0].step()
    same_bits(written(opt[0]), written(eager[0]))


def test_tensors_that_rest_and_steps_that_are_skipped(engine):
    """Nothing of them is written, in either part."""
    engine.plans(grid=2)
    opt, params = engine.train("lamb", values_of(EVERY, (70,)), [], grouped(EVERY), max_grad_norm=1.0)
    grads = there(gradients_of(EVERY, next(tame((70,), 1))))
    step(opt, params, grads)
    before = written(opt)
    step(opt, params, [None] * len(params))
    grads[-1][3] = float("nan")
    for p, g in zip(params, grads, strict=True):
        set_gradient(p, g)
    opt.step()
    assert int(opt.skipped_steps) == 1
    same_bits(written(opt), before)


# What is moved


@on_host
@pytest.mark.parametrize("clip", [None, 2.0], ids=["", "clip"])
@NAMES
def test_requested_bytes_are_what_is_moved(name, clip, engine):
    engine.plans()
    sizes = (0, 5, 64, 65, 300)
    opt, params = engine.train(name, values_of(EVERY, sizes), [], grouped(EVERY), max_grad_norm=clip)
    for p in params:
        p.grad = p.detach().clone()
    moved = engine.moved(opt, [*operands(opt, params), *rests_of(opt, params)])
    assert sum(map(sum, moved)) == opt.traffic()["requested"]


@on_host
def test_a_copy_of_a_master_is_written_alone(engine):
    """Each part of p for itself, in one sweep and on chip; the others' parts are read and written both."""
    for name in ("adam-decay", "lamb"):
        opt, params = engine.train(name, values_of(OF_P, (65, 1000)), [], grouped(OF_P))
        for p in params:
            p.grad = p.detach().clone()
        expected = []
        for p in params:
            way, n = opt.state[p].keys() & {*RESTS.values()}, p.numel()
            expected.append((0, 2 * n) if "master" in way else (2 * n, 2 * n))
        rests = [(x.nbytes, x.nbytes) for x in rests_of(opt, params)]
        assert engine.moved(opt, [*params, *rests_of(opt, params)]) == expected + rests


def test_every_way_is_among_them():
    found = {(dtype, way_of(words if isinstance(words, tuple) else (words,), dtype)) for dtype, words in EVERY}
    assert found == {(dtype, way) for dtype in HALVES for way in (*WAYS, None)} - {(torch.float16, "remainder")} | {
        (torch.float32, None)
    }
