"""The conduct of a torch optimizer: groups, gradients that come and go, closures, hooks, threads, version counters.

Left out here: states and their saving (test_conduct_states.py), memory layouts and types (test_conduct_tensors.py),
what an optimizer tells (test_conduct_reports.py), learning-rate schedulers (test_schedulers.py).
"""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conduct import SHAPES, assert_same, copies, each_case, each_engine, give, make, parameters, same_bits, snapshot, train
from torch.nn import Parameter

import layerfused as lf
from layerfused.cpu import CpuLaunch


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


# Parameter i has a gradient in step n where bit i of PRESENT[n] is set: absent at first (frozen), absent in between.
PRESENT = (0b0111, 0b0011, 0b1101, 0b0000, 0b1110, 0b1111)


@each_engine
@each_case
def test_parameters_without_gradient_are_left_alone(case, backend):
    params, alone = parameters(), parameters()
    opt = make(case, params, backend=backend)
    solos = [make(case, [p], backend=backend) for p in alone]
    for seed, present in enumerate(PRESENT):
        give(params, seed)
        give(alone, seed)
        for i, p in enumerate(params):
            if not present >> i & 1:
                p.grad = None
                continue
            solos[i].step()
        versions = [p._version for p in params]
        opt.step()
        assert [p._version - v for p, v in zip(params, versions, strict=True)] == [present >> i & 1 for i in range(4)]
    assert_same(snapshot(opt, params), [s for solo, p in zip(solos, alone, strict=True) for s in snapshot(solo, [p])])


@each_case
def test_frozen_and_unfrozen(case):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    opt, x = make(case, model.parameters()), torch.randn(8, 4)
    model[0].requires_grad_(False)
    start = snapshot(opt, model[0].parameters())
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        model(x).pow(2).sum().backward()
        opt.step()
        moved = [not same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert moved == [not frozen, not frozen, True, True]
        if frozen:
            assert_same(snapshot(opt, model[0].parameters()), start)


@each_case
def test_zero_grad(case):
    params, others = parameters(), parameters()
    opt, other = make(case, params), make(case, others)
    train(opt, params, [0])
    train(other, others, [0])
    kept = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, kept, strict=True))
    for p in others:
        p.grad = torch.zeros_like(p)
    opt.step()
    other.step()
    assert_same(snapshot(opt, params), snapshot(other, others))
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    before = snapshot(opt, params)
    opt.step()
    assert_same(snapshot(opt, params), before)


@each_engine
def test_old_gradients_are_not_held(backend):
    params = parameters(*SHAPES, (6, 6))
    opt = lf.LAMB(params, backend=backend)
    for seed in range(2):
        give(params, seed)
        params[-1].grad = torch.ones(1, 1).expand(6, 6)  # one that has to be copied
        opt.step()
        held = [weakref.ref(p.grad) for p in params]
        opt.zero_grad(set_to_none=True)
        assert not any(ref() is not None for ref in held)


@each_engine
@each_case
def test_gradients_are_read_only(case, backend):
    params = parameters()
    opt = make(case, params, backend=backend, weight_decay=0.1, maximize=True, max_grad_norm=0.5)
    give(params, 0)
    before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
    opt.step()
    for p, (g, values, version) in zip(params, before, strict=True):
        assert p.grad is g and same_bits(g, values) and g._version == version


@each_case
def test_maximize_mirrors_the_gradient(case):
    params, mirrored = parameters(), parameters()
    up, down = make(case, params, maximize=True), make(case, mirrored)
    for seed in range(3):
        give(params, seed)
        for p, q in zip(params, mirrored, strict=True):
            q.grad = -p.grad
        up.step()
        down.step()
    assert_same(snapshot(up, params), snapshot(down, mirrored))


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
def test_version_counters_count_every_write(case, backend):
    params = parameters()
    opt = make(case, params, backend=backend)
    give(params, 0)
    opt.step()  # entries are final
    written = {("p", i): p for i, p in enumerate(params)}
    written |= {(name, i): x for i, p in enumerate(params) for name, x in opt.state[p].items()}
    before = {key: x._version for key, x in written.items()}
    opt.step()
    assert [key for key, x in written.items() if x._version == before[key]] == []


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

    cases = [mark for mark in each_case.args[1] if mark.cls in ("LAMB", "AdamW", "NovoGrad", "SETAdam")]
    expected = [run(n) for n in range(20)]
    with ThreadPoolExecutor(5) as pool:
        for got, want in zip(pool.map(run, range(20)), expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_skips_the_step(value):
    """For one launch, and for two (float64 parameters are the reference engine's)."""
    for params in (parameters(), [*parameters(), *parameters((3,), dtype=torch.float64)]):
        opt, other = lf.LAMB(params), lf.LAMB(others := copies(params))
        for seed in (0, 1):
            train(other, others, [seed])
            if seed:
                give(params, 7)
                params[1].grad[2] = value
                before, versions = snapshot(opt, params), [p._version for p in params]
                opt.step()
                assert_same(snapshot(opt, params), before)
                assert versions == [p._version for p in params]
                assert opt.skipped_steps == 1 and not opt.grad_norm.isfinite()
            train(opt, params, [seed])
        assert opt.skipped_steps == 1 and other.skipped_steps == 0
        assert_same(snapshot(opt, params), snapshot(other, others))


@each_case
def test_a_bad_layer_stays_alone(case):
    params, others = parameters(), parameters()
    opt, other = make(case, params), make(case, others)
    for seed in (0, 1):
        give(others, seed)
        other.step()
        give(params, seed)
        params[0].grad[0, 0], params[3].grad[0, 0, 0, 0] = float("nan"), float("inf")
        opt.step()
    assert_same(snapshot(opt, params[1:3]), snapshot(other, others[1:3]))


def test_a_copied_gradient_lives_until_the_step_has_read_it(monkeypatch):
    """Two launches under one norm: the second call of each still reads the gradients that were copied for the first."""
    make_copy, run, made = CpuLaunch._copy, CpuLaunch.run, []

    def copying(self, i):
        g = make_copy(self, i)
        made.append(weakref.ref(g))
        return g

    def running(self, *args):
        assert made and all(ref() is not None for ref in made)
        return run(self, *args)

    monkeypatch.setattr(CpuLaunch, "_copy", copying)
    monkeypatch.setattr(CpuLaunch, "run", running)
    params = [*parameters((6, 6)), *parameters((3,), dtype=torch.float64)]
    opt = lf.LAMB(params, max_grad_norm=1.0)
    give(params, 0)
    params[0].grad = torch.ones(1, 1).expand(6, 6)
    opt.step()
