"""Steps and changes that the optimizer inside refuses: XGrad is then as it was, and goes on."""

import math

import pytest
import torch
from conduct import parameters, refused
from test_xgrad_errors import LAMB, trained
from xgrad_oracle import Net, assert_leads, assert_same, snapshot, train, true_weights, values

import layerfused as lf


def bad_gradient(net, xg):
    net.w2.grad = torch.eye(3, 6).to_sparse()


def bad_lr(net, xg):
    xg.param_groups[0]["lr"] = -1.0


def bad_beta(net, xg):
    xg.param_groups[0]["betas"] = (0.9, 1.5)


@pytest.mark.parametrize("trouble", [bad_gradient, bad_lr, bad_beta])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_that_raises_changes_nothing(trouble, backend):
    """And the next one goes on as if it had not been."""
    net, xg = trained(lambda net: lf.LAMB(net.parameters(), backend=backend))
    group = dict(xg.param_groups[0])
    before = snapshot(xg)
    net(3).backward()
    grad = net.w2.grad
    trouble(net, xg)
    live = values(net.parameters())
    with pytest.raises((ValueError, TypeError)):
        xg.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), live, strict=True))
    net.w2.grad = grad
    xg.param_groups[0].update(group)
    assert_same(xg, before)
    twin_net, twin = trained(lambda net: lf.LAMB(net.parameters(), backend=backend))
    for each in ((net, xg), (twin_net, twin)):
        train(*each, [3])
    assert_same(xg, twin)


def test_a_refresh_that_raises_changes_nothing():
    net, xg = trained()
    before = snapshot(xg)
    for bad in (-1.0, math.nan, "much"):
        xg.param_groups[0]["lr"] = bad
        with pytest.raises((ValueError, TypeError)):
            xg.zero_grad()
    xg.param_groups[0]["lr"] = 0.02
    assert_same(xg, before)


def test_a_step_of_torch_that_raises_leaves_weights_that_can_be_trusted():
    """torch's step may have written half of them: what counts is that true weights do not become predicted ones."""
    net, xg = trained(LAMB[1])
    true = true_weights(xg)
    net(3).backward()
    net.w1.grad = torch.eye(6, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        xg.step()
    assert all(torch.equal(p, q) for p, q in zip(true_weights(xg), true, strict=True))
    train(net, xg, [3])
    assert_leads(xg)


@pytest.mark.parametrize("cls", [lf.SGD, torch.optim.SGD])
def test_a_group_that_cannot_be_predicted(cls):
    """The optimizer is then as it was."""
    net = Net()
    xg = lf.XGrad(cls(net.parameters(), lr=0.1, momentum=0.9))
    train(net, xg, range(2))
    before = snapshot(xg)
    with refused(ValueError, "SGD", "momentum"):
        xg.add_param_group({"params": parameters((3,)), "momentum": 0.0})
    assert len(xg.param_groups) == 1
    assert_same(xg, before)
    train(net, xg, [2])


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_momentum_that_becomes_zero(backend):
    """Schedulers may do that. Nothing is predicted until there is a buffer again; steps are the plain optimizer's."""
    net, plain_net = Net(), Net()
    inner, plain = (
        torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9)
        if backend == "torch"
        else lf.SGD(n.parameters(), lr=0.1, momentum=0.9, backend=backend)
        for n in (net, plain_net)
    )
    xg = lf.XGrad(inner, steps=2)
    for t, momentum in enumerate((0.9, 0.9, 0.0, 0.0, 0.9, 0.9)):
        xg.param_groups[0]["momentum"] = plain.param_groups[0]["momentum"] = momentum
        train(net, xg, [t])
        for p, q in zip(net.parameters(), plain_net.parameters(), strict=True):
            q.grad = p.grad
        plain.step()
        true = true_weights(xg)
        assert all(torch.equal(p, q) for p, q in zip(plain_net.parameters(), true, strict=True))
        assert momentum or all(torch.equal(p, q) for p, q in zip(net.parameters(), true, strict=True))
    assert_leads(xg)
