"""Whatever moves lr: predictions are those of the plain three phases with the lr of the forward pass.

Every loop is held against three phases by hand, bit for bit, and these against the float64 oracle. Left out: schedulers
beyond six of torch's (test_schedulers.py has them all: they only write into the groups).
"""

import pytest
import torch
from engines import make
from torch.optim import lr_scheduler as lrs
from xgrad_oracle import (
    Net,
    Oracle,
    assert_near,
    assert_same,
    gradients,
    snapshot,
    true_weights,
    values,
)

import layerfused as lf

pytestmark = pytest.mark.filterwarnings("error")  # as schedulers warn that nobody has stepped
STEPS = 12
SCHEDULES = {
    "warm-up": lambda opt: lrs.LambdaLR(opt, [lambda n: min(n / 4, 1), lambda n: min(n / 8, 1)]),  # from 0
    "cosine": lambda opt: lrs.CosineAnnealingLR(opt, T_max=STEPS),
    "warm-up and cosine": lambda opt: lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, start_factor=0.1, total_iters=4), lrs.CosineAnnealingLR(opt, T_max=8)], milestones=[4]
    ),
    "steps": lambda opt: lrs.StepLR(opt, step_size=3, gamma=0.5),
    "one cycle": lambda opt: lrs.OneCycleLR(opt, max_lr=0.1, total_steps=STEPS + 1),  # moves beta1 or momentum, too
    "plateau": lambda opt: lrs.ReduceLROnPlateau(opt, patience=1, factor=0.5),
}
NAMES = ["sgd-momentum", "adamw-decay", "lamb"]
TORCH = {"torch.AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
         "torch.SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9, foreach=True)}  # fmt: skip
CASE = {"torch.AdamW": "adamw-decay", "torch.SGD": "sgd-momentum"}  # of the oracle


def groups_of(net):
    return [{"params": [net.w1, net.b1], "lr": 0.02}, {"params": [net.w2, net.gain], "lr": 0.01}]


def inner_of(name, net, **more):
    return TORCH[name](groups_of(net)) if name in TORCH else make(name, groups_of(net), **more)


def advance(scheduler):
    scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))


# Loops as users write them. Each takes the network, XGrad and the scheduler, and says whether it gives XGrad the model


def usual(net, xg, scheduler):
    for t in range(STEPS):
        xg.zero_grad()
        net(t).backward()
        xg.step()
        advance(scheduler)


def scheduler_after_zero_grad(net, xg, scheduler):
    for t in range(STEPS):
        net(t).backward()
        xg.step()
        xg.zero_grad()
        advance(scheduler)


def zero_grad_after_forward(net, xg, scheduler):
    for t in range(STEPS):
        loss = net(t)
        xg.zero_grad(set_to_none=False)
        loss.backward()
        xg.step()
        advance(scheduler)


def train_before_forward(net, xg, scheduler):
    for t in range(STEPS):
        net.zero_grad()
        xg.train()
        net(t).backward()
        xg.step()
        advance(scheduler)


def closures(net, xg, scheduler):
    for t in range(STEPS):

        def closure(t=t):
            xg.zero_grad()
            loss = net(t)
            loss.backward()
            return loss

        xg.step(closure)
        advance(scheduler)


LOOPS = [(usual, False), (usual, True), (scheduler_after_zero_grad, True), (zero_grad_after_forward, True),
         (train_before_forward, False), (closures, False)]  # fmt: skip


def scheduled(loop, name, schedule, with_model, attached):
    """What `loop` leaves; the scheduler is given the inner optimizer, before or after it is wrapped, or XGrad."""
    net = Net()
    inner = inner_of(name, net)
    scheduler = schedule(inner) if attached == "before" else None
    xg = lf.XGrad(inner, steps=2, model=net if with_model else None)
    scheduler = scheduler or schedule(inner if attached == "inner" else xg)
    loop(net, xg, scheduler)
    return xg


def three_phases(name, schedule, ahead=2):
    """Predict, backward, restore, step, one call each. The oracle stays beside it, within the bound."""
    net, start = Net(), values(Net().parameters())
    oracle = Oracle(CASE.get(name, name), start, ahead)
    inner = inner_of(name, net)
    xg, scheduler = lf.XGrad(inner, steps=ahead), schedule(inner)
    for t in range(STEPS):
        oracle.follow(xg)
        oracle.step(gradients(oracle.predicted(), t))
        xg.train()
        net.zero_grad()
        net(t).backward()
        xg.eval()
        xg.step()
        advance(scheduler)
    oracle.follow(xg)
    xg.train()
    assert_near(net.parameters(), oracle.predicted(), start)
    assert_near(true_weights(xg), oracle.true(), start)
    return xg


def check(name, schedule):
    exact = snapshot(three_phases(name, schedule))
    for i, (loop, with_model) in enumerate(LOOPS):
        xg = scheduled(loop, name, schedule, with_model, ("inner", "outer", "before")[i % 3])
        xg.train()  # lr has moved once more
        assert_same(xg, exact)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_schedule(name, schedule):
    check(name, SCHEDULES[schedule])


@pytest.mark.parametrize("name", TORCH)
def test_schedule_of_torch(name):
    check(name, SCHEDULES["warm-up"])


@pytest.mark.parametrize("name", ["lars-lr-in-momentum", "larc", "novograd-averaging", "setadam", "ladam-post"])
def test_schedule_of_other_rules(name):
    check(name, SCHEDULES["warm-up and cosine"])


def test_a_stale_prediction_would_be_seen():
    """One that uses the lr of the step before lies out of the bound."""
    exact, stale = (Oracle("adamw-decay", Net().parameters(), ahead=1) for _ in range(2))
    for t in range(STEPS):
        for oracle, lag in ((exact, 0), (stale, 1)):
            for h in oracle.h:
                h.lr = 0.01 * 0.9 ** max(t - lag, 0)
            weights = oracle.predicted()
            for h in oracle.h:
                h.lr = 0.01 * 0.9**t
            oracle.step(gradients(weights, t))
    with pytest.raises(AssertionError, match="off by"):
        assert_near(stale.true(), exact.true(), Net().parameters())
