"""Every rule on the Triton engine against float64: the numbers of algorithms.md, section 6."""

import pytest
from engines import DEFAULT_EPS, NAMED, ONE_PER_RULE, starts, tame, wild
from triton_cases import MARKS, counters, plans, train, within_twins, written

from layerfused import triton_engine
from layerfused.kernels import sums

pytestmark = MARKS
EVERY = pytest.mark.parametrize("name", NAMED)
SIZES = (0, 1, 7, 8, 65, 63, 300, 64, 129, 128)  # around the 8 elements of a vector, a tile of 64, a chunk of two
TILE, CHUNK = triton_engine.TILE, triton_engine.CHUNK


# Leaves out storage types (test_triton_storage.py), programs that run at once (test_triton_schedules.py) and what more
# steps accumulate: in each the bits are those of the CPU engine (test_triton_bits.py), which takes 50.
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


@pytest.mark.all
@EVERY
def test_accuracy_after_many_steps(name, monkeypatch):
    plans(monkeypatch, grid=7)
    _, params = train(name, starts((7, 300)), tame((7, 300), 50))
    within_twins(params, name, 50)


@pytest.mark.all
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_accuracy_of_large_layers(name):
    sizes = (1, CHUNK, 5 * CHUNK + 5, 100_003)
    _, params = train(name, starts(sizes), tame(sizes, 5))
    within_twins(params, name, 5)


# |g| in {0} and [1e-30, 1e15] at default eps; leaves out storage types.
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("name", [name for name in ONE_PER_RULE if name in DEFAULT_EPS])
def test_range(name, scale, monkeypatch):
    sizes = (1, 17, 2049)
    opt, params = train(name, starts(sizes, scale), wild(sizes, 5))
    assert all(x.isfinite().all() for x in written(opt).values())
    within_twins(params, name, 5, "wild", scale)


@pytest.mark.all
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("name", DEFAULT_EPS)
def test_range_of_every_case(name, scale, monkeypatch):
    plans(monkeypatch)
    opt, params = train(name, starts((7, 300), scale), wild((7, 300), 16))
    assert all(x.isfinite().all() for x in written(opt).values())
    within_twins(params, name, 16, "wild", scale)
