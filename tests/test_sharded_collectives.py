"""Sharded parameters: gradients placed otherwise than their parameters, and the number of collectives of a step.

Left out: gradients of other placements on two dimensions at once.
"""

import pytest
import torch
from ranks import Collectives, run
from sharding import (
    assert_whole,
    mesh,
    over,
    parameters,
    place,
    plain,
    ranks_agree,
    steps_of,
    tensors,
    told,
    train,
    whole,
)
from torch.nn import Parameter

import layerfused as lf

TYPES = (torch.float32, torch.bfloat16)


def from_partial(dtype, op):
    """Sums and means over one dimension of the mesh or both are taken, all together, and the gradients left alone."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    sums = Partial(op)
    pieces = [(sums, Replicate()), (sums, sums), (Replicate(), sums), (Shard(0), sums)]
    params = [
        Parameter(place(p.to(dtype), mesh(2, 2), *(0 if piece.is_shard() else None for piece in own)))
        for p, own in zip(tensors(shapes=((4, 3),) * 4), pieces, strict=True)
    ]
    opt = lf.LAMB(params, lr=0.1, max_grad_norm=None)
    at = mesh(2, 2).get_coordinate()
    for p, (outer, inner) in zip(params, pieces, strict=True):
        differs = at[0] * outer.is_partial() + 2 * at[1] * inner.is_partial()
        local = torch.arange(12.0).view(4, 3)[: p.to_local().shape[0]] - differs  # whole numbers: exact in any order
        p.grad = DTensor.from_local(local.to(dtype), mesh(2, 2), (outer, inner), run_check=False)
    before = [(p.grad, p.grad.placements, p.grad.to_local().clone()) for p in params]
    with Collectives() as collectives:
        opt.step()
    kept = all(
        p.grad is g and g.placements == own and torch.equal(g.to_local(), x)
        for p, (g, own, x) in zip(params, before, strict=True)
    )
    return told(opt, params), [whole(g) for g, *_ in before], kept, collectives.seen


def from_others():
    """A parameter and its gradient in different places, neither of them a sum."""
    weights, gradients = tensors(shapes=((5, 3),) * 4), tensors(1, ((5, 3),) * 4)
    params = [Parameter(place(p, mesh(4), dim)) for p, dim in zip(weights, (0, None, 0, 1), strict=True)]
    opt = lf.LAMB(params, lr=0.1)
    for p, g, dim in zip(params, gradients, (None, 0, 1, 0), strict=True):
        p.grad = place(g, mesh(4), dim)
    opt.step()
    return told(opt, params)


def placed():
    cases = {(dtype, op): from_partial(dtype, op) for dtype in TYPES for op in ("sum", "avg")}
    return cases, from_others()


@pytest.fixture(scope="module")
def redistributed():
    return run(placed, 4)


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("dtype", TYPES)
def test_partial_gradients(redistributed, dtype, op):
    found = [cases[dtype, op] for cases, _ in redistributed]
    ranks_agree([answer for answer, *_ in found])
    start = [p.to(dtype) for p in tensors(shapes=((4, 3),) * 4)]
    params = parameters(plain, start)
    opt = lf.LAMB(params, lr=0.1, max_grad_norm=None)
    train(opt, params, [found[0][1]], plain)
    for answer, gradients, kept, seen in found:
        assert_whole(answer, told(opt, params), start)
        assert all(torch.equal(g, h) for g, h in zip(gradients, found[0][1], strict=True)) and kept
        assert seen == ["all_reduce", "all_reduce", "all_gather"]  # one for each dimension of the mesh, and the stats


def test_gradients_of_other_placements(redistributed):
    found, start = [others for _, others in redistributed], tensors(shapes=((5, 3),) * 4)
    ranks_agree(found)
    params = parameters(plain, start)
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, [tensors(1, ((5, 3),) * 4)], plain)
    assert_whole(found[0], told(opt, params), start)


# Collectives of a step: optimizer, clip, layout -> how many

COUNTS = {
    ("LAMB", None, "rows"): 1,
    ("LAMB", 1.0, "rows"): 2,
    ("LAMB", 1.0, "mixed"): 2,
    ("LAMB", None, "hybrid"): 1,
    ("LAMB", None, "column-parallel"): 1,
    ("LAMB", 1.0, "copied"): 0,
    ("LAMB", 1.0, "plain"): 0,
    ("NovoGrad", None, "rows"): 1,
    ("SETAdam", None, "nested"): 1,
    ("AdamW", None, "rows"): 0,
    ("AdamW", 1.0, "rows"): 1,
    ("SGD", None, "mixed"): 0,
    ("LAMB", None, "three"): 1,  # cut along the one, the other and both dimensions of a mesh
    ("LAMB", None, "meshes"): 2,
}


def spread(layout, given):
    if layout == "three":
        return [place(p, mesh(2, 2), *((0, None), (None, 0), (0, 1))[i % 3]) for i, p in enumerate(given)]
    if layout == "meshes":
        return [place(p, mesh(4), 0) if i % 2 else place(p, mesh(2, 2), 0, None) for i, p in enumerate(given)]
    return over(layout)(given)


def counted():
    found = {}
    for name, clip, layout in COUNTS:
        laid = lambda given, layout=layout: spread(layout, given)  # noqa: E731
        params = parameters(laid, tensors())
        opt = getattr(lf, name)(params, max_grad_norm=clip)
        train(opt, params, steps_of()[:1], laid)
        for p, g in zip(params, laid(steps_of()[1]), strict=True):
            p.grad = g
        with Collectives() as collectives:
            opt.step()
        found[name, clip, layout] = collectives.seen
    return found


def test_collectives():
    for rank in run(counted, 4):
        assert {key: ["all_gather"] * count for key, count in COUNTS.items()} == rank


# More ranks than everybody's rows are gathered of

REDUCED = {"LAMB": ["all_reduce"] * 2, "SETAdam": ["all_reduce"] * 3}  # the norm, the sums, the minima


def reduced():
    from layerfused import exchange

    exchange.MANY, found = 1, {}  # as if 2 were 65
    for name in REDUCED:
        params = parameters(over("mixed"), tensors())
        opt = getattr(lf, name)(params, max_grad_norm=1.0)
        with Collectives() as collectives:
            train(opt, params, steps_of()[:1], over("mixed"))
        found[name] = told(opt, params), collectives.seen
    return found


def test_many_ranks():
    found = run(reduced, 2)
    for name, collectives in REDUCED.items():
        params = parameters(plain, tensors())
        opt = getattr(lf, name)(params, max_grad_norm=1.0)
        train(opt, params, steps_of()[:1], plain)
        ranks_agree([answers[name][0] for answers in found])
        assert_whole(found[0][name][0], told(opt, params), tensors())
        seen = found[0][name][1]
        assert [kind for kind in seen if kind != "broadcast"][-len(collectives) :] == collectives, seen


# A mesh of two dimensions that is not the whole world: its ranks have no group yet


def some_of_the_world():
    from torch.distributed.device_mesh import DeviceMesh

    part = DeviceMesh("cpu", [[0, 1], [2, 3]])
    if torch.distributed.get_rank() == 4:
        return None
    laid = lambda given: [place(p, part, 0, 1) for p in given]  # noqa: E731
    params = parameters(laid, tensors())
    opt = lf.LAMB(params, lr=0.1)
    with Collectives() as collectives:
        train(opt, params, steps_of()[:1], laid)
    seen = [kind for kind in collectives.seen if kind == "all_gather"]
    train(opt, params, steps_of()[1:], laid)
    return told(opt, params), seen


def test_a_mesh_in_a_larger_world():
    *found, other = run(some_of_the_world, 5)
    assert other is None and all(seen == ["all_gather"] * 2 for _, seen in found)
    ranks_agree([answer for answer, _ in found])
    params = parameters(plain, tensors())
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, steps_of(), plain)
    assert_whole(found[0][0], told(opt, params), tensors())
