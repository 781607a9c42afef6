"""CUDA graphs around training, which only a GPU can show: schedules, whole training steps, resuming, compiled steps.

Left out: graphs of several streams, and arithmetic, which the other files of an engine have.
"""

import copy

import pytest
import torch
from conduct import assert_exact
from device_cases import DEVICE, written
from device_gpu import RULES, built
from engines import same_bits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bench import device

NAMES = pytest.mark.parametrize("name", ["sgd-dampening", "lars", "lamb"])
WARM, REPLAYS = 3, 4  # eager steps before a capture, as torch wants them on another stream, and replays behind it


def schedule(opt):
    return LambdaLR(opt, lambda epoch: 0.9**epoch)


def graph_of(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@RULES
def test_a_schedule_is_followed_through_replay(name, engine):
    """A number that is a tensor on the device is read there by every replay; the twin steps with plain numbers."""
    lr = torch.tensor(0.125, dtype=torch.float64, device=DEVICE)
    (twin, _), (opt, _) = (built(engine, name, lr=rate, max_grad_norm=1.0, capturable=True) for rate in (0.125, lr))
    schedules = [schedule(one) for one in (twin, opt)]
    opt.step()
    graph = graph_of(opt.step)
    for t in range(REPLAYS):
        twin.step()
        graph.replay() if t else None
        same_bits(written(opt), written(twin))
        for each in schedules:
            each.step()


def test_a_replay_is_one_launch(engine):
    """Nothing else is done on the device for it."""
    opt, _ = built(engine, "lamb", max_grad_norm=1.0)
    opt.step()
    calls = device.on("cuda").launches(graph_of(opt.step).replay)
    if calls["launches"] is None:
        pytest.skip("the profiler sees no launches here: CUPTI is not permitted")
    assert calls == {"launches": 1, "memcpys": 0, "memsets": 0}


@RULES
def test_nobody_waits_for_the_device(name, engine):
    """Neither an eager step, with numbers on host and device that change, nor a replay."""
    lr = torch.tensor(0.125, device=DEVICE)
    opt, _ = built(engine, name, lr=lr, max_grad_norm=1.0)
    opt.step()
    graph = graph_of(opt.step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(3):
            lr.mul_(0.5)
            opt.param_groups[0]["weight_decay"] = 0.01 * t
            opt.step()
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Training


class Training:
    """A small model in training, eagerly or in a graph.

    Attributes:
        fresh: whether each step's gradients are new tensors; else they stay where they are and are zeroed.
    """

    def __init__(self, engine, name, fresh):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).to(DEVICE)
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.lr = torch.tensor(0.125, dtype=torch.float64, device=DEVICE)
        self.opt = engine.make(name, self.model.parameters(), lr=self.lr, max_grad_norm=1.0)
        self.schedule, self.fresh, self.graph = schedule(self.opt), fresh, None
        self.x, self.t = torch.empty(32, 64, device=DEVICE), 0

    def step(self):
        """The next batch, by a replay once there is a graph."""
        self.x.copy_(torch.randn(self.x.shape, generator=torch.Generator().manual_seed(self.t)))
        self.t += 1
        self.graph.replay() if self.graph else self.work()
        self.schedule.step()

    def work(self):
        self.opt.zero_grad(set_to_none=self.fresh)
        self.model(self.x).square().mean().backward()
        self.opt.step()

    def warm_up(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self):
        self.opt.zero_grad(set_to_none=self.fresh)
        self.graph = graph_of(self.work)


def new_gradients(engine):
    """Whether a step may be captured whose gradients lie where none lay before."""
    return [False, True] if engine.backend == "cuda" else [False]


def near(training, exact):
    """Matrix products of a graph may be other kernels than those of an eager step."""
    triples = zip(training.model.parameters(), exact.model.parameters(), training.start, strict=True)
    for p, q, start in triples:
        assert_exact(p, q, start)
    assert torch.equal(training.lr, exact.lr)


@NAMES
def test_a_whole_training_step(name, engine):
    for fresh in new_gradients(engine):
        eager, training = (Training(engine, name, fresh) for _ in range(2))
        training.warm_up()
        training.capture()
        for _ in range(REPLAYS):
            training.step()
        for _ in range(WARM + REPLAYS):
            eager.step()
        near(training, eager)


@NAMES
def test_resume_after_replay(name, engine):
    """What replays did is in the state_dict: training goes on from there, eagerly and in a new graph."""
    eager, training, other = (Training(engine, name, False) for _ in range(3))
    training.warm_up()
    training.capture()
    training.step()
    other.model.load_state_dict(training.model.state_dict())
    other.opt.load_state_dict(copy.deepcopy(training.opt.state_dict()))
    other.schedule.load_state_dict(training.schedule.state_dict())
    other.lr, other.t = other.opt.param_groups[0]["lr"], training.t
    other.warm_up()
    other.capture()
    other.step()
    for _ in range(2 * (WARM + 1)):
        eager.step()
    near(other, eager)


@NAMES
def test_graphed_callables(name, engine):
    """Forward and backward are graphs of torch's, whose gradients the eager step finds."""
    eager, training = (Training(engine, name, False) for _ in range(2))
    training.model = torch.cuda.make_graphed_callables(training.model, (training.x.clone(),))
    for _ in range(REPLAYS):
        eager.step()
        training.step()
    near(training, eager)


@NAMES
def test_a_compiled_step_follows_a_rate_that_is_a_number(name, engine):
    """mode="reduce-overhead" makes CUDA graphs, which would freeze it: the operator is kept out of them."""
    (twin, _), (opt, _) = (built(engine, name, max_grad_norm=1.0) for _ in range(2))
    torch._dynamo.reset()
    update = torch.compile(opt.step, mode="reduce-overhead")
    for t in range(REPLAYS):
        for one, do in ((twin, twin.step), (opt, update)):
            one.param_groups[0]["lr"] = 0.5**t
            do()
        same_bits(written(opt), written(twin))
