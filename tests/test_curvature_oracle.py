"""The oracle itself, before anything is held against it: explicit Hessians, enumeration, what the papers prove."""

import itertools

import pytest
import torch
from curvature_oracle import (
    ESTIMATORS,
    PRODUCTS,
    RULES,
    Layer,
    Oracle,
    Row,
    blocks,
    hessian_times,
    loss,
    reach,
    start,
    step_size,
    tensors_as_layers,
    third,
)

PLAIN = Row(momentum=0.0, ema=0.0, damping=0.0, max_step=1e9)
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, some hundred operations
N = range(5)


def gradients(f, params):
    params = [p.clone().requires_grad_() for p in params]
    return params, torch.autograd.grad(f(params), params, create_graph=True)


def dots(d, x):
    return [float(a.reshape(-1) @ b.reshape(-1)) for a, b in zip(d, x, strict=True)]


def first_directions(flavour, g, row=PLAIN):
    """Of a first step without decay: the averages are the gradient's own."""
    return [x.detach() if flavour == "sgd" else x.detach() / (x.detach().abs() + row.eps) for x in g]


def test_products_are_those_of_the_explicit_hessian():
    f, p = loss(0), start()
    params, g = gradients(f, p)
    z = start(seed=1)
    whole = blocks(f, p)
    for i, found in enumerate(hessian_times(g, params, z)):
        torch.testing.assert_close(found.reshape(-1), sum(whole[i][k] @ z[k].reshape(-1) for k in N), **EXACT)
        torch.testing.assert_close(whole[i][i], whole[i][i].T, **EXACT)


@pytest.mark.parametrize("flavour", ["sgd", "adamw"])
def test_estimators_from_blocks(flavour):
    f, p = loss(0), start()
    d = first_directions(flavour, gradients(f, p)[1])
    whole = blocks(f, p)
    pairs = torch.tensor([[float(d[i].reshape(-1) @ whole[i][k] @ d[k].reshape(-1)) for k in N] for i in N])
    dd = torch.tensor(dots(d, d))
    drawn = []
    for signs in itertools.product((-1.0, 1.0), repeat=5):
        oracle = Oracle(flavour, p, PLAIN, estimator="signs")
        oracle.step([f], list(signs))
        drawn.append([layer.curvature for layer in oracle.layers])
        s = torch.tensor(signs)
        torch.testing.assert_close(torch.tensor(drawn[-1]), s * (pairs @ s) / dd, rtol=1e-6, atol=1e-6)
    found = {"signs": torch.tensor(drawn).mean(0)}
    for name in ("joint", "exact"):
        oracle = Oracle(flavour, p, PLAIN, estimator=name)
        oracle.step([f])
        found[name] = torch.tensor([layer.curvature for layer in oracle.layers])
    block = pairs.diagonal() / dd
    for name, want in {"signs": block, "exact": block, "joint": (pairs.sum(1) / dd).abs()}.items():
        torch.testing.assert_close(found[name], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_of_gradients_misses_the_product_by_taylors_next_term(seed):
    f, p = loss(seed), start(seed)
    params, g = gradients(f, p)
    d = first_directions("sgd", g)
    oracle = Oracle("sgd", p, PLAIN, product="finite-difference", dtype=torch.float32)
    h = reach(params, d, 1e-3)
    found, exact = oracle._product([f], g, d, d), hessian_times(g, params, d)
    for a, b, next_term in zip(found, exact, third(f, p, d), strict=True):
        missed = a - b
        assert missed.norm() > 0
        assert (missed - h / 2 * next_term).norm() <= 0.02 * h / 2 * next_term.norm() + 1e-9 * b.norm()


def test_a_quadratic_is_minimised_along_its_gradient():
    """One layer, no memory, no damping: the step of steepest descent with exact line search, g.g / g.Ag."""
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a @ a.T + torch.eye(6)
    p = [torch.arange(1.0, 7.0, dtype=torch.float64)]
    for estimator, product in itertools.product(ESTIMATORS, PRODUCTS):
        oracle = Oracle("sgd", p, PLAIN, estimator=estimator, product=product)
        (report,) = oracle.step([lambda params: params[0] @ a @ params[0] / 2], [-1.0])
        g = a @ p[0]
        assert report["step_size"] == pytest.approx(float(g @ g / (g @ a @ g)), rel=1e-9)
        assert abs(float((a @ oracle.params[0].detach()) @ g)) <= 1e-9 * float(g @ g)


@pytest.mark.parametrize("x", [1e-3, 0.5, 0.99, 1.5, 30.0])
def test_a_self_concordant_step_descends_and_stays_inside(x):
    """x - log x is self-concordant: Gao and Goldfarb's step needs no trial, from anywhere in x > 0."""
    f, row = lambda params: params[0] - params[0].log(), Row(momentum=0.0, ema=0.0, damping=0.0, max_step=1e9,
                                                            step_rule="self-concordant")  # fmt: skip
    oracle = Oracle("sgd", [torch.tensor(x, dtype=torch.float64)], row)
    before = float(f(oracle.params).detach())
    oracle.step([f])
    assert oracle.params[0] > 0 and float(f(oracle.params).detach()) < before


def test_ridge_regression_is_what_coupled_decay_minimises():
    """SGD's decay enters slope and curvature as |p|^2 wd / 2 of the loss does."""
    f, wd = loss(0), 0.3
    decayed = Oracle("sgd", start(), Row(weight_decay=wd), estimator="exact")
    ridge = Oracle("sgd", start(), Row(), estimator="exact")
    for _ in range(5):
        decayed.step([f])
        ridge.step([lambda params: f(params) + wd / 2 * sum(p.square().sum() for p in params)])
        for p, q in zip(decayed.params, ridge.params, strict=True):
            torch.testing.assert_close(p, q, **EXACT)


@pytest.mark.parametrize("flavour", ["sgd", "adamw"])
def test_directions_are_those_of_torch(flavour):
    """With a step size held at its bound torch's own optimizers take the same steps (SGD's buffer bias corrected)."""
    row, f = Row(weight_decay=0.0 if flavour == "sgd" else 0.1, max_step=1e-3, damping=0.0, ema=0.0), loss(0)
    oracle = Oracle(flavour, start(), row)
    oracle.layers = [Layer([(i, slice(0, p.numel())) for i, p in enumerate(oracle.params)], row)]
    params = [p.clone().requires_grad_() for p in start()]
    theirs = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    buffers = [torch.zeros_like(p) for p in params]
    for t in range(1, 6):
        (report,) = oracle.step([f])
        assert report["step_size"] == 1e-3
        g = torch.autograd.grad(f(params), params)
        if flavour == "adamw":
            for p, x in zip(params, g, strict=True):
                p.grad = x
            theirs.step()
        for p, x, buffer in zip(params, g, buffers, strict=True) if flavour == "sgd" else ():
            buffer.mul_(0.9).add_(x, alpha=0.1)
            p.data -= 1e-3 * buffer / (1 - 0.9**t)
        for p, q in zip(oracle.params, params, strict=True):
            torch.testing.assert_close(p, q, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_step_sizes_rise_with_slope_and_fall_with_curvature(rule):
    """What the tests' intervals rely on, and the bound."""
    row = Row(step_rule=rule, damping=1e-4, max_step=5.0)
    slopes, curvatures = (1e-6, 1e-3, 0.1, 1.0, 1e4), (0.0, 1e-3, 0.1, 1.0, 1e6)
    grid = torch.tensor([[step_size(row, s, c, 0.7) for c in curvatures] for s in slopes], dtype=torch.float64)
    assert (grid.diff(dim=0) >= 0).all() and (grid.diff(dim=1) <= 0).all()
    assert (grid > 0).all() and grid.max() == 5.0


def test_averages_are_those_of_their_definition():
    """Slope and curvature: weighted means with weights 0.9**(n - k), over the steps so far."""
    oracle, rhos, kappas = Oracle("sgd", start(), Row(ema=0.9), estimator="signs"), [], []
    for n in range(4):
        twin = Oracle("sgd", oracle.params, Row(ema=0.0), estimator="signs")
        twin.m, twin.t = list(oracle.m), list(oracle.t)
        signs = [(-1.0) ** (n // (k + 1)) for k in N]
        reports, own = oracle.step([loss(n)], signs), twin.step([loss(n)], signs)
        rhos.append([report["slope"] for report in own])
        kappas.append([layer.curvature for layer in twin.layers])
    weights = torch.tensor([0.9 ** (3 - k) for k in range(4)], dtype=torch.float64)
    weights /= weights.sum()
    for i in N:
        slope, curvature = (float(weights @ torch.tensor(x, dtype=torch.float64)[:, i]) for x in (rhos, kappas))
        assert reports[i]["slope"] == pytest.approx(slope, rel=1e-9)
        assert reports[i]["curvature"] == pytest.approx(abs(curvature), rel=1e-9)


def test_steps_that_are_skipped_change_nothing():
    oracle = Oracle("adamw", start(), Row())
    oracle.step([loss(0)])
    before = [p.clone() for p in oracle.params]
    assert oracle.step([lambda params: loss(1)(params) * float("nan")]) is None
    assert oracle.skipped == 1 and oracle.t == [1] * 5
    assert all(torch.equal(p, q) for p, q in zip(oracle.params, before, strict=True))


def test_layers_cover_every_element_once():
    assert [layer.pieces for layer in tensors_as_layers(start(), Row())] == [
        [(i, slice(0, n))] for i, n in enumerate((12, 4, 8, 2, 1))
    ]
