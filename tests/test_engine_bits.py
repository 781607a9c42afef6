"""The CPU engine's bits: alike from run to run, for any number of threads, phase by phase, wherever tensors lie."""

import pytest
import torch
from cases import FIXED
from engines import (
    NAMED,
    ONE_PER_RULE,
    make,
    parameters,
    raw,
    same_bits,
    small_chunks,
    starts,
    step,
    tame,
    threads,
    train,
    wild,
    written,
)

from layerfused import cpu
from layerfused.plan import Phase

RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
# Several layers of more than one chunk in flight, small ones between them.
LARGE = (17, 2 * cpu.CHUNK + 5, 300, cpu.CHUNK + 1, 0, 2 * cpu.CHUNK + 3)
MANY = tuple(range(0, 1500, 37))  # against chunks of 64


def mixed(name):
    """Groups with layer-wise factor, without it where the rule allows that, and with one layer for all tensors."""

    def groups(params):
        third = len(params) // 3
        rest = {"params": params[2 * third :], "layer": "group"}
        adapt = NAMED[name].rule in FIXED
        return [{"params": params[:third]}, {"params": params[third : 2 * third], "adapt": adapt}, rest]

    return groups


def run(name, sizes, gradients, count=1, groups=None, **more):
    with threads(count):
        opt, _ = train(name, starts(sizes), gradients, groups, **more)
    return written(opt)


# Production sizes; leaves out storage types (test_engine_storage.py) and other instruction sets (test_native.py).
@RULES
def test_threads_and_repetition(name):
    gradients = list(tame(LARGE, 2))
    once = run(name, LARGE, gradients)
    for count in (1, 2, 4):
        same_bits(run(name, LARGE, gradients, count), once)


# Hundreds of items, so that workers meet at many layers; leaves out production sizes.
@RULES
def test_threads_in_many_chunks(name, monkeypatch):
    gradients = list(tame(MANY, 3))
    with small_chunks(monkeypatch):
        once = run(name, MANY, gradients, 1, mixed(name), max_grad_norm=2.0)
        for count in (2, 3, 4, 4):
            same_bits(run(name, MANY, gradients, count, mixed(name), max_grad_norm=2.0), once)


@RULES
def test_the_caller_flushing_denormals(name, monkeypatch):
    """Every worker has its own default floating-point environment, and leaves the caller's as it was."""
    sizes = (17, 700, 3000)
    values = [1e-39 * value for value in starts(sizes)]  # subnormal, as are gradients, moments and updates
    gradients = [[1e-39 * g for g in grads] for grads in tame(sizes, 2)]
    bits = {}
    for flush in (False, True):
        for count in (1, 2):
            with small_chunks(monkeypatch), threads(count):
                torch.set_flush_denormal(flush)
                try:
                    opt, _ = train(name, values, gradients)
                    assert (torch.full((), 1e-38) * 0.1 == 0) == flush
                finally:
                    torch.set_flush_denormal(False)
            bits[flush, count] = written(opt)
    for other in bits.values():
        same_bits(other, bits[False, 1])
    opt, _ = train(name, values, [[g * (g.abs() > 1.2e-38) for g in grads] for grads in gradients])
    with pytest.raises(AssertionError, match="bits differ"):  # so much does it take to tell
        same_bits(written(opt), bits[False, 1])


def phase_by_phase(opt, params, grads, max_norm, phases):
    """What `Optimizer.step` does, with the native call cut into pieces."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    (launch,) = opt._read()
    rows = opt._rows(launch)
    for phase in phases:
        assert launch.run(phase, rows, max_norm)
    return launch


PIECES = {
    "reduce, finish, apply": (Phase.REDUCE, Phase.FINISH, Phase.APPLY),
    "reduce and finish, apply": (Phase.REDUCE | Phase.FINISH, Phase.APPLY),
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@RULES
def test_phases_together_are_the_step(name, clip, pieces, monkeypatch):
    max_norm = 2.0 if clip else None
    phases = (Phase.NORM,) * clip + PIECES[pieces]
    sizes = (5, 300, 17, 900, 0, 64)
    with small_chunks(monkeypatch), threads(2):
        one, two = (parameters(starts(sizes)) for _ in range(2))
        whole = make(name, mixed(name)(one), max_grad_norm=max_norm)
        cut = make(name, mixed(name)(two), max_grad_norm=max_norm)
        for t, grads in enumerate(tame(sizes, 4)):
            grads[t % 3] = None
            step(whole, one, grads)
            launch = phase_by_phase(cut, two, grads, max_norm or 0.0, phases)
            same_bits(written(cut), written(whole))
            same_bits({"stats": launch.stats}, {"stats": whole._current()[0].stats})


def test_finish_takes_the_stats_that_it_finds():
    """What sharded parameters need: another rank's sums are added between `reduce` and `finish`."""
    params = parameters(starts((300,)))
    opt = make("lamb", params)
    (grads,) = tame((300,), 1)
    launch = phase_by_phase(opt, params, grads, 0.0, [Phase.REDUCE])
    assert torch.equal(params[0], starts((300,))[0]) and opt.state[params[0]]["step"] == 0
    launch.stats[0] *= torch.tensor([16.0, 4.0])
    p, u = launch.stats[0].sqrt()
    for phase in (Phase.FINISH, Phase.APPLY):
        launch.run(phase, opt._rows(launch), 0.0)
    assert opt.layer_stats()["0.0"] == {"param_norm": p, "update_norm": u, "trust_ratio": p / u}


def shifted(value, offset):
    """A copy that begins `offset` elements behind an aligned address."""
    flat = torch.empty(value.numel() + 16, dtype=value.dtype)
    view = flat[offset : offset + value.numel()]
    return view.copy_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@RULES
def test_misaligned_addresses(name, dtype):
    """As in flat buffers (DDP's buckets, FSDP2's gradients): p, g and states each at an odd offset of its own."""
    sizes = (1, 17, 2049, 5000)
    values = [value.to(dtype) for value in starts(sizes)]
    aligned = parameters(values)
    moved = [torch.nn.Parameter(shifted(value, 3)) for value in values]
    assert all(p.data_ptr() % 16 for p in moved)
    one, two = make(name, aligned), make(name, moved)
    for p in moved:
        for key in one.rule_of(one.param_groups[0]).states:
            two.state[p][key] = shifted(two.state[p][key], 5 if key == "exp_avg" else 7)
    for grads in tame(sizes, 3):
        grads = [g.to(dtype) for g in grads]
        step(one, aligned, grads)
        for p, g in zip(moved, grads, strict=True):
            p.grad = shifted(g, 1)
        two.step()
        assert all(two.state[p][key].data_ptr() % 16 for p in moved for key in one.rule_of(one.param_groups[0]).states)
        same_bits(written(two), written(one))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@RULES
def test_a_poisoned_layer_reaches_no_other(name, poison, monkeypatch):
    """Neither another tensor nor another slice of the same one."""
    gradients = list(wild((300, 40, 600, 200), 3))
    poisoned = [[g.clone() for g in grads] for grads in gradients]
    for grads in poisoned:
        grads[2][250] = poison  # in the second of three slices of the third tensor

    def after(gradients):
        values = starts((300, 40, 600, 200))
        values[2] = values[2].view(3, 200)
        gradients = ([g.view(v.shape) for g, v in zip(grads, values, strict=True)] for grads in gradients)
        with threads(4):
            return train(name, values, gradients, lambda params: [{"params": params, "layer": "slices"}])[1]

    with small_chunks(monkeypatch):
        clean = after(gradients)
        dirty = after(poisoned)
    for i, (p, q) in enumerate(zip(clean, dirty, strict=True)):
        untouched = [0, 2] if i == 2 else slice(None)
        assert torch.equal(raw(p.detach()[untouched]), raw(q.detach()[untouched]))
    assert not dirty[2][1].isfinite().all()


def test_copied_gradients_live_as_long_as_the_step():
    """Gradients that lie unlike their parameter are copied; a global norm over two launches runs them twice."""
    values = [x.view(40, 40) for x in starts((1600, 1600, 1600, 1600))]

    def final(transpose):
        params = parameters(values)
        groups = [{"params": params[:2], "momentum": 0.9}, {"params": params[2:], "momentum": 0.0}]
        opt = make("sgd", groups, lr=0.1, max_grad_norm=1.0)
        for grads in tame((1600,) * 4, 3):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.view(40, 40).t().contiguous().t() if transpose else g.view(40, 40).clone()
            opt.step()
        return written(opt)

    same_bits(final(True), final(False))
