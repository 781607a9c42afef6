"""Bad input to CurvatureSGD and CurvatureAdamW: an error with value and remedy, before anything is written."""

import math

import pytest
import torch
from conduct import assert_same, raw, refused, snapshot
from curvature_oracle import CLASSES, ESTIMATORS, PRODUCTS, RULES, loss, make, parameters, start, take_step
from torch.nn import Parameter

import layerfused as lf

NAN, INF = math.nan, math.inf
ANY = (ValueError, TypeError, RuntimeError)
CHOICES = {"step_rule": RULES, "estimator": ESTIMATORS, "product": PRODUCTS}
OUT = {
    "lr": (-1.0, NAN, INF),
    "weight_decay": (-0.1, NAN, INF),
    "ema": (-0.1, 1.0, 1.5, NAN, INF, None, "0.9"),
    "damping": (-1e-9, NAN, INF, None, "0.1"),
    "max_step": (0.0, -1.0, NAN, None, "10"),
}
OWN = {
    "sgd": {"momentum": (-0.1, 1.0, 1.5, NAN)},  # the average of gradients is bias corrected by 1 / (1 - momentum**t)
    "adamw": {"eps": (-1.0, NAN, INF), "betas": ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), 0.9, (0.9,))},
}
each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_product = pytest.mark.parametrize("product", PRODUCTS)


class Unchanged:
    """Weights, states, gradients, reports, what is counted and torch's random numbers: the same before and after."""

    def __init__(self, opt, params):
        self.opt, self.params = opt, list(params)
        self.before = self.look()

    def look(self):
        grads = [None if p.grad is None else (id(p.grad), raw(p.grad)) for p in self.params]
        counted = int(self.opt.skipped_steps), repr(self.opt.layer_stats()), torch.get_rng_state().tolist()
        return grads, counted, snapshot(self.opt, self.params)

    def check(self, grads=True):
        after = self.look()
        assert not grads or after[0] == self.before[0]
        assert after[1] == self.before[1]
        assert_same(after[2], self.before[2])


def ready(flavour, steps=1, **options):
    """An optimizer that has taken some steps, so that there is something to spoil."""
    params = parameters(start())
    opt = make(flavour, params, **options)
    for n in range(steps):
        take_step(opt, params, loss(n))
    return opt, params


# Constructors


@pytest.mark.parametrize("name", CHOICES)
@each_flavour
def test_unknown_choices(flavour, name):
    for value in ("newton", None, 3, ""):
        with refused((ValueError, TypeError), name, repr(value), *map(repr, CHOICES[name])):
            make(flavour, parameters(start()), **{name: value})
    for value in CHOICES[name]:
        assert make(flavour, parameters(start()), **{name: value}).defaults[name] == value


@pytest.mark.parametrize("name", CHOICES)
@each_flavour
def test_choices_are_the_whole_optimizers(flavour, name):
    """A group with another one is told so, not passed over."""
    other = CHOICES[name][-1 if name != "product" else 1]
    opt = make(flavour, parameters(start()))
    for act in (
        lambda: make(flavour, [{"params": parameters(start()), name: other}]),
        lambda: opt.add_param_group({"params": parameters(start()), name: other}),
    ):
        with refused(ValueError, name, repr(other)):
            act()
    assert len(opt.param_groups) == 1


@each_flavour
def test_out_of_range(flavour):
    for name, values in {**OUT, **OWN[flavour]}.items():
        for value in values:
            word = name if name != "betas" else "beta"
            with refused((ValueError, TypeError), word):
                make(flavour, parameters(start()), **{name: value})
            with refused((ValueError, TypeError), word):
                make(flavour, [{"params": parameters(start()), name: value}])


@each_flavour
def test_options_that_it_does_not_have(flavour):
    """Passed over in silence they would be believed."""
    for option in ({"max_grad_norm": 1.0}, {"differentiable": True}):
        with refused((ValueError, TypeError), *option):
            make(flavour, parameters(start()), **option)


@each_flavour
def test_ranges_are_named(flavour):
    for name, value, text in (("ema", 1.0, "[0, 1)"), ("damping", -1.0, "[0, inf)"), ("max_step", 0.0, "(0, inf")):
        with refused(ValueError, name, value, text):
            make(flavour, parameters(start()), **{name: value})


@each_flavour
def test_the_ends_of_the_ranges_are_in(flavour):
    own = {"momentum": 0.0} if flavour == "sgd" else {"betas": (0.0, 0.0), "eps": 0.0}
    opt, params = ready(flavour, steps=2, ema=0.0, damping=0.0, max_step=1e-12, lr=0.0, weight_decay=0.0, **own)
    assert all(torch.equal(p.detach(), q.float()) for p, q in zip(params, start(), strict=True))


@each_flavour
def test_a_hyper_parameter_spoiled_later(flavour):
    """Groups are data: what a user or a scheduler put there is looked at before the step writes."""
    for name, value in (("lr", -1.0), ("ema", 1.0), ("damping", -1.0), ("max_step", 0.0)):
        opt, params = ready(flavour)
        same = Unchanged(opt, params)
        opt.param_groups[0][name] = value
        with refused((ValueError, TypeError), name):
            take_step(opt, params, loss(1))
        assert_same(snapshot(opt, params), same.before[2])


@each_flavour
def test_positional_order_is_that_of_the_interface(flavour):
    args = (0.5, 0.8, 0.1) if flavour == "sgd" else (0.5, (0.8, 0.99), 1e-6, 0.1)
    names = ("lr", "momentum", "weight_decay") if flavour == "sgd" else ("lr", "betas", "eps", "weight_decay")
    opt = getattr(lf, CLASSES[flavour])(parameters(start()), *args)
    assert tuple(opt.param_groups[0][name] for name in names) == args
    with pytest.raises(TypeError):
        getattr(lf, CLASSES[flavour])(parameters(start()), *args, "quadratic")


@each_flavour
def test_parameters_that_do_not_do(flavour):
    p = Parameter(torch.ones(3))
    for params in ([], [p, p], [Parameter(torch.ones(2, dtype=torch.complex64))]):
        with pytest.raises((ValueError, TypeError)):
            make(flavour, params)


# Closures


@each_product
@each_flavour
def test_a_closure_is_needed(flavour, product):
    opt, params = ready(flavour, product=product)
    same = Unchanged(opt, params)
    with refused(ANY, "closure"):
        opt.step()
    for value in (3, "loss", torch.ones(()), [], (), [lambda: loss(0)(params), None]):
        with refused(ANY, "closure"):
            opt.step(value)
        same.check()


BAD = {
    "nothing": (lambda params: None, "tensor"),
    "a number": (lambda params: loss(0)(params).item(), "tensor"),
    "a tuple": (lambda params: (loss(0)(params), 1), "tensor"),
    "a vector": (lambda params: loss(0)(params).expand(3), "(3,)"),
    "detached": (lambda params: loss(0)(params).detach(), "graph"),
    "without grad": (lambda params: torch.no_grad()(loss(0))(params), "graph"),
    "of no parameter": (lambda params: torch.ones(()), "graph"),
}


@pytest.mark.parametrize("kind", BAD)
@each_product
@each_flavour
def test_closures_that_return_no_loss(flavour, product, kind):
    function, word = BAD[kind]
    opt, params = ready(flavour, product=product)
    for closures in (lambda: function(params), [lambda: loss(0)(params), lambda: function(params)]):
        same = Unchanged(opt, params)
        with refused(ANY, word):
            opt.step(closures)
        assert_same(snapshot(opt, params), same.before[2])
        assert int(opt.skipped_steps) == 0
        opt.zero_grad()
    ends = []
    for twin, theirs in ((opt, params), ready(flavour, product=product)):
        take_step(twin, theirs, loss(1))
        ends.append(snapshot(twin, theirs))
    assert_same(*ends)


@pytest.mark.parametrize("clear", ["before the first", "own", "none", "zeros"])
@pytest.mark.parametrize("retain", [True, False])
@each_product
@each_flavour
def test_a_closure_that_called_backward(flavour, product, retain, clear):
    """Whatever stands in p.grad: with retain_graph=True nothing else would tell, and gradients would be doubled."""
    opt, params = ready(flavour, steps=clear != "before the first", product=product)
    if clear in ("none", "zeros"):
        opt.zero_grad(set_to_none=clear == "none")
    same = Unchanged(opt, params)

    def closure():
        found = loss(1)(params)
        found.backward(retain_graph=retain)
        return found

    with refused(ANY, "backward", "closure"):
        opt.step(closure)
    assert_same(snapshot(opt, params), same.before[2])
    assert int(opt.skipped_steps) == 0
    opt.zero_grad()
    twin, theirs = ready(flavour, steps=clear != "before the first", product=product)
    take_step(opt, params, loss(1))
    take_step(twin, theirs, loss(1))
    assert_same(snapshot(opt, params), snapshot(twin, theirs))


@each_product
@each_flavour
def test_a_later_closure_that_called_backward(flavour, product):
    opt, params = ready(flavour, product=product)
    same = Unchanged(opt, params)

    def closure():
        found = loss(1)(params)
        found.backward(retain_graph=True)
        return found

    with refused(ANY, "backward", "closure"):
        opt.step([lambda: loss(0)(params), closure])
    assert_same(snapshot(opt, params), same.before[2])


# Gradients of the user's own


@pytest.mark.parametrize("when", ["before the first", "on top of its own", "in their place", "of one"])
@each_product
@each_flavour
def test_gradients_of_somebody_else(flavour, product, when):
    """Accumulated by hand they would be lost or counted twice: the remedy is named, and they are left."""
    opt, params = ready(flavour, steps=when != "before the first", product=product)
    if when == "in their place":
        opt.zero_grad()
    if when == "of one":
        opt.zero_grad()
        params[2].grad = torch.ones_like(params[2])
    else:
        loss(3)(params).backward()
    same = Unchanged(opt, params)
    with refused((ValueError, RuntimeError), "zero_grad()", "closures"):
        take_step(opt, params, loss(1))
    same.check()
    opt.zero_grad()
    take_step(opt, params, loss(1))
    assert all(p.isfinite().all() for p in params)


@each_product
@each_flavour
def test_gradients_of_zeros_are_nobodys(flavour, product):
    opt, params = ready(flavour, steps=0, product=product)
    for p in params:
        p.grad = torch.zeros_like(p)
    take_step(opt, params, loss(0))
    assert_same(snapshot(opt, params), snapshot(*ready(flavour, product=product)))


@each_flavour
def test_a_sparse_gradient(flavour):
    table = torch.nn.Embedding(4, 3, sparse=True)
    opt = make(flavour, table.parameters())
    same = Unchanged(opt, table.parameters())
    with refused((ValueError, RuntimeError), "sparse"):
        opt.step(lambda: table(torch.tensor([1, 2])).square().sum())
    assert_same(snapshot(opt, table.parameters()), same.before[2])


@each_product
@each_flavour
def test_a_loss_of_other_parameters(flavour, product):
    """Nothing of this optimizer's has a gradient: nothing moves."""
    opt, params = ready(flavour, product=product)
    same, other = Unchanged(opt, params), torch.ones((), requires_grad=True)
    opt.step(lambda: other * 2)
    assert_same(snapshot(opt, params), same.before[2])


# Loading


def test_states_of_the_other_class():
    opt, _ = ready("sgd")
    other, params = ready("adamw")
    same = Unchanged(other, params)
    with pytest.raises(ValueError):
        other.load_state_dict(opt.state_dict())
    same.check()
