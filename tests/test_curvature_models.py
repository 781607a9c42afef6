"""Models that are not functions of their weights alone: randomness, buffers, autocast, somebody else's parameters.

The second forward must not be seen from outside. What fails half-way is in test_curvature_exceptions.py, kernels
without a second derivative in test_curvature_kernels.py.

Left out: random numbers that are not torch's (Python's, NumPy's), and what a module keeps outside of its buffers.
"""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from conduct import raw, same_bits
from curvature_oracle import (
    CLASSES,
    ESTIMATORS,
    PRODUCTS,
    make,
    parameters,
    stats,
)
from engines import threads
from torch import nn
from torch.nn import functional as F

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
