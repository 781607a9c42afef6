"""A small model, and the ways to lay it over ranks: FSDP2, HSDP, tensor parallelism with and without FSDP2."""

import torch
from sharding import mesh
from torch import nn


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


def on_batch(net, part, dtype=torch.float64):
    """A backward pass over what this rank has of a batch."""

    def backward(t):
        x, y = (z[part].to(dtype) for z in batch(t))
        loss_of(net(x), y, 5 * 4 * len(x)).backward()

    return backward


def joint(net):
    """A backward pass of one process over the whole batch, in double."""

    def backward(t):
        x, y = (z.double() for z in batch(t))
        params = {name: p.double() for name, p in net.named_parameters()}
        loss_of(torch.func.functional_call(net, params, (x,)), y, y.numel()).backward()

    return backward


def descend(opt, backward, steps):
    for t in steps:
        opt.zero_grad()
        backward(t)
        opt.step()
