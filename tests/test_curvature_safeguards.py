"""What may go wrong with slopes, curvatures and gradients, and must leave finite weights and averages.

Parameters that come and go, of other types and shapes, and gradients left in p.grad are in test_curvature_tensors.py,
models with randomness, buffers or kernels of their own in test_curvature_models.py.
"""

import itertools

import pytest
import torch
from conduct import assert_same, same_bits, snapshot
from curvature_oracle import (
    CLASSES,
    ESTIMATORS,
    PRODUCTS,
    RULES,
    Oracle,
    Row,
    all_finite,
    loss,
    make,
    start,
    state_of,
    stats,
    take_step,
)
from curvature_oracle import parameters as parameters_of

each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_rule = pytest.mark.parametrize("rule", RULES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_product = pytest.mark.parametrize("product", PRODUCTS)
each_engine = pytest.mark.parametrize("backend", ["auto", "reference"])


# Curvature


@each_product
@each_estimator
@each_rule
@each_flavour
def test_indefinite_curvature(flavour, rule, estimator, product):
    """At a saddle the negative side counts by its absolute value: the step leaves it, and stays bounded."""
    params = parameters_of([torch.tensor([1.0, 0.5]), torch.tensor([1.0]), torch.tensor([0.5, -0.5])])
    opt = make(flavour, params, step_rule=rule, estimator=estimator, product=product, weight_decay=0.0)

    def saddle(ps):
        return (ps[0].square().sum() - ps[1].square().sum() + ps[2][0] ** 2 - ps[2][1] ** 2) / 2

    for _ in range(3):
        before = saddle(params).item()
        take_step(opt, params, saddle)
        assert all_finite(opt, params)
        assert all(0 <= report["step_size"] <= 10 for report in stats(opt))
        assert saddle(params) < before


@each_product
def test_newtons_length_on_either_side(product):
    """rho / |kappa| = 1 where the Hessian is +1 or -1: one goes to the minimum, the other as far the other way."""
    params = parameters_of([torch.tensor([0.5]), torch.tensor([0.5])])
    opt = make("sgd", params, momentum=0.0, ema=0.0, damping=0.0, estimator="exact", product=product)
    take_step(opt, params, lambda ps: (ps[0].square().sum() - ps[1].square().sum()) / 2)
    # a difference over h = 1e-3 of gradients that are weights: 2**-24 / 1e-3 of them, a few times
    torch.testing.assert_close(torch.cat(params).detach(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-3)


@each_product
@each_rule
@each_flavour
def test_no_curvature_at_all(flavour, rule, product):
    """A linear loss: damping bounds the step, and without it max_step does."""
    for damping in (1e-4, 0.0):
        params = parameters_of([torch.ones(3), torch.ones(())])
        opt = make(flavour, params, step_rule=rule, damping=damping, product=product, weight_decay=0.0, max_step=0.5)
        for n in range(1, 4):
            take_step(opt, params, lambda ps: ps[0].sum() + 2 * ps[1])
            assert all_finite(opt, params)
            assert [report["step_size"] for report in stats(opt)] == [0.5, 0.5]
            unit = (torch.ones(3), torch.ones(())) if flavour == "adamw" else (torch.ones(3), torch.tensor(2.0))
            for p, u in zip(params, unit, strict=True):
                torch.testing.assert_close(p.detach(), 1 - 0.5 * n * u, rtol=1e-5, atol=1e-5)


@each_product
@each_flavour
def test_a_parameter_that_enters_linearly(flavour, product):
    """Autograd has no second derivative for it to hand back: its curvature is 0, the others' is not."""
    params = parameters_of([torch.ones(2), torch.ones(2)], torch.float64)
    opt, oracle = (
        make(flavour, params, product=product, weight_decay=0.0),
        Oracle(flavour, params, Row(), product=product),
    )

    def f(ps):
        return ps[0].square().sum() + ps[1].sum()

    take_step(opt, params, f)
    for report, want in zip(stats(opt), oracle.step([f]), strict=True):
        assert report["curvature"] == pytest.approx(want["curvature"], rel=1e-6, abs=1e-9)
        assert report["step_size"] == pytest.approx(want["step_size"], rel=1e-6)


# Slope and direction


@each_engine
@each_product
@each_flavour
def test_a_layer_without_slope_stays(flavour, product, backend):
    """A gradient of zeros gives no direction: no step, decay included, and nothing that is not a number."""
    params = parameters_of([torch.ones(3), torch.ones(4)])
    opt = make(flavour, params, product=product, weight_decay=0.1 if flavour == "adamw" else 0.0, backend=backend)
    for _ in range(2):
        take_step(opt, params, lambda ps: ps[0].square().sum() + (0 * ps[1]).sum())
        assert all_finite(opt, params)
        moving, still = stats(opt)
        assert still["step_size"] == still["direction_norm"] == 0 < moving["step_size"]
        assert same_bits(params[1], torch.ones(4)) and not same_bits(params[0], torch.ones(3))


@each_engine
@each_estimator
@each_product
@each_flavour
def test_a_model_without_slope_stays(flavour, product, estimator, backend):
    """No layer has a direction: there is no reach to take. The step counts, and the next one moves."""
    params = parameters_of([torch.ones(3), torch.ones(4)])
    opt = make(flavour, params, product=product, estimator=estimator, backend=backend, weight_decay=0.0)
    take_step(opt, params, lambda ps: sum((0 * p).square().sum() for p in ps))
    assert all_finite(opt, params)
    assert all(same_bits(p, torch.ones_like(p)) and opt.state[p]["step"] == 1 for p in params)
    take_step(opt, params, lambda ps: sum(p.square().sum() for p in ps))
    assert all_finite(opt, params)
    assert all((p < 1).all() for p in params)


@each_engine
@each_product
@each_flavour
def test_against_the_gradient_nothing_moves(flavour, product, backend):
    """The average still points where the gradients came from, the slope along it turned: rho < 0, so alpha = 0."""
    params = parameters_of([torch.full((3,), 0.5), torch.full((2,), 0.5)])
    opt = make(flavour, params, product=product, ema=0.0, weight_decay=0.0, backend=backend)
    for slope in (1.0, -0.3):
        before = snapshot(opt, params)
        take_step(opt, params, lambda ps, slope=slope: slope * ps[0].sum() + ps[1].sum())
    turned, other = stats(opt)
    assert turned["slope"] < 0 and turned["descent"] < 0 and turned["step_size"] == 0
    assert same_bits(params[0], before[0][0]) and not same_bits(params[1], before[1][0])
    assert other["step_size"] > 0
    moved = state_of(opt, params[0], "exp_avg", "momentum_buffer")
    assert not torch.equal(moved, before[0][1]["exp_avg" if flavour == "adamw" else "momentum_buffer"])


# What is not a number


def spoiled(how, ps):
    """A loss with finite weights that is not a number, or whose gradient is not."""
    fine = loss(0)(ps)
    if how == "loss":
        return fine * float("nan")
    if how == "infinite loss":
        return fine * float("inf")
    return fine + (0.0 * ps[0]).sum().abs().sqrt()  # 0 / 0 in the derivative of the root, the value is fine


@each_engine
@pytest.mark.parametrize("how", ["loss", "infinite loss", "gradient"])
@each_estimator
@each_product
@each_flavour
def test_a_loss_that_is_not_a_number_is_skipped(flavour, product, estimator, how, backend):
    """The step changes nothing but `skipped_steps`; what follows is what it would have been without it."""
    ends = []
    for spoil in (False, True):
        params = parameters_of(start())
        opt = make(flavour, params, product=product, estimator=estimator, backend=backend)
        take_step(opt, params, loss(0))
        if spoil:
            before = snapshot(opt, params)
            found = take_step(opt, params, lambda ps: spoiled(how, ps))
            assert how == "gradient" or not found.isfinite()
            assert_same(snapshot(opt, params), before)
        assert int(opt.skipped_steps) == spoil
        take_step(opt, params, loss(1))
        ends.append(snapshot(opt, params))
    assert_same(*ends)


def poison_second(params, which):
    """Gradients of parameter `which` are NaN in every second backward: that of the difference."""
    calls = itertools.count()
    params[which].register_hook(lambda g: g * float("nan") if next(calls) % 2 else g)


@each_engine
@each_flavour
def test_a_second_gradient_that_is_not_a_number(flavour, backend):
    """The layer has no curvature this time: it stays, with the average it had. The others step."""
    params = parameters_of(start())
    opt = make(flavour, params, backend=backend)
    take_step(opt, params, loss(0))
    poison_second(params, 2)
    before = snapshot(opt, params)
    take_step(opt, params, loss(1))
    assert all_finite(opt, params)
    assert [not same_bits(p, old) for p, (old, _) in zip(params, before, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert [report["step_size"] > 0 for report in stats(opt)][2] is False
    name = "exp_avg_curvature"
    assert same_bits(opt.state[params[2]][name], before[2][1][name])
    params[2]._backward_hooks.clear()
    take_step(opt, params, loss(2))
    assert all_finite(opt, params) and not same_bits(params[2], before[2][0])


@each_engine
@each_flavour
def test_a_second_loss_that_is_not_a_number(flavour, backend):
    params, calls = parameters_of(start()), itertools.count()
    opt = make(flavour, params, backend=backend)
    take_step(opt, params, lambda ps: loss(0)(ps) * (float("nan") if next(calls) else 1.0))
    assert next(calls) == 2
    assert all(same_bits(p, q.float()) for p, q in zip(params, start(), strict=True))
    take_step(opt, params, loss(1))
    assert all_finite(opt, params)
    assert not any(same_bits(p, q.float()) for p, q in zip(params, start(), strict=True))


@each_engine
@each_flavour
def test_a_second_derivative_that_is_not_a_number(flavour, backend):
    """|x|**1.5 at 0: its gradient is 0, its second derivative infinite."""
    params = parameters_of([torch.tensor([0.0, 1.0]), torch.ones(2)])
    opt = make(flavour, params, product="double-backward", backend=backend, weight_decay=0.0)
    take_step(opt, params, lambda ps: (ps[0].abs() ** 1.5).sum() + ps[1].square().sum() + ps[0].sum())
    assert all_finite(opt, params)
    assert (params[1] < 1).all()
