"""XGrad in training loops: accumulation, clipping, skipped steps, AMP, missing gradients, closures, hooks, new groups.

Held against the float64 oracle where the loop changes what is computed, else bit for bit against the usual loop. Left
out: DDP (test_xgrad_ddp.py), and which weights are in the parameters when (test_xgrad_weights.py).
"""

import pytest
import torch
from engines import make
from xgrad_oracle import (
    Net,
    Oracle,
    assert_leads,
    assert_near,
    assert_same,
    gradients,
    snapshot,
    tensors,
    train,
    true_weights,
    values,
)

import layerfused as lf

BASES = {
    "lamb": lambda params, **more: make("lamb", params, lr=0.02, **more),
    "adamw-decay": lambda params, **more: make("adamw-decay", params, **more),
    "sgd-momentum": lambda params, **more: make("sgd-momentum", params, **more),
    "torch": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}
OURS = ["lamb", "adamw-decay", "sgd-momentum"]
each_base = pytest.mark.parametrize("base", BASES)


def wrapped(base, ahead=2, with_model=False, **more):
    net = Net()
    return net, lf.XGrad(BASES[base](net.parameters(), **more), steps=ahead, model=net if with_model else None)


def oracle_of(base, net, ahead=2):
    if base == "torch":
        return Oracle("adamw-decay", net.parameters(), ahead)
    return Oracle(base, net.parameters(), ahead, **({"lr": 0.02} if base == "lamb" else {}))


def assert_is(xg, oracle):
    start = values(Net().parameters())
    assert_leads(xg)
    assert_near(tensors(xg), oracle.predicted(), start)
    assert_near(true_weights(xg), oracle.true(), start)


def test_gradients_are_those_of_predicted_weights():
    net, xg = wrapped("lamb")
    train(net, xg, range(3))
    xg.zero_grad()
    net(3).backward()
    for p, g, h in zip(net.parameters(), gradients(net.parameters(), 3), gradients(true_weights(xg), 3), strict=True):
        assert torch.equal(p.grad, g) and not torch.equal(p.grad, h)


# Between zero_grad and step


@each_base
def test_accumulation_and_clipping(base):
    """clip_grad_norm_ divides by the norm plus 1e-6."""
    net, xg = wrapped(base)
    oracle = oracle_of(base, net)
    for t in range(0, 24, 2):
        xg.zero_grad()
        for part in (t, t + 1):
            (net(part) / 2).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.2)
        xg.step()
        sums = [(g + h) / 2 for g, h in zip(*(gradients(oracle.predicted(), part) for part in (t, t + 1)), strict=True)]
        norm = torch.cat([g.flatten() for g in sums]).norm() + 1e-6
        oracle.step([g * (0.2 / norm).clamp(max=1) for g in sums])
    assert_is(xg, oracle)


ORDERS = {
    "none before": lambda xg, net, t: (xg.zero_grad(), net(t).backward(), xg.step()),
    "zeros before": lambda xg, net, t: (xg.zero_grad(set_to_none=False), net(t).backward(), xg.step()),
    "none after": lambda xg, net, t: (net(t).backward(), xg.step(), xg.zero_grad(set_to_none=True)),
    "zeros after": lambda xg, net, t: (net(t).backward(), xg.step(), xg.zero_grad(set_to_none=False)),
    "by the model": lambda xg, net, t: (net.zero_grad(), net(t).backward(), xg.step()),
    "by the inner": lambda xg, net, t: (xg.optimizer.zero_grad(), net(t).backward(), xg.step()),
}


@each_base
def test_zero_grad_anywhere(base):
    """The authors' code predicts nothing after zero_grad(set_to_none=True)."""
    found = []
    for order in ORDERS.values():
        net, xg = wrapped(base)
        for t in range(5):
            order(xg, net, t)
        found.append(snapshot(xg))
        xg.zero_grad(set_to_none=True)
        assert_leads(xg)
        assert all(p.grad is None for p in net.parameters())
    for other in found[1:]:
        assert_same(other, found[0])


@each_base
@pytest.mark.parametrize("with_model", [False, True])
def test_closures(base, with_model):
    net, xg = wrapped(base, with_model=with_model)
    oracle = oracle_of(base, net)
    for t in range(4):

        def closure(t=t):
            assert torch.is_grad_enabled()
            assert_near(net.parameters(), oracle.predicted(), values(Net().parameters()))
            xg.zero_grad()
            loss = net(t)
            loss.backward()
            return loss

        assert xg.step(closure).requires_grad
        oracle.train([t])
    assert_is(xg, oracle)


def test_a_closure_that_fails_changes_nothing():
    net, xg = wrapped("lamb")
    train(net, xg, range(3))
    before = snapshot(xg)

    def closure():
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        xg.step(closure)
    assert_same(xg, before)
    train(net, xg, [3])


# Steps that are skipped, parameters that have no gradient


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("first", [False, True])
def test_a_skipped_step_changes_nothing(backend, first):
    found = []
    for bad in (True, False):
        net, xg = wrapped("lamb", max_grad_norm=0.3, backend=backend)
        done = 0 if first else 3
        train(net, xg, range(done))
        if bad:
            before = snapshot(xg)
            for p in net.parameters():
                p.grad = torch.full_like(p, float("nan"))
            xg.step()
            assert_same(xg, before)
            assert xg.optimizer.skipped_steps == 1
        train(net, xg, range(done, 6))
        found.append(snapshot(xg))
    assert_same(*found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_skipped_step_after_lr_has_moved(backend):
    """Predictions of the old lr stay behind: the next zero_grad() has to see it."""
    found = []
    for bad in (True, False):
        net, xg = wrapped("lamb", max_grad_norm=0.3, backend=backend)
        train(net, xg, range(3))
        xg.param_groups[0]["lr"] = 0.1
        if bad:
            for p in net.parameters():
                p.grad = torch.full_like(p, float("inf"))
            xg.step()
        xg.zero_grad()
        found.append(snapshot(xg))
    assert_same(*found)


@pytest.mark.parametrize("trouble", ["skipped", "without gradient"])
def test_a_step_from_true_weights_leaves_all_predicted(trouble):
    """Saving has put the true weights back, and the step that follows does not reach every parameter."""
    found = []
    for saved in (True, False):
        net, xg = wrapped("lamb", with_model=True, max_grad_norm=0.3 if trouble == "skipped" else None)
        train(net, xg, range(3))
        xg.zero_grad()
        net(3).backward()
        if saved:
            with pytest.warns(UserWarning):
                net.state_dict()
        net.w2.grad = torch.full_like(net.w2, float("nan")) if trouble == "skipped" else None
        xg.step()
        net(4)
        found.append(snapshot(xg))
    assert_same(*found)


@each_base
def test_parameters_without_gradient_now_and_then(base):
    """w2 misses every third step, b1 is frozen until step 6, w1 from step 6 on; each counts its own steps."""
    net, xg = wrapped(base)
    oracle = oracle_of(base, net)
    net.b1.requires_grad_(False)
    for t in range(12):
        if t == 6:
            assert torch.equal(net.b1, Net().b1)
            net.b1.requires_grad_(True)
            net.w1.requires_grad_(False)
        absent = {0: t >= 6, 1: t < 6, 2: t % 3 == 1, 3: False}
        xg.zero_grad()
        net(t).backward()
        if t % 3 == 1:
            net.w2.grad = None
        xg.step()
        grads = gradients(oracle.predicted(), t)
        oracle.step([None if absent[i] else g for i, g in enumerate(grads)])
    assert_is(xg, oracle)


@each_base
def test_a_step_without_any_gradient(base):
    net, xg = wrapped(base)
    xg.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), Net().parameters(), strict=True))
    train(net, xg, range(2))
    before = snapshot(xg)
    xg.zero_grad()
    xg.step()
    assert_same(xg, before)
