"""What a step of the CUDA engine does (device_step.py, too): loss scales, skipped steps, many groups."""

import math

import pytest
import torch
from cuda_cases import Cuda
from device_cases import DEVICE, there, written
from device_step import *  # noqa: F403
from engines import NAMED, ONE_PER_RULE, parameters, same_bits, starts, step, tame

from layerfused import cuda
from layerfused.plan import Phase

ENGINE = Cuda
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
SIZES = (1, 17, 300)


def scalar(x):
    return torch.tensor(x, dtype=torch.float32, device=DEVICE)


def scaled_step(opt, params, grads, grad_scale=None, found_inf=None):
    """A step as torch.amp.GradScaler asks for it, by the launch itself."""
    (launch,) = opt._current()
    launch.grad_scale, launch.found_inf = (x if x is None else scalar(x) for x in (grad_scale, found_inf))
    step(opt, params, there(grads))
    return launch


# Powers of two, so that scaled gradients have the same bits; a clip that is at work, one that is not, and none.
@pytest.mark.parametrize("clip", [None, 20.0, 1e9], ids=str)
@RULES
def test_a_loss_scale_is_undone(name, clip, engine):
    found = []
    for factor in (1.0, 1024.0):
        opt, params = engine.train(name, starts(SIZES), [], max_grad_norm=clip)
        for grads in tame(SIZES, 2):
            scale, inf = (None, None) if factor == 1 else (factor, 0.0)
            launch = scaled_step(opt, params, [factor * g for g in grads], scale, inf)
        found.append(written(opt) | {"norm": launch.norm.cpu(), "stats": launch.stats.cpu()})
        assert opt.skipped_steps == 0 and not engine.counters(opt).any()
    same_bits(*found)
    exact = sum((p.grad.double() ** 2).sum() for p in params).sqrt() / 1024
    if clip:
        torch.testing.assert_close(opt.grad_norm, exact, rtol=1e-12, atol=0)  # of the gradients as they were


# Whatever else there is: clip or not, a norm that is not finite either, gradients that are or are not.
@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("clip", [None, 2.0], ids=["", "clip"])
@pytest.mark.parametrize("name", ["sgd", "lamb", "novograd-decay", "adabeliefnorm"])
def test_a_step_that_found_inf_changes_nothing(name, clip, found_inf, engine):
    """Nor does it take the number of a step; several blocks agree on it, and the next step is as if it had not been."""
    first, second = tame(SIZES, 2)
    (opt, params), (twin, others) = (engine.train(name, starts(SIZES), [first], max_grad_norm=clip) for _ in range(2))
    before = written(opt)
    poisoned = [g.clone() for g in second]
    poisoned[1][3] = math.inf
    for t, grads in enumerate((second, poisoned), 1):
        scaled_step(opt, params, grads, 8.0, found_inf)
        same_bits(written(opt), before)
        assert opt.skipped_steps == t and not engine.counters(opt).any()
    for one, own in ((opt, params), (twin, others)):
        scaled_step(one, own, second, 1.0, 0.0)
    same_bits(written(opt), written(twin))
    assert opt.skipped_steps == 2 and twin.skipped_steps == 0


def test_a_scale_that_is_not_finite_is_a_norm_that_is_not(engine):
    opt, params = engine.train("lamb", starts(SIZES), tame(SIZES, 1), max_grad_norm=1.0)
    before = written(opt)
    scaled_step(opt, params, next(tame(SIZES, 1)), math.nan, 0.0)
    same_bits(written(opt), before)
    assert opt.skipped_steps == 1 and opt.grad_norm.isnan()


@pytest.mark.parametrize("clip", [None, 2.0], ids=["", "clip"])
def test_a_skipped_step_in_phases_counts_once(clip, engine):
    opt, params = engine.train("lamb", starts(SIZES), tame(SIZES, 1), max_grad_norm=clip)
    before = written(opt)
    (launch,) = opt._read()
    launch.found_inf = scalar(1.0)
    for phase in (Phase.NORM, Phase.REDUCE, Phase.FINISH, Phase.APPLY)[clip is None :]:
        launch.run(phase, opt._rows(launch), clip or 0.0, opt.skipped_steps)
    same_bits(written(opt), before)
    assert opt.skipped_steps == 1 and not engine.counters(opt).any()


# A block keeps the scalars of the eight groups that it met last, each at the step where it met it. Here applies stand
# beside reduces of eight groups later, and the tensors of a group are at different steps.
@pytest.mark.parametrize("grid", [1, 3])
@RULES
def test_many_groups_at_different_steps(name, grid, engine, monkeypatch):
    engine.plans(tile=16, grid=grid)
    monkeypatch.setattr(cuda, "AHEAD", 8 * 62)
    sizes, steps = (5, 40, 17), 3
    every = list(tame(sizes, steps))

    def gradients(k, t):  # tensor i of group k rests at some steps, and is then behind the first
        return [None if i and (t + k + i) % 3 == 0 else g for i, g in enumerate(every[t])]

    def final(chosen):
        params = parameters(there(starts(sizes) * len(chosen)))
        shares = zip(*[iter(params)] * len(sizes), strict=True)
        groups = [{"params": list(own), "lr": 0.5 ** (1 + k % 5)} for k, own in zip(chosen, shares, strict=True)]
        opt = engine.make(name, groups)
        assert opt.traffic()["launches"] == 1
        for t in range(steps):
            step(opt, params, there(g for k in chosen for g in gradients(k, t)))
        assert {int(opt.state[p]["step"]) for p in params} == {2, 3}
        return params

    together = final(range(20))
    for k in range(0, 20, 6):
        for p, q in zip(together[3 * k : 3 * k + 3], final((k,)), strict=True):
            assert torch.equal(p, q), f"group {k}"


# Zero among them, with which a coupled decay reads no p; leaves out other numbers of a row, which are read alike.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in ONE_PER_RULE if "weight_decay" in NAMED[name].hyper])
def test_weight_decay_on_the_device(name, dtype, engine):
    rates = (0.25, 0.0, 0.0625)
    decay = torch.tensor(rates[0], dtype=dtype, device=DEVICE)
    found = []
    for value in (decay, None):
        params = parameters(there(starts(SIZES)))
        opt = engine.make(name, params, weight_decay=rates[0] if value is None else value)
        for grads, rate in zip(tame(SIZES, 3), rates, strict=True):
            decay.fill_(rate)
            if value is None:
                opt.param_groups[0]["weight_decay"] = rate
            step(opt, params, there(grads))
        found.append(written(opt))
    same_bits(*found)


def test_float64_on_the_device_keeps_its_digits(engine):
    """A number that float32 has not: as the same number on the host, which is a double, too."""
    found = []
    for lr in (torch.tensor(1 / 3, dtype=torch.float64, device=DEVICE), 1 / 3):
        opt, _ = engine.train("lamb", starts(SIZES), tame(SIZES, 1), lr=lr)
        found.append(written(opt))
    same_bits(*found)
