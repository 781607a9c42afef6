"""Storage types: conversions bit for bit, and mixtures of types."""

from itertools import product

import pytest
import torch
from device_cases import DEVICE
from engines import ONE_PER_RULE, starts, tame
from test_engine_storage import HALVES, TYPES, patterns, rounded_by_engine, same_numbers, set_gradient

import layerfused

PAIRS = [(a, b, (a + b) % 3, (a + 2 * b) % 3) for a, b in product(range(3), repeat=2)]
# Types of p, g, m, v: every pair of types of any two operands.
MIXTURES = [tuple(TYPES[k] for k in row) for row in PAIRS]


def rounded_by(engine, x, dtype):
    """p = -0.0 - lr * -(x) is x, sign of zero included, then stored as `dtype`."""
    p = torch.nn.Parameter(torch.full(x.shape, -0.0, dtype=dtype, device=DEVICE))
    opt = layerfused.SGD([p], lr=1.0, maximize=True, backend=engine.backend)
    set_gradient(p, x.to(DEVICE))
    opt.step()
    return p.detach().cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_pattern_widens_as_on_the_cpu(dtype, engine):
    x = patterns(dtype)
    for target in (torch.float32, dtype):
        assert same_numbers(rounded_by(engine, x, target), rounded_by_engine(x, target))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_midpoints_round_as_on_the_cpu(dtype, engine):
    """Ties, subnormals, the largest number, infinity and NaN, and the floats on both sides of each."""
    x = patterns(dtype).float()
    x = x[(x >= 0) | x.isnan()].sort().values
    middle = (x[:-1].double() + x[1:].double()).div(2).float()  # exact: one more bit
    edges = torch.cat([x, middle, torch.tensor([65519.996, 65520.0, 3.3953e38, 1e-45, 1e-40, 2.0**-149])])
    up, down = (torch.nextafter(edges, torch.tensor(to)) for to in (float("inf"), float("-inf")))
    values = torch.cat([edges, up, down])
    values = torch.cat([values, -values])
    assert same_numbers(rounded_by(engine, values, dtype), rounded_by_engine(values, dtype))


# Any 32 bits; leaves out what 2^17 draws do not meet.
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_random_floats_round_as_on_the_cpu(dtype, engine):
    source = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (2**17,), generator=source).to(torch.int32).view(torch.float32)
    assert same_numbers(rounded_by(engine, x, dtype), rounded_by_engine(x, dtype))


def mixed_twins(engine, name, sizes, mixture):
    """Twins whose states have types of their own."""
    p, _, *types = mixture
    twins = engine.twins(name, [value.to(p) for value in starts(sizes)])
    for opt in twins.opts:
        saved = opt.state_dict()
        states = opt.rule_of(opt.param_groups[0]).states
        for number, n in enumerate(sizes):
            saved["state"][number] |= {
                key: torch.zeros(n, dtype=dtype) for key, dtype in zip(states, types, strict=False)
            }
        opt.load_state_dict(saved)
    return twins


def same_with(engine, name, mixture, steps):
    sizes = (137,)
    twins = mixed_twins(engine, name, sizes, mixture)
    for grads in tame(sizes, steps):
        twins.step([g.to(mixture[1]) for g in grads])
    p, state = twins.params[1][0], twins.opts[1].state[twins.params[1][0]]
    states = [state[key].dtype for key in twins.opts[1].rule_of(twins.opts[1].param_groups[0]).states]
    assert (p.dtype, p.grad.dtype, *states) == mixture[: 2 + len(states)]


# Pairs of types, for every choice of operands that a sweep reads or writes; leaves out the other mixtures and rules
# (next test). Numbers are the CPU engine's, whose own bound against float64 test_engine_storage.py has.
@pytest.mark.parametrize("name", ["sgd", "adam-decay", "lars", "lamb", "novograd-decay", "aida-k1", "ladabelief-decay"])
def test_bits_of_pairs_of_types(name, engine):
    engine.plans()
    for mixture in MIXTURES:
        same_with(engine, name, mixture, 2)


@pytest.mark.all
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_bits_of_every_mixture(name, engine):
    engine.plans()
    for mixture in product(TYPES, repeat=4):
        same_with(engine, name, mixture, 2)
