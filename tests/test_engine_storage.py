"""Storage types: conversions bit for bit, and every mixture of types of p, g, m and v against float64."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from engines import NAMED, make, parameters, randn, raw, small_chunks, tame, threads

import layerfused
from layerfused import reference

HALVES = [torch.bfloat16, torch.float16]
TYPES = [torch.float32, *HALVES]
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}  # of a significand
LEAST = {torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}  # exponent of the least subnormal
# Without decay, so that an update is a multiple of m over a root of v and nothing is added to it.
UNDECAYED = ["sgd", "sgd-momentum", "adam", "adabelief", "adam3", "lars-no-decay", "lamb-no-decay", "novograd", "aida",
             "ladam", "ladabelief", "ladam-post", "setadam", "adamnorm", "adabeliefnorm"]  # fmt: skip


def set_gradient(p, g):
    p.grad_dtype = None  # torch: a gradient of another type than its parameter's is meant
    p.grad = g


def patterns(dtype):
    """All 65,536 of them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def rounded_by_engine(x, dtype):
    """p = -0.0 - lr * -(x) is x, sign of zero included, then stored as `dtype`."""
    p = torch.nn.Parameter(torch.full(x.shape, -0.0, dtype=dtype))
    opt = layerfused.SGD([p], lr=1.0, maximize=True, backend="cpu")
    set_gradient(p, x)
    opt.step()
    return p.detach()


def same_numbers(a, b):
    """Bit for bit, but any NaN for any NaN."""
    return bool(((raw(a) == raw(b)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_pattern_widens_as_in_torch(dtype):
    x = patterns(dtype)
    assert same_numbers(rounded_by_engine(x, torch.float32), x.float())
    assert same_numbers(rounded_by_engine(x, dtype), x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_midpoint_rounds_as_in_torch(dtype):
    """Each number of the type, the midpoint to the next, and the floats around both: what rounding can get wrong."""
    x = patterns(dtype).float()
    x = x[x.isfinite() & (x >= 0)].sort().values  # (-0.0 is among the negatives)
    middle = (x[:-1].double() + x[1:].double()).div(2).float()  # exact: one more bit
    top = torch.tensor([torch.finfo(dtype).max * 1.0, torch.finfo(dtype).max * (1 + 2.0 ** -BITS[dtype]), float("inf")])
    edges = torch.cat([x, middle, top])
    up, down = (torch.nextafter(edges, torch.tensor(to)) for to in (float("inf"), float("-inf")))
    for values in (edges, up, down):
        for signed in (values, -values):
            assert same_numbers(rounded_by_engine(signed, dtype), signed.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_random_floats_round_as_in_torch(dtype):
    """Any 32 bits; leaves out what 2^20 draws do not meet."""
    source = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (2**20,), generator=source).to(torch.int32).view(torch.float32)
    assert same_numbers(rounded_by_engine(x, dtype), x.to(dtype))
    assert same_numbers(rounded_by_engine(x, torch.float32), x)


def half_ulp(x, dtype):
    """Half the distance between neighbours of the type around x."""
    exponent = torch.frexp(x).exponent.clamp(min=LEAST[dtype] + BITS[dtype])
    return torch.ldexp(torch.ones_like(x), exponent - BITS[dtype] - 1) * (dtype != torch.float32)


def relative(dtype):
    """Most that storing takes of a normal number: half an ulp of the smallest significand."""
    return 0.0 if dtype == torch.float32 else 2.0 ** -BITS[dtype]


def lost_between_sweeps(case, old, new, g, m, v):
    """How far the update, and Aida's v, may stray because the second sweep reads m and v as they were stored.

    Rules that write m and v in the sweep that moves p have them in registers: nothing. With m off by the share h and
    v by k, an update m/root(v) is off by h + k/2 of itself, to first order (second: 1.02). SET-Adam's denominator
    root(v) - tau*least is at least (1 - tau)*root(v). Aida's r = b*m - a*g is off by b*h*m; iterates never grow, so
    b <= max(|g|, |m|)/|m|, and r itself comes back from the exact v.
    """
    h, k, hyper = relative(m), relative(v), case.hyper
    if case.rule == "lamb":
        return 1.02 * (h + k / 2), 0.0
    if case.rule == "setadam":
        return 1.02 * (h + k / 2 / (1 - hyper["tau"])), 0.0
    if case.rule in ("ladam_pre", "ladam_post"):
        return 1.02 * h, 0.0
    if case.rule == "aida":
        c, moment, exact = 1 - hyper["beta2"], new["exp_avg"], new["exp_avg_var"]
        r = ((exact - hyper["beta2"] * old["exp_avg_var"] - hyper["eps"]).clamp(min=0) / c).sqrt()
        stray = h * moment.abs() * max(1.0, float(g.norm() / moment.norm()))
        strayed = c * (2 * r * stray + stray**2)
        return 1.02 * (h + (exact / (exact - strayed).clamp(min=1e-30)).sqrt() - 1), strayed
    return 0.0, 0.0


def excess_is_small(found, exact, old, allowed):
    """What is left over half an ulp, and over what was lost between sweeps, keeps the bound of fp32 arithmetic."""
    excess = ((found.double() - exact).abs() - half_ulp(exact, found.dtype) - allowed).clamp(min=0)
    bound = 1e-5 * (exact - old).norm() + 4e-7 * old.norm()
    assert excess.norm() <= bound, f"{found.dtype}: {excess.norm():.3e} over half an ulp, allowed {bound:.3e}"


def mixed_optimizer(name, n):
    """A parameter per mixture, in one launch; returns the mixtures (p, g, m, v) too."""
    states = make(name, parameters([torch.zeros(1)]))
    states = states.rule_of(states.param_groups[0]).states
    mixtures = list(product(TYPES, repeat=2 + len(states)))
    params = parameters([randn(n, i).to(types[0]) for i, types in enumerate(mixtures)])
    opt = make(name, params, backend="cpu")
    saved = opt.state_dict()
    for i, (_, _, *types) in enumerate(mixtures):
        saved["state"][i] |= {key: torch.zeros(n, dtype=dtype) for key, dtype in zip(states, types, strict=True)}
    opt.load_state_dict(saved)
    for p, (_, _, *types) in zip(params, mixtures, strict=True):
        assert [opt.state[p][key].dtype for key in states] == types
    return opt, params, states, mixtures


def step_and_compare(opt, case, params, states, grads):
    """One step of the engine against one of the float64 reference from the same stored numbers."""
    before = [(p.detach().double(), {k: x.clone().double() for k, x in opt.state[p].items()}) for p in params]
    for p, g in zip(params, grads, strict=True):
        set_gradient(p, g)
    opt.step()
    for p, g, (old, old_states) in zip(params, grads, before, strict=True):
        new = {key: value for key, value in old_states.items() if key != "step"}
        t, g = int(old_states["step"]) + 1, g.double()
        exact, _ = getattr(reference, case.rule)(old, g, new, SimpleNamespace(**case.hyper), t, True)
        types = [opt.state[p][key].dtype for key in states] + [torch.float32] * 2
        lost, strayed = lost_between_sweeps(case, old_states, new, g, *types[:2])
        excess_is_small(p.detach(), exact, old, lost * (exact - old).abs())
        for key in states:
            excess_is_small(opt.state[p][key], new[key], old_states[key], strayed if key == "exp_avg_var" else 0.0)
        for key in new.keys() - set(states):
            torch.testing.assert_close(opt.state[p][key].double(), new[key], rtol=1e-6, atol=0)


# Every mixture, each step from the numbers that the engine stored: half an ulp a step. Gradients between 1 and 2 keep
# fp16 moments normal. Leaves out decay (the table of accuracy has it) and production chunks.
@pytest.mark.parametrize("name, n", [*((name, 37) for name in UNDECAYED), ("adam", 2049), ("lamb-no-decay", 2049)])
def test_every_mixture_of_types(name, n, monkeypatch):
    with threads(2), small_chunks(monkeypatch, *((2048, 2048) if n > 2048 else (16, 16))):  # more than a tile; tails
        opt, params, states, mixtures = mixed_optimizer(name, n)
        for grads in tame((n,), 3):
            g = grads[0].sign() * (1 + grads[0].abs() % 1)
            step_and_compare(opt, NAMED[name], params, states, [g.to(m[1]) for m in mixtures])
