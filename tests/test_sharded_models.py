"""Models under FSDP2, HSDP and tensor parallelism, every rule: five steps are those of one process on the joint batch.

FSDP computes in float64 here, so that gradients are the same but for their last rounding; tensor parallelism alone does
not. Left out: models whose parts step at different times, mixed precision as one uses it, CPU offload.
"""

from functools import cache

import pytest
import torch
from conduct import EACH
from ranks import run
from sharded_nets import Net, built, descend, joint, on_batch, sharded
from sharding import assert_whole, make, mesh, ranks_agree, told

import layerfused as lf

STEPS = 5
BY_NAME = {case.name: case for case in EACH}
FEW = ("adamw", "lamb", "novograd", "setadam")
WAYS = {"fsdp": BY_NAME, "tp-fsdp": BY_NAME, "hsdp": FEW, "tp": FEW}  # the rules that go each way
CLIPPED = ("fsdp", "tp-fsdp")


def trained(net, name, clip, backward):
    opt = make(BY_NAME[name], lf.param_groups(net), max_grad_norm=0.1 if clip else None)
    descend(opt, backward, range(STEPS))
    return told(opt, list(net.parameters()))


def on_ranks(ways):
    found = {}
    for way, names in ways.items():
        net, part = built(way)
        backward = on_batch(net, part, torch.float32 if way == "tp" else torch.float64)
        start = [p.to_local().clone() for p in net.parameters()]
        for name in names:
            with torch.no_grad():
                for p, x in zip(net.parameters(), start, strict=True):
                    p.to_local().copy_(x)
            found[name, way] = trained(net, name, way in CLIPPED, backward)
    return found


@cache
def alone(name, clip):
    net = Net()
    return trained(net, name, clip, joint(net))


@pytest.fixture(scope="module")
def four():
    return run(on_ranks, 4, {way: list(names) for way, names in WAYS.items()}, timeout=120)


@pytest.fixture(scope="module")
def two():
    return run(on_ranks, 2, {"fsdp": FEW})


def check(found, name, way, allowed=1e-6):
    ranks_agree([rank[name, way] for rank in found])
    assert_whole(found[0][name, way], alone(name, way in CLIPPED), list(Net().parameters()), allowed)


@pytest.mark.parametrize("way, name", [(way, name) for way, names in WAYS.items() for name in names])
def test_four_ranks(four, way, name):
    check(four, name, way, 1e-5 if way == "tp" else 1e-6)


@pytest.mark.parametrize("name", FEW)
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
    own = on_batch(net, slice(rank, None, 4), torch.float32)

    def backward(t):
        own(t)
        for p in theirs:
            torch.distributed.all_reduce(p.grad)
            p.grad /= 4

    return trained(net, "lamb", True, backward), [hasattr(p, "placements") for p in net.parameters()]


def test_plain_and_frozen_parameters():
    """A plain parameter's gradient counts once in the norm, not once a rank."""
    found, net = run(with_plain_parameters, 4), freeze(Net())
    assert found[0][1] == [True, True, True, True, False, False]
    ranks_agree([answer for answer, _ in found])
    assert_whole(found[0][0], trained(net, "lamb", True, joint(net)), list(Net().parameters()), 1e-5)
