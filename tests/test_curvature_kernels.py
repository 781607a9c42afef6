"""Kernels without a second derivative: a difference of gradients does not need it, double backward says what does."""

import itertools
from functools import cache

import pytest
import torch
from conduct import assert_same, refused, snapshot
from curvature_oracle import CLASSES, ESTIMATORS, PRODUCTS, make, stats, take_step
from engines import threads
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


@pytest.fixture(autouse=True)
def one_thread():
    """Teams of threads cost more than these models do."""
    with threads(1):
        yield


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
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=random), torch.randn(16, 2, generator=random)
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
