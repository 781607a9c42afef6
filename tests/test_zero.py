"""Plain parameters on several ranks: ZeroRedundancyOptimizer, pipeline stages and DistributedDataParallel.

Where each rank steps parameters of its own, the norm to clip by is summed over `norm_group`. Left out:
`overlap_with_ddp=True`, which wants torch's functional optimizers.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from conduct import EACH, same_bits
from ranks import run
from sharding import assert_whole, make, mesh, parameters, place, plain, ranks_agree, steps_of, tensors, told, train
from torch import nn

import layerfused as lf

STEPS, WORLD = 5, 4
CLIP = {"lr": 0.1, "max_grad_norm": 0.1}
SIZES = {"several each": 3, "none for some": 1}  # layers of a model, of two parameters each


def model(layers):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


def loss_of(net, t, part=slice(None)):
    x, y = tensors(t, ((16, 6), (16, 6)))
    return (torch.tanh(net(x[part])) - y[part]).square().mean()


def descend(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()


# ZeRO-1


def zero_of(net):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    cls = partial(lf.LAMB, norm_group=dist.group.WORLD, max_grad_norm=CLIP["max_grad_norm"])
    return ZeroRedundancyOptimizer(net.parameters(), cls, lr=CLIP["lr"])


def zero(layers):
    """Training, with a save and a load into another optimizer on the way if there is a state for every rank."""
    rank = dist.get_rank()
    net = nn.parallel.DistributedDataParallel(model(layers))
    opt, norms = zero_of(net), []
    for t in range(STEPS):
        if t == 2 and layers == SIZES["several each"]:
            opt = reloaded(opt, zero_of(net))
        descend(opt, loss_of(net, t, slice(rank, None, WORLD)))
        norms.append(float(opt.optim.grad_norm))
    sizes = [len(group["params"]) for group in opt.optim.param_groups]
    return [p.detach() for p in net.parameters()], norms, sizes


def reloaded(opt, other):
    opt.consolidate_state_dict(to=0)
    saved = [opt.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    other.load_state_dict(saved[0])
    return other


@pytest.mark.parametrize("layers", SIZES.values(), ids=SIZES)
def test_zero(layers):
    net, norms = model(layers), []
    opt, start = lf.LAMB(net.parameters(), **CLIP), list(model(layers).parameters())
    for t in range(STEPS):
        descend(opt, loss_of(net, t))
        norms.append(float(opt.grad_norm))
    found = run(zero, WORLD, layers)
    assert sum(sum(sizes) for *_, sizes in found) == len(start)
    assert any(sizes == [0] for *_, sizes in found) == (layers == SIZES["none for some"])
    for params, their_norms, _ in found:
        assert their_norms == found[0][1]
        torch.testing.assert_close(their_norms, norms, rtol=1e-6, atol=0)
        for p, own, q, before in zip(params, found[0][0], net.parameters(), start, strict=True):
            assert same_bits(p, own) and (p - q).norm() <= 1e-5 * (q - before).norm()


# Pipeline stages, each sharded over two ranks


def stages(quiet):
    """The first stage has the tensors of even number; in step `quiet` the second one has no gradients."""
    stage = mesh(2, 2).get_coordinate()[0]

    def laid(given):
        return [None if x is None else place(x, mesh(2, 2)["inner"], 0) for x in given[stage::2]]

    params = parameters(laid, tensors())
    opt = lf.LAMB(params, norm_group=mesh(2, 2).get_group("outer"), **CLIP)
    train(opt, params, stage_steps(quiet), laid)
    return told(opt, params)


def stage_steps(quiet):
    return [[None if t == quiet and i % 2 else g for i, g in enumerate(step)] for t, step in enumerate(steps_of())]


@pytest.mark.parametrize("quiet", [None, 2, STEPS - 1])
def test_stages(quiet):
    params = parameters(plain, tensors())
    opt = lf.LAMB(params, **CLIP)
    train(opt, params, stage_steps(quiet), plain)
    want, found = told(opt, params), run(stages, WORLD, quiet)
    assert len({rank["grad_norm"] for rank in found}) == 1
    for stage in (0, 1):
        ranks_agree(found[2 * stage :][:2])
        own = {key: value[stage::2] if isinstance(value, list) else value for key, value in want.items()}
        stats = list(want["stats"].values())[stage::2]
        own["stats"] = dict(zip(found[2 * stage]["stats"], stats, strict=True))  # names count within the stage
        assert_whole(found[2 * stage], own, tensors()[stage::2])


# DistributedDataParallel


def replicated():
    found = {}
    for case in EACH:
        net = nn.parallel.DistributedDataParallel(model(2))
        opt = make(case, net.parameters(), max_grad_norm=0.1)
        for t in range(STEPS):
            descend(opt, loss_of(net, t, slice(dist.get_rank(), None, WORLD)))
        found[case.name] = told(opt, list(net.parameters()))
    return found


def test_replicas_stay_the_same_bits():
    found, start = run(replicated, WORLD), list(model(2).parameters())
    for case in EACH:
        ranks_agree([rank[case.name] for rank in found])
        assert not any(same_bits(p, q) for p, q in zip(found[0][case.name]["params"], start, strict=True))
