"""The Triton engine's bits: the CPU engine's where sums are equal, the same for any grid, in phases, and misaligned.

What programs do that run at once is in test_triton_schedules.py.
"""

import pytest
import torch
from engines import NAMED, ONE_PER_RULE, make, parameters, same_bits, starts, step, tame, wild
from test_engine_bits import PIECES, mixed, phase_by_phase, shifted
from triton_cases import DEVICE, MARKS, Twins, counters, plans, there, train, written

from layerfused import triton_engine
from layerfused.plan import Phase

pytestmark = MARKS
EVERY = pytest.mark.parametrize("name", NAMED)
GRIDS = (1, 2, 3, 7, 7) if DEVICE == "cuda" else (1, 2, 2)  # interpreted, test_triton_schedules.py has 3 and 7
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
HALVES = [*((name, torch.bfloat16) for name in NAMED), *((name, torch.float16) for name in ONE_PER_RULE)]
SIZES = (0, 7, 65, 300)
TILE, CHUNK = triton_engine.TILE, triton_engine.CHUNK
FINISH_APPLY = {"reduce, finish and apply": (Phase.REDUCE, Phase.FINISH | Phase.APPLY)}
WAYS = {**PIECES, **FINISH_APPLY}
CUTS = [(WAYS["reduce, finish, apply"], True), (WAYS["reduce, finish and apply"], False)]


# The production sizes, whole layers and layers of several chunks; leaves out what is stored in 16 bits (next tests).
@EVERY
def test_bits_are_the_cpu_engines(name):
    sizes = (TILE + 1, CHUNK + 5)
    twins = Twins(name, starts(sizes))
    long, short = tame(sizes, 2)
    for grads in (long, [0.01 * g for g in short], *wild(sizes, 1)):  # AdaNorm answers to short ones
        twins.step(grads)


# Parameters and gradients in 16 bits, many wild ones infinite as float16; leaves out other mixtures of types
# (test_triton_storage.py).
@pytest.mark.parametrize("name, dtype", HALVES)
def test_bits_of_parameters_in_16_bits(name, dtype):
    sizes = (TILE + 1,)
    twins = Twins(name, [value.to(dtype) for value in starts(sizes)])
    for grads in (*tame(sizes, 1), *wild(sizes, 1)):
        twins.step([g.to(dtype) for g in grads])


# |p| and |g| around the least float32, where a unit that flushes shows; leaves out 16 bits, which have such numbers in
# test_triton_storage.py.
@RULES
def test_bits_of_subnormal_numbers(name):
    sizes = (17, TILE + 1)
    twins = Twins(name, [1e-39 * value for value in starts(sizes)])
    for grads in tame(sizes, 2):
        twins.step([1e-39 * g for g in grads])


@EVERY
@pytest.mark.all
def test_bits_of_many_steps(name, monkeypatch):
    plans(monkeypatch, grid=3)
    twins = Twins(name, starts(SIZES), mixed(name), max_grad_norm=2.0)
    for grads in (*tame(SIZES, 8), *wild(SIZES, 8)):
        twins.step(grads)


# Programs of the interpreter run one after the other: there it is the kernel's own use of the grid that is tested.
@RULES
def test_grids_and_repetition(name, monkeypatch):
    found = []
    for grid in GRIDS:
        plans(monkeypatch, grid=grid)
        opt, _ = train(name, starts(SIZES), tame(SIZES, 1), mixed(name), max_grad_norm=2.0)
        found.append(written(opt))
        assert not counters(opt).any()
    for other in found[1:]:
        same_bits(other, found[0])


# With a global norm and without; every way to cut a step, for every case, with and without is in `make test-all`.
@pytest.mark.parametrize("pieces, clip", CUTS, ids=["in three", "in two"])
@RULES
def test_phases_together_are_the_step(name, pieces, clip, monkeypatch):
    same_in_pieces(name, pieces, clip, monkeypatch)


@pytest.mark.all
@pytest.mark.parametrize("pieces", WAYS.values(), ids=WAYS)
@EVERY
def test_phases_together_are_the_step_of_every_case(name, pieces, monkeypatch):
    for clip in (False, True):
        same_in_pieces(name, pieces, clip, monkeypatch)


def same_in_pieces(name, pieces, clip, monkeypatch):
    max_norm = 2.0 if clip else None
    phases = (Phase.NORM,) * clip + pieces
    plans(monkeypatch, grid=2)
    one, two = (parameters(there(starts(SIZES))) for _ in range(2))
    whole, cut = (make(name, mixed(name)(ps), max_grad_norm=max_norm, backend="triton") for ps in (one, two))
    for t, grads in enumerate(tame(SIZES, 2)):
        grads[t + 1] = None
        step(whole, one, there(grads))
        launch = phase_by_phase(cut, two, there(grads), max_norm or 0.0, phases)
        same_bits(written(cut), written(whole))
        same_bits({"stats": launch.stats}, {"stats": whole._launches[0].stats})
        assert not counters(cut).any() and not counters(whole).any()


@RULES
def test_finish_takes_the_stats_that_it_finds(name, monkeypatch):
    """What sharded parameters need: another rank's sums are added between `reduce` and `finish`."""
    plans(monkeypatch, grid=2)
    twins = Twins(name, starts((300,)))
    for opt, params, grads in zip(twins.opts, twins.params, ((g := next(tame((300,), 1))), there(g)), strict=True):
        launch = phase_by_phase(opt, params, grads, 0.0, [Phase.REDUCE])
        assert torch.equal(params[0].cpu(), starts((300,))[0]) and opt.state[params[0]]["step"] == 0
        launch.stats.copy_(torch.tensor([[9.0, 4.0, 1.0]])[:, : launch.stats.shape[1]])
        for phase in (Phase.FINISH, Phase.APPLY):
            launch.run(phase, opt._rows(launch), 0.0)
    same_bits(written(twins.opts[1]), written(twins.opts[0]))


def displaced(value, offset):
    """On the device, `offset` elements behind an aligned address."""
    view = shifted(value, 0).to(DEVICE)
    return torch.empty(len(value) + 16, dtype=value.dtype, device=DEVICE)[offset : offset + len(value)].copy_(view)


# Each operand alone and all of them, at offsets of 2 and of 4 bytes: tiles that are full and tails.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@RULES
def test_misaligned_addresses(name, dtype):
    sizes = (16, TILE + 1)
    values = [value.to(dtype) for value in starts(sizes)]
    gradients = [[g.to(dtype) for g in grads] for grads in tame(sizes, 1)]

    def moved(*offsets):
        params = [torch.nn.Parameter(displaced(value, offsets[0])) for value in values]
        opt = make(name, params, backend="triton")
        states = zip(opt.rule_of(opt.param_groups[0]).states, offsets[2:], strict=False)
        for key, offset in states:
            for p in params:
                opt.state[p][key] = displaced(opt.state[p][key].detach().cpu(), offset)
        for grads in gradients:
            for p, g in zip(params, grads, strict=True):
                p.grad = displaced(g, offsets[1])
            opt.step()
        assert [p.data_ptr() % 16 > 0 for p in params] == [offsets[0] % 8 > 0] * 2
        return written(opt)

    aligned = moved(0, 0, 0, 0)
    for offsets in ((3, 0, 0, 0), (0, 1, 0, 0), (0, 0, 5, 0), (0, 0, 0, 7), (3, 1, 5, 7)):
        same_bits(moved(*offsets), aligned)
