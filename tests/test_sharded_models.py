"""Models under FSDP2, HSDP and tensor parallelism, every rule: five steps are those of one process on the joint batch.

FSDP computes in float64 here, so that gradients are the same but for their last rounding; tensor parallelism alone does
not. Left out: models whose parts step at different times, mixed precision as one uses it, CPU offload.
"""

from functools import cache

import pytest
import torch
from conduct import EACH
from ranks import run
from sharding import assert_whole, make, mesh, ranks_agree, told
from torch import nn

import layerfused as lf

STEPS = 5
BY_NAME = {case.name: case for case in EACH}
FEW = ("adamw", "lamb", "novograd", "setadam")
WAYS = {"fsdp": BY_NAME, "tp-fsdp": BY_NAME, "hsdp": FEW, "tp": FEW}  # the rules that go each way
CLIPPED = ("fsdp", "tp-fsdp")


class Net(nn.Module):
    """Over four ranks some rows of every tensor are uneven, and of `down` and `norm` one rank has none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def batch(t):
    random = torch.Generator().manual_seed(t)
    return torch.randn(8, 4, 6, generator=random), torch.randn(8, 4, 5, generator=random)


def parallel(net):
    """Tensor and sequence parallel, as one does: what `norm` and the bias of `down` get are sums still to be taken."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import parallel as tp

    plan = {
        "norm": tp.SequenceParallel(),
        "up": tp.ColwiseParallel(input_layouts=Shard(1)),
        "down": tp.RowwiseParallel(output_layouts=Shard(1)),
    }
    return tp.parallelize_module(net, mesh(2, 2)["inner"], plan)


def sharded(net, over, dtype=torch.float64, **more):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for module in (net.norm, net.up, net.down, net):
        fully_shard(module, mesh=over, mp_policy=policy, **more)
    return net


def built(way):
    """The model, laid over ranks, and what of a batch it gets here: (slices of samples and of the sequence)."""
    net, world, rank = Net(), torch.distributed.get_world_size(), torch.distributed.get_rank()
    part = slice(rank, None, world)
    if way in ("fsdp", "hsdp"):
        return sharded(net, mesh(world) if way == "fsdp" else mesh(2, 2)), (part, slice(None))
    outer, inner = mesh(2, 2).get_coordinate()
    net, sequence = parallel(net), slice(2 * inner, 2 * inner + 2)
    if way == "tp":
        return net, (slice(None), sequence)
    return sharded(net, mesh(2, 2)["outer"]), (slice(outer, None, 2), sequence)


def loss_of(output, y, count):
    return (output - y).square().sum() / count


def trained(net, name, clip, backward):
    opt = make(BY_NAME[name], lf.param_groups(net), max_grad_norm=0.1 if clip else None)
    for t in range(STEPS):
        opt.zero_grad()
        backward(net, *batch(t))
        opt.step()
    return told(opt, list(net.parameters()))


def on_ranks(ways):
    found = {}
    for way in ways:
        net, part = built(way)
        dtype = torch.float32 if way == "tp" else torch.float64

        def backward(net, x, y, part=part, dtype=dtype):
            x, y = x[part].to(dtype), y[part].to(dtype)
            loss_of(net(x), y, 5 * 4 * len(x)).backward()

        start = [p.to_local().clone() for p in net.parameters()]
        for name in WAYS[way]:
            with torch.no_grad():
                for p, x in zip(net.parameters(), start, strict=True):
                    p.to_local().copy_(x)
            found[name, way] = trained(net, name, way in CLIPPED, backward)
    return found


def joint(net, x, y):
    """The backward pass of one process over the whole batch, in double."""
    params = {name: p.double() for name, p in net.named_parameters()}
    loss_of(torch.func.functional_call(net, params, (x.double(),)), y.double(), y.numel()).backward()


@cache
def alone(name, clip):
    return trained(Net(), name, clip, joint)


@pytest.fixture(scope="module")
def four():
    return run(on_ranks, 4, list(WAYS), timeout=120)


@pytest.fixture(scope="module")
def two():
    return run(on_ranks, 2, ["fsdp"])


def check(found, name, way, allowed=1e-6):
    ranks_agree([rank[name, way] for rank in found])
    assert_whole(found[0][name, way], alone(name, way in CLIPPED), list(Net().parameters()), allowed)


@pytest.mark.parametrize("way, name", [(way, name) for way, names in WAYS.items() for name in names])
def test_four_ranks(four, way, name):
    check(four, name, way, 1e-5 if way == "tp" else 1e-6)


@pytest.mark.parametrize("name", BY_NAME)
def test_two_ranks(two, name):
    check(two, name, "fsdp")


# Parameters that FSDP leaves alone, and frozen ones


def freeze(net):
    net.up.bias.requires_grad_(False)
    return net


def with_plain_parameters():
    """`down` is nobody's shard: its gradient is averaged by hand."""
    net, rank = freeze(Net()), torch.distributed.get_rank()
    theirs = set(net.down.parameters())
    sharded(net, mesh(4), torch.float32, ignored_params=theirs)

    def backward(net, x, y):
        x, y = x[rank::4], y[rank::4]
        loss_of(net(x), y, y.numel()).backward()
        for p in theirs:
            torch.distributed.all_reduce(p.grad)
            p.grad /= 4

    return trained(net, "lamb", True, backward), [hasattr(p, "placements") for p in net.parameters()]


def test_plain_and_frozen_parameters():
    """A plain parameter's gradient counts once in the norm, not once a rank."""
    found = run(with_plain_parameters, 4)
    assert found[0][1] == [True, True, True, True, False, False]
    ranks_agree([answer for answer, _ in found])
    assert_whole(found[0][0], trained(freeze(Net()), "lamb", True, joint), list(Net().parameters()), 1e-5)
