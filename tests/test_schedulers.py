"""Every scheduler of torch.optim.lr_scheduler drives our AdamW as it drives torch's: the same lr, the same parameters.

Left out: schedules of real length, and rules other than Adam's, which read lr and momentum in the same place.
"""

import inspect

import pytest
import torch
from conduct import assert_near, copies, each_case, give, make, parameters, same_bits, train
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import layerfused as lf

SCHEDULERS = {
    "LambdaLR": lambda opt: lrs.LambdaLR(opt, [lambda n: 0.9**n, lambda n: 1 / (n + 1)]),
    "MultiplicativeLR": lambda opt: lrs.MultiplicativeLR(opt, lambda n: 0.8),
    "StepLR": lambda opt: lrs.StepLR(opt, step_size=3, gamma=0.5),
    "MultiStepLR": lambda opt: lrs.MultiStepLR(opt, milestones=[2, 5], gamma=0.5),
    "ConstantLR": lambda opt: lrs.ConstantLR(opt, factor=0.5, total_iters=4),
    "LinearLR": lambda opt: lrs.LinearLR(opt, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda opt: lrs.ExponentialLR(opt, gamma=0.7),
    "PolynomialLR": lambda opt: lrs.PolynomialLR(opt, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda opt: lrs.CosineAnnealingLR(opt, T_max=5),
    "CosineAnnealingWarmRestarts": lambda opt: lrs.CosineAnnealingWarmRestarts(opt, T_0=3),
    "CyclicLR": lambda opt: lrs.CyclicLR(opt, base_lr=1e-3, max_lr=1e-1, step_size_up=3),  # cycles beta1, too
    "OneCycleLR": lambda opt: lrs.OneCycleLR(opt, max_lr=0.1, total_steps=11),
    "ReduceLROnPlateau": lambda opt: lrs.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "ChainedScheduler": lambda opt: lrs.ChainedScheduler(
        [lrs.ConstantLR(opt, total_iters=3), lrs.ExponentialLR(opt, gamma=0.9)]
    ),
    "SequentialLR": lambda opt: lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, total_iters=3), lrs.ExponentialLR(opt, gamma=0.9)], milestones=[4]
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.02, anneal_epochs=4),
}
STEPS = 10


def test_every_scheduler_is_here():
    public = {name for name, found in inspect.getmembers(lrs, inspect.isclass) if issubclass(found, lrs.LRScheduler)}
    public = {name for name in public if not name.startswith("_")} | set(lrs.__all__)
    assert public - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


def advance(scheduler):
    scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))


def groups_of(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name):
    start, params, mine = parameters(), parameters(), parameters()
    pairs = []
    for cls, own in ((torch.optim.AdamW, params), (lf.AdamW, mine)):
        opt = cls(groups_of(own), lr=0.05)
        pairs.append((opt, SCHEDULERS[name](opt), own))
    for n in range(STEPS):
        seen = []
        for opt, scheduler, own in pairs:
            train(opt, own, [n])
            advance(scheduler)
            seen.append([(group["lr"], group["betas"]) for group in opt.param_groups])
        assert seen[0] == seen[1]
    for p, q, p0 in zip(params, mine, start, strict=True):
        assert_near(q, p, p0, STEPS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resume_in_the_middle_of_a_schedule(name):
    params = parameters()
    opt = lf.AdamW(groups_of(params), lr=0.05)
    scheduler = SCHEDULERS[name](opt)
    for n in range(4):
        train(opt, params, [n])
        advance(scheduler)
    resumed = copies(params)
    other = lf.AdamW(groups_of(resumed), lr=0.05)
    follower = SCHEDULERS[name](other)
    follower.load_state_dict(scheduler.state_dict())
    other.load_state_dict(opt.state_dict())
    for n in range(4, STEPS):
        for each, its, own in ((opt, scheduler, params), (other, follower, resumed)):
            train(each, own, [n])
            advance(its)
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in other.param_groups]
    assert all(same_bits(p, q) for p, q in zip(params, resumed, strict=True))


@pytest.mark.parametrize("shape", [(), (1,)])
@each_case
def test_lr_as_a_tensor(case, shape):
    """Powers of two, so that float32 holds each lr exactly. A scheduler fills the tensor, which stays in its group."""
    params, others = parameters(), parameters()
    lr = torch.full(shape, 0.125)
    opt, other = make(case, params, lr=lr), make(case, others, lr=0.125)
    schedulers = [lrs.StepLR(o, step_size=1, gamma=0.5) for o in (opt, other)]
    for seed in range(3):
        give(params, seed)
        give(others, seed)
        for o, scheduler in zip((opt, other), schedulers, strict=True):
            o.step()
            scheduler.step()
    assert opt.param_groups[0]["lr"] is lr and lr == other.param_groups[0]["lr"] == 0.125 / 8
    assert all(same_bits(p, q) for p, q in zip(params, others, strict=True))


def test_momentum_of_sgd_is_cycled():
    """The rule's variant without a buffer is left and taken up again as momentum passes 0."""
    start, params, mine = parameters(), parameters(), parameters()
    opts = [torch.optim.SGD(params, lr=0.1, momentum=0.5), lf.SGD(mine, lr=0.1, momentum=0.5)]
    for n, momentum in enumerate((0.5, 0.9, 0.0, 0.0, 0.9)):
        for opt, own in zip(opts, (params, mine), strict=True):
            opt.param_groups[0]["momentum"] = momentum
            train(opt, own, [n])
    for p, q, p0 in zip(params, mine, start, strict=True):
        assert_near(q, p, p0, 5)
