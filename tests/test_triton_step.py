"""What a step of the Triton engine does with a global norm, `maximize`, groups, and hyper-parameters on the device."""

import pytest
import torch
from engines import ONE_PER_RULE, make, parameters, same_bits, starts, step, tame
from triton_cases import DEVICE, MARKS, Twins, counters, plans, there, train, written

from layerfused import triton_engine

pytestmark = MARKS
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
SIZES = (1, 17, 300)


def scaled(steps, factors):
    for grads, factor in zip(tame(SIZES, steps), factors, strict=True):
        yield [factor * g for g in grads]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    plans(monkeypatch, grid=2)


@RULES
def test_global_clip(name):
    """The first gradients are clipped, the second not; the CPU engine's bits once the norm is equal."""
    twins = Twins(name, starts(SIZES), max_grad_norm=20.0)
    for grads in scaled(2, (1.0, 0.1)):
        twins.step(grads)
    found = (twins.opts[0].grad_norm < 20).item(), (twins.opts[1]._launches[0].norm < 20).item()
    assert found == (True, True)


@RULES
def test_the_norm_of_a_step(name):
    """Of all gradients, in float64: doubles of positive numbers, of which 1,000 are added at most."""
    opt, params = train(name, starts(SIZES), tame(SIZES, 1), max_grad_norm=20.0)
    exact = sum((p.grad.double() ** 2).sum() for p in params).sqrt()
    assert exact > 20
    torch.testing.assert_close(opt.grad_norm, exact, rtol=1000 * 1.2e-16, atol=0)
    assert not counters(opt).any()


GIVEN = [8.0, torch.tensor(8.0), torch.tensor([8.0], dtype=torch.float64, device=DEVICE)]


@pytest.mark.parametrize("name, given", [*((name, 8.0) for name in ONE_PER_RULE), *(("lamb", norm) for norm in GIVEN)])
def test_a_given_norm_clips_instead(name, given):
    values, grads = starts(SIZES), next(tame(SIZES, 1))
    params = parameters(there(values))
    opt = make(name, params, max_grad_norm=1.0, backend="triton")
    for p, g in zip(params, there(grads), strict=True):
        p.grad = g
    opt.step(grad_norm=given)
    exact, _ = train(name, values, [[g / 8 for g in grads]], max_grad_norm=1e9)  # a power of two: exact
    same_bits(written(opt), written(exact))
    assert opt.grad_norm == 8


def launches(kind):
    """Parameters whose optimizer makes one launch, two of Triton, or one beside another engine's, before or after."""
    one, two, three = starts((5, 300, 7))
    here = there((one, two))
    triton = {"params": parameters(here), "backend": "triton"}
    if kind == "one":
        return [triton], 1
    if kind == "two":
        return [{"params": parameters([here[0], here[1].bfloat16()]), "backend": "triton"}], 2
    other = {"params": parameters([three]), "backend": "cpu" if "cpu" in kind else "reference"}
    return ([other, triton] if kind.endswith("first") else [triton, other]), 2


SKIPPED = [("lamb", kind) for kind in ("one", "two", "cpu first", "cpu last", "reference last")]
SKIPPED += [("novograd-decay", "two"), ("sgd", "one")]


# Bits of the whole optimizer, steps and layer scalars included; two launches share one norm and count once.
# Leaves out the other rules: what is skipped is no affair of theirs.
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "given"], ids=str)
@pytest.mark.parametrize("name, kind", SKIPPED)
def test_a_norm_that_is_not_finite_changes_nothing(name, kind, poison):
    groups, count = launches(kind)
    opt = make(name, groups, max_grad_norm=1.0)
    params = [p for group in groups for p in group["params"]]
    assert len(opt._current()) == count

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
    assert not counters_of_triton(opt).any()


def counters_of_triton(opt):
    return torch.cat([launch._work.counters for launch in opt._launches if launch.engine == "triton"])


@pytest.mark.parametrize("kind", ["one", "two"])
def test_no_gradient_at_all_with_a_global_clip(kind):
    opt = make("lamb", launches(kind)[0], max_grad_norm=1.0)
    before = written(opt)
    opt.step()
    same_bits(written(opt), before)
    assert opt.skipped_steps == 0 and opt.grad_norm == 0


@RULES
def test_maximize(name):
    """It is the same as minimizing with the gradient turned round."""
    up, _ = train(name, starts(SIZES), scaled(1, (-1.0,)), maximize=True, max_grad_norm=2.0)
    down, _ = train(name, starts(SIZES), tame(SIZES, 1), max_grad_norm=2.0)
    same_bits(written(up), written(down))


@RULES
def test_groups_with_hyper_parameters_of_their_own(name):
    """One launch; each group as it is alone, after a change of lr, too."""
    rates = (0.25, 0.5, 0.125)
    signs = (False, True, False)
    values = starts(SIZES)

    def final(chosen):
        params = parameters(there(values[i] for i in chosen))
        groups = [{"params": [p], "lr": rates[i], "maximize": signs[i]} for p, i in zip(params, chosen, strict=True)]
        opt = make(name, groups, backend="triton")
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
def test_lr_on_the_device(name, dtype):
    """Read by the kernel: a change of the tensor is seen, though nothing is sent again."""
    rates = (0.25, 0.0625)
    lr = torch.tensor(rates[0], dtype=dtype, device=DEVICE)
    live, params = (make(name, ps := parameters(there(starts(SIZES))), lr=lr, backend="triton"), ps)
    fixed, others = (make(name, ps := parameters(there(starts(SIZES))), lr=rates[0], backend="triton"), ps)
    sent = []
    for grads, rate in zip(tame(SIZES, 2), rates, strict=True):
        lr.fill_(rate)
        fixed.param_groups[0]["lr"] = rate
        for p, q, g in zip(params, others, there(grads), strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)  # at its place, so that no address changes
            q.grad = g.clone()
        live.step()
        fixed.step()
        sent.append(live._launches[0]._sent)
        same_bits(written(live), written(fixed))
    assert sent[0] is sent[1] and live.param_groups[0]["lr"] is lr


def test_lr_of_some_groups_on_the_device():
    """Beside a number, and a tensor of one element on the CPU, which is read on the host."""
    rates = [torch.tensor(0.25, device=DEVICE), 0.5, torch.tensor([0.125], dtype=torch.float64)]

    def final(rates):
        params = parameters(there(starts(SIZES)))
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
        opt = make("lamb", groups, backend="triton")
        for grads in tame(SIZES, 2):
            step(opt, params, there(grads))
        return written(opt)

    same_bits(final(rates), final([float(rate) for rate in rates]))


# The bad one is in the second of two launches, so that an engine which checks as it goes would have run the first.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_lr_of_a_type_that_the_kernel_does_not_read(dtype):
    here = there(starts(SIZES))
    params = parameters([here[0], here[1].bfloat16()])
    lr = torch.ones((), dtype=dtype, device=DEVICE)
    opt = make("lamb", [{"params": params[:1]}, {"params": params[1:], "lr": lr}], backend="triton")
    assert len(opt._current()) == 2
    before = written(opt)
    for p in params:
        p.grad = p.detach().clone()
    with pytest.raises(TypeError, match=f"lr on the device must be float32 or float64, got {dtype}"):
        opt.step()
    same_bits(written(opt), before)
    opt.param_groups[1]["lr"] = lr.float()
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [1, 1]


def test_the_second_of_two_launches_that_cannot_be_made(monkeypatch):
    """It is found before the first has written anything."""
    values = starts((5, 300))
    params = parameters(there([values[0], values[1].bfloat16()]))
    opt = make("lamb", params, backend="triton", max_grad_norm=1.0)
    step(opt, params, there(next(tame((5, 300), 1))[:1]) + [torch.ones_like(params[1])])
    before, upload = written(opt), triton_engine.TritonLaunch._upload

    def refused(self):
        if self is opt._launches[1]:
            raise RuntimeError("no memory")
        upload(self)

    opt.param_groups[0]["lr"] *= 2
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(triton_engine.TritonLaunch, "_upload", refused)
        opt.defaults["max_grad_norm"] = None  # a global norm would have sent it before
        opt.step()
    same_bits(written(opt), before)
