"""XGrad under DistributedDataParallel: two processes on gloo agree bit for bit, with one process that does their work.

Left out: NCCL, and sharded parameters (the optimizers refuse those).
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn import Linear, Sequential, Tanh
from torch.nn.parallel import DistributedDataParallel

import layerfused as lf

STEPS, WORLD = 4, 2


def model():
    torch.manual_seed(0)
    return Sequential(Linear(5, 8), Tanh(), Linear(8, 2))


def loss_of(net, t, rank):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * t + rank))
    return (net(x) - x[:, :2]).square().mean()


def run(net, seen_by_xgrad, losses):
    """A schedule with model=: every forward pass needs another prediction. Answers live weights, true ones, states."""
    xg = lf.XGrad(lf.LAMB(net.parameters(), lr=0.1), steps=2, model=seen_by_xgrad)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(xg, 0.7)
    for t in range(STEPS):
        xg.zero_grad()
        losses(t)
        xg.step()
        scheduler.step()
    found = [p.detach().clone() for p in net.parameters()]
    found += [value.clone() for p in net.parameters() for value in xg.state[p].values()]
    with xg.true_weights():
        return found + [p.detach().clone() for p in net.parameters()]


def work(rank, folder):
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        net = model()
        ddp = DistributedDataParallel(net)
        torch.save(run(net, (ddp, net)[rank], lambda t: loss_of(ddp, t, rank).backward()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path):
    """Half of a sum of two is the sum of halves, in any order: the mean over ranks has the bits of accumulation.

    One rank names the wrapper as model, one what is in it. Rank 0 is this process: a second start costs seconds."""
    other = torch.multiprocessing.get_context("spawn").Process(target=work, args=(1, str(tmp_path)))
    other.start()
    work(0, str(tmp_path))
    other.join()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    net = model()
    found.append(run(net, net, lambda t: [(loss_of(net, t, rank) / WORLD).backward() for rank in range(WORLD)]))
    for result in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(result, found[0], strict=True))
