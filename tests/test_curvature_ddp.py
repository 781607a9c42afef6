"""Two processes, DistributedDataParallel and gloo: ranks agree bit for bit, and with one process on the joint batch.

Left out: FSDP2, more ranks, GPUs.
"""

import os
import socket
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from conduct import refused, same_bits, snapshot
from curvature_oracle import CLASSES, ESTIMATORS, make, stats
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 4
CASES = [(flavour, estimator) for flavour in CLASSES for estimator in ESTIMATORS]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(n):
    random = torch.Generator().manual_seed(n)
    return torch.randn(16, 6, generator=random).double(), torch.randn(16, 2, generator=random).double()


def part(n, rank, ranks):
    x, y = batch(n)
    return x[rank::ranks], y[rank::ranks]


def losses_of(model, data, pieces):
    """Closures for micro-batches whose losses add up to the mean over `data`."""
    chunks = zip(data[0].chunk(pieces), data[1].chunk(pieces), strict=True)
    closures = [lambda x=x, y=y: nn.functional.mse_loss(model(x), y) / pieces for x, y in chunks]
    return closures if pieces > 1 else closures[0]


def train(flavour, estimator, model, rank=0, ranks=1, pieces=1):
    opt = make(flavour, model.parameters(), estimator=estimator, damping=0.1)
    torch.manual_seed(rank)  # the ranks' own streams differ, as they do in real training
    for n in range(STEPS):
        opt.step(losses_of(model, part(n, rank, ranks), pieces))
    return opt


def told(opt, params):
    return [(p, dict(states)) for p, states in snapshot(opt, params)], stats(opt)


def work(rank, port, folder):
    """One rank: all cases in one process, because starting it is what takes the time."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for pieces in (1, 2):
        for flavour, estimator in CASES:
            model = DistributedDataParallel(network())
            found[flavour, estimator, pieces] = told(
                train(flavour, estimator, model, rank, 2, pieces), list(model.parameters())
            )
    found["refused"] = [refuses_double_backward(flavour) for flavour in CLASSES]
    found["spoiled"] = [spoiled(flavour, rank) for flavour in CLASSES]
    found["others"] = [halves(flavour, *part(0, rank, 2)) for flavour in CLASSES]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refuses_double_backward(flavour):
    model = DistributedDataParallel(network())
    before = deepcopy(model.state_dict())
    with refused(RuntimeError, "product='finite-difference'"):
        opt = make(flavour, model.parameters(), product="double-backward")
        opt.step(losses_of(model, batch(0), 1))
    return all(same_bits(x, before[name]) for name, x in model.state_dict().items())


def spoiled(flavour, rank):
    """A batch with a NaN on one rank: its gradient is everybody's, and so every rank skips. A rank that looked at its
    own loss would leave the others waiting in the second backward."""
    model = DistributedDataParallel(network())
    opt = make(flavour, model.parameters())
    for n in range(3):
        x, y = part(n, rank, 2)
        if n == 1 and rank == 1:
            y = y * float("nan")
        opt.step(losses_of(model, (x, y), 1))
    return int(opt.skipped_steps), told(opt, list(model.parameters()))


def halves(flavour, *data, **options):
    """Two steps where the optimizer has half of the model: gradients of the other half, and what they should be."""
    model = DistributedDataParallel(network(), **options)
    opt, theirs = make(flavour, model.module[0].parameters()), list(model.module[2].parameters())
    for _ in range(2):
        model.zero_grad()
        losses_of(model, data, 1)().backward()
        wanted = [p.grad.clone() for p in theirs]
        model.zero_grad()
        opt.step(losses_of(model, data, 1))
        found = [p.grad for p in theirs]
    return found, wanted


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("flavour, estimator", CASES)
def test_ranks_agree_and_are_one_process_on_the_joint_batch(ranks, flavour, estimator, pieces):
    own, other = (found[flavour, estimator, pieces] for found in ranks)
    for (p, states), (q, theirs) in zip(own[0], other[0], strict=True):
        assert same_bits(p, q) and all(same_bits(states[name], theirs[name]) for name in states)
    assert own[1] == other[1]
    model = network()
    opt = train(flavour, estimator, model)
    # the order of a sum, 1e-16, over h: 1e-10 of a curvature; dividing by small gradients magnifies that a thousandfold
    for (p, _), (q, _) in zip(own[0], snapshot(opt, list(model.parameters())), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert [report["sign"] for report in own[1]] == [report["sign"] for report in stats(opt)]


def test_double_backward_is_refused(ranks):
    assert all(found["refused"] == [True, True] for found in ranks)


def test_every_rank_skips_a_bad_batch(ranks):
    for own, other in zip(ranks[0]["spoiled"], ranks[1]["spoiled"], strict=True):
        assert own[0] == other[0] == 1
        for (p, states), (q, theirs) in zip(own[1][0], other[1][0], strict=True):
            assert p.isfinite().all() and states["step"] == 2
            assert same_bits(p, q) and all(same_bits(states[name], theirs[name]) for name in states)


def check_halves(found, wanted):
    for g, want in zip(found, wanted, strict=True):
        if g is not None:
            torch.testing.assert_close(g, want, rtol=0, atol=1e-12)


def test_gradients_of_another_optimizer(ranks):
    """DDP waits for all parameters in every backward; those that are somebody else's get one gradient, not two."""
    for found in ranks:
        for pair in found["others"]:
            check_halves(*pair)


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
@pytest.mark.parametrize("flavour", CLASSES)
def test_half_of_a_model_in_a_group_of_one_rank(flavour, views, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_halves(*halves(flavour, *batch(0), gradient_as_bucket_view=views))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("flavour", CLASSES)
def test_a_group_of_one_rank_may_use_double_backward(flavour, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        opt = make(flavour, model.parameters(), product="double-backward")
        first = opt.step(losses_of(model, batch(0), 1)).item()
        assert opt.step(losses_of(model, batch(0), 1)).item() < first
    finally:
        dist.destroy_process_group()
