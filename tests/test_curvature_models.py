"""Models that are not functions of their weights alone: randomness, buffers, kernels without a second derivative,
exceptions. The second forward must not be seen from outside.

Left out: random numbers that are not torch's (Python's, NumPy's), and what a module keeps outside of its buffers.
"""

import itertools
from contextlib import nullcontext
from copy import deepcopy
from functools import cache

import pytest
import torch
from conduct import assert_same, raw, refused, same_bits, snapshot
from curvature_oracle import (
    CLASSES,
    ESTIMATORS,
    PRODUCTS,
    make,
    parameters,
    stats,
    take_step,
)
from engines import threads
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_product = pytest.mark.parametrize("product", PRODUCTS)


@pytest.fixture(autouse=True)
def one_thread():
    """Teams of threads cost more than these models do."""
    with threads(1):
        yield


def data(seed=0, rows=16):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=random), torch.randn(rows, 2, generator=random)


def dropout_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2))


class Counts(nn.Module):
    """Buffers of every kind: written in place, put in anew, not saved, and None."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x):
        self.seen += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        self.last.copy_(x.detach().flatten()[:3])
        return x + self.mean


BUFFERED = {
    "batch norm": lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)],
    "cumulative": lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh(), nn.Linear(8, 2)],
    "spectral": lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 2)],
    "own": lambda: [nn.Linear(6, 8), Counts(), nn.Tanh(), nn.Linear(8, 2)],
    "all": lambda: [nn.Linear(6, 8), Counts(), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)],
}


def mse(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def buffers(model):
    return {name: raw(buffer) for name, buffer in model.named_buffers()}


# Randomness


@each_estimator
@each_flavour
def test_the_second_forward_sees_the_same_masks(flavour, estimator):
    """With other masks a difference over h = 1e-3 would be a thousand times the gradients' own difference.

    Over one step from equal seeds a finite difference finds what double backward finds, which has one forward only.
    """
    found = []
    for product in PRODUCTS:
        model = dropout_model()
        opt = make(flavour, model.parameters(), estimator=estimator, product=product)
        torch.manual_seed(7)
        opt.step([lambda model=model, n=n: mse(model, data(n)) / 2 for n in (0, 1)])
        found.append(torch.tensor([report["curvature"] for report in stats(opt)]))
    # truncation: a thousandth of the weights; what it makes of a curvature that nearly cancels is the larger part
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05 * float(found[1].max()))


@each_estimator
@each_product
@each_flavour
def test_the_users_random_stream_is_that_of_one_forward(flavour, product, estimator):
    model = dropout_model()
    opt = make(flavour, model.parameters(), estimator=estimator, product=product)
    for n in range(2):
        torch.manual_seed(n)
        mse(model, data(n))
        want = torch.get_rng_state()
        torch.manual_seed(n)
        opt.step(lambda n=n: mse(model, data(n)))
        assert torch.equal(torch.get_rng_state(), want)


# Buffers


@each_estimator
@each_product
@pytest.mark.parametrize("kind", BUFFERED)
def test_buffers_are_those_of_one_forward(kind, product, estimator):
    torch.manual_seed(0)
    model = nn.Sequential(*BUFFERED[kind]())
    twin = deepcopy(model)
    opt = make("sgd", model.parameters(), estimator=estimator, product=product)
    for n in range(3):
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        state = torch.get_rng_state()
        for k in (0, 1):
            mse(twin, data(10 * n + k)).backward()
        torch.set_rng_state(state)
        opt.step([lambda n=n, k=k: mse(model, data(10 * n + k)) for k in (0, 1)])
        assert buffers(model) == buffers(twin)
        assert model.state_dict().keys() == twin.state_dict().keys()


def test_buffers_keep_their_place():
    """Whoever holds a buffer (an averaged model, a graph) holds the one in use afterwards."""
    model = nn.Sequential(*BUFFERED["batch norm"]())
    places = [(id(buffer), buffer.data_ptr()) for buffer in model.buffers()]
    opt = make("adamw", model.parameters())
    for n in range(2):
        opt.step(lambda n=n: mse(model, data(n)))
    assert [(id(buffer), buffer.data_ptr()) for buffer in model.buffers()] == places


@each_product
@each_flavour
def test_a_model_with_all_of_it_learns(flavour, product):
    torch.manual_seed(0)
    model = nn.Sequential(*BUFFERED["all"]())
    opt = make(flavour, model.parameters(), product=product)
    losses = [opt.step(lambda: mse(model, data())).item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# Kernels without a second derivative


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.inward(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.outward(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class NoSecond(torch.autograd.Function):
    """A kernel as extensions have them. Autograd knows that it does not see into its backward, and says so only if it
    is asked for all that led to a gradient: of what is asked for by `inputs=` it would be left out in silence."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def attention_loss(model):
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    return lambda: (model(x) - x.flip(1)).square().mean()


@cache
def has_second_derivative(kernel):
    model = Attention()
    with sdpa_kernel(kernel):
        grads = torch.autograd.grad(attention_loss(model)(), list(model.parameters()), create_graph=True)
    try:
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["flash", "math"])
@each_flavour
def test_attention(flavour, kernel):
    """A difference works with every kernel; double backward with those that have a second derivative."""
    for product in PRODUCTS:
        model = Attention()
        params = list(model.parameters())
        opt = make(flavour, params, product=product)
        before = snapshot(opt, params)
        with sdpa_kernel(kernel):
            if product == "double-backward" and not has_second_derivative(kernel):
                with refused(RuntimeError, "product='finite-difference'"):
                    opt.step(attention_loss(model))
                assert_same(snapshot(opt, params), before)
                continue
            losses = [opt.step(attention_loss(model)).item() for _ in range(10)]
        assert losses[-1] < 0.8 * losses[0]
    assert has_second_derivative(SDPBackend.MATH)


@each_estimator
@each_flavour
def test_a_function_that_is_once_differentiable(flavour, estimator):
    x, y = data()
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    for product in PRODUCTS:
        params = [nn.Parameter(weight.clone()), nn.Parameter(torch.zeros(2))]
        opt = make(flavour, params, product=product, estimator=estimator)
        before = snapshot(opt, params)

        def closure(params=params):
            return F.mse_loss(NoSecond.apply(F.linear(x, *params)), y)

        if product == "double-backward":
            with refused(RuntimeError, "product='finite-difference'"):
                opt.step(closure)
            assert_same(snapshot(opt, params), before)
        else:
            first = opt.step(closure).item()
            assert closure().item() < first


@each_flavour
def test_a_kernel_that_comes_later(flavour):
    """A branch taken in the third step for the first time: averages that are no longer zeros are not spoiled either."""
    params, calls = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))], itertools.count()
    opt = make(flavour, params, product="double-backward")

    def closure():
        function = NoSecond.apply if next(calls) == 2 else torch.tanh
        return (function(params[0]) * params[1] - 2).square().sum()

    for _ in range(2):
        opt.step(closure)
    before = snapshot(opt, params)
    with refused(RuntimeError, "product='finite-difference'"):
        opt.step(closure)
    assert_same(snapshot(opt, params), before)
    opt.step(closure)
    assert all(opt.state[p]["step"] == 3 for p in params)


class ErrorFeedback(torch.autograd.Function):
    """Differentiable as often as one likes, whatever it is called."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_function_is_not_known_by_its_name():
    found = []
    for function in (ErrorFeedback.apply, torch.square):
        params = [nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))]
        opt = make("sgd", params, product="double-backward")
        take_step(opt, params, lambda ps, function=function: function(2 * ps[0]).square().sum())
        found.append(stats(opt)[0]["curvature"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# Autocast


@pytest.mark.parametrize("estimator", ["joint", "exact"])
def test_autocast_around_the_step(estimator):
    """Its cache of cast weights must not serve the second forward: that would see no difference, and no curvature."""
    found = []
    for outside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
        opt = make("sgd", model.parameters(), estimator=estimator)
        contexts = [nullcontext(), torch.autocast("cpu", torch.bfloat16)]

        def closure(model=model, inner=contexts[not outside]):
            with inner:
                return F.mse_loss(model(data()[0]).float(), data()[1])

        with contexts[outside]:
            opt.step(closure)
        found.append(stats(opt))
    for inner, outer in zip(*found, strict=True):
        assert outer["curvature"] == pytest.approx(inner["curvature"], rel=1e-6)
    assert any(report["curvature"] > 0 for report in found[0])


# Leaves that are not this optimizer's


@each_product
@each_flavour
def test_parameters_of_another_optimizer(flavour, product):
    """Their gradient may be left out or that of the loss; the second backward must not be added to it."""
    mine, other = parameters([torch.ones(3), torch.full((3,), 2.0)])
    opt = make(flavour, [mine], product=product)
    opt.step(lambda: (mine * other).square().sum())
    assert other.grad is None or torch.equal(other.grad, torch.full((3,), 4.0))
    assert same_bits(other, torch.full((3,), 2.0)) and (mine < 1).all()
