"""What is attached to XGrad or to the optimizer inside: GradScaler, hooks, later groups; and what that did before.

Left out: schedulers (test_xgrad_schedules.py) and checkpoints (test_xgrad_resume.py).
"""

import pytest
import torch
from conduct import parameters
from test_xgrad_training import BASES, assert_is, each_base, oracle_of, wrapped
from torch.nn import Linear, Parameter, Sequential, Tanh
from xgrad_oracle import Net, Oracle, assert_near, assert_same, gradients, snapshot, tensors, train, true_weights

import layerfused as lf

# AMP


def mlp():
    torch.manual_seed(0)
    return Sequential(Linear(4, 8), Tanh(), Linear(8, 3))


def amp_loss(net, t):
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(16, 4, generator=torch.Generator().manual_seed(t)))
    return out.float().square().mean()


@pytest.mark.parametrize("made", [lf.LAMB, lf.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_and_autocast(made, unscale):
    """Scaling by a power of two changes no bits; a step that overflows is skipped by the scaler."""
    net, twin_net = mlp(), mlp()
    xg, twin = lf.XGrad(made(net.parameters()), model=net), lf.XGrad(made(twin_net.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        xg.zero_grad()
        loss = amp_loss(net, t)
        scaler.scale(loss * float("inf") if t == 3 else loss).backward()
        if unscale:
            scaler.unscale_(xg)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(xg)
        scaler.update()
        if t != 3:
            twin.zero_grad()
            amp_loss(twin_net, t).backward()
            if unscale:
                torch.nn.utils.clip_grad_norm_(twin_net.parameters(), 0.5)
            twin.step()
    assert scaler.get_scale() == 512.0
    assert_same(xg, twin)


# What is attached to either optimizer


@each_base
def test_the_inner_step_is_xgrads(base):
    """As GradScaler takes it that was given the inner optimizer."""
    found = []
    for whose in ("outer", "inner", "scaler"):
        net, xg = wrapped(base)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for t in range(4):
            xg.zero_grad()
            scaler.scale(net(t)).backward()
            if whose == "scaler":
                scaler.step(xg.optimizer)
                scaler.update()
            else:
                (xg if whose == "outer" else xg.optimizer).step()
        found.append(snapshot(xg))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@each_base
@pytest.mark.parametrize("whose", ["inner", "outer"])
def test_step_hooks_run_once(base, whose):
    net, xg = wrapped(base)
    seen = []
    opt = xg if whose == "outer" else xg.optimizer
    opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    train(net, xg, range(3))
    assert seen == ["before", "after"] * 3


@each_base
def test_groups_and_state_are_the_inner_optimizers(base):
    net, xg = wrapped(base)
    assert isinstance(xg, torch.optim.Optimizer) and xg.steps == 2
    for _ in range(2):
        inner = xg.optimizer
        assert xg.param_groups is inner.param_groups and xg.state is inner.state and xg.defaults is inner.defaults
        train(net, xg, range(2))
        xg.load_state_dict(xg.state_dict())


def test_options_of_the_inner_step():
    """grad_norm, where the gradients at hand are a part."""
    params, others = parameters((5,)), parameters((5,))
    xg, plain = lf.XGrad(lf.LAMB(params)), lf.LAMB(others)
    for p in (*params, *others):
        p.grad = torch.ones(5)
    xg.step(grad_norm=torch.tensor(8.0))
    plain.step(grad_norm=torch.tensor(8.0))
    assert torch.equal(true_weights(xg)[0], others[0]) and xg.optimizer.grad_norm == 8


# Groups that come later, optimizers that have stepped before


@each_base
@pytest.mark.parametrize("whose", ["inner", "outer"])
def test_a_group_added_later(base, whose):
    """It joins at its own step 0; until then it holds what it held."""
    net, xg = wrapped(base)
    oracle = oracle_of(base, net)
    late = Parameter(torch.tensor([0.3, -0.2]))
    train(net, xg, range(3))
    oracle.train(range(3))
    alone = Oracle("adamw-decay" if base == "torch" else base, [late], 2, **({"lr": 0.02} if base == "lamb" else {}))
    (xg if whose == "outer" else xg.optimizer).add_param_group({"params": [late]})
    assert late.tolist() == torch.tensor([0.3, -0.2]).tolist()
    for t in range(3, 7):
        xg.zero_grad()
        (net(t) + late.double().cos().sum()).backward()
        xg.step()
        oracle.step(gradients(oracle.predicted(), t))
        alone.step([-alone.predicted()[0].sin()])
    start = [*Net().parameters(), torch.tensor([0.3, -0.2])]
    assert_near(tensors(xg), [*oracle.predicted(), *alone.predicted()], start)
    assert_near(true_weights(xg), [*oracle.true(), *alone.true()], start)


@each_base
@pytest.mark.parametrize("with_model", [False, True])
def test_wrapping_an_optimizer_that_has_stepped(base, with_model):
    """It has a direction: the next forward pass is at predicted weights already."""
    net = Net()
    oracle = oracle_of(base, net, ahead=0)
    inner = BASES[base](net.parameters())
    train(net, inner, range(3))
    oracle.train(range(3))
    oracle.ahead = 2
    xg = lf.XGrad(inner, steps=2, model=net if with_model else None)
    train(net, xg, range(3, 6))
    oracle.train(range(3, 6))
    assert_is(xg, oracle)
