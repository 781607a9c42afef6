"""What the tests of conduct share: optimizers of the table, small parameters with gradients, comparisons of bits.

EACH     the first case of every class and variant: what conduct may depend on. The other cases differ in numbers only
ENGINES  the engines that serve float32 parameters on the CPU
"""

import io
import re

import pytest
import torch
from cases import CASES
from torch.nn import Parameter

import layerfused as lf

EACH = list({(case.cls, case.rule): case for case in reversed(CASES)}.values())[::-1]
ENGINES = ("auto", "reference")
SHAPES = ((7, 5), (5,), (), (4, 3, 2, 2))

each_case = pytest.mark.parametrize("case", EACH, ids=lambda case: f"{case.cls}-{case.rule}")
each_engine = pytest.mark.parametrize("backend", ENGINES)


def make(case, params, **more):
    return getattr(lf, case.cls)(params, **{**case.kwargs, **more})


def parameters(*shapes, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes or SHAPES]


def give(params, seed):
    """Gradients that depend on the seed and the shapes alone; each lies in memory like its parameter."""
    random = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.empty_like(p, requires_grad=False).copy_(torch.randn(p.shape, generator=random))


def train(opt, params, seeds):
    for seed in seeds:
        give(params, seed)
        opt.step()


def snapshot(opt, params):
    """Copies of everything a step writes: parameters with their states."""
    return [(p.detach().clone(), {k: v.detach().clone() for k, v in opt.state.get(p, {}).items()}) for p in params]


def raw(x):
    """The bytes of a tensor in logical order, so that NaN equals itself and -0.0 is not 0.0."""
    return x.dtype, tuple(x.shape), x.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same_bits(a, b):
    return raw(a) == raw(b)


def assert_same(got, want):
    """Two snapshots are the same bits."""
    assert len(got) == len(want)
    for (p, own), (q, other) in zip(got, want, strict=True):
        assert same_bits(p, q)
        assert own.keys() == other.keys()
        for name in own:
            assert same_bits(own[name], other[name]), name


def assert_exact(p, exact, start):
    """fp32 within 1e-5 of the way gone and 4e-7 of the start: what every engine keeps over up to 50 steps."""
    p, exact, start = (x.detach().double() for x in (p, exact, start))
    assert (p - exact).norm() <= 1e-5 * (exact - start).norm() + 4e-7 * start.norm()


def assert_near(p, q, start, steps):
    """Two fp32 runs of one rule. Each step p is rounded up to four times, by 2**-24 (torch rounds the factor of the
    decay, the product, the update and the sum); an update itself is right to 1e-5 in either run."""
    p, q, start = (x.detach().double() for x in (p, q, start))
    assert (p - q).norm() <= steps * 2**-22 * max(q.norm(), start.norm()) + 2e-5 * (q - start).norm()


def copies(params):
    return [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def refused(kind, *words):
    """Raises this error with every word in its message."""
    return pytest.raises(kind, match="".join(f"(?=(?s:.*){re.escape(str(word))})" for word in words))
