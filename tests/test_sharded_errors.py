"""What is refused of sharded parameters: on every rank that takes part, with words that help; nobody waits for ever.

Every case runs under a time limit, so that a rank that waits for one that has raised fails the test. Left out: ranks of
which some have no sharded parameter at all, and input that is wrong on one rank only: who waits cannot know of it.
"""

import pytest
import torch
import torch.distributed as dist
from conduct import same_bits
from ranks import error_of, run
from sharding import mesh, over, parameters, place, steps_of, tensors, told, train
from torch.nn import Parameter

import layerfused as lf

WORLD, SECONDS = 4, 40


def rows(number=0, shape=(5, 4), dim=0, **more):
    return Parameter(place(tensors(number, (shape,), **more)[0], mesh(WORLD), dim))


def odd_rank():
    """The rank that differs from the others: neither the first nor the last."""
    return dist.get_rank() == 2


def named(*pairs):
    return [(name, p) for name, p in pairs]


# Ranks that hold other things: what each gives to LAMB

DIFFERENT = {
    "order": lambda odd: named(*[("a", rows()), ("b", rows(shape=(6, 4)))][:: -1 if odd else 1]),
    "shape": lambda odd: named(("a", rows()), ("b", rows(shape=(6, 4) if odd else (8, 4)))),
    "type": lambda odd: named(("a", rows()), ("b", rows(dtype=torch.bfloat16 if odd else torch.float32))),
    "placement": lambda odd: named(("a", rows()), ("b", rows(dim=1 if odd else 0))),
    "one more": lambda odd: named(("a", rows()), *[("b", p) for p in [rows(1)] if not odd]),
    "layer": lambda odd: [{"params": named(("b", rows())), "layer": "slices" if odd else "tensor"}],
    "adapt": lambda odd: [{"params": named(("b", rows())), "adapt": not odd}],
}


def differing(kind):
    given = DIFFERENT[kind]
    everywhere = [given(False), given(True)]  # laying a tensor over ranks is itself something that all of them do
    return error_of(lambda: lf.LAMB(everywhere[odd_rank()]))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_ranks_that_hold_different_things(kind):
    errors = run(differing, WORLD, kind, timeout=SECONDS)
    assert len(set(errors)) == 1 and errors[0].startswith("ValueError: ranks differ"), errors
    assert "rank 2" in errors[0] and ("b" in errors[0].split()) and "same order" in errors[0], errors[0]


def late_group():
    """Ranks add groups that differ; the optimizer is then as it was, and steps on."""
    laid = over("rows")
    params = parameters(laid, tensors())
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, steps_of(steps=1), laid)
    both = [rows(1), rows(1, (6, 4))]
    error = error_of(lambda: opt.add_param_group({"params": [both[odd_rank()]]}))
    train(opt, params, steps_of(steps=2), laid)
    return error, len(opt.param_groups), len(opt.state), told(opt, params)


def not_disturbed():
    laid = over("rows")
    params = parameters(laid, tensors())
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, steps_of(steps=1), laid)
    train(opt, params, steps_of(steps=2), laid)
    return told(opt, params)


def late():
    return late_group(), not_disturbed()


def test_groups_that_differ_leave_the_optimizer_as_it_was():
    for (error, groups, states, found), want in run(late, WORLD, timeout=SECONDS):
        assert error.startswith("ValueError: ranks differ") and (groups, states) == (1, len(tensors()))
        assert all(same_bits(p, q) for p, q in zip(found["params"], want["params"], strict=True))


# The same thing on all ranks: what is done, and the words of the error


def foreign_mesh():
    """A mesh of the first two ranks, whose parameter the others get too."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    half = DeviceMesh("cpu", [0, 1])
    lf.LAMB([("here", Parameter(DTensor.from_local(torch.ones(2, 3), half, [Shard(0)], run_check=False)))])


def doubles():
    lf.LAMB([("deep", rows(dtype=torch.float64))])


def reference():
    lf.LAMB([("deep", rows())], backend="reference")


def one_layer(*params):
    lf.LAMB([{"params": list(params), "layer": "group"}])


def unsummed():
    from torch.distributed.tensor import DTensor, Partial

    lf.LAMB([("deep", Parameter(DTensor.from_local(torch.ones(2, 3), mesh(WORLD), [Partial()], run_check=False)))])


def plain_gradient():
    p = rows()
    opt = lf.LAMB([("deep", p)])
    p.grad = torch.ones(5, 4)
    opt.step()


def other_mesh():
    """The same ranks in another order: with placements like the parameter's, but other rows."""
    from torch.distributed.tensor import DeviceMesh

    p = rows()
    opt = lf.LAMB([("deep", p)])
    p.grad = place(torch.ones(5, 4), DeviceMesh("cpu", [3, 2, 1, 0]), 0)
    opt.step()


def zero_keyword():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ZeroRedundancyOptimizer([Parameter(torch.ones(3))], lf.LAMB, max_grad_norm=1.0)


REFUSED = {
    foreign_mesh: ("ValueError", ["here", "not in", "rank"]),
    doubles: ("ValueError", ["float64", "deep", "backend='auto'"]),
    reference: ("ValueError", ["reference", "deep", "backend='auto'"]),
    unsummed: ("ValueError", ["deep", "Partial", "redistribute"]),
    other_mesh: ("ValueError", ["deep", "mesh"]),
    plain_gradient: ("TypeError", ["deep", "plain tensor", "DTensor"]),
    zero_keyword: ("ValueError", ["max_grad_norm", "partial"]),
}


def refusals():
    found = {call.__name__: error_of(call) for call in REFUSED}
    tall, wide, flat = rows(), rows(1, dim=1), Parameter(torch.ones(4))
    pair = Parameter(place(torch.ones(5, 4), mesh(2, 2), 0, None)), Parameter(place(torch.ones(5, 4), mesh(2, 2), 0, 1))
    found["groups"] = [error_of(lambda own=own: one_layer(*own)) for own in ((tall, flat), (tall, pair[0]), pair)]
    found["kept"] = error_of(lambda: one_layer(tall, wide))  # other rows, but the same ranks
    found["curvature"] = [error_of(lambda cls=cls: cls([tall])) for cls in (lf.CurvatureSGD, lf.CurvatureAdamW)]
    found["xgrad"] = error_of(lambda: lf.XGrad(lf.LAMB([tall]), steps=1))
    found["norm_group"] = error_of(lambda: lf.AdamW([flat], norm_group=dist.group.WORLD))
    found["cut"] = error_of(lambda: lf.LAMB([{"params": [tall], "layer": (2, 2)}]))
    found["still works"] = error_of(lambda: lf.LAMB([tall]).step())
    return found


@pytest.fixture(scope="module")
def refused():
    return run(refusals, WORLD, timeout=SECONDS)


@pytest.mark.parametrize("name", [call.__name__ for call in REFUSED])
def test_refused_with_the_remedy(refused, name):
    kind, words = next(expected for call, expected in REFUSED.items() if call.__name__ == name)
    ranks = refused[2:] if name == "foreign_mesh" else refused
    for rank in ranks:
        assert rank[name].startswith(kind) and all(word in rank[name] for word in words), rank[name]


def test_refused_on_every_rank_alike(refused):
    for rank in refused:
        assert all(error.startswith("ValueError: layer='group'") for error in rank["groups"]), rank["groups"]
        assert all(error.startswith("TypeError: Curvature") for error in rank["curvature"]), rank["curvature"]
        assert "DTensor" in rank["xgrad"], rank["xgrad"]
        assert rank["norm_group"].startswith("ValueError: norm_group needs max_grad_norm")
        assert rank["cut"].startswith("ValueError: layer=(2, 2) has 4 rows")
        assert rank["kept"] == rank["still works"] == ""


def resting():
    """One rank has no gradient of its rows in the second step of three."""
    laid, shapes = over("rows"), ((8, 3), (8, 2))
    params = parameters(laid, tensors(shapes=shapes))
    opt, rested = lf.LAMB(params, lr=0.1), False
    for t, step in enumerate(steps_of(shapes, 3)):
        for p, g in zip(params, laid(step), strict=True):
            p.grad = None if t == 1 and p is params[0] and odd_rank() else g
        before = params[0].to_local().clone()
        opt.step()
        rested = rested or torch.equal(params[0].to_local(), before)
    return rested, float(opt.grad_norm), opt.layer_stats(), [float(opt.state[p]["step"]) for p in params]


def test_rows_without_a_gradient_rest():
    """The others step them by what they have together, and nobody waits."""
    found = run(resting, WORLD, timeout=SECONDS)
    assert [rested for rested, *_ in found] == [False, False, True, False]
    assert all(rank[1:3] == found[0][1:3] for rank in found)
    assert [steps for *_, steps in found] == [[3, 3], [3, 3], [2, 3], [3, 3]]
