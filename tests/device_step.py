"""What a step does with a global norm, `maximize`, groups, and hyper-parameters on the device."""

import pytest
import torch
from device_cases import DEVICE, there, written
from engines import ONE_PER_RULE, make, parameters, same_bits, starts, step, tame

RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
SIZES = (1, 17, 300)


def scaled(steps, factors):
    for grads, factor in zip(tame(SIZES, steps), factors, strict=True):
        yield [factor * g for g in grads]


@pytest.fixture(autouse=True)
def small(engine):
    engine.plans(grid=2)


@RULES
def test_global_clip(name, engine):
    """The first gradients are clipped, the second not; the CPU engine's bits once the norm is equal."""
    twins = engine.twins(name, starts(SIZES), max_grad_norm=20.0)
    for grads in scaled(2, (1.0, 0.1)):
        twins.step(grads)
    found = (twins.opts[0].grad_norm < 20).item(), (twins.opts[1]._launches[0].norm < 20).item()
    assert found == (True, True)


@RULES
def test_the_norm_of_a_step(name, engine):
    """Of all gradients, in float64: doubles of positive numbers, of which 1,000 are added at most."""
    opt, params = engine.train(name, starts(SIZES), tame(SIZES, 1), max_grad_norm=20.0)
    exact = sum((p.grad.double() ** 2).sum() for p in params).sqrt()
    assert exact > 20
    torch.testing.assert_close(opt.grad_norm, exact, rtol=1000 * 1.2e-16, atol=0)
    assert not engine.counters(opt).any()


GIVEN = [8.0, torch.tensor(8.0), torch.tensor([8.0], dtype=torch.float64, device=DEVICE)]


@pytest.mark.parametrize("name, given", [*((name, 8.0) for name in ONE_PER_RULE), *(("lamb", norm) for norm in GIVEN)])
def test_a_given_norm_clips_instead(name, given, engine):
    values, grads = starts(SIZES), next(tame(SIZES, 1))
    params = parameters(there(values))
    opt = engine.make(name, params, max_grad_norm=1.0)
    for p, g in zip(params, there(grads), strict=True):
        p.grad = g
    opt.step(grad_norm=given)
    exact, _ = engine.train(name, values, [[g / 8 for g in grads]], max_grad_norm=1e9)  # a power of two: exact
    same_bits(written(opt), written(exact))
    assert opt.grad_norm == 8


OTHER = {"ladam": {"processing": "post"}, "sgd": {"momentum": 0.9}}  # what makes another rule of it, and so a launch


def launches(name, kind, engine):
    """An optimizer of one launch, of two, or of one beside another engine's, before or after; and its parameters."""
    params = parameters([*there(starts((5, 300))), starts((7,))[0].to(DEVICE if kind == "two" else "cpu")])
    ours, others = {"params": params[:2], "backend": engine.backend}, {"params": params[2:]}
    if kind == "one":
        return make(name, [ours], max_grad_norm=1.0), params[:2]
    others |= OTHER[name] if kind == "two" else {}
    others["backend"] = engine.backend if kind == "two" else "cpu" if "cpu" in kind else "reference"
    opt = make(name, [others, ours] if kind.endswith("first") else [ours, others], max_grad_norm=1.0)
    return opt, [p for group in opt.param_groups for p in group["params"]]


SKIPPED = [("lamb", kind) for kind in ("one", "cpu first", "cpu last", "reference last")]
SKIPPED += [("ladam", "two"), ("sgd", "two"), ("sgd", "one")]


# Bits of the whole optimizer, steps and layer scalars included; two launches share one norm and count once.
# Leaves out the other rules: what is skipped is no affair of theirs.
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "given"], ids=str)
@pytest.mark.parametrize("name, kind", SKIPPED)
def test_a_norm_that_is_not_finite_changes_nothing(name, kind, poison, engine):
    opt, params = launches(name, kind, engine)
    assert len(opt._current()) == 1 + (kind != "one")

    def give(t, poison=None):
        for p in params:
            p.grad = (0.5 + t) * p.detach()
        if poison is not None:
            params[-1].grad[3] = poison

    give(0)
    opt.step()
    before = written(opt)
    give(1, None if poison == "given" else poison)
    opt.step(grad_norm=float("inf") if poison == "given" else None)
    same_bits(written(opt), before)
    assert opt.skipped_steps == 1
    give(1)
    opt.step()
    assert opt.skipped_steps == 1 and all(opt.state[p]["step"] == 2 for p in params)
    assert not engine.counters(opt).any()


@pytest.mark.parametrize("kind", ["one", "two"])
def test_no_gradient_at_all_with_a_global_clip(kind, engine):
    opt, _ = launches("ladam", kind, engine)
    before = written(opt)
    opt.step()
    same_bits(written(opt), before)
    assert opt.skipped_steps == 0 and opt.grad_norm == 0


@RULES
def test_maximize(name, engine):
    """It is the same as minimizing with the gradient turned round."""
    up, _ = engine.train(name, starts(SIZES), scaled(1, (-1.0,)), maximize=True, max_grad_norm=2.0)
    down, _ = engine.train(name, starts(SIZES), tame(SIZES, 1), max_grad_norm=2.0)
    same_bits(written(up), written(down))


@RULES
def test_groups_with_hyper_parameters_of_their_own(name, engine):
    """One launch; each group as it is alone, after a change of lr, too."""
    rates = (0.25, 0.5, 0.125)
    signs = (False, True, False)
    values = starts(SIZES)

    def final(chosen):
        params = parameters(there(values[i] for i in chosen))
        groups = [{"params": [p], "lr": rates[i], "maximize": signs[i]} for p, i in zip(params, chosen, strict=True)]
        opt = engine.make(name, groups)
        assert opt.traffic()["launches"] == 1
        for grads in tame(SIZES, 2):
            step(opt, params, there(grads[i] for i in chosen))
            for group in opt.param_groups:
                group["lr"] *= 0.5
        return params

    for p, (q,) in zip(final((0, 1, 2)), (final((0,)), final((1,)), final((2,))), strict=True):
        assert torch.equal(p, q)


# Hyper-parameters on the device


TYPES = [*((name, torch.float32) for name in ONE_PER_RULE), ("lamb", torch.float64), ("sgd", torch.float64)]


@pytest.mark.parametrize("name, dtype", TYPES)
def test_lr_on_the_device(name, dtype, engine):
    """Read by the kernel: a change of the tensor is seen, though nothing is sent again."""
    rates = (0.25, 0.0625)
    lr = torch.tensor(rates[0], dtype=dtype, device=DEVICE)
    live, params = (engine.make(name, ps := parameters(there(starts(SIZES))), lr=lr), ps)
    fixed, others = (engine.make(name, ps := parameters(there(starts(SIZES))), lr=rates[0]), ps)
    sent = []
    for grads, rate in zip(tame(SIZES, 2), rates, strict=True):
        lr.fill_(rate)
        fixed.param_groups[0]["lr"] = rate
        for p, q, g in zip(params, others, there(grads), strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)  # at its place, so that no address changes
            q.grad = g.clone()
        fixed.step()
        live.step()
        sent.append(engine.sent(live))
        same_bits(written(live), written(fixed))
    assert sent[0] == sent[1] and live.param_groups[0]["lr"] is lr


def test_lr_of_some_groups_on_the_device(engine):
    """Beside a number, and a tensor of one element on the CPU, which is read on the host."""
    rates = [torch.tensor(0.25, device=DEVICE), 0.5, torch.tensor([0.125], dtype=torch.float64)]

    def final(rates):
        params = parameters(there(starts(SIZES)))
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
        opt = engine.make("lamb", groups)
        for grads in tame(SIZES, 2):
            step(opt, params, there(grads))
        return written(opt)

    same_bits(final(rates), final([float(rate) for rate in rates]))


# The bad one is in the second of two launches, so that an engine which checks as it goes would have run the first.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_lr_of_a_type_that_the_kernel_does_not_read(dtype, engine):
    opt, params = launches("ladam", "two", engine)
    lr = torch.ones((), dtype=dtype, device=DEVICE)
    opt.param_groups[1]["lr"] = lr
    before = written(opt)
    for p in params:
        p.grad = p.detach().clone()
    with pytest.raises(TypeError, match=f"lr on the device must be float32 or float64, got {dtype}"):
        opt.step()
    same_bits(written(opt), before)
    opt.param_groups[1]["lr"] = lr.float()
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [1, 1, 1]


@pytest.mark.parametrize("clip", [None, 20.0], ids=str)
@pytest.mark.parametrize("name", ["lamb", "adam-decay", "novograd-decay"])
def test_gradscaler(name, clip, engine):
    """Its scale leaves no trace, a gradient that is not finite makes the step one that changes nothing."""
    plain, _ = engine.train(name, starts(SIZES), tame(SIZES, 2), max_grad_norm=clip)
    opt, params = engine.train(name, starts(SIZES), [], max_grad_norm=clip, amp_scaling=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    sequence = [*tame(SIZES, 2)]
    for grads in (sequence[0], [g * float("inf") for g in sequence[0]], sequence[1]):
        scaler.scale(torch.zeros((), device=DEVICE))
        for p, g in zip(params, there(grads), strict=True):
            p.grad = g * scaler.get_scale()
        scaler.step(opt)
        scaler.update()
    same_bits(written(opt), written(plain))
    assert int(opt.skipped_steps) == 1 and scaler.get_scale() == 2.0**9
    if clip:
        torch.testing.assert_close(opt.grad_norm, plain.grad_norm, rtol=1e-12, atol=0)
