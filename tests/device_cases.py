"""What the tests of engines that launch kernels share: where they run, and the CPU engine as a twin.

Everything runs on DEVICE: compiled on a GPU, else Triton in its interpreter and CUDA as built for the host
(conftest.py). Values and gradients come from the CPU, results go back there. Tests that are the same for both engines
stand in device_*.py; test_triton_*.py and test_cuda_*.py take them over and say by ENGINE which engine they are of.
"""

import engines
import torch
from engines import make, parameters, raw, threads
from test_engine_storage import set_gradient

from layerfused.plan import Phase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def there(tensors):
    return [None if x is None else x.to(DEVICE) for x in tensors]


def train(name, values, gradients, groups=None, **more):
    """As `engines.train`, on DEVICE."""
    return engines.train(name, there(values), map(there, gradients), groups, **more)


def within_twins(params, *claim):
    engines.within_twins([p.detach().cpu() for p in params], *claim)


def written(opt):
    return {name: value.cpu() for name, value in engines.written(opt).items()}


def operands(opt, params):
    """What a step reads and writes: p, g, m, v of every parameter."""
    states = opt.rule_of(opt.param_groups[0]).states
    return [*params, *(p.grad for p in params), *(opt.state[p][key] for p in params for key in states)]


def same_numbers(a, b):
    """Bit for bit, but any NaN for any NaN."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        different = (raw(x) != raw(y)) & ~(x.isnan() & y.isnan())
        assert not different.any(), f"{name}: {x[different][:4]} is not {y[different][:4]}"


class Twins:
    """One optimizer on the CPU engine and on another; both go on from the sums that the CPU took.

    Attributes:
        opts, params: of the CPU, then of the other.
    """

    def __init__(self, engine, name, values, groups=None, **more):
        self.engine = engine
        self.max_norm = more.get("max_grad_norm") or 0.0
        self.params = parameters(values), parameters(there(values))
        self.opts = [
            make(name, groups(params) if groups else params, **{**more, "backend": backend})
            for backend, params in zip(("cpu", engine.backend), self.params, strict=True)
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
        assert not self.engine.counters(self.opts[1]).any()

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


class Engine:
    """How tests drive an engine. Subclasses say what is the engine's own.

    Attributes:
        backend: its name.
        tile, whole, chunk: elements that a block handles in one round, that a layer on chip has at most, of an item.
        grids: numbers of blocks or programs that tests compare.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def make(self, name, params, **more):
        return make(name, params, backend=self.backend, **more)

    def train(self, name, values, gradients, groups=None, **more):
        return train(name, values, gradients, groups, **{"backend": self.backend, **more})

    def twins(self, name, values, groups=None, **more):
        return Twins(self, name, values, groups, **more)

    def plans(self, tile=64, grid=1):
        """Plans of many items from small tensors, with applies among the reduces, for `grid` blocks or programs."""
        raise NotImplementedError

    def blocks(self, grid):
        """So many in every launch from now on."""
        raise NotImplementedError

    def counters(self, opt):
        """What every launch must find as zeros."""
        raise NotImplementedError

    def memory(self, launch):
        """The tensors that a launch has beside those of its optimizer."""
        raise NotImplementedError

    def sent(self, opt):
        """Changes when tables are copied to the device."""
        raise NotImplementedError

    def moved(self, opt, tensors):
        """Bytes that a step reads and writes of each of these tensors, one pair each."""
        raise NotImplementedError
