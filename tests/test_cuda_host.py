"""The CUDA engine's host side: what a step asks of CUDA, when copies are queued, and when calls fail."""

import pytest
import torch
from cuda_cases import SIZES, Cuda, asks, built, change, give, many_groups, on_host
from device_cases import written
from engines import ONE_PER_RULE, parameters, same_bits, starts, tame
from host_cuda import deferred, shim
from test_engine_storage import TYPES

ENGINE, pytestmark = Cuda, on_host
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)


# What a step asks for


@RULES
def test_a_step_is_one_launch_and_nothing_else(name, engine):
    """For all groups, layers and types; once there was a first step, whatever changes."""
    engine.plans()
    opt, params = built(engine, name, max_grad_norm=1.0)
    with asks(launches=1, copies=1, allocations=1):
        opt.step()
    for t, grads in enumerate(tame(SIZES, 4)):
        with asks(launches=1):
            opt.step()
        change(opt, t)
        with asks(launches=1):
            opt.step()
        give(params, [None if i == t else g for i, g in enumerate(grads)])  # elsewhere, and one is absent
        with asks(launches=1):
            opt.step()


def test_released_gradients_are_a_launch_each(engine):
    """Within backward(); the numbers are those of one launch for all."""

    def build():
        params = parameters(x.to(TYPES[i % 3]) for i, x in enumerate(starts(SIZES)))
        groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "adapt": False}]
        return engine.make("lamb", groups, max_grad_norm=None), params

    (opt, params), (twin, twins) = build(), build()
    twin.release_gradients()
    for t, grads in enumerate(tame(SIZES, 3)):
        for p, q, g in zip(params, twins, grads, strict=True):
            p.grad = g.to(p.dtype)
            with asks(launches=1, copies=int(t == 0), allocations=int(t == 0)):  # the first brings tables along
                (q * p.grad).sum().backward()
        with asks():
            twin.step()
        opt.step()
    same, other = ([(p, *one.state[p].values()) for p in its] for one, its in ((opt, params), (twin, twins)))
    for mine, theirs in zip(same, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    assert twin.layer_stats() == opt.layer_stats()


def test_making_an_optimizer_copies_the_plan(engine):
    with asks(copies=2):
        built(engine, "lamb")


def test_large_tables_are_copied_only_when_they_change(engine):
    opt = many_groups(engine)
    for t in range(5):
        with asks(launches=1, copies=1, allocations=int(t < 4)):
            change(opt, t)
            opt.step()
        with asks(launches=1):
            opt.step()
        with asks(launches=1):  # a small part of them
            opt.param_groups[7]["lr"] = 0.5
            opt.step()


# Queued copies and launches: whatever is on its way must not be overwritten


def after_steps(opt, steps):
    for t in range(steps):
        change(opt, t)
        opt.step()
    return opt


@pytest.mark.parametrize("kind", ["small", "large"])
def test_queued_steps_keep_their_numbers(kind, engine):
    def build():
        return many_groups(engine) if kind == "large" else built(engine, "lamb", max_grad_norm=1.0)[0]

    eager, queued = after_steps(build(), 10), build()
    untouched = written(queued)
    with deferred():
        with asks(
            **{"launches": 10, "copies": 1, "allocations": 1}
            | ({"copies": 10, "allocations": 4, "waits": 6} if kind == "large" else {})
        ):
            after_steps(queued, 10)
        if kind == "small":
            same_bits(written(queued), untouched)  # nothing has run
    same_bits(written(queued), written(eager))


def test_an_engine_that_goes_waits_for_its_copies(engine):
    """They read from its memory."""
    opt = many_groups(engine)
    with deferred():
        opt.step()
        with asks(waits=1):
            opt._launches[0]._native = None
    assert all(opt.state[p]["step"] == 1 for p in opt._params)


# Calls that fail

LAUNCH = "CUDA could not launch the step: cudaErrorNoKernelImageForDevice, no kernel image is available"
PINNED = "CUDA could not allocate pinned memory for the tables: cudaErrorMemoryAllocation, out of memory"


@pytest.mark.parametrize("what, steps, call", [(PINNED, 0, 1), (LAUNCH, 0, 2), (LAUNCH, 1, 1)])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_call_that_fails(kind, what, steps, call, engine):
    """Nothing is half updated; the next step is as if it had not been, and a failure more changes nothing of that."""
    opt, twin = (many_groups(engine) if kind == "large" else built(engine, "lamb")[0] for _ in range(2))
    after_steps(opt, steps), after_steps(twin, steps)
    for one in (opt, twin):
        one.param_groups[0]["lr"] = 0.25
    before = written(opt)
    for _ in range(2):
        shim().shim_fail(call)
        with pytest.raises(RuntimeError, match=what):
            opt.step()
        same_bits(written(opt), before)
        call = 1 if what == LAUNCH else call  # by then its tables are there
    for one in (opt, twin):
        one.step()
    same_bits(written(opt), written(twin))


@pytest.mark.parametrize("failing", [1, 2])
def test_two_launches_of_which_one_cannot_be_made(failing, engine):
    """Found before the first has written anything."""
    params = parameters(starts((5, 300)))
    opt = engine.make("ladam", [{"params": params[:1]}, {"params": params[1:], "processing": "post"}])
    give(params, next(tame((5, 300), 1)))
    before = written(opt)
    shim().shim_fail(failing)
    with pytest.raises(RuntimeError, match=PINNED):
        opt.step()
    same_bits(written(opt), before)
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [1, 1]


def test_the_current_device_stays(engine):
    """The engine works on its parameters' device, and leaves the current one as it found it, when it fails too."""
    shim().shim_current_device(3)
    try:
        opt, _ = built(engine, "lamb")
        opt.step()
        assert shim().shim_device() == 3
        shim().shim_fail(1)
        with pytest.raises(RuntimeError, match=LAUNCH):
            opt.step()
        assert shim().shim_device() == 3
    finally:
        shim().shim_current_device(0)
