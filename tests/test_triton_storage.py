"""Storage types on the Triton engine: conversions bit for bit, mixtures of types, and how many launches they make."""

from itertools import product

import pytest
import torch
import triton.language as tl
from engines import ONE_PER_RULE, make, parameters, randn, same_bits, starts, tame
from test_engine_storage import HALVES, TYPES, patterns, rounded_by_engine, same_numbers, set_gradient
from triton_cases import DEVICE, MARKS, Twins, plans, there, written

import layerfused

pytestmark = MARKS
PAIRS = [(a, b, (a + b) % 3, (a + 2 * b) % 3) for a, b in product(range(3), repeat=2)]
# Types of p, g, m, v: every pair of types of any two operands.
MIXTURES = [tuple(TYPES[k] for k in row) for row in PAIRS]


def rounded_by_triton(x, dtype):
    """p = -0.0 - lr * -(x) is x, sign of zero included, then stored as `dtype`."""
    p = torch.nn.Parameter(torch.full(x.shape, -0.0, dtype=dtype, device=DEVICE))
    opt = layerfused.SGD([p], lr=1.0, maximize=True, backend="triton")
    set_gradient(p, x.to(DEVICE))
    opt.step()
    return p.detach().cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_pattern_widens_as_on_the_cpu(dtype):
    x = patterns(dtype)
    for target in (torch.float32, dtype):
        assert same_numbers(rounded_by_triton(x, target), rounded_by_engine(x, target))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_midpoints_round_as_on_the_cpu(dtype):
    """Ties, subnormals, the largest number, infinity and NaN, and the floats on both sides of each."""
    x = patterns(dtype).float()
    x = x[(x >= 0) | x.isnan()].sort().values
    middle = (x[:-1].double() + x[1:].double()).div(2).float()  # exact: one more bit
    edges = torch.cat([x, middle, torch.tensor([65519.996, 65520.0, 3.3953e38, 1e-45, 1e-40, 2.0**-149])])
    up, down = (torch.nextafter(edges, torch.tensor(to)) for to in (float("inf"), float("-inf")))
    values = torch.cat([edges, up, down])
    values = torch.cat([values, -values])
    assert same_numbers(rounded_by_triton(values, dtype), rounded_by_engine(values, dtype))


# Any 32 bits; leaves out what 2^17 draws do not meet.
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_random_floats_round_as_on_the_cpu(dtype):
    source = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (2**17,), generator=source).to(torch.int32).view(torch.float32)
    assert same_numbers(rounded_by_triton(x, dtype), rounded_by_engine(x, dtype))


def mixed_twins(name, sizes, mixture):
    """Twins whose states have types of their own."""
    p, _, *types = mixture
    twins = Twins(name, [value.to(p) for value in starts(sizes)])
    for opt in twins.opts:
        saved = opt.state_dict()
        states = opt.rule_of(opt.param_groups[0]).states
        for number, n in enumerate(sizes):
            saved["state"][number] |= {
                key: torch.zeros(n, dtype=dtype) for key, dtype in zip(states, types, strict=False)
            }
        opt.load_state_dict(saved)
    return twins


def same_with(name, mixture, steps):
    sizes = (137,)
    twins = mixed_twins(name, sizes, mixture)
    for grads in tame(sizes, steps):
        twins.step([g.to(mixture[1]) for g in grads])
    p, state = twins.params[1][0], twins.opts[1].state[twins.params[1][0]]
    states = [state[key].dtype for key in twins.opts[1].rule_of(twins.opts[1].param_groups[0]).states]
    assert (p.dtype, p.grad.dtype, *states) == mixture[: 2 + len(states)]


# Pairs of types, for every choice of operands that a sweep reads or writes; leaves out the other mixtures and rules
# (next test). Numbers are the CPU engine's, whose own bound against float64 test_engine_storage.py has.
@pytest.mark.parametrize("name", ["sgd", "adam-decay", "lars", "lamb", "novograd-decay", "aida-k1", "ladabelief-decay"])
def test_bits_of_pairs_of_types(name, monkeypatch):
    plans(monkeypatch)
    for mixture in MIXTURES:
        same_with(name, mixture, 2)


@pytest.mark.all
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_bits_of_every_mixture(name, monkeypatch):
    plans(monkeypatch)
    for mixture in product(TYPES, repeat=4):
        same_with(name, mixture, 2)


GRADIENTS = {  # types of three gradients -> what the kernel reads them as
    (torch.float32,) * 3: tl.float32,
    (torch.bfloat16,) * 3: tl.bfloat16,
    (torch.float16, None, torch.float16): tl.float16,
    (torch.bfloat16, torch.float16, torch.bfloat16): tl.float32,
    (torch.float16, torch.float32, None): tl.float32,
    (torch.float64, torch.bfloat16, torch.float32): tl.float32,
}


# "lars" reads gradients in both sweeps, "lamb" in one; leaves out the other rules, whose gradients the engine reads.
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_gradients_of_several_types(name, monkeypatch):
    """One launch has one type for all; it changes from step to step, and copies are exact."""
    plans(monkeypatch)
    twins = Twins(name, starts((5, 100, 300)), max_grad_norm=3.0)
    for types, read_as in GRADIENTS.items():
        grads = next(tame((5, 100, 300), 1))
        twins.step([dtype and g.to(dtype) for dtype, g in zip(types, grads, strict=True)])
        (launch,) = twins.opts[1]._launches
        assert launch._gradients == read_as and launch._copies == []


def test_one_launch_for_an_ordinary_model():
    for dtype in TYPES:
        opt = make("lamb", parameters(there(value.to(dtype) for value in starts((5, 20)))), backend="triton")
        assert opt.traffic()["launches"] == len(opt._current()) == 1


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_one_launch_per_tuple_of_types(name):
    """Parameters of several types: each as it is alone."""
    types = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    values = there(randn(40, i).to(dtype) for i, dtype in enumerate(types))

    def final(values):
        params = parameters(values)
        opt = make(name, params, backend="triton")
        for t in range(2):
            for p in params:
                p.grad = (0.5 + t) * p.detach()
            opt.step()
        return opt, params

    opt, params = final(values)
    assert opt.traffic()["launches"] == len(opt._current()) == 3
    for p, value in zip(params, values, strict=True):
        same_bits({"p": p.detach()}, {"p": final([value])[1][0].detach()})


def test_a_type_of_state_makes_a_launch():
    """States that were loaded in another type: their parameters get a launch of their own."""
    params = parameters(there(starts((5, 20, 30))))
    opt = make("lamb", params, backend="triton")
    saved = opt.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(20, dtype=torch.bfloat16)
    opt.load_state_dict(saved)
    assert opt.traffic()["launches"] == 2
    assert written(opt)["1.exp_avg"].dtype == torch.bfloat16
