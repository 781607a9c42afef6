"""Every rule against float64, over many steps and ranges: the numbers of algorithms.md, section 6."""

import pytest
from device_cases import within_twins, written
from engines import DEFAULT_EPS, NAMED, ONE_PER_RULE, starts, tame, wild

EVERY = pytest.mark.parametrize("name", NAMED)


@pytest.mark.all
@EVERY
def test_accuracy_after_many_steps(name, engine):
    engine.plans(grid=7)
    _, params = engine.train(name, starts((7, 300)), tame((7, 300), 50))
    within_twins(params, name, 50)


@pytest.mark.all
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_accuracy_of_large_layers(name, engine):
    sizes = (1, engine.chunk, 5 * engine.chunk + 5, 100_003)
    _, params = engine.train(name, starts(sizes), tame(sizes, 5))
    within_twins(params, name, 5)


# |g| in {0} and [1e-30, 1e15] at default eps; leaves out storage types.
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("name", [name for name in ONE_PER_RULE if name in DEFAULT_EPS])
def test_range(name, scale, engine):
    sizes = (1, 17, 2049)
    opt, params = engine.train(name, starts(sizes, scale), wild(sizes, 5))
    assert all(x.isfinite().all() for x in written(opt).values())
    within_twins(params, name, 5, "wild", scale)


@pytest.mark.all
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("name", DEFAULT_EPS)
def test_range_of_every_case(name, scale, engine):
    engine.plans()
    opt, params = engine.train(name, starts((7, 300), scale), wild((7, 300), 16))
    assert all(x.isfinite().all() for x in written(opt).values())
    within_twins(params, name, 16, "wild", scale)
