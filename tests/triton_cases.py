"""What the tests of the Triton engine share: where they run, plans of many items, and the CPU engine as a twin.

Everything runs on DEVICE: compiled on a GPU, else in Triton's interpreter (conftest.py). Values and gradients come
from the CPU, results go back there.
"""

from types import ModuleType

import engines
import pytest
import torch
import triton.language as tl
from engines import make, parameters, raw, threads
from test_engine_storage import set_gradient

from layerfused import kernels, triton_engine
from layerfused.kernels import INTERPRETED
from layerfused.plan import Phase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [
    pytest.mark.usefixtures("quick_interpreter"),
    # numpy warns of the branch of a `where` that is not taken, and of overflow that the test is about
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")


def patch_once(monkeypatch):
    """See conftest.py. What a launch patches stays so until the launch ends, as it does anyway."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_language(function):
        seen = frozenset(name for name in ("tl", "core") if name in function.__globals__)
        if seen in patched:
            return None  # a device function's scope is never restored
        scope = patch(function)
        restore = scope.restore
        patched.add(seen)

        def end():
            patched.clear()
            restore()

        scope.restore = end
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_language)
    monkeypatch.setattr(interpreter, "_get_np_dtype", by_identity(interpreter._get_np_dtype))


def by_identity(function):
    """Remembers answers for arguments that cannot be hashed: a sixth of the interpreter's time goes to one table."""
    known = {}

    def remembering(x):
        if id(x) not in known:
            known[id(x)] = x, function(x)  # x stays, so that its id stays its own
        return known[id(x)][1]

    return remembering


def plans(monkeypatch, tile=64, grid=1):
    """Plans of many items from small tensors, with applies among the reduces, for `grid` programs."""
    settings = {"TILE": tile, "CHUNK": 2 * tile, "AHEAD": 4 * tile, "programs": lambda device: grid}
    for constant, value in settings.items():
        monkeypatch.setattr(triton_engine, constant, value)
    if INTERPRETED:  # several rounds over partial sums and counters; compiled, it is a constant
        exchange(monkeypatch, "LANES", tl.constexpr(2))


def exchange(monkeypatch, name, value):
    """Puts another function or constant into the interpreted kernel, in every file that knows it; returns the old."""
    files = [module for module in vars(kernels).values() if isinstance(module, ModuleType) and hasattr(module, name)]
    old = getattr(files[0], name)
    for module in files:
        monkeypatch.setattr(module, name, value)
    return old


def there(tensors):
    return [None if x is None else x.to(DEVICE) for x in tensors]


def train(name, values, gradients, groups=None, **more):
    """As `engines.train`, by the Triton engine."""
    return engines.train(name, there(values), map(there, gradients), groups, **{"backend": "triton", **more})


def within_twins(params, *claim):
    engines.within_twins([p.detach().cpu() for p in params], *claim)


def written(opt):
    return {name: value.cpu() for name, value in engines.written(opt).items()}


def counters(opt):
    """What every launch must find as zeros."""
    return torch.cat([launch._work.counters for launch in opt._launches])


def same_numbers(a, b):
    """Bit for bit, but any NaN for any NaN."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        different = (raw(x) != raw(y)) & ~(x.isnan() & y.isnan())
        assert not different.any(), f"{name}: {x[different][:4]} is not {y[different][:4]}"


class Twins:
    """One optimizer on the CPU engine and on Triton; both go on from the sums that the CPU took.

    Attributes:
        opts, params: of the CPU, then of Triton.
    """

    def __init__(self, name, values, groups=None, **more):
        self.max_norm = more.get("max_grad_norm") or 0.0
        self.params = parameters(values), parameters(there(values))
        self.opts = [
            make(name, groups(params) if groups else params, **{**more, "backend": backend})
            for backend, params in zip(("cpu", "triton"), self.params, strict=True)
        ]

    def step(self, grads):
        """A step in phases; sums and norm agree to 1e-6 (algorithms.md, section 6), everything else bit for bit."""
        for params, own in zip(self.params, (grads, there(grads)), strict=True):
            for p, g in zip(params, own, strict=True):
                set_gradient(p, g)
        launches = [opt._read() for opt in self.opts]
        with threads(1):
            for pair in zip(*launches, strict=True):
                self._run(pair)
        same_numbers(written(self.opts[1]), written(self.opts[0]))
        assert not counters(self.opts[1]).any()

    def _run(self, pair):
        self._phase(pair, Phase.NORM, "norm") if self.max_norm else None
        self._phase(pair, Phase.REDUCE, "stats")
        self._phase(pair, Phase.FINISH)
        self._phase(pair, Phase.APPLY)

    def _phase(self, pair, phase, result=None):
        for opt, launch in zip(self.opts, pair, strict=True):
            launch.run(phase, opt._rows(launch), self.max_norm)
        if result:
            one, other = (getattr(launch, result) for launch in pair)
            torch.testing.assert_close(other.cpu(), one, rtol=1e-6, atol=0, equal_nan=True)
            other.copy_(one)
