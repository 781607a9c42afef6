"""What only a GPU can show: launches, streams, graphs, blocks that really run at once.

The arithmetic is tested by the other files of an engine, which use a GPU where there is one.
"""

import pytest
import torch
from device_cases import there, written
from engines import LAYERWISE, ONE_PER_RULE, make, parameters, same_bits, starts, tame
from test_engine_bits import mixed

from bench import device
from layerfused.backends import cuda_is_missing, unserved_gpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
DRAWN = {"dtype": torch.bfloat16, "precision": ("stochastic", "bf16-states")}
SIZES = (5, 1000, 1024, 1025, 0, 70_001, 300_000, 4097)  # whole, one chunk, many


def give(params, grads):
    """The same tensors every time, so that nothing is sent to the device again."""
    for p, g in zip(params, there(grads), strict=True):
        p.grad = g


def built(engine, name, dtype=torch.float32, **more):
    params = parameters(there(x.to(dtype) for x in starts(SIZES)))
    opt = engine.make(name, mixed(name)(params), **more)
    give(params, [g.to(dtype) for g in next(tame(SIZES, 1))])
    return opt, params


@RULES
def test_a_step_is_one_launch(name, engine):
    """And nothing else on the device, whatever groups and clip, once addresses and numbers are there."""
    opt, _ = built(engine, name, max_grad_norm=1.0)
    opt.step()
    opt.step()
    calls = device.on("cuda").launches(opt.step)
    if calls["launches"] is None:
        pytest.skip("the profiler sees no launches here: CUPTI is not permitted")
    assert calls == {"launches": 1, "memcpys": 0, "memsets": 0}


@pytest.mark.parametrize("stored", [{}, DRAWN], ids=["float32", "stochastic"])
@RULES
def test_a_replayed_graph_gives_the_bits_of_eager_steps(name, stored, engine):
    """Noise goes on with the steps: their number is on the device."""
    eager, _ = built(engine, name, max_grad_norm=1.0, **stored)
    opt, _ = built(engine, name, max_grad_norm=1.0, **stored)
    for _ in range(5):
        eager.step()
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(4):
        graph.replay()
    same_bits(written(opt), written(eager))


@RULES
def test_a_hundred_runs(name, engine):
    """Two steps each; blocks meet in another order every time."""
    gradients = list(tame(SIZES, 2))
    first = written(engine.train(name, starts(SIZES), gradients, mixed(name), max_grad_norm=1.0)[0])
    for _ in range(99):
        same_bits(written(engine.train(name, starts(SIZES), gradients, mixed(name), max_grad_norm=1.0)[0]), first)


@pytest.mark.parametrize("grid", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("name", LAYERWISE)
def test_any_number_of_blocks(name, grid, engine):
    gradients = list(tame(SIZES, 2))
    first = written(engine.train(name, starts(SIZES), gradients, mixed(name), max_grad_norm=1.0)[0])
    engine.blocks(grid)
    same_bits(written(engine.train(name, starts(SIZES), gradients, mixed(name), max_grad_norm=1.0)[0]), first)


def test_the_current_stream_is_used(engine):
    """Gradients that a side stream is still writing are waited for there."""
    opt, params = built(engine, "lamb")
    exact, _ = built(engine, "lamb")
    exact.step()
    stream = torch.cuda.Stream()
    values = [p.grad.clone() for p in params]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for p in params:
            p.grad.zero_()
        torch.cuda._sleep(50_000_000)
        for p, value in zip(params, values, strict=True):
            p.grad.copy_(value)
        opt.step()
    stream.synchronize()
    same_bits(written(opt), written(exact))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_devices_are_two_launches(engine):
    values, grads = starts(SIZES), next(tame(SIZES, 1))
    params = [torch.nn.Parameter(value.to(f"cuda:{k % 2}")) for k, value in enumerate(values)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.device)
    opt = engine.make("lamb", params, max_grad_norm=None)
    assert opt.traffic()["launches"] == 2
    opt.step()
    one, _ = engine.train("lamb", values, [grads], max_grad_norm=None)
    for p, q in zip(params, one.param_groups[0]["params"], strict=True):
        assert torch.equal(p.detach().cpu(), q.detach().cpu())


def test_auto(engine):
    """On a GPU the CUDA engine, or else Triton; a float64 parameter goes to the reference engine."""
    params = parameters(there(starts((5, 3000))))
    best = "triton" if cuda_is_missing() or unserved_gpu(params[0].device) else "cuda"
    assert make("lamb", params).engines == {best: 2}
    assert make("lamb", [torch.nn.Parameter(p.detach().double()) for p in params]).engines == {"reference": 2}
