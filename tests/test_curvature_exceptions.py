"""Evaluations that fail or change their mind half-way: the true weights are there again, bit for bit."""

import itertools
from copy import deepcopy

import pytest
import torch
from conduct import assert_same, copies, refused, same_bits, snapshot
from curvature_oracle import CLASSES, ESTIMATORS, all_finite, loss, make, parameters, start, take_step
from torch import nn

each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def batch_of(seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=random), torch.randn(16, 2, generator=random)


def mse(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


class Fails(RuntimeError):
    pass


def failing(f, call, early=False):
    """A closure that raises in one call (counted from 0) and never again, before it evaluates f or after."""
    calls = itertools.count()

    def closure():
        fails = next(calls) == call
        if fails and early:
            raise Fails
        found = f()
        if fails:
            raise Fails
        return found

    return closure


@pytest.mark.parametrize("estimator, call", [("joint", 1), ("signs", 1), ("exact", 1), ("exact", 3)])
@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@each_flavour
def test_an_exception_in_a_later_forward_leaves_the_true_weights(flavour, early, estimator, call):
    """And the random stream and the buffers where one forward would; the next step goes on from there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    params = list(model.parameters())
    opt = make(flavour, params, estimator=estimator)
    opt.step(lambda: mse(model, batch_of(0)))
    before, twin, state = copies(params), deepcopy(model), torch.get_rng_state()
    mse(twin, batch_of(1))
    want = torch.get_rng_state()
    torch.set_rng_state(state)
    with pytest.raises(Fails):
        opt.step(failing(lambda: mse(model, batch_of(1)), call, early))
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    assert torch.equal(torch.get_rng_state(), want) and all(map(same_bits, model.buffers(), twin.buffers()))
    opt.zero_grad()
    opt.step(lambda: mse(model, batch_of(1)))
    assert all(p.isfinite().all() for p in params)
    assert not same_bits(params[-1], before[-1])


@each_estimator
@each_flavour
def test_an_exception_in_the_first_forward_changes_nothing(flavour, estimator):
    """Out of memory, say: whoever catches it and repeats the step has what an undisturbed run has."""
    ends = []
    for disturbed in (False, True):
        params = parameters(start())
        opt = make(flavour, params, estimator=estimator)
        take_step(opt, params, loss(0))
        if disturbed:
            before = snapshot(opt, params)
            with pytest.raises(Fails):
                opt.step(failing(lambda params=params: loss(1)(params), 0))
            assert_same(snapshot(opt, params), before)
        take_step(opt, params, loss(1))
        ends.append(snapshot(opt, params))
    assert_same(*ends)


@pytest.mark.parametrize("estimator, call", [("joint", 1), ("signs", 1), ("exact", 3)])
@each_flavour
def test_a_step_that_raised_later_is_not_counted(flavour, estimator, call):
    """The averages of the gradients may have seen the first evaluation; weights and step counts have not."""
    params = parameters(start())
    opt = make(flavour, params, estimator=estimator)
    take_step(opt, params, loss(0))
    before = copies(params)
    with pytest.raises(Fails):
        opt.step(failing(lambda: loss(1)(params), call))
    assert all(same_bits(p, q) and opt.state[p]["step"] == 1 for p, q in zip(params, before, strict=True))
    take_step(opt, params, loss(1))
    assert all(opt.state[p]["step"] == 2 for p in params) and all_finite(opt, params)


@each_flavour
def test_an_exception_in_the_second_backward(flavour):
    params, calls = parameters(start()), itertools.count()

    def hook(g):
        if next(calls) == 1:
            raise Fails

    params[0].register_hook(hook)
    opt = make(flavour, params)
    with pytest.raises(Fails):
        take_step(opt, params, loss(0))
    assert all(same_bits(p, q.float()) for p, q in zip(params, start(), strict=True))


@pytest.mark.parametrize("second", [(1,), (0, 1), (), (0, 2)])
@each_flavour
def test_other_parameters_in_the_second_forward(flavour, second):
    """A model that chooses by Python's own random numbers: no product can come of it, and nothing stays moved."""
    params, calls = parameters([torch.ones(3), torch.ones(2), torch.ones(())]), itertools.count()
    opt = make(flavour, params)

    def closure():
        used = second if next(calls) else (0, 2)
        return sum(params[i].square().sum() for i in used) + torch.zeros((), requires_grad=True)

    if second == (0, 2):
        opt.step(closure)
        assert [bool((p < 1).all()) for p in params] == [True, False, True]
        return
    with refused(RuntimeError, "closure"):
        opt.step(closure)
    assert all(same_bits(p, torch.ones_like(p)) for p in params)
