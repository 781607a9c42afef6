"""Capture of the CUDA engine's launches, on the host: a launch that is run again as it was."""

import copy

import pytest
import torch
from cuda_cases import SIZES, Cuda, asks, built, change, give, many_groups, on_host
from device_cases import written
from engines import ONE_PER_RULE, same_bits, tame
from host_cuda import capture, replay
from torch.optim.lr_scheduler import LambdaLR

ENGINE, pytestmark = Cuda, on_host
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
WARM_UP = "take one step with these parameters and groups before the capture"


@RULES
def test_a_replay_gives_the_bits_of_eager_steps(name, engine):
    engine.plans(grid=2)
    (eager, _), (opt, _) = (built(engine, name, max_grad_norm=1.0) for _ in range(2))
    for _ in range(5):
        eager.step()
    opt.step()
    with capture(), asks(launches=1):
        opt.step()
    for _ in range(4):
        replay()
    same_bits(written(opt), written(eager))
    assert not engine.counters(opt).any()


@pytest.mark.parametrize("name", ["sgd-dampening", "lars", "lamb", "novograd-decay"])
def test_a_captured_change_is_the_captures_own(name, engine):
    """Other gradients and another lr ride along with the launch. Neither do eager steps see them afterwards, nor does a
    replay see what eager steps changed since."""
    engine.plans(grid=2)
    (twin, others), (opt, params) = (built(engine, name, max_grad_norm=1.0) for _ in range(2))
    rate = opt.param_groups[0]["lr"]
    mine = list(tame(SIZES, 4))  # the captured gradients are [1]

    def run(one, own, t, lr, do):
        give(own, mine[t])
        one.param_groups[0]["lr"] = lr
        do()

    for one, own in ((twin, others), (opt, params)):
        run(one, own, 0, rate, one.step)
    with capture(), asks(launches=1):
        run(opt, params, 1, 0.5, opt.step)
    # eager steps with the captured numbers, too, and after a replay with those of the eager step before it
    eager, again = [(0, rate), (1, 0.5), (2, 0.25), (3, rate)], None
    for lot in (eager[1], again, eager[1], eager[0], again, eager[0], eager[2], again, again, eager[3]):
        run(twin, others, *(lot or (1, 0.5)), twin.step)
        run(opt, params, *lot, opt.step) if lot else replay()
        same_bits(written(opt), written(twin))


@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_captured_step_without_change_is_the_captures_own(kind, engine):
    """Nothing has to ride along then, and yet a replay must not follow what eager steps changed since. Leaves out the
    words of a large table that no launch can carry."""
    engine.plans(grid=2)
    twin, opt = (many_groups(engine) if kind == "large" else built(engine, "lamb")[0] for _ in range(2))
    rate = opt.param_groups[0]["lr"]
    opt.step()
    with capture():
        opt.step()
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    replay()
    for lr in (rate, 0.5, rate):
        twin.param_groups[0]["lr"] = lr
        twin.step()
    same_bits(written(opt), written(twin))


def test_a_capture_that_would_have_to_copy_says_so(engine):
    """Before the first step, and when too much has changed; nothing is written, and the next step is right."""
    eager, opt = many_groups(engine), many_groups(engine)
    for t in range(2):
        before = written(opt)
        change(opt, t)
        with capture(), asks(), pytest.raises(RuntimeError, match=WARM_UP):
            opt.step()
        same_bits(written(opt), before)
        opt.step()
        change(eager, t)
        eager.step()
        same_bits(written(opt), written(eager))


@RULES
def test_a_first_step_can_be_captured(name, engine):
    """What it says of addresses and numbers fits into the launch; the first eager step sends it all the same."""
    (twin, _), (opt, _) = (built(engine, name, max_grad_norm=1.0) for _ in range(2))
    with capture(), asks(launches=1):
        opt.step()
    for go in (replay, replay, opt.step, replay, opt.step):
        go()
        twin.step()
        same_bits(written(opt), written(twin))


def test_an_optimizer_made_in_capture_says_so(engine):
    with capture(), pytest.raises(RuntimeError, match=f"cannot capture an optimizer's first step: {WARM_UP}"):
        built(engine, "lamb")


@RULES
def test_a_schedule_is_followed_through_replay(name, engine):
    """A number that is a tensor on the device is read there by every replay; the twin steps with plain numbers."""
    engine.plans(grid=2)
    lr = torch.tensor(0.125, dtype=torch.float64)
    (twin, _), (opt, _) = (built(engine, name, lr=rate, max_grad_norm=1.0) for rate in (0.125, lr))
    schedules = [LambdaLR(one, lambda epoch: 0.9**epoch) for one in (twin, opt)]
    opt.step()
    with capture(), asks(launches=1):
        opt.step()
    for t in range(4):
        twin.step()
        replay() if t else None
        same_bits(written(opt), written(twin))
        for schedule in schedules:
            schedule.step()
    assert all(group["lr"] is lr for group in opt.param_groups) and lr == twin.param_groups[0]["lr"]


def test_many_groups_with_a_rate_each_through_replay(engine):
    """More words than a launch can carry: those of the groups lie on the device, and say where the rates lie."""
    twin, opt = many_groups(engine), many_groups(engine)
    rates = torch.linspace(0.0, 0.25, len(opt.param_groups), dtype=torch.float64)
    for one, own in ((twin, rates.tolist()), (opt, rates)):
        for group, rate in zip(one.param_groups, own, strict=True):
            group["lr"] = rate
        one.step()
    with capture(), asks(launches=1):
        opt.step()
    for factor in (0.5, 2.0):
        rates.mul_(factor)
        for group, rate in zip(twin.param_groups, rates.tolist(), strict=True):
            group["lr"] = rate
        twin.step()
        replay()
        same_bits(written(opt), written(twin))


@RULES
def test_resume_after_replay(name, engine):
    """What replays did is in the state_dict: another optimizer goes on from there, and so does the same one."""
    engine.plans(grid=2)
    (twin, _), (opt, params), (other, others) = (built(engine, name, max_grad_norm=1.0) for _ in range(3))
    opt.step()
    with capture():
        opt.step()
    replay()
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    replay()
    for one, own in ((other, others), (opt, params)):
        for p, weight in zip(own, weights, strict=True):
            p.data.copy_(weight)
        one.load_state_dict(saved)
        one.step()
        with capture(), asks(launches=1):
            one.step()
        replay()
    for _ in range(4):
        twin.step()
    for one in (opt, other):
        same_bits(written(one), written(twin))
