"""Which weights are in the parameters: eval(), train(), true_weights(), the model's own saving and loading, averages.

Left out: checkpoints of the optimizer (test_xgrad_resume.py) and what is refused (test_xgrad_errors.py).
"""

from copy import deepcopy

import pytest
import torch
from torch.nn import Linear, Sequential
from xgrad_oracle import (
    Net,
    assert_leads,
    assert_same,
    snapshot,
    train,
    true_weights,
    values,
)

import layerfused as lf

MADE = [lambda params: lf.LAMB(params, lr=0.02), lambda params: torch.optim.AdamW(params, lr=0.01)]
each_base = pytest.mark.parametrize("made", MADE, ids=["LAMB", "torch.AdamW"])
models = pytest.mark.parametrize("with_model", [False, True], ids=["alone", "model"])


def trained(made=MADE[0], with_model=False, steps=3, **more):
    net = Net()
    xg = lf.XGrad(made(net.parameters()), model=net if with_model else None, **more)
    train(net, xg, range(steps))
    return net, xg


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# eval(), train()


@each_base
@models
def test_eval_and_train(made, with_model):
    net, xg = trained(made, with_model)
    live, true = values(net.parameters()), true_weights(xg)
    for _ in range(2):
        for _ in range(2):
            xg.eval()
            assert same(net.parameters(), true)
            assert same(true_weights(xg), true)
        for _ in range(2):
            xg.train()
            assert same(net.parameters(), live)


def test_before_the_first_step_all_are_alike():
    net, xg = trained(steps=0)
    for change in (xg.eval, xg.train, xg.zero_grad):
        change()
        assert same(net.parameters(), Net().parameters()) and same(true_weights(xg), Net().parameters())


@models
def test_eval_lasts(with_model):
    """Until train(): batch norms may be recalibrated by forward passes in training mode."""
    net, xg = trained(with_model=with_model)
    xg.eval()
    true = values(net.parameters())
    xg.param_groups[0]["lr"] = 0.5
    for change in (xg.zero_grad, lambda: net(0), lambda: true_weights(xg)):
        change()
        assert same(net.parameters(), true)


@each_base
def test_eval_between_any_two_calls_changes_no_bits(made):
    found = []
    for toggles in (False, True):
        net, xg = trained(made)

        def toggle(toggles=toggles, xg=xg):
            if toggles:
                xg.eval()
                xg.train()

        for t in range(3, 6):
            xg.zero_grad()
            toggle()
            loss = net(t)
            loss.backward()
            toggle()
            xg.step()
            toggle()
        found.append(snapshot(xg))
    assert_same(*found)


@each_base
def test_weights_changed_after_eval_are_true_weights(made):
    net, xg = trained(made)
    xg.eval()
    with torch.no_grad():
        for p in net.parameters():
            p *= 0.5
    halves = values(net.parameters())
    xg.train()
    assert_leads(xg)
    assert same(true_weights(xg), halves)


def test_parameters_that_get_another_type_or_place_after_eval():
    """As `net.to()` does it. States stay what they were."""
    net, xg = trained()
    xg.eval()
    net.to(torch.bfloat16)
    xg.train()
    train(net, xg, [3])
    assert_leads(xg)
    assert {p.dtype for p in true_weights(xg)} == {torch.bfloat16}
    xg.eval()
    halves = values(net.parameters())
    for p in net.parameters():
        p.data = p.data.clone()
    xg.train()
    assert same(true_weights(xg), halves)
    train(net, xg, [4])
    assert_leads(xg)


@pytest.mark.parametrize("made", [lf.LAMB, lf.AdamW, torch.optim.AdamW])
def test_switching_between_forward_and_backward_is_seen_by_autograd(made):
    """The engines write without torch, and have to count versions themselves."""
    net = Sequential(Linear(3, 4), Linear(4, 2))
    xg = lf.XGrad(made(net.parameters()))
    net(torch.ones(2, 3)).sum().backward()
    xg.step()
    for change in (xg.eval, xg.train, xg.step):
        loss = net(torch.ones(2, 3)).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# with xg.true_weights()


@each_base
def test_true_weights_nested_and_left_by_an_exception(made):
    net, xg = trained(made)
    live = values(net.parameters())
    with xg.true_weights():
        true = values(net.parameters())
        with xg.true_weights():
            assert same(net.parameters(), true)
        assert same(net.parameters(), true)
    assert same(net.parameters(), live)
    with pytest.raises(KeyError), xg.true_weights():
        with xg.true_weights():
            raise KeyError("evaluation")
    assert same(net.parameters(), live)
    xg.eval()
    with xg.true_weights():
        assert same(net.parameters(), true)
    assert same(net.parameters(), true)
    xg.train()
    assert same(net.parameters(), live)


@each_base
@models
def test_training_goes_on_as_if_nobody_had_looked(made, with_model):
    found = []
    for looks in (True, False):
        net, xg = trained(made, with_model)
        if looks:
            with xg.true_weights():
                net.eval()
                net(7)
                net.train()
                net(7)  # forward passes in training mode see true weights, too
                assert same(net.parameters(), true_weights(xg))
                xg.zero_grad()
        train(net, xg, range(3, 6))
        found.append(snapshot(xg))
    assert_same(*found)


@each_base
def test_weights_loaded_inside_of_true_weights(made):
    net, xg = trained(made)
    with xg.true_weights():
        net.load_state_dict(Net().state_dict())
    assert same(true_weights(xg), Net().parameters())
    assert_leads(xg)
    with pytest.raises(KeyError), xg.true_weights():
        with torch.no_grad():
            net.w1.zero_()
        raise KeyError("half of a change is a change")
    assert not true_weights(xg)[0].any()


@each_base
def test_a_step_inside_of_true_weights(made):
    """Gradients at true weights are the user's affair; afterwards the parameters lead again."""
    net, xg = trained(made)
    with xg.true_weights():
        net.zero_grad()
        net(3).backward()
        before = values(net.parameters())
        xg.step()
    assert not same(true_weights(xg), before)
    assert_leads(xg)
    other, plain = trained(made)
    plain.eval()
    plain.zero_grad()
    other(3).backward()
    plain.step()
    plain.train()
    assert_same(xg, plain)


@each_base
@pytest.mark.parametrize("evaluated", [False, True])
def test_an_xgrad_that_is_gone_leaves_a_plain_optimizer(made, evaluated):
    """With true weights in the parameters, and steps that go on from whatever they hold."""
    net, xg = trained(made)
    inner, true = xg.optimizer, true_weights(xg)
    if evaluated:
        xg.eval()
    del xg
    assert same(net.parameters(), true)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    plain_net = Net()
    plain_net.load_state_dict(net.state_dict())
    plain = made(plain_net.parameters())
    plain.load_state_dict(deepcopy(inner.state_dict()))  # torch shares the tensors
    for each in ((net, inner), (plain_net, plain)):
        train(*each, [3])
    assert same(net.parameters(), plain_net.parameters())
