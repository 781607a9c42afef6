"""GradScaler: fused into the step with `amp_scaling=True`, and by its own ways without.

Left out: a real GPU's wait for the host (there are tests for GPUs), several devices.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch
from cases import CASES
from torch.amp import GradScaler

import layerfused as lf

SHAPES = [(7, 5), (5,), (3, 4, 2), (), (3000,), (0,)]
STEPS = 4
BACKENDS = ["cpu", "reference"]


def start():
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def gradients(n, scale=1.0):
    random = torch.Generator().manual_seed(n + 1)
    return [scale * torch.randn(shape, generator=random) for shape in SHAPES]


def train(make, scaler=None, spoil=(), unscale=False):
    """Steps with gradients of a power-of-2 scale, so that taking it out again is exact."""
    params = start()
    opt = make(params)
    for n in range(STEPS):
        scale = 1.0 if scaler is None else scaler.get_scale()
        for p, g in zip(params, gradients(n, scale), strict=True):
            p.grad = g.to(p.dtype)
        if n in spoil:
            params[1].grad[2] = math.inf if n % 2 else math.nan
        if scaler is None:
            if n not in spoil:
                opt.step()
            continue
        scaler.scale(torch.zeros(()))  # as the loss would
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    return params, opt


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def scaler_of(scale=2.0**10):
    return GradScaler("cpu", init_scale=scale, growth_interval=2)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LAMB", "NovoGrad", "AdamW"])
def test_the_scale_leaves_no_trace(name, backend, clip, unscale):
    def make(params, **scaling):
        return getattr(lf, name)(params, max_grad_norm=clip, backend=backend, **scaling)

    plain, one = train(make)
    scaled, two = train(lambda params: make(params, amp_scaling=True), scaler_of(), unscale=unscale)
    assert same(plain, scaled)
    assert float(one.grad_norm) == pytest.approx(float(two.grad_norm), rel=1e-12) and int(two.skipped_steps) == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_optimizer(case):
    def make(params, **scaling):
        return getattr(lf, case.cls)(params, **case.kwargs, **scaling)

    plain, _ = train(make)
    scaled, _ = train(lambda params: make(params, amp_scaling=True), scaler_of())
    assert same(plain, scaled)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", [(0,), (1,), (2, 3)])
def test_gradients_that_are_not_finite(backend, clip, spoil):
    def make(params, **scaling):
        return lf.LAMB(params, max_grad_norm=clip, backend=backend, **scaling)

    plain, _ = train(make, spoil=spoil)
    scaler = scaler_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a skipped step is GradScaler's daily bread
        scaled, opt = train(lambda params: make(params, amp_scaling=True), scaler, spoil)
    assert same(plain, scaled) and int(opt.skipped_steps) == len(spoil)
    assert all(float(opt.state[p]["step"]) == STEPS - len(spoil) for p in scaled)
    assert scaler.get_scale() < 2.0**10 * 4  # it backed off


def test_without_the_option_gradscaler_does_it_all():
    plain, _ = train(lambda params: lf.LAMB(params))
    scaled, opt = train(lambda params: lf.LAMB(params), scaler_of(), spoil=())
    assert same(plain, scaled) and not opt._step_supports_amp_scaling
    spoiled, opt = train(lambda params: lf.LAMB(params), scaler_of(), spoil=(1,))
    assert same(spoiled, train(lambda params: lf.LAMB(params), spoil=(1,))[0])


def test_gradients_stay_scaled():
    """The fused way reads them; nobody writes them."""
    params = start()
    opt, scaler = lf.LAMB(params, amp_scaling=True), scaler_of()
    scaler.scale(torch.zeros(()))
    for p, g in zip(params, gradients(0, 1024.0), strict=True):
        p.grad = g
    scaler.step(opt)
    assert same([p.grad for p in params], gradients(0, 1024.0))


def test_a_norm_that_is_given_is_of_unscaled_gradients():
    plain = start()
    one = lf.LAMB(plain, max_grad_norm=0.5)
    for p, g in zip(plain, gradients(0), strict=True):
        p.grad = g
    one.step(grad_norm=3.0)
    scaled = start()
    two, scaler = lf.LAMB(scaled, max_grad_norm=0.5, amp_scaling=True), scaler_of()
    scaler.scale(torch.zeros(()))
    for p, g in zip(scaled, gradients(0, 1024.0), strict=True):
        p.grad = g
    scaler.step(two, grad_norm=3.0)
    assert same(plain, scaled)


def test_fp16_parameters():
    """GradScaler refuses to unscale fp16 gradients; in the step nothing is unscaled in memory."""
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    opt, scaler = lf.LAMB([p], amp_scaling=True), scaler_of()
    scaler.scale((p.float() * 1e-7).sum()).backward()
    scaler.step(opt)
    assert int(opt.state[p]["step"]) == 1 and not torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("word", ["master", "remainder", "kahan", "stochastic", ("master", "bf16-states")], ids=str)
def test_with_precision(word):
    """Gradients of bfloat16 times a power of two are the same gradients."""

    def make(params, **scaling):
        for p in params:
            p.data = p.data.bfloat16()
        return lf.LAMB(params, lr=0.1, precision=word, **scaling)

    plain, one = train(make)
    scaled, two = train(lambda params: make(params, amp_scaling=True), scaler_of())
    assert plain[0].dtype == torch.bfloat16 and same(plain, scaled)
    assert all(same(one.state[p].values(), two.state[q].values()) for p, q in zip(plain, scaled, strict=True))


def test_pickled_and_copied():
    for make in (copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
        opt = lf.LAMB(start(), amp_scaling=True)
        assert make(opt)._step_supports_amp_scaling


def test_only_for_the_whole_optimizer():
    with pytest.raises(ValueError, match="amp_scaling is the whole optimizer's"):
        lf.LAMB([{"params": start(), "amp_scaling": True}])
    with pytest.raises(ValueError, match="CurvatureSGD has no amp_scaling"):
        lf.CurvatureSGD(start(), amp_scaling=True)


def test_a_norm_that_is_not_finite_is_warned_of_once():
    params = start()
    opt = lf.LAMB(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for p, g in zip(params, gradients(0), strict=True):
                p.grad = g * math.inf
            opt.step()
    assert int(opt.skipped_steps) == 3 and same(params, start())
    (one,) = [w for w in caught if "changed nothing" in str(w.message)]
    assert one.filename == __file__
