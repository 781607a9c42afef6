"""Bytes that the Triton engine really loads and stores, against what `traffic()` says it asks for.

Counted where the interpreter reads and writes, masks honoured: addresses within p, g, m and v only.
"""

import numpy as np
import pytest
from cases import ADAPT
from engines import NAMED, ONE_PER_RULE, starts, tame
from triton_cases import MARKS, needs_interpreter, plans, train

pytestmark = [*MARKS, needs_interpreter]
# One option each that changes what is read or written: coupled decay, no decay, decoupled decay, belief.
COUNTED = ["sgd", "sgd-decay", "sgd-momentum", "sgd-dampening", "adam", "adam-decay", "adamw", "adabelief",
           "adabelief-coupled", "adam3", "adam3-coupled", "lars", "lars-no-decay", "lamb", "lamb-no-decay", "novograd",
           "novograd-decay", "aida", "aida-k1", "aida-k3", "ladam", "ladam-decay", "ladabelief", "ladabelief-decay",
           "ladam-post", "ladam-post-decay", "ladabelief-post", "setadam", "setadam-coupled", "setadam-decoupled",
           "adamnorm", "adamnorm-coupled", "adabeliefnorm"]  # fmt: skip
CLIPPED = [*((name, None) for name in COUNTED), *((name, 2.0) for name in (*ONE_PER_RULE, "aida", "ladam", "setadam"))]
SIZES = (0, 5, 64, 65, 300)  # whole layers up to a tile of 64, one chunk of two tiles, several


class Count:
    """Bytes loaded and stored within some tensors, and how often each of their bytes was."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        self.moved = {"load": [], "store": []}
        for kind in self.moved:
            name = f"create_masked_{kind}"
            monkeypatch.setattr(Builder, name, self._spy(kind, getattr(Builder, name)))

    def _spy(self, kind, method):
        def spied(builder, places, *rest):
            mask = rest[0] if kind == "load" else rest[1]
            width = places.get_element_ty().primitive_bitwidth // 8
            here = places.data[np.broadcast_to(mask.data, places.data.shape)]
            self.moved[kind].append((here.astype(np.int64).ravel(), width))
            return method(builder, places, *rest)

        return spied

    def clear(self):
        for moves in self.moved.values():
            moves.clear()

    def within(self, tensors, kind):
        total = 0
        for x in tensors:
            first, last = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
            total += sum(width * int(((at >= first) & (at < last)).sum()) for at, width in self.moved[kind])
        return total


def operands(opt, params):
    states = opt.rule_of(opt.param_groups[0]).states
    return [*params, *(p.grad for p in params), *(opt.state[p][key] for p in params for key in states)]


def counted(opt, params, count):
    """Bytes of a step with gradients like the parameters."""
    for p in params:
        p.grad = p.detach().clone()
    count.clear()
    opt.step()
    return sum(count.within(operands(opt, params), kind) for kind in ("load", "store"))


# Whole layers and layers of several chunks; leaves out storage types and other layers (next tests).
@pytest.mark.parametrize("name, clip", CLIPPED)
def test_requested_bytes_are_what_is_moved(name, clip, monkeypatch):
    plans(monkeypatch)
    opt, params = train(name, starts(SIZES), [], max_grad_norm=clip)
    assert counted(opt, params, Count(monkeypatch)) == opt.traffic()["requested"]


def test_every_rule_and_both_kinds_of_decay_are_counted():
    assert {NAMED[name].rule for name in COUNTED} == {case.rule for case in NAMED.values()}
    decays = {(NAMED[name].rule, NAMED[name].hyper["weight_decay"] != 0) for name in COUNTED}
    assert decays >= {(case.rule, case.hyper["weight_decay"] != 0) for case in NAMED.values()}


@pytest.mark.parametrize("name", [name for name in COUNTED if NAMED[name].rule in ADAPT])
def test_layers_without_adaptation_are_one_sweep(name, monkeypatch):
    plans(monkeypatch)

    def groups(params):
        return [{"params": params[:3]}, {"params": params[3:], "adapt": False}]

    opt, params = train(name, starts(SIZES), [], groups)
    assert counted(opt, params, Count(monkeypatch)) == opt.traffic()["requested"]


# bf16 parameters and gradients; leaves out states in 16 bits.
@pytest.mark.parametrize("name", ["sgd-decay", "adam", "lamb", "aida-k1", "setadam-coupled"])
def test_bytes_of_16_bits(name, monkeypatch):
    plans(monkeypatch)
    opt, params = train(name, [x.bfloat16() for x in starts(SIZES)], [])
    assert counted(opt, params, Count(monkeypatch)) == opt.traffic()["requested"]


@pytest.mark.parametrize("name", ["lars", "lamb", "aida-k1"])
def test_bytes_of_cut_and_joined_layers(name, monkeypatch):
    """Slices above and below a tile; all tensors one layer, which is two sweeps though its tensors are small."""
    plans(monkeypatch)
    values = [x.view(6, -1) for x in starts((6 * 10, 6 * 100))] + starts((10, 100))

    def groups(params):
        return [{"params": params[:2], "layer": "slices"}, {"params": params[2:], "layer": "group"}]

    opt, params = train(name, values, [], groups)
    assert counted(opt, params, Count(monkeypatch)) == opt.traffic()["requested"]


@pytest.mark.parametrize("name", ["lamb", "aida-k1"])
def test_nothing_is_moved_for_tensors_that_rest(name, monkeypatch):
    plans(monkeypatch)
    opt, params = train(name, starts((5, 300)), tame((5, 300), 1), max_grad_norm=1.0)
    params[1].grad = None
    count = Count(monkeypatch)
    opt.step()
    resting = [params[1], *(opt.state[params[1]][key] for key in opt.rule_of(opt.param_groups[0]).states)]
    assert count.within(resting, "load") == count.within(resting, "store") == 0


@pytest.mark.parametrize("name", ["lamb", "aida-k1", "sgd-decay"])
def test_the_count_sees_what_it_should(name, monkeypatch):
    """Every element of p is stored once, g never, and nothing outside of any tensor."""
    plans(monkeypatch)
    opt, params = train(name, starts(SIZES), [])
    count = Count(monkeypatch)
    counted(opt, params, count)
    assert count.within(params, "store") == 4 * sum(SIZES)
    assert count.within([p.grad for p in params], "store") == 0
    (launch,) = opt._launches
    ours = [*launch._plan, launch._device, *launch._work, launch.stats, launch.norm, launch.table.report,
            launch.table.step, launch.table.scalars, opt.skipped_steps, launch._unheeded]  # fmt: skip
    for kind, moves in count.moved.items():
        total = sum(width * len(at) for at, width in moves)
        assert count.within([*operands(opt, params), *ours], kind) == total
