"""Gradients that are absent, zero, not finite or read-only, and how long they are held."""

import weakref

import pytest
import torch
from conduct import (
    SHAPES,
    assert_same,
    copies,
    each_case,
    each_engine,
    give,
    make,
    parameters,
    same_bits,
    snapshot,
    train,
)

import layerfused as lf
from layerfused.cpu import CpuLaunch

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
