"""Memory that moves or goes away between steps, and what a look at an address alone does not tell.

Left out: writes of another thread during a step, which no optimizer survives.
"""

import pytest
import torch
from torch.nn import Parameter

import layerfused as lf


def one(n=1000, **options):
    p = Parameter(torch.ones(n))
    p.grad = torch.full((n,), 0.5)
    return p, lf.LAMB([p], max_grad_norm=None, **options)


def twin_of(change):
    """Two optimizers in step, of which one has its state moved between two steps."""
    results = []
    for moved in (False, True):
        p, opt = one()
        opt.step()
        if moved:
            change(opt.state[p])
        opt.step()
        results.append((p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}))
    return results


MOVES = {
    "share_memory_": lambda s: s["exp_avg"].share_memory_(),
    "data": lambda s: setattr(s["exp_avg"], "data", s["exp_avg"].data.clone()),
    "step shared": lambda s: s["step"].share_memory_(),
}


@pytest.mark.parametrize("move", MOVES)
def test_states_whose_memory_moves(move):
    (p, s), (q, t) = twin_of(MOVES[move])
    assert torch.equal(p, q) and all(torch.equal(s[k], t[k]) for k in s)


def test_a_state_that_changes_its_type():
    p, opt = one()
    opt.step()
    opt.state[p]["exp_avg_sq"].data = opt.state[p]["exp_avg_sq"].data.half()
    opt.step()
    assert opt.state[p]["exp_avg_sq"].dtype == torch.float16 and p.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_storage_resized_away(backend):
    p, opt = one(backend=backend)
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no storage"):
        opt.step()
    p.grad = torch.ones(1000)
    p.data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no storage"):
        opt.step()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_negated_views_are_read_with_their_sign(backend):
    p = Parameter(torch.zeros(3))
    p.grad = torch._neg_view(torch.ones(3))
    lf.SGD([p], lr=1.0, backend=backend).step()
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_an_overlap_is_refused_again():
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    opt = lf.SGD([p, q], lr=1.0)
    p.data = q.data
    for _ in range(2):
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        with pytest.raises(ValueError, match="share memory"):
            opt.step()
    assert q.tolist() == [1.0] * 4


def test_a_rule_named_like_a_native_one_is_its_own():
    def lamb(p, g, s, h, t, adapt):
        return p - h.lr * g.sign(), {}

    class Mine(lf.Optimizer):
        rule = lf.Rule(name="lamb", hyper=("lr",), reference=lamb)

    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    opt = Mine([p], {"lr": 0.5})
    opt.step()
    assert opt.engines == {"reference": 1} and p.tolist() == [-0.5] * 3


def test_a_bad_row_stops_every_launch():
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.float64))
    opt = lf.AdamW([{"params": [p]}, {"params": [q]}])
    for bad in (torch.ones(3), -1.0, float("nan")):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        opt.param_groups[1]["lr"] = bad
        with pytest.raises(ValueError, match="lr must be"):
            opt.step()
        assert p.tolist() == [1.0] * 3 and not opt.state[p]["step"]


def test_subnormal_gradients_leave_adamnorm_finite():
    p = Parameter(torch.ones(3))
    opt = lf.AdamNorm([p])
    for size in (1.0, 1e-40):
        p.grad = torch.full((3,), size)
        opt.step()
    assert p.isfinite().all()


def test_finish_and_apply_in_one_call():
    from layerfused.plan import Phase

    p, opt = one(300_000)
    q, other = one(300_000)
    other.step()
    launch = opt._launches[0]
    launch.read()
    rows = opt._rows(launch)
    launch.run(Phase.REDUCE, rows, 0.0)
    launch.run(Phase.FINISH | Phase.APPLY, rows, 0.0)
    assert torch.equal(p, q)


def test_decoupled_decay_is_not_taken_for_coupled():
    p = Parameter(torch.ones(3))
    saved = torch.optim.AdamW([p]).state_dict()
    with pytest.raises(ValueError, match="adam_decoupled"):
        lf.Adam([p]).load_state_dict(saved)
    with pytest.raises(ValueError, match="lamb"):
        lf.LAMB([p]).load_state_dict(saved)
