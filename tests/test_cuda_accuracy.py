"""Every rule on the CUDA engine against float64 (device_accuracy.py, too)."""

import pytest
from cuda_cases import Cuda, train
from device_accuracy import *  # noqa: F403
from device_cases import there, within_twins
from engines import NAMED, ONE_PER_RULE, starts, tame

from layerfused import cuda
from layerfused.plan import Phase

ENGINE = Cuda
EVERY = pytest.mark.parametrize("name", NAMED)
SIZES = (0, 1, 3, 4, 5, 65, 63, 300, 64, 129, 128, 127)  # around the 4 elements of a vector, a whole layer, a chunk
WAYS = [(1, 0), (2, 1), (3, 2), (7, 3)]  # blocks, and the seed of their interleaving on the host


# Leaves out storage types (device_storage.py), layers of other kinds (device_layers.py), production sizes (next test)
# and what more steps accumulate: in each the bits are those of the CPU engine (device_bits.py), which takes 50.
@pytest.mark.parametrize("grid, seed", WAYS)
@EVERY
def test_accuracy(name, grid, seed, engine):
    engine.plans(grid=grid, seed=seed)
    sizes = SIZES[grid % 2 :: 2]
    opt, params = train(name, starts(sizes), tame(sizes, 2))
    assert opt.engines == {"cuda": len(sizes)} and opt.traffic()["launches"] == 1
    within_twins(params, name, 2)
    assert not engine.counters(opt).any()


# Around a tile, a layer on chip, a chunk, and several chunks, as they are in production; leaves out options of a rule.
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_accuracy_around_a_chunk(name, engine):
    sizes = {n + d for n in (engine.tile, engine.whole, engine.chunk) for d in (-1, 0, 1)}
    sizes = (*sorted(sizes), 2 * engine.tile + 3, 3 * engine.chunk + engine.tile + 2)
    engine.blocks(3)
    opt, params = train(name, starts(sizes), tame(sizes, 2))
    within_twins(params, name, 2)
    assert not engine.counters(opt).any()


# More partial sums than a block has threads: sums and minima. Leaves out the other rules, whose sums are alike.
@pytest.mark.parametrize("name, grid", [("setadam-coupled", 2), pytest.param("lamb", 7, marks=pytest.mark.all)])
def test_accuracy_of_many_chunks(name, grid, engine, monkeypatch):
    for constant, value in {"CHUNK": 8, "WHOLE": 8, "AHEAD": 64}.items():
        monkeypatch.setattr(cuda, constant, value)
    engine.blocks(grid)
    n = 8 * (2 * engine.tile // 4 + 3) + 5  # two rounds over the partial sums, and a part of one
    opt, params = train(name, starts((n,)), tame((n,), 1), max_grad_norm=1e9)
    within_twins(params, name, 1)
    assert not engine.counters(opt).any()


# Each way to cut a step is bit for bit the step (device_bits.py): one of them here, for every rule.
@EVERY
def test_accuracy_in_phases(name, engine):
    engine.plans(grid=3)
    sizes = (5, 300)
    opt, params = train(name, starts(sizes), [])
    for grads in tame(sizes, 2):
        for p, g in zip(params, there(grads), strict=True):
            p.grad = g
        (launch,) = opt._read()
        for phase in (Phase.REDUCE, Phase.FINISH, Phase.APPLY):
            launch.run(phase, opt._rows(launch), 0.0)
    within_twins(params, name, 2)
