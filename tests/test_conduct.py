"""The conduct of a torch optimizer: groups, closures, hooks, threads, version counters.

Left out here: gradients that come and go (test_conduct_gradients.py), states and their saving (test_conduct_states.py),
memory layouts and types (test_conduct_tensors.py), what an optimizer tells (test_conduct_reports.py), learning-rate
schedulers (test_schedulers.py).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conduct import EACH, assert_same, each_case, each_engine, give, make, parameters, snapshot, train
from torch.nn import Parameter

import layerfused as lf


@each_case
def test_groups_equal_optimizers_of_their_own(case):
    mine, theirs = parameters(), parameters()
    opt = make(case, [{"params": mine[:1], "lr": 0.5}, {"params": mine[1:], "weight_decay": 0.25}])
    others = [make(case, theirs[:1], lr=0.5), make(case, theirs[1:], weight_decay=0.25)]
    for seed in range(3):
        train(opt, mine, [seed])
        give(theirs, seed)
        for other in others:
            other.step()
    assert_same(snapshot(opt, mine), snapshot(others[0], theirs[:1]) + snapshot(others[1], theirs[1:]))


@each_case
def test_a_group_added_later_equals_an_optimizer_begun_later(case):
    params, alone = parameters(), parameters()
    opt = make(case, params[:2])
    give(params, 0)
    opt.step()
    before = snapshot(opt, params[:2])
    opt.add_param_group({"params": params[2:], "lr": 0.5})
    assert_same(snapshot(opt, params[:2]), before)
    train(opt, params, [1, 2])
    later = make(case, alone[2:], lr=0.5)
    for seed in (1, 2):
        give(alone, seed)
        later.step()
    assert_same(snapshot(opt, params[2:]), snapshot(later, alone[2:]))


def test_an_added_group_that_is_refused_leaves_no_trace():
    params, others = parameters(), parameters()
    opt, undisturbed = lf.LAMB(params), lf.LAMB(others)
    train(opt, params, [0])
    train(undisturbed, others, [0])
    for group in ({"params": [torch.zeros(2, dtype=torch.int64)]}, {"params": parameters((2,)), "lr": -1.0},
                  {"params": [Parameter(params[0].data[1:])]}, {"params": params[:1]}):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1 and set(opt.state) == set(params)
    train(opt, params, [1])
    train(undisturbed, others, [1])
    assert_same(snapshot(opt, params), snapshot(undisturbed, others))


def test_an_empty_group_is_legal():
    params = parameters()
    opt = lf.LAMB([{"params": []}, {"params": params}, {"params": [], "lr": 3.0}])
    train(opt, params, [0])
    opt.load_state_dict(opt.state_dict())
    train(opt, params, [1])
    assert opt.state[params[0]]["step"] == 2
    only = lf.LAMB([{"params": []}])  # a rank without parameters of its own
    only.step()
    only.step(grad_norm=2.0)
    only.add_param_group({"params": (late := parameters((3,)))})
    train(only, late, [0])
    assert only.state[late[0]]["step"] == 1


@each_engine
@each_case
def test_a_write_between_forward_and_backward_raises(case, backend):
    params = parameters()
    opt = make(case, params, backend=backend)
    give(params, 0)
    loss = sum((p * p).sum() for p in params)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_engine
@each_case
def test_version_counters_of_parameters(case, backend):
    params = parameters()
    opt = make(case, params, backend=backend)
    give(params, 0)
    params[0].grad = None
    before = [p._version for p in params]
    opt.step()
    assert [p._version - version for p, version in zip(params, before, strict=True)] == [0, 1, 1, 1]


@each_case
def test_closure(case):
    params, others = parameters(), parameters()
    opt, other = make(case, params), make(case, others)

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert loss.requires_grad
    for q in others:
        q.grad = 2 * q.detach()
    assert other.step() is None
    assert_same(snapshot(opt, params), snapshot(other, others))


def test_step_hooks_see_and_change_the_call():
    params, seen = parameters(), []
    opt = lf.LAMB(params)

    def before(optimizer, args, kwargs):
        seen.append(("before", optimizer.state[params[0]]["step"].item()))
        return args, {"grad_norm": 100.0}

    first = opt.register_step_pre_hook(before)
    second = opt.register_step_post_hook(lambda o, a, k: seen.append(("after", o.state[params[0]]["step"].item())))
    train(opt, params, [0])
    assert seen == [("before", 0), ("after", 1)]
    assert opt.grad_norm == 100
    first.remove()
    second.remove()
    train(opt, params, [1])
    assert len(seen) == 2 and opt.grad_norm < 100


def test_several_threads_step_several_optimizers():
    """20 optimizers on 5 threads, each with layers over the chunk size and under it."""

    def run(number):
        params = parameters((300, 300), (17,), seed=number)
        opt = make(cases[number % len(cases)], params)
        train(opt, params, range(number, number + 6))
        return snapshot(opt, params)

    cases = [case for case in EACH if case.cls in ("LAMB", "AdamW", "NovoGrad", "SETAdam")]
    expected = [run(n) for n in range(20)]
    with ThreadPoolExecutor(5) as pool:
        for got, want in zip(pool.map(run, range(20)), expected, strict=True):
            assert_same(got, want)
