"""Every rule on every engine against float64: the numbers of algorithms.md, section 6."""

import pytest
from engines import (
    DEFAULT_EPS,
    NAMED,
    ONE_PER_RULE,
    small_chunks,
    starts,
    tame,
    threads,
    train,
    wild,
    within_twins,
    written,
)

from layerfused import cpu

EVERY = pytest.mark.parametrize("name", NAMED)
SMALL = (0, 1, 2, 15, 16, 17, 2047, 2049)  # around the 16 lanes and the tile of 2,048
CHUNK = cpu.CHUNK


@pytest.fixture(autouse=True)
def one_thread():
    """More change no bit (test_engine_bits.py), and waking them for small layers takes most of the time."""
    with threads(1):
        yield



# Leaves out layers of several chunks (next tests) and storage types (test_engine_storage.py).
@pytest.mark.parametrize("backend, sizes", [("cpu", SMALL), ("reference", (0, 1, 17, 2049))], ids=["cpu", "reference"])
@EVERY
def test_accuracy(name, backend, sizes):
    opt, params = train(name, starts(sizes), tame(sizes, 50), backend=backend)
    assert opt.engines == {backend: len(sizes)}
    within_twins(params, name, 50)


# The path of large layers on small ones; leaves out the production sizes.
@EVERY
def test_accuracy_in_many_chunks(name, monkeypatch):
    with small_chunks(monkeypatch):
        _, params = train(name, starts(SMALL), tame(SMALL, 50), backend="cpu")
    within_twins(params, name, 50)


# The production sizes; leaves out options of a rule and what 50 steps accumulate (next test).
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_accuracy_around_a_chunk(name):
    sizes = (CHUNK - 1, CHUNK, CHUNK + 1)
    _, params = train(name, starts(sizes), tame(sizes, 2), backend="cpu")
    within_twins(params, name, 2)


@pytest.mark.all
@EVERY
def test_accuracy_of_large_layers(name):
    sizes = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
    for backend in ("cpu", "reference"):
        _, params = train(name, starts(sizes), tame(sizes, 50), backend=backend)
        within_twins(params, name, 50)


# The largest size of the claim; leaves out options of a rule.
@pytest.mark.all
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_accuracy_of_a_million_elements(name):
    _, params = train(name, starts((1_000_003,)), tame((1_000_003,), 50), backend="cpu")
    within_twins(params, name, 50)


# |g| in {0} and [1e-30, 1e15] at default eps; leaves out storage types.
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("name", DEFAULT_EPS)
def test_range(name, scale):
    sizes = (1, 17, 2049)
    for backend in ("cpu", "reference"):
        opt, params = train(name, starts(sizes, scale), wild(sizes, 16), backend=backend)
        assert all(x.isfinite().all() for x in written(opt).values())
        within_twins(params, name, 16, "wild", scale)


@pytest.mark.all
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("name", [name for name in ONE_PER_RULE if name in DEFAULT_EPS])
def test_range_of_large_layers(name, scale):
    sizes = (CHUNK + 1, 1_000_003)
    opt, params = train(name, starts(sizes, scale), wild(sizes, 12), backend="cpu")
    assert all(x.isfinite().all() for x in written(opt).values())
    within_twins(params, name, 12, "wild", scale)


@pytest.mark.parametrize("name", NAMED)
def test_engines_agree_in_their_reports(name):
    """Within 1e-5: sums are double in both, what is summed differs by some ulps, as the bound on p allows."""
    sizes = (17, 2049)
    stats = [train(name, starts(sizes), tame(sizes, 5), backend=b)[0].layer_stats() for b in ("cpu", "reference")]
    for one, other in zip(stats[0].values(), stats[1].values(), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-12)
