"""An engine's bits: the CPU engine's where sums are equal, the same for any grid, in phases, and misaligned."""

import pytest
import torch
from device_cases import DEVICE, there, written
from engines import NAMED, ONE_PER_RULE, parameters, same_bits, starts, step, tame, wild
from test_engine_bits import PIECES, mixed, phase_by_phase, shifted

from layerfused.plan import Phase

EVERY = pytest.mark.parametrize("name", NAMED)
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
HALVES = [*((name, torch.bfloat16) for name in NAMED), *((name, torch.float16) for name in ONE_PER_RULE)]
SIZES = (0, 7, 65, 300)
FINISH_APPLY = {"reduce, finish and apply": (Phase.REDUCE, Phase.FINISH | Phase.APPLY)}
WAYS = {**PIECES, **FINISH_APPLY}
CUTS = [(WAYS["reduce, finish, apply"], True), (WAYS["reduce, finish and apply"], False)]


# The production sizes, whole layers and layers of several chunks; leaves out what is stored in 16 bits (next tests).
@EVERY
def test_bits_are_the_cpu_engines(name, engine):
    sizes = (engine.whole + 1, engine.chunk + 5)
    twins = engine.twins(name, starts(sizes))
    long, short = tame(sizes, 2)
    for grads in (long, [0.01 * g for g in short], *wild(sizes, 1)):  # AdaNorm answers to short ones
        twins.step(grads)


# Parameters and gradients in 16 bits, many wild ones infinite as float16; leaves out other mixtures of types
# (device_storage.py).
@pytest.mark.parametrize("name, dtype", HALVES)
def test_bits_of_parameters_in_16_bits(name, dtype, engine):
    sizes = (engine.tile + 1,)
    twins = engine.twins(name, [value.to(dtype) for value in starts(sizes)])
    for grads in (*tame(sizes, 1), *wild(sizes, 1)):
        twins.step([g.to(dtype) for g in grads])


# |p| and |g| around the least float32, where a unit that flushes shows; leaves out 16 bits, which have such numbers in
# device_storage.py.
@RULES
def test_bits_of_subnormal_numbers(name, engine):
    sizes = (17, engine.tile + 1)
    twins = engine.twins(name, [1e-39 * value for value in starts(sizes)])
    for grads in tame(sizes, 2):
        twins.step([1e-39 * g for g in grads])


@EVERY
@pytest.mark.all
def test_bits_of_many_steps(name, engine):
    engine.plans(grid=3)
    twins = engine.twins(name, starts(SIZES), mixed(name), max_grad_norm=2.0)
    for grads in (*tame(SIZES, 8), *wild(SIZES, 8)):
        twins.step(grads)


# Programs of Triton's interpreter run one after the other: there it is the kernel's own use of the grid that is tested.
@RULES
def test_grids_and_repetition(name, engine):
    found = []
    for grid in engine.grids:
        engine.plans(grid=grid)
        opt, _ = engine.train(name, starts(SIZES), tame(SIZES, 1), mixed(name), max_grad_norm=2.0)
        found.append(written(opt))
        assert not engine.counters(opt).any()
    for other in found[1:]:
        same_bits(other, found[0])


# With a global norm and without; every way to cut a step, for every case, with and without is in `make test-all`.
@pytest.mark.parametrize("pieces, clip", CUTS, ids=["in three", "in two"])
@RULES
def test_phases_together_are_the_step(name, pieces, clip, engine):
    same_in_pieces(name, pieces, clip, engine)


@pytest.mark.all
@pytest.mark.parametrize("pieces", WAYS.values(), ids=WAYS)
@EVERY
def test_phases_together_are_the_step_of_every_case(name, pieces, engine):
    for clip in (False, True):
        same_in_pieces(name, pieces, clip, engine)


def same_in_pieces(name, pieces, clip, engine):
    max_norm = 2.0 if clip else None
    phases = (Phase.NORM,) * clip + pieces
    engine.plans(grid=2)
    one, two = (parameters(there(starts(SIZES))) for _ in range(2))
    whole, cut = (engine.make(name, mixed(name)(ps), max_grad_norm=max_norm) for ps in (one, two))
    for t, grads in enumerate(tame(SIZES, 2)):
        grads[t + 1] = None
        step(whole, one, there(grads))
        launch = phase_by_phase(cut, two, there(grads), max_norm or 0.0, phases)
        same_bits(written(cut), written(whole))
        same_bits({"stats": launch.stats}, {"stats": whole._launches[0].stats})
        assert not engine.counters(cut).any() and not engine.counters(whole).any()


@RULES
def test_finish_takes_the_stats_that_it_finds(name, engine):
    """What sharded parameters need: another rank's sums are added between `reduce` and `finish`."""
    engine.plans(grid=2)
    twins = engine.twins(name, starts((300,)))
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
def test_misaligned_addresses(name, dtype, engine):
    sizes = (16, engine.tile + 1)
    values = [value.to(dtype) for value in starts(sizes)]
    gradients = [[g.to(dtype) for g in grads] for grads in tame(sizes, 1)]

    def moved(*offsets):
        params = [torch.nn.Parameter(displaced(value, offsets[0])) for value in values]
        opt = engine.make(name, params)
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
