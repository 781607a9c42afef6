"""Parameters that come and go, of every type and shape, and gradients that are left in p.grad or come in parts."""

from copy import deepcopy

import pytest
import torch
from conduct import assert_same, parameters, same_bits, snapshot
from curvature_oracle import CLASSES, ESTIMATORS, PRODUCTS, Oracle, Row, all_finite, loss, make, start, stats, take_step
from curvature_oracle import parameters as parameters_of
from torch.nn import Parameter

each_flavour = pytest.mark.parametrize("flavour", CLASSES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_product = pytest.mark.parametrize("product", PRODUCTS)
each_engine = pytest.mark.parametrize("backend", ["auto", "reference"])


# Parameters that come and go


def with_only(used, n):
    """A loss that uses some of the five parameters; the others are constants to it."""
    return lambda ps: loss(n)([p if i in used else p.detach() for i, p in enumerate(ps)])


@each_estimator
@each_flavour
def test_unused_parameters(flavour, estimator):
    """Unused, then used, then unused again: each counts its own steps, as the oracle's do."""
    params = parameters_of(start(), torch.float64)
    opt = make(flavour, params, estimator=estimator, product="double-backward", weight_decay=0.01)
    oracle = Oracle(flavour, params, Row(weight_decay=0.01), estimator=estimator)
    for n, used in enumerate([(0, 1, 4), (0, 1, 2, 3, 4), (1, 2), (0, 3, 4), (0, 1, 2, 3, 4)]):
        before = [p.detach().clone() for p in params]
        take_step(opt, params, with_only(used, n))
        signs = [report["sign"] for report in stats(opt)] if estimator == "signs" else None
        oracle.step([with_only(used, n)], signs)
        for i, (p, q, old) in enumerate(zip(params, oracle.params, before, strict=True)):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-7, atol=1e-8)
            assert i in used or same_bits(p, old)
            assert (p.grad is None or not p.grad.any()) == (i not in used)
    assert [int(opt.state[p]["step"]) for p in params] == oracle.t


@each_product
@each_estimator
@each_flavour
def test_unused_parameters_with_either_product(flavour, estimator, product):
    """A parameter that has never been used has no state to speak of and no NaN; float32 on the native engine."""
    params = parameters_of(start())
    opt = make(flavour, params, estimator=estimator, product=product)
    for n in range(3):
        take_step(opt, params, with_only((0, 4), n))
        assert all_finite(opt, params)
    for i in (1, 2, 3):
        assert same_bits(params[i], start()[i].float()) and opt.state[params[i]]["step"] == 0
    take_step(opt, params, loss(3))
    assert all_finite(opt, params)
    assert [int(opt.state[p]["step"]) for p in params] == [4, 1, 1, 1, 4]


@each_product
@each_flavour
def test_frozen_parameters(flavour, product):
    params = parameters_of(start())
    opt = make(flavour, params, product=product)
    params[0].requires_grad_(False)
    before = snapshot(opt, params)[0]
    for n in range(2):
        take_step(opt, params, loss(n))
    assert_same([snapshot(opt, params)[0]], [before])
    assert params[0].grad is None
    params[0].requires_grad_(True)
    take_step(opt, params, loss(2))
    assert not same_bits(params[0], before[0]) and all_finite(opt, params)


@each_engine
@each_product
@each_estimator
@each_flavour
def test_empty_and_0_dim_parameters(flavour, estimator, product, backend):
    params = parameters((), (0,), (2, 0, 3), (3,))
    opt = make(flavour, params, estimator=estimator, product=product, backend=backend)
    first = None
    for _ in range(4):
        found = take_step(opt, params, lambda ps: sum((p - 1).square().sum() for p in ps))
        first = found if first is None else first
        assert all_finite(opt, params)
    assert found < first


@each_product
@each_estimator
@each_flavour
def test_all_zero_weights(flavour, estimator, product):
    """Training starts from zeros, where h |d| has no |p| to go by."""
    params, x = [Parameter(torch.zeros(3)), Parameter(torch.zeros(()))], torch.arange(12.0).view(4, 3)
    opt = make(flavour, params, estimator=estimator, product=product)
    losses = [take_step(opt, params, lambda ps: (x @ ps[0] + ps[1] - 1).square().mean()).item() for _ in range(30)]
    assert all_finite(opt, params)
    assert losses[-1] < 0.3 * losses[0]


@each_product
@each_flavour
def test_bfloat16_parameters(flavour, product):
    """The reach has to be long enough for weights of 8 bits: a step that they do not see would read as no curvature."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).bfloat16()
    x, y = torch.randn(64, 8).bfloat16(), torch.randn(64, 8)[:, :4]
    y = y + x[:, :4].float()
    opt = make(flavour, model.parameters(), product=product)
    losses = [opt.step(lambda: (model(x).float() - y).square().mean()).item() for _ in range(30)]
    assert all_finite(opt, list(model.parameters()))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]
    assert all(report["curvature"] > 0 for report in stats(opt))


@each_flavour
def test_weights_come_back_from_the_difference(flavour):
    """lr = 0: what was moved to p + hz is again what it was, bit for bit, in every storage type."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        params = [Parameter((1e3 ** torch.randn(257)).to(dtype)), Parameter(torch.randn(5, 3).to(dtype))]
        before = [p.detach().clone() for p in params]
        opt = make(flavour, params, lr=0.0)
        for _ in range(3):
            take_step(opt, params, lambda ps: sum(p.float().cos().sum() for p in ps))
        assert all(same_bits(p, old) for p, old in zip(params, before, strict=True))


@each_estimator
@each_product
@each_flavour
def test_two_engines_take_one_step(flavour, product, estimator):
    """float32 and float64 parameters of one model: one reach, one skip, and the oracle's curvatures."""
    params = [
        Parameter(value.to(dtype)) for value, dtype in zip(start(), [torch.float32, torch.float64] * 3, strict=False)
    ]
    opt = make(flavour, params, product=product, estimator=estimator, weight_decay=0.0)
    assert opt.engines == {"cpu": 3, "reference": 2}
    before = snapshot(opt, params)
    take_step(opt, params, lambda ps: loss(0)(ps) + (0 * ps[1]).sum().sqrt())  # a NaN for one of the engines alone
    assert_same(snapshot(opt, params), before)
    assert opt.skipped_steps == 1
    oracle = Oracle(flavour, start(), Row(), estimator=estimator)
    take_step(opt, params, loss(0))
    wanted = oracle.step([loss(0)], [report["sign"] for report in stats(opt)])
    for report, want in zip(stats(opt), wanted, strict=True):
        for name in ("direction_norm", "slope", "curvature"):  # a difference over a thousandth is right to some of them
            assert report[name] == pytest.approx(want[name], rel=0.02, abs=0.005), name


@each_flavour
def test_memory_format_makes_no_difference(flavour):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ends = []
    for form in (torch.contiguous_format, torch.channels_last):
        own = deepcopy(model).to(memory_format=form)
        opt = make(flavour, own.parameters(), estimator="signs")
        for _ in range(3):
            opt.step(lambda own=own, form=form: own(x.to(memory_format=form)).square().mean())
        ends.append(list(own.parameters()))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# Gradients left in p.grad


@each_estimator
@each_product
@each_flavour
def test_zero_grad_makes_no_difference(flavour, product, estimator):
    """Its own gradients of the step before are no gradients of the user's."""
    ends = []
    for clear in (lambda opt: None, lambda opt: opt.zero_grad(), lambda opt: opt.zero_grad(set_to_none=False)):
        params = parameters_of(start())
        opt = make(flavour, params, product=product, estimator=estimator)
        for n in range(3):
            clear(opt)
            take_step(opt, params, loss(n))
        ends.append(snapshot(opt, params))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@each_product
@each_flavour
def test_zero_grad_inside_of_the_closure(flavour, product):
    """The habit from LBFGS does no harm."""
    ends = []
    for clear in (False, True):
        params = parameters_of(start())
        opt = make(flavour, params, product=product)
        for n in range(3):
            take_step(opt, params, lambda ps, n=n, opt=opt, clear=clear: (clear and opt.zero_grad(), loss(n)(ps))[1])
        ends.append(snapshot(opt, params))
    assert_same(*ends)


@each_estimator
@each_product
@each_flavour
def test_micro_batches_are_one_batch(flavour, product, estimator):
    """A sequence of closures: the losses are added. Float64, so that only the order of a sum is left between them."""
    ends, found = [], []
    for parts in (1, 2, 3):
        params = parameters_of(start(), torch.float64)
        opt = make(flavour, params, product=product, estimator=estimator)
        for n in range(3):
            whole = [loss(n), loss(n + 10), loss(n + 20)]
            if parts == 1:
                total = take_step(opt, params, lambda ps, whole=whole: sum(f(ps) for f in whole))
            elif parts == 2:
                total = take_step(opt, params, whole[0], lambda ps, whole=whole: whole[1](ps) + whole[2](ps))
            else:
                total = opt.step(tuple(lambda f=f, params=params: f(params) for f in whole))
        ends.append(params)
        found.append(total.item())
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-9)
    for other in ends[1:]:
        for p, q in zip(ends[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_grad_mode_around_the_step_does_not_matter():
    ends = []
    for mode in (torch.enable_grad, torch.no_grad):
        for product in PRODUCTS:
            params = parameters_of(start())
            opt = make("sgd", params, product=product)
            with mode():
                take_step(opt, params, loss(0))
            ends.append(snapshot(opt, params))
    assert_same(ends[0], ends[2])
    assert_same(ends[1], ends[3])
