"""Every rule on the Triton engine against float64 (device_accuracy.py, too)."""

import pytest
from device_accuracy import *  # noqa: F403
from device_cases import within_twins
from engines import NAMED, ONE_PER_RULE, starts, tame
from triton_cases import MARKS, Triton, counters, plans, train

from layerfused import triton_engine
from layerfused.kernels import sums

ENGINE, pytestmark = Triton, MARKS
EVERY = pytest.mark.parametrize("name", NAMED)
SIZES = (0, 1, 7, 8, 65, 63, 300, 64, 129, 128)  # around the 8 elements of a vector, a tile of 64, a chunk of two
TILE, CHUNK = triton_engine.TILE, triton_engine.CHUNK


# Leaves out storage types (device_storage.py), programs that run at once (test_triton_schedules.py) and what more
# steps accumulate: in each the bits are those of the CPU engine (device_bits.py), which takes 50.
@pytest.mark.parametrize("grid", [1, 3])
@EVERY
def test_accuracy(name, grid, monkeypatch):
    plans(monkeypatch, grid=grid)
    sizes = SIZES[grid > 1 :: 2]
    opt, params = train(name, starts(sizes), tame(sizes, 2))
    assert opt.engines == {"triton": len(sizes)} and opt.traffic()["launches"] == 1
    within_twins(params, name, 2)
    assert not counters(opt).any()


# The production sizes; leaves out options of a rule.
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_accuracy_around_a_chunk(name):
    sizes = (TILE - 1, TILE, TILE + 1, CHUNK, CHUNK + 1)
    _, params = train(name, starts(sizes), tame(sizes, 2))
    within_twins(params, name, 2)


# More partial sums than are added side by side in production; leaves out every other rule.
@pytest.mark.all
@pytest.mark.parametrize("name", ["lamb", "setadam-coupled"])
def test_accuracy_of_many_chunks(name, monkeypatch):
    for constant, value in {"TILE": 4, "CHUNK": 8}.items():
        monkeypatch.setattr(triton_engine, constant, value)
    n = 8 * sums.LANES.value + 43
    _, params = train(name, starts((n,)), tame((n,), 1), max_grad_norm=1e9)
    within_twins(params, name, 1)
