"""What only a GPU can show of the CUDA engine, beside device_gpu.py, device_graphs.py: captured changes, host time."""

import time

import pytest
import torch
from cuda_cases import Cuda
from device_cases import there, written
from device_gpu import *  # noqa: F403
from device_gpu import built, give, needs_gpu
from device_graphs import *  # noqa: F403
from engines import parameters, same_bits, starts, tame

ENGINE, pytestmark = Cuda, needs_gpu


def captured(opt):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


@pytest.mark.parametrize("name", ["sgd-dampening", "lars", "lamb", "novograd-decay"])
def test_a_captured_change_is_the_captures_own(name, engine):
    """Other gradients and another lr: eager steps do not see them afterwards, nor a replay what those change."""
    (twin, others), (opt, params) = (built(engine, name, max_grad_norm=1.0) for _ in range(2))
    rate, mine = opt.param_groups[0]["lr"], [there(grads) for grads in tame([p.numel() for p in params], 4)]

    def run(one, own, t, lr, do):
        give(own, mine[t])
        one.param_groups[0]["lr"] = lr
        return do()

    for one, own in ((twin, others), (opt, params)):
        run(one, own, 0, rate, one.step)
    graph = run(opt, params, 1, 0.5, lambda: captured(opt))
    # eager steps with the captured numbers, too, and after a replay with those of the eager step before it
    eager, again = [(0, rate), (1, 0.5), (2, 0.25), (3, rate)], None
    for lot in (eager[1], again, eager[1], eager[0], again, eager[0], eager[2], again, again, eager[3]):
        run(twin, others, *(lot or (1, 0.5)), twin.step)
        run(opt, params, *lot, opt.step) if lot else graph.replay()
        same_bits(written(opt), written(twin))


def test_a_first_step_can_be_captured(engine):
    """What it says of addresses and numbers fits into the launch."""
    (twin, _), (opt, _) = (built(engine, "lamb") for _ in range(2))
    graph = captured(opt)
    for _ in range(3):
        graph.replay()
        twin.step()
    same_bits(written(opt), written(twin))


def test_many_queued_copies(engine):
    """Tables that are sent anew with each of a hundred steps that nobody waits for."""

    def final(wait):
        params = parameters(there(starts((3,)) * 420))
        opt = engine.make("lamb", [{"params": [p]} for p in params])
        give(params, next(tame((3,), 1)) * 420)
        torch.cuda.synchronize()
        torch.cuda._sleep(0 if wait else 100_000_000)
        for t in range(100):
            for k, group in enumerate(opt.param_groups):
                group["lr"] = 0.01 * (1 + (t + k) % 7)
            opt.step()
            torch.cuda.synchronize() if wait else None
        return written(opt)

    same_bits(final(False), final(True))


def test_a_step_allocates_nothing(engine):
    opt, _ = built(engine, "lamb", max_grad_norm=1.0)
    opt.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for t in range(3):
        opt.param_groups[0]["lr"] = 0.1 * (t + 1)
        opt.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_host_time(engine):
    """Printed, not asserted: it is the processor's affair. 80 µs for 161 tensors is what there should be."""
    params = parameters(there(starts((64,)) * 161))
    opt = engine.make("lamb", params, max_grad_norm=None)
    give(params, next(tame((64,), 1)) * 161)
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    print(f"host time of a step over 161 tensors: {sorted(times)[150] * 1e6:.0f} µs")


def test_the_second_device_is_left_as_it_was(engine):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    torch.cuda.set_device(1)
    try:
        opt, _ = built(engine, "lamb")
        opt.step()
        assert torch.cuda.current_device() == 1
    finally:
        torch.cuda.set_device(0)
