"""What the tests of the CUDA engine share, beside device_cases.py: plans of many items, and the build for the host."""

from contextlib import contextmanager

import host_cuda
import pytest
import torch
from device_cases import DEVICE, Engine
from engines import parameters, starts, tame
from host_cuda import counts
from test_engine_bits import mixed
from test_engine_storage import TYPES, set_gradient

from layerfused.backends import cuda_is_missing

_cuda = pytest.importorskip("layerfused._cuda", reason=cuda_is_missing())
from layerfused import cuda  # noqa: E402

on_host = pytest.mark.skipif(DEVICE == "cuda", reason="steers the build for the host, which takes the place of no GPU")
MAX_SCALARS, ARRIVED = 16, 128  # csrc/cuda/launch.h


class Cuda(Engine):
    backend = "cuda"
    grids = (1, 2, 3, 7, 7, 40)
    tile, whole = _cuda.TILE, property(lambda self: cuda.WHOLE)
    chunk = property(lambda self: cuda.CHUNK)

    def plans(self, tile=64, grid=1, seed=0):
        settings = {"CHUNK": 2 * tile, "WHOLE": min(tile, _cuda.WHOLE), "AHEAD": 4 * tile}
        for constant, value in settings.items():
            self.monkeypatch.setattr(cuda, constant, value)
        self.monkeypatch.setattr(cuda.CudaLaunch, "on_chip", settings["WHOLE"])
        self.blocks(grid, seed)

    def blocks(self, grid, seed=0):
        """Every launch from now on has so many; on the host they take turns as the seed says."""

        def of_blocks(*arguments):
            native = native_engine(*arguments)
            native.blocks = grid
            return native

        self.monkeypatch.setattr(_cuda, "Engine", of_blocks)
        if DEVICE == "cpu":
            host_cuda.shim().shim_seed(seed)

    def counters(self, opt):
        return torch.cat([counters(launch) for launch in opt._launches if launch.engine == "cuda"])

    def memory(self, launch):
        return launch._workspace, launch.stats, launch.norm

    def sent(self, opt):
        return host_cuda.counts()["copies"] if DEVICE == "cpu" else None  # on a GPU it is the profiler that sees copies

    def moved(self, opt, tensors):
        with host_cuda.Watched(tensors) as watched:
            opt.step()
            seen = iter(watched.seen())
        return [next(seen) if x.nbytes else (0, 0) for x in tensors]


native_engine = _cuda.Engine
train = Cuda(None).train


def counters(launch):
    """A part of the workspace: found from its end, where everything begins at a multiple of 128 bytes."""
    layers = len(launch.table.layers)
    chunks = sum(-(-max(span.count, 1) // cuda.CHUNK) for spec in launch.table.layers for span in spec.spans)
    size = 4 * (ARRIVED + 2 * layers)
    begin = launch._workspace.numel() - 4 * MAX_SCALARS * layers
    for bytes_ in (8 * chunks, 8 * chunks * launch.stats.shape[1], size):  # norm_partials, partials, counters
        begin -= -(-bytes_ // 128) * 128
    return launch._workspace[begin : begin + size].view(torch.int32)


# What the host side does

SIZES = (5, 300, 0, 70, 17, 40)
MANY = 420  # groups whose rows, 10 numbers each, are more than a launch's argument holds


@contextmanager
def asks(**expected):
    """What is asked of CUDA within: nothing but this."""
    before = counts()
    yield
    found = {key: value - before[key] for key, value in counts().items()}
    assert found == {"launches": 0, "copies": 0, "allocations": 0, "waits": 0} | expected


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        set_gradient(p, g)


def built(engine, name, **more):
    """An optimizer over groups, layers and types of all kinds, with gradients, and its parameters."""
    params = parameters(x.to(TYPES[i % 3]) for i, x in enumerate(starts(SIZES)))
    opt = engine.make(name, mixed(name)(params), **more)
    give(params, next(tame(SIZES, 1)))
    return opt, params


def many_groups(engine):
    params = parameters(starts((3,)) * MANY)
    opt = engine.make("lamb", [{"params": [p]} for p in params], max_grad_norm=1.0)
    give(params, next(tame((3,), 1)) * MANY)
    return opt


def change(opt, t):
    """Every group another lr."""
    for k, group in enumerate(opt.param_groups):
        group["lr"] = 0.01 * (1 + (t + k) % 7)
