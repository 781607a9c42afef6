"""Ways of storing a parameter and its second moment (`precision=`): the CPU engine's bits, whatever the engine.

What the bits should be is in test_precision.py.
"""

import pytest
import torch
from device_bits import displaced
from device_cases import DEVICE, same_numbers, there, written
from engines import ONE_PER_RULE, make, parameters, same_bits, starts, tame, wild
from test_engine_bits import mixed, phase_by_phase
from test_engine_storage import patterns, set_gradient

import layerfused
from layerfused.plan import Phase

BF16, FP16, STATES = torch.bfloat16, torch.float16, "bf16-states"
RESTS = {"master": "master", "remainder": "remainder", "kahan": "compensation"}
KINDS = [(BF16, "master"), (BF16, "remainder"), (BF16, "kahan"), (BF16, "stochastic"), (FP16, "master"),
         (FP16, "kahan"), (FP16, "stochastic")]  # fmt: skip
EVERY_KIND = [*((dtype, (word,)) for dtype, word in KINDS), (torch.float32, (STATES,)),
              *((dtype, (word, STATES)) for dtype, word in KINDS)]  # fmt: skip
ALL = [(name, *kind) for name in ONE_PER_RULE for kind in EVERY_KIND]
SOME = [(ONE_PER_RULE[k % len(ONE_PER_RULE)], *kind) for k, kind in enumerate(EVERY_KIND)]  # each of both once


def in_type(tensors, dtype):
    return [x.to(dtype) for x in tensors]


def numbers(dtype):
    """Numbers of the type, the floats around the midpoints between them, and any 32 bits."""
    x = patterns(dtype).float()
    x = x[x.isfinite()].sort().values[::13]
    middle = (x[:-1].double() + x[1:].double()).div(2).float()
    edges = torch.cat([middle, torch.tensor([65519.996, 65520.0, 3.39e38, 1e-45, 2.0**-149, float("inf")])])
    source = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2**13,), generator=source).to(torch.int32).view(torch.float32)
    around = (torch.nextafter(edges, torch.tensor(to)) for to in (float("inf"), float("-inf")))
    return torch.cat([x, edges, -edges, *around, random, patterns(dtype)[:: 2**7].float()])


# What is written is read again in the second step; leaves out nearest rounding (device_storage.py).
@pytest.mark.parametrize("dtype, word", KINDS, ids=str)
def test_numbers_are_split_and_joined_as_on_the_cpu(dtype, word, engine):
    engine.plans(tile=2**13)  # fewer rounds are quicker to interpret
    x, found = numbers(dtype), []
    for backend, device in (("cpu", "cpu"), (engine.backend, DEVICE)):
        p = torch.nn.Parameter(torch.full(x.shape, -0.0, dtype=dtype, device=device))
        opt = layerfused.SGD([p], lr=1.0, maximize=True, backend=backend, precision=word, seed=2**53 - 1)
        for g in (x, x.flip(0)):  # p = -0.0 - lr * -(g) is g, sign of zero included
            set_gradient(p, g.to(device))
            opt.step()
            found.append(written(opt))
    same_numbers(found[2], found[0])
    same_numbers(found[3], found[1])


# Tiles and tails, the coupled decay of sweeps that read p for it alone; leaves out other kinds (next test).
@pytest.mark.parametrize("name, dtype, words", SOME)
def test_bits_are_the_cpu_engines(name, dtype, words, engine):
    same_steps(name, dtype, words, engine)


@pytest.mark.all
@pytest.mark.parametrize("name, dtype, words", ALL)
def test_bits_of_every_rule_and_kind(name, dtype, words, engine):
    same_steps(name, dtype, words, engine)


def same_steps(name, dtype, words, engine):
    engine.plans(grid=2)
    sizes = (0, 65, 7, 150)
    twins = engine.twins(name, in_type(starts(sizes), dtype), mixed(name), precision=words, seed=7)
    for grads in (*tame(sizes, 1), *wild(sizes, 1)):
        twins.step(in_type(grads, dtype))


@pytest.mark.parametrize("word", ["remainder", "stochastic"])
def test_slices_that_begin_anywhere(word, engine):
    """Of odd lengths: noise goes by the element's place in the tensor, and addresses are no multiples of 16."""
    engine.plans()

    def groups(params):
        return [{"params": params, "layer": "slices"}]

    values = [x.view(3, -1).to(BF16) for x in starts((3 * 5, 3 * 73))]
    twins = engine.twins("lamb", values, groups, precision=(word, STATES))
    for grads in tame((3 * 5, 3 * 73), 2):
        twins.step([g.view(3, -1).to(BF16) for g in grads])


# Each half alone, both, and all; the states' own offsets are in device_bits.py.
@pytest.mark.parametrize("word", RESTS)
def test_misaligned_halves(word, engine):
    engine.plans()
    sizes = (16, 65)
    values = in_type(starts(sizes), BF16)

    def moved(p_offset, rest_offset):
        params = [torch.nn.Parameter(displaced(value, p_offset)) for value in values]
        opt = engine.make("adam-decay", params, precision=word)
        for p in params:
            rest = opt.state[p][RESTS[word]]
            opt.state[p][RESTS[word]] = displaced(rest.cpu(), rest_offset)
        for grads in tame(sizes, 2):
            for p, g in zip(params, there(grads), strict=True):
                p.grad = g.to(BF16)
            opt.step()
        assert [opt.state[p][RESTS[word]].data_ptr() % 16 > 0 for p in params] == [rest_offset > 0] * 2
        return written(opt)

    aligned = moved(0, 0)
    for offsets in ((3, 0), (0, 1), (3, 1)):
        same_bits(moved(*offsets), aligned)


@pytest.mark.parametrize("word", ["kahan", "stochastic"])
def test_phases_and_grids(word, engine):
    """A step is the same at once, in phases, and by any number of blocks."""
    sizes, phases = (7, 65, 150), (Phase.NORM, Phase.REDUCE, Phase.FINISH, Phase.APPLY)
    found = []
    for grid in (1, 3):
        engine.plans(grid=grid)
        whole, cut = (engine.train("lamb", in_type(starts(sizes), BF16), [], max_grad_norm=2.0, precision=word)
                      for _ in range(2))  # fmt: skip
        for grads in tame(sizes, 2):
            grads = there(in_type(grads, BF16))
            for p, g in zip(whole[1], grads, strict=True):
                p.grad = g
            whole[0].step()
            phase_by_phase(*cut, grads, 2.0, phases)
        found += [written(whole[0]), written(cut[0])]
    for other in found[1:]:
        same_bits(other, found[0])


def test_groups_of_several_kinds(engine):
    """Noise goes by a parameter's number in the optimizer and by its group's seed, whatever launch it is in."""
    kinds = [(torch.float32, None), (BF16, "stochastic"), (FP16, "stochastic"), (BF16, "remainder"),
             (BF16, ("stochastic", STATES)), (BF16, None), (BF16, "stochastic")]  # fmt: skip
    found = []
    for backend, device in (("cpu", "cpu"), (engine.backend, DEVICE)):
        params = parameters(starts((37,))[0].to(device, dtype) for dtype, _ in kinds)
        groups = [{"params": [p], "precision": words} for p, (_, words) in zip(params, kinds, strict=True)]
        opt = make("adamw-decay", groups, backend=backend, seed=3)
        for seed, (g,) in enumerate(tame((37,), 3), 3):
            opt.param_groups[1]["seed"] = seed
            for p in params:
                p.grad = g.to(device, p.dtype)
            opt.step()
        found.append(written(opt))
    same_numbers(*({name: x for name, x in one.items() if "report" not in name} for one in found))
    drawn = [found[0][f"{number}.p"] for number in (1, 6)]
    assert not torch.equal(*drawn)


def test_a_step_that_is_skipped_writes_no_half(engine):
    for word in RESTS:
        values = in_type(starts((5, 300)), BF16)
        opt, params = engine.train("lamb", values, in_type_each(tame((5, 300), 1)), precision=word, max_grad_norm=1.0)
        before = written(opt)
        params[1].grad[7] = float("inf")
        opt.step()
        same_bits(written(opt), before)
        assert opt.skipped_steps == 1


def in_type_each(steps):
    return [in_type(grads, BF16) for grads in steps]


@pytest.mark.parametrize("word", RESTS)
def test_halves_of_tensors_that_rest_are_not_touched(word, engine):
    values = in_type(starts((5, 300)), BF16)
    opt, params = engine.train("lamb", values, in_type_each(tame((5, 300), 1)), precision=word)
    params[1].grad = None
    rest = [params[1], opt.state[params[1]][RESTS[word]]]
    assert engine.moved(opt, rest) == [(0, 0)] * 2


# Bytes of both halves: a master is read alone, both are written.
@pytest.mark.parametrize("name", ["sgd-decay", "lamb"])
@pytest.mark.parametrize("word", RESTS)
def test_bytes_of_halves(word, name, engine):
    engine.plans()
    opt, params = engine.train(name, in_type(starts((5, 64, 65)), BF16), [], precision=word)
    for p in params:
        p.grad = p.detach().clone()
    states = opt.rule_of(opt.param_groups[0]).states
    operands = [*params, *(p.grad for p in params), *(opt.state[p][key] for p in params for key in states)]
    moved = engine.moved(opt, [*operands, *(opt.state[p][RESTS[word]] for p in params)])
    assert sum(map(sum, moved)) == opt.traffic()["requested"]
