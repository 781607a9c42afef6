"""What a step does with absent gradients, global norms and `adapt`, on every engine."""

import pytest
import torch
from cases import ADAPT, CASES, FIXED
from engines import (
    NAMED,
    ONE_PER_RULE,
    all_within,
    make,
    parameters,
    same_bits,
    starts,
    step,
    tame,
    threads,
    train,
    written,
)

ENGINES = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.fixture(autouse=True)
def one_thread():
    """More change no bit (test_engine_bits.py), and waking them for small layers takes most of the time."""
    with threads(1):
        yield


@ENGINES
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_absent_gradients(name, backend):
    """A parameter without gradient rests, and counts no step; at one step nobody has one."""
    sizes = (1, 17, 300)

    def gradients():
        for t, grads in enumerate(tame(sizes, 8)):
            yield [g if t != 4 and (t + i) % 3 else None for i, g in enumerate(grads)]

    opt, params = train(name, starts(sizes), gradients(), backend=backend)
    _, exact = train(name, [x.double() for x in starts(sizes)], gradients())
    all_within(params, exact, starts(sizes))
    taken = [sum(t != 4 and (t + i) % 3 > 0 for t in range(8)) for i in range(3)]
    assert [opt.state[p]["step"].item() for p in params] == taken


@ENGINES
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_global_clip(name, backend):
    """g /= max(1, norm / max) over all parameters, in float64; the first steps are clipped, the last are not."""
    sizes, limit = (1, 17, 2049), 20.0

    def clipped():
        for t, grads in enumerate(shrinking()):
            norm = sum((g.double() ** 2).sum() for g in grads) ** 0.5
            assert (norm > limit) == (t < 4)
            yield [g.double() / max(1, norm / limit) for g in grads]

    def shrinking():
        for t, grads in enumerate(tame(sizes, 6)):
            yield [g if t < 4 else g / 10 for g in grads]

    opt, params = train(name, starts(sizes), shrinking(), backend=backend, max_grad_norm=limit)
    _, exact = train(name, [x.double() for x in starts(sizes)], clipped())
    all_within(params, exact, starts(sizes))
    last = [p.grad.double() for p in params]
    # 16 lanes, then a tree: fewer than 200 additions of positive numbers follow each other
    torch.testing.assert_close(opt.grad_norm, sum((g**2).sum() for g in last) ** 0.5, rtol=200 * 1.2e-16, atol=0)


@ENGINES
def test_a_given_norm_clips_instead(backend):
    values, grads = starts((5, 300)), next(tame((5, 300), 1))
    params = parameters(values)
    opt = make("lamb", params, max_grad_norm=1.0, backend=backend)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step(grad_norm=torch.tensor(8.0))
    _, exact = train("lamb", values, [[g / 8 for g in grads]], backend=backend)  # a power of two: exact
    assert all(torch.equal(p, q) for p, q in zip(params, exact, strict=True))
    assert opt.grad_norm == 8


# "mixed": two launches share one norm. Bits of the whole optimizer, steps and layer scalars included.
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "given"], ids=str)
@pytest.mark.parametrize("kind", ["cpu", "reference", "mixed"])
@pytest.mark.parametrize("name", ["lamb", "novograd", "adabeliefnorm", "adam", "sgd"])
def test_a_norm_that_is_not_finite_changes_nothing(name, kind, poison):
    params = parameters([*starts((5, 300)), starts((7,))[0].double()])[: 3 if kind == "mixed" else 2]
    sizes = [p.numel() for p in params]
    opt = make(name, params, max_grad_norm=1.0, backend="auto" if kind == "mixed" else kind)
    clean, poisoned = list(tame(sizes, 2))
    step(opt, params, clean)
    before = written(opt)
    if poison == "given":
        for p, g in zip(params, poisoned, strict=True):
            p.grad = g.to(p.dtype)
        opt.step(grad_norm=float("inf"))
    else:
        poisoned[-1][3] = poison
        step(opt, params, poisoned)
    same_bits(written(opt), before)
    assert opt.skipped_steps == 1
    step(opt, params, clean)
    assert opt.skipped_steps == 1 and all((p != before[f"{i}.p"]).any() for i, p in enumerate(params))


@pytest.mark.parametrize("backend", ["cpu", "mixed"])
def test_no_gradient_at_all_with_a_global_clip(backend):
    params = parameters([starts((5,))[0], starts((5,))[0].to(torch.float64 if backend == "mixed" else torch.float32)])
    opt = make("lamb", params, max_grad_norm=1.0)
    before = written(opt)
    opt.step()
    same_bits(written(opt), before)
    assert opt.skipped_steps == 0


@ENGINES
@pytest.mark.parametrize("name", [case.name for case in CASES if case.rule in ADAPT])
def test_without_adaptation(name, backend):
    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "adapt": False}]

    def gradients():  # up and down: AdaNorm answers to short gradients, LARC's bound to long ones
        for t, grads in enumerate(tame(sizes, 10)):
            yield [g * 4 ** (-1) ** t for g in grads]

    sizes = (17, 300, 17, 300)  # layers of one size have the same start and gradients
    _, params = train(name, starts(sizes), gradients(), groups, backend=backend)
    _, exact = train(name, [x.double() for x in starts(sizes)], gradients(), groups)
    all_within(params, exact, starts(sizes))
    _, adapted = train(name, starts(sizes), gradients(), backend=backend)
    assert torch.equal(params[1], adapted[1])
    if NAMED[name].hyper.get("k", 1) > 0:  # aida with k = 0 has nothing to leave out
        assert not torch.equal(params[1], params[3])


@pytest.mark.parametrize("name", [case.name for case in CASES if case.rule in FIXED])
def test_rules_that_need_adaptation_refuse(name):
    with pytest.raises(ValueError, match="adapt=False"):
        make(name, [{"params": parameters(starts((3,))), "adapt": False}])
