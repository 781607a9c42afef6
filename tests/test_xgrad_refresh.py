"""When a prediction is made anew: after every change of lr, however it comes about, and at no other time.

Left out: torch's schedulers (test_xgrad_schedules.py).
"""

import pytest
import torch
from device_cases import DEVICE
from torch.optim import lr_scheduler as lrs
from xgrad_oracle import (
    Net,
    Oracle,
    assert_leads,
    assert_near,
    assert_same,
    gradients,
    phases_of,
    snapshot,
    tensors,
    train,
    true_weights,
    values,
)

import layerfused as lf
from layerfused.plan import Phase

pytestmark = pytest.mark.filterwarnings("error")


# How lr moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cuda", "reference"])
@pytest.mark.parametrize("with_model", [False, True])
def test_an_lr_tensor_changed_in_place(backend, with_model, dtype):
    """Powers of two, which float32 holds: a tensor gives the bits of a number. On the device the kernel reads it."""
    if backend == "cuda":
        pytest.importorskip("layerfused._cuda")
    found = []
    for lr in (torch.tensor(0.125, dtype=dtype, device=DEVICE), 0.125):
        net = Net().to(DEVICE)
        xg = lf.XGrad(lf.LAMB(net.parameters(), lr=lr, backend=backend), model=net if with_model else None)
        (group,) = xg.param_groups
        for t in range(4):
            train(net, xg, [t])
            if isinstance(lr, float):
                group["lr"] *= 0.5
            else:
                lr.mul_(0.5)
                assert group["lr"] is lr
        xg.zero_grad()
        if with_model:
            net(0)
        found.append(snapshot(xg))
    assert_same(*found)


def test_an_lr_that_becomes_a_tensor_and_back():
    net, other = Net(), Net()
    xg, twin = lf.XGrad(lf.AdamW(net.parameters())), lf.XGrad(lf.AdamW(other.parameters()))
    for t, lr in enumerate((0.125, torch.tensor(0.125), torch.tensor(0.25), 0.25)):
        xg.param_groups[0]["lr"], twin.param_groups[0]["lr"] = lr, float(lr)
        train(net, xg, [t])
        train(other, twin, [t])
    assert_same(xg, twin)


def test_with_lr_zero_nothing_is_predicted():
    net = Net()
    xg = lf.XGrad(lf.Adam(net.parameters(), lr=0.0))
    train(net, xg, range(3))
    for p, true, start in zip(net.parameters(), true_weights(xg), Net().parameters(), strict=True):
        assert torch.equal(p, true) and torch.equal(p, start)
    xg.param_groups[0]["lr"] = 0.01
    xg.zero_grad()
    assert_leads(xg)


def test_hyper_parameters_of_ones_own_rule():
    """Whatever is in its row may be in its direction."""

    def steps(p, g, s, h, t, adapt):
        s["momentum_buffer"] = s["momentum_buffer"] + g
        return p - h.lr * h.reach * s["momentum_buffer"], {}

    class Mine(lf.Optimizer):
        rule = lf.Rule(name="mine", hyper=("lr", "reach"), states=("momentum_buffer",), reference=steps,
                       direction=lambda s, h, t, report: (h.lr, h.reach * s["momentum_buffer"]))  # fmt: skip

    p = torch.nn.Parameter(torch.ones(2))
    xg = lf.XGrad(Mine([p], {"lr": 0.5, "reach": 1.0}))
    p.grad = torch.ones(2)
    xg.step()
    assert p.tolist() == [0.0, 0.0]
    xg.param_groups[0]["reach"] = 2.0
    xg.zero_grad()
    assert p.tolist() == [-0.5, -0.5]


def test_lr_changed_inside_of_true_weights():
    """Where validation steps ReduceLROnPlateau."""
    found = []
    for inside in (True, False):
        net = Net()
        xg = lf.XGrad(lf.AdamW(net.parameters(), lr=0.1))
        train(net, xg, range(3))
        with xg.true_weights():
            if inside:
                xg.param_groups[0]["lr"] = 0.01
        xg.param_groups[0]["lr"] = 0.01
        xg.zero_grad()
        train(net, xg, [3])
        found.append(snapshot(xg))
    assert_same(*found)


def test_lr_changed_between_backward_and_step():
    """A parameter without gradient is no part of that step, and still goes with the new lr."""
    found = []
    for by_hand in (True, False):
        net = Net()
        xg = lf.XGrad(lf.LAMB(net.parameters(), lr=0.1, max_grad_norm=None), steps=2)
        train(net, xg, range(2))
        for t in (2, 3):
            if by_hand:
                xg.train()
            xg.zero_grad()
            net(t).backward()
            net.w2.grad = None
            xg.param_groups[0]["lr"] /= 2
            if by_hand:
                xg.eval()
            xg.step()
        if by_hand:
            xg.train()
        xg.zero_grad()
        found.append(snapshot(xg))
    assert_same(*found)


# How often


def refreshes(seen):
    return sum(bool(phases & Phase.PREDICT) for phases in seen)


@pytest.mark.parametrize("with_model", [False, True])
def test_a_constant_lr_needs_no_refresh(with_model, monkeypatch):
    net = Net()
    xg = lf.XGrad(lf.LAMB(net.parameters()), model=net if with_model else None)
    scheduler = lrs.StepLR(xg, step_size=100)
    with phases_of(monkeypatch) as seen:
        train(net, xg, range(6), after=scheduler.step)
    assert refreshes(seen) == 0 and len(seen) == 6


@pytest.mark.parametrize("with_model", [False, True])
def test_one_refresh_for_each_change(with_model, monkeypatch):
    """However often zero_grad and forward come; what goes there and back again is no change."""
    net = Net()
    xg = lf.XGrad(lf.LAMB(net.parameters()), model=net if with_model else None)
    scheduler = lrs.StepLR(xg, step_size=3, gamma=0.5)
    (group,) = xg.param_groups
    with phases_of(monkeypatch) as seen:
        for t in range(9):
            xg.zero_grad()
            for part in (t, t + 100):
                net(part).backward()
            group["lr"] *= 2
            group["lr"] /= 2
            xg.zero_grad(set_to_none=False)
            net(t).backward()
            xg.step()
            scheduler.step()
    assert refreshes(seen) == 2 and len(seen) == 9 + 2  # the third change has seen no forward pass yet


def test_before_the_first_step_nothing_is_launched(monkeypatch):
    net = Net()
    xg = lf.XGrad(lf.LAMB(net.parameters()), model=net)
    with phases_of(monkeypatch) as seen:
        xg.param_groups[0]["lr"] = 0.5
        xg.zero_grad()
        net(0)
        xg.train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), Net().parameters(), strict=True))
    assert refreshes(seen) == 0


# Limits, as documented


def test_without_model_it_is_the_lr_of_zero_grad():
    net, start = Net(), values(Net().parameters())
    xg, oracle = lf.XGrad(lf.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)), Oracle("adamw-decay", start, 1)
    for t in range(4):
        xg.zero_grad()
        oracle.follow(xg)
        weights = oracle.predicted()
        xg.param_groups[0]["lr"] *= 0.5
        net(t).backward()
        xg.step()
        oracle.follow(xg)
        oracle.step(gradients(weights, t))
    assert_near(true_weights(xg), oracle.true(), start)


@pytest.mark.parametrize("made", [lf.AdamW, lf.LAMB, torch.optim.AdamW])
def test_a_refresh_between_forward_and_backward_is_no_silent_error(made):
    """Without model, zero_grad() may have to write weights that the graph holds: autograd says so."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    xg = lf.XGrad(made(net.parameters()))
    net(torch.ones(2, 4)).sum().backward()
    xg.step()
    xg.param_groups[0]["lr"] = 0.5
    loss = net(torch.ones(2, 4)).sum()
    xg.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_eval_mode_forward_leaves_the_weights_alone():
    net = Net()
    xg = lf.XGrad(lf.AdamW(net.parameters()), model=net)
    train(net, xg, range(2))
    before = values(net.parameters())
    xg.param_groups[0]["lr"] = 0.5
    net.eval()
    net(2)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    net.train()
    net(2)
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert tensors(xg)[0] is net.w1
