"""How the curvature optimizers behave as torch optimizers: what a step costs, returns, leaves; schedulers, states."""

import pickle
from copy import deepcopy

import host_cuda
import pytest
import torch
from conduct import assert_same, copies, snapshot, through_a_file
from curvature_oracle import (
    CLASSES,
    ESTIMATORS,
    PRODUCTS,
    REPORT,
    RULES,
    loss,
    make,
    parameters,
    start,
    stats,
    take_step,
)
from torch.optim import lr_scheduler

each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_product = pytest.mark.parametrize("product", PRODUCTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the launches of the host build")
@each_product
@each_flavour
def test_launches_do_not_grow_with_the_model(flavour, product):
    """Two fused launches, and one that takes the weights to p + hz or writes z; however many tensors there are."""
    counted = []
    for tensors in (2, 40):
        params = parameters([torch.full((3,), 0.5) for _ in range(tensors)])
        opt = make(flavour, params, product=product, backend="cuda")
        for _ in range(3):
            before = host_cuda.counts()["launches"]
            opt.step(lambda params=params: sum(p.cos().sum() for p in params))
        counted.append(host_cuda.counts()["launches"] - before)
    assert counted == [3, 3]


@each_product
@each_estimator
def test_how_often_the_model_is_evaluated(estimator, product):
    params, calls = parameters(start()), []
    opt = make("sgd", params, estimator=estimator, product=product)
    opt.step(lambda: calls.append(0) or loss(0)(params))
    products = 5 if estimator == "exact" else 1
    assert len(calls) == (1 + products if product == "finite-difference" else 1)


@each_flavour
def test_what_a_step_returns_and_leaves(flavour):
    """The loss of the weights before the step, and its gradients in p.grad."""
    for product in PRODUCTS:
        params = parameters(start())
        opt = make(flavour, params, product=product)
        for n in range(3):
            want = loss(n)(params)
            grads = torch.autograd.grad(want, params)
            found = take_step(opt, params, loss(n))
            assert found.item() == want.item()
            assert all(torch.equal(p.grad, g) and not p.grad.requires_grad for p, g in zip(params, grads, strict=True))
            assert all(p.is_leaf and p.requires_grad for p in params)


# Schedulers of lr

FACTORS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda n: 0.9**n),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=4),
}


@pytest.mark.parametrize("name", FACTORS)
@each_flavour
def test_schedulers_move_the_factor(flavour, name, recwarn):
    """The same steps as with that lr put in by hand, and the first of them is the oracle's with lr as a factor."""
    ends = []
    for scheduled in (True, False):
        params = parameters(start())
        opt = make(flavour, params, lr=0.8)
        driver = opt if scheduled else torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8)
        scheduler = FACTORS[name](driver)
        for n in range(6):
            opt.param_groups[0]["lr"] = driver.param_groups[0]["lr"]
            take_step(opt, params, loss(n))
            if not scheduled:
                driver.step()
            scheduler.step()
        ends.append(snapshot(opt, params))
    assert_same(*ends)
    assert not [str(w.message) for w in recwarn if "lr_scheduler" in str(w.message)]


@each_flavour
def test_lr_is_a_factor_on_the_step_found(flavour):
    moved = {}
    for lr in (1.0, 0.25, torch.tensor(0.25), 0.0):
        params = parameters(start(), torch.float64)
        opt = make(flavour, params, lr=lr)
        take_step(opt, params, loss(0))
        moved[float(lr), isinstance(lr, float)] = [p.detach() - q for p, q in zip(params, start(), strict=True)]
    for whole, quarter, other, none in zip(*moved.values(), strict=True):
        torch.testing.assert_close(quarter, 0.25 * whole, rtol=1e-9, atol=1e-12)
        assert torch.equal(quarter, other) and not none.any()


# Saving and loading


@each_product
@each_estimator
@each_flavour
def test_resume_is_bit_exact(flavour, estimator, product):
    params = parameters(start())
    opt = make(flavour, params, estimator=estimator, product=product)
    for n in range(4):
        take_step(opt, params, loss(n))
    saved, resumed = through_a_file(opt.state_dict()), copies(params)
    torch.manual_seed(5)
    other = make(flavour, resumed, estimator=estimator, product=product, lr=77.0, ema=0.1)  # what was saved overrides
    other.load_state_dict(saved)
    assert_same(snapshot(other, resumed), snapshot(opt, params))
    for n in range(4, 8):
        take_step(opt, params, loss(n))
        take_step(other, resumed, loss(n))
        assert stats(opt) == stats(other)
    assert_same(snapshot(other, resumed), snapshot(opt, params))


@pytest.mark.parametrize("name, value", [("estimator", "signs"), ("product", PRODUCTS[1]), ("step_rule", RULES[1])])
@each_flavour
def test_what_was_saved_overrides_the_choices_too(flavour, name, value):
    """Averages of |kappa| and of kappa are not the same: what made them goes on."""
    params = parameters(start())
    opt = make(flavour, params)
    take_step(opt, params, loss(0))
    resumed = copies(params)
    other = make(flavour, resumed, **{name: value})
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.param_groups[0][name] == opt.param_groups[0][name]
    take_step(opt, params, loss(1))
    take_step(other, resumed, loss(1))
    assert_same(snapshot(other, resumed), snapshot(opt, params))


@pytest.mark.parametrize("layer", ["slices", "group", 2])
@each_flavour
def test_resume_with_other_layers(flavour, layer):
    params = parameters([start()[0], start()[2]])

    def f(ps):
        return (ps[1] @ torch.tanh(ps[0])).square().sum()

    opt = make(flavour, [{"params": params, "layer": layer}], estimator="signs")
    for _ in range(3):
        take_step(opt, params, f)
    resumed = copies(params)
    other = make(flavour, [{"params": resumed, "layer": layer}], estimator="signs")
    other.load_state_dict(through_a_file(opt.state_dict()))
    for _ in range(3):
        take_step(opt, params, f)
        take_step(other, resumed, f)
    assert_same(snapshot(other, resumed), snapshot(opt, params))


@each_flavour
def test_copies_go_on_alike(flavour):
    params = torch.nn.ParameterList(parameters(start()))
    opt = make(flavour, params.parameters(), estimator="signs")
    take_step(opt, list(params), loss(0))
    copied = [deepcopy((opt, params)), pickle.loads(pickle.dumps((opt, params)))]
    for n in (1, 2):
        for own, theirs in ((opt, params), *copied):
            own.zero_grad()  # a copy does not know whose gradients were copied with the parameters
            take_step(own, list(theirs), loss(n))
    for twin, twins in copied:
        assert_same(snapshot(twin, twins), snapshot(opt, params))


@each_flavour
def test_states_have_their_types(flavour):
    params = parameters(start())
    opt = make(flavour, params)
    take_step(opt, params, loss(0))
    for p in params:
        entries = opt.state[p]
        assert entries["step"] == 1
        for name in ("exp_avg_slope", "exp_avg_curvature"):
            assert entries[name].dtype == torch.float64 and entries[name].shape == ()
        moments = {"momentum_buffer", "exp_avg", "exp_avg_sq"} & entries.keys()
        assert len(moments) == (1 if flavour == "sgd" else 2)
        assert all(entries[name].dtype == torch.float32 and entries[name].shape == p.shape for name in moments)


@each_flavour
def test_reports_have_the_parameters_names(flavour):
    model = torch.nn.Linear(2, 3)
    opt = make(flavour, model.named_parameters())
    opt.step(lambda: model(torch.ones(4, 2)).square().mean())
    assert {name: tuple(report) for name, report in opt.layer_stats().items()} == dict.fromkeys(
        ("weight", "bias"), REPORT
    )
