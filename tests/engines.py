"""What the engines' tests share: parameters and gradients from seeds, a float64 twin of an optimizer, the bound.

Seeds depend on a layer's size alone, so that a layer is the same in whatever company it runs.
"""

from contextlib import contextmanager
from functools import cache

import torch
from cases import ADAPT, CASES, FIXED, RULES

import layerfused
from layerfused import cpu

NAMED = {case.name: case for case in CASES}
DEFAULT_EPS = [case.name for case in CASES if case.hyper.get("eps") == RULES[case.rule].get("eps")]
ONE_PER_RULE = ["sgd", "sgd-dampening", "adam-decay", "adabelief-rectify", "adam3", "lars", "lamb", "novograd-decay",
                "aida-k1", "ladabelief-decay", "ladabelief-post", "setadam-coupled", "adabeliefnorm"]  # fmt: skip
LAYERWISE = [name for name in ONE_PER_RULE if NAMED[name].rule in (*ADAPT, *FIXED)]


def make(name, params, **more):
    case = NAMED[name]
    return getattr(layerfused, case.cls)(params, **{**case.kwargs, **more})


def randn(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def starts(sizes, scale=1.0):
    return [scale * randn(n, n) for n in sizes]


def tame(sizes, steps):
    """Gradients with a common direction and noise, so that m and g are neither parallel nor unrelated."""
    for t in range(steps):
        yield [randn(n, n + t + 2) + randn(n, n + 1) for n in sizes]


def wild(sizes, steps):
    """Each element of its own size, 1e-30 to 1e15, some zero; some gradients are all zero, some near 1e-30."""
    for t in range(steps):
        grads = []
        for n in sizes:
            source = torch.Generator().manual_seed(n + t + 1)
            size = 10.0 ** (torch.rand(n, generator=source, dtype=torch.float64) * 45 - 30)
            size = size.clamp(max=2e-30) if t % 5 == 4 else size
            sign = torch.randint(-1, 2, (n,), generator=source)
            grads.append((sign * size).float() * (t % 7 != 3))
        yield grads


GRADIENTS = {"tame": tame, "wild": wild}


def parameters(values):
    return [torch.nn.Parameter(value.clone()) for value in values]


def step(opt, params, grads):
    """One step; gradients take the parameter's dtype only where that loses nothing."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.double() if p.dtype == torch.float64 else g.clone()
    opt.step()


def train(name, values, gradients, groups=None, **more):
    """The optimizer and its parameters after one step per list of gradients; `groups` shares them out."""
    params = parameters(values)
    opt = make(name, groups(params) if groups else params, **more)
    for grads in gradients:
        step(opt, params, grads)
    return opt, params


@cache
def float64_twin(name, n, steps, kind="tame", scale=1.0):
    """Where the reference engine takes a layer of n elements in float64 from the same start by the same gradients."""
    _, params = train(name, [x.double() for x in starts((n,), scale)], GRADIENTS[kind]((n,), steps))
    return params[0].detach()


def within(p, exact, start):
    """algorithms.md, section 6: |p - exact| <= 1e-5 |exact - start| + 4e-7 |start|."""
    p, exact, start = (x.detach().double().flatten() for x in (p, exact, start))
    error, bound = (p - exact).norm(), 1e-5 * (exact - start).norm() + 4e-7 * start.norm()
    assert error <= bound, f"off by {error:.3e}, allowed {bound:.3e}, in {p.numel()} elements"


def all_within(params, exact, values):
    for p, q, value in zip(params, exact, values, strict=True):
        within(p, q, value)


def within_twins(params, name, steps, kind="tame", scale=1.0):
    """Layers do not see each other: one float64 run of each serves every test."""
    sizes = [p.numel() for p in params]
    all_within(params, [float64_twin(name, n, steps, kind, scale) for n in sizes], starts(sizes, scale))


@contextmanager
def small_chunks(monkeypatch, chunk=64, whole=64):
    """Plans of many items from small tensors; otherwise only large layers have more than one chunk in flight."""
    with monkeypatch.context() as patch:
        for constant, value in {"CHUNK": chunk, "WHOLE": whole, "AHEAD": 2 * chunk, "PER_THREAD": 1}.items():
            patch.setattr(cpu, constant, value)
        yield


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def written(opt):
    """Copies of everything a step writes, by name."""
    found = {}
    for i, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        found[f"{i}.p"] = p.detach().clone()
        found |= {f"{i}.{name}": value.clone() for name, value in opt.state[p].items()}
    for i, launch in enumerate(opt._current()):
        found[f"report {i}"] = launch.table.report.clone()
    return found


def raw(x):
    """A tensor's bits: NaNs compare, and -0.0 is not 0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].shape != b[name].shape or not torch.equal(raw(a[name]), raw(b[name]))]
    assert not different, f"bits differ in {different}"
