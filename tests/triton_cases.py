"""What the tests of the Triton engine share, beside device_cases.py: plans of many items, and its interpreter."""

from functools import partial
from types import ModuleType

import device_cases
import numpy as np
import pytest
import torch
import triton.language as tl
from device_cases import DEVICE, Engine

from layerfused import kernels, triton_engine
from layerfused.kernels import INTERPRETED

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


class Count:
    """Bytes loaded and stored within some tensors, and how often each of their bytes was."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        self.moved = {"load": [], "store": []}
        for kind in self.moved:
            name = f"create_masked_{kind}"
            monkeypatch.setattr(Builder, name, self._spy(kind, getattr(Builder, name)))

    def _spy(self, kind, method):
        def spied(builder, places, *rest):
            mask = rest[0] if kind == "load" else rest[1]
            width = places.get_element_ty().primitive_bitwidth // 8
            here = places.data[np.broadcast_to(mask.data, places.data.shape)]
            self.moved[kind].append((here.astype(np.int64).ravel(), width))
            return method(builder, places, *rest)

        return spied

    def clear(self):
        for moves in self.moved.values():
            moves.clear()

    def within(self, tensors, kind):
        total = 0
        for x in tensors:
            first, last = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
            total += sum(width * int(((at >= first) & (at < last)).sum()) for at, width in self.moved[kind])
        return total


class Triton(Engine):
    backend = "triton"
    grids = (1, 2, 3, 7, 7) if DEVICE == "cuda" else (1, 2, 2)  # interpreted, test_triton_schedules.py has 3 and 7
    tile = whole = property(lambda self: triton_engine.TILE)
    chunk = property(lambda self: triton_engine.CHUNK)

    def plans(self, tile=64, grid=1):
        plans(self.monkeypatch, tile, grid)

    def blocks(self, grid):
        self.monkeypatch.setattr(triton_engine, "programs", lambda device: grid)

    def counters(self, opt):
        return counters(opt)

    def memory(self, launch):
        return (*launch._plan, *launch._given, *launch._work, launch.stats, launch.norm)

    def moved(self, opt, tensors):
        with self.monkeypatch.context() as patch:
            count = Count(patch)
            opt.step()
        return [(count.within([x], "load"), count.within([x], "store")) for x in tensors]

    def sent(self, opt):
        return [id(launch._sent) for launch in opt._launches]


train = partial(device_cases.train, backend="triton")


def Twins(*arguments, **more):
    return device_cases.Twins(Triton(None), *arguments, **more)


def counters(opt):
    """What every launch must find as zeros."""
    return torch.cat([launch._work.counters for launch in opt._launches if launch.engine == "triton"])
