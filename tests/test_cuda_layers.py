"""What a group says a layer is, on the CUDA engine (device_layers.py): several types in one layer, and huge ones."""

from array import array

import pytest
import torch
from cuda_cases import Cuda, counters, native_engine
from device_cases import there, written
from device_layers import *  # noqa: F403
from engines import LAYERWISE, ONE_PER_RULE, same_bits, starts, step, tame, wild
from test_engine_storage import TYPES

from layerfused import cuda
from layerfused.plan import make_plan

ENGINE = Cuda
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
SIZES = (40, 1, 0, 300, 17)


def one_layer(params):
    return [{"params": params[:-1], "layer": "group"}, {"params": params[-1:]}]


# Types of p and g that differ within a layer, at t = 1 with members that rest; leaves out states in 16 bits
# (device_storage.py).
@pytest.mark.parametrize("name", [*LAYERWISE, "adam-decay"])
def test_a_group_of_several_types(name, engine):
    engine.plans(tile=16, grid=2)
    types = [*TYPES, *TYPES][: len(SIZES)]
    twins = engine.twins(name, [x.to(dtype) for x, dtype in zip(starts(SIZES), types, strict=True)], one_layer)
    assert twins.opts[1].traffic()["launches"] == 1
    for t, grads in enumerate((*tame(SIZES, 2), *wild(SIZES, 1))):
        grads = [g.to(dtype) for g, dtype in zip(grads, types[1:] + types[:1], strict=True)]
        twins.step([None if t == 1 and i in (0, 2) else g for i, g in enumerate(grads)])


# Layers of production sizes: some stay on chip, one of several tensors never does; with tensors that rest.
@pytest.mark.parametrize("name", LAYERWISE)
def test_layers_of_production_sizes(name, engine):
    sizes = (engine.whole, engine.whole + 4, engine.chunk + 1, 300, 7)
    twins = engine.twins(name, starts(sizes), one_layer)
    for t, grads in enumerate(tame(sizes, 2)):
        twins.step([None if t == 1 and i in (1, 4) else g for i, g in enumerate(grads)])


@pytest.mark.parametrize("where", ["first", "between", "last"])
@RULES
def test_empty_tensors_anywhere(name, where, engine):
    """In a layer of their own and as members of one; they count steps, and change nothing of the others."""
    engine.plans(tile=16, grid=3)
    sizes = {"first": (0, 0, 40, 5), "between": (40, 0, 0, 5), "last": (40, 5, 0, 0)}[where]
    for groups in (None, one_layer):
        opt, params = engine.train(name, starts(sizes), tame(sizes, 2), groups)
        plain, others = engine.train(name, starts((40, 5)), tame((40, 5), 2), groups)
        if groups is None or where == "between":  # else the groups are of other tensors
            same_bits(*({str(i): p.detach() for i, p in enumerate(q for q in ps if len(q))} for ps in (params, others)))
        assert [opt.state[p]["step"] for p in params] == [2] * 4


# Huge layers: the last chunks of a tensor that begins far in front of the memory there is.

FAR = 2**31 + 8  # elements


def far_away(launch, size):
    """Lets a launch believe that its tensors have FAR elements more, in front of those there are."""
    plan = make_plan(launch.table.layers, chunk=cuda.CHUNK, whole=cuda.WHOLE, ahead=cuda.AHEAD, norm=True)
    plan = plan._replace(chunks=[c._replace(start=c.start + FAR) for c in plan.chunks])
    table = launch.table
    native = native_engine(table.rule.name, *plan.packed(), len(table.params), len(table.groups))
    native.blocks = 3
    launch._workspace.zero_()
    native.bind(launch.device.index or 0, launch._workspace.data_ptr(), launch._stream())
    native.set_outputs(*launch._outputs)
    launch._native, reader = native, launch._reader

    class Far:
        def addresses(self, out):
            reader.addresses(out)
            out[:] = array("q", (address and address - size * FAR for address in out))

        def __getattr__(self, what):
            return getattr(reader, what)

    launch._reader = Far()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@RULES
def test_offsets_of_64_bits(name, dtype, engine):
    """Chunks that start beyond 2^31 elements: p, g, m and v of them, in whole layers and in several chunks."""
    engine.plans(tile=32)
    sizes = (30, 300, 0, 50)
    found = []
    for far in (False, True):
        opt, params = engine.train(name, [x.to(dtype) for x in starts(sizes)], [], max_grad_norm=2.0)
        for state in opt.state.values():
            state |= {key: state[key].to(dtype) for key in opt.rule_of(opt.param_groups[0]).states}
        opt._read()  # sees that states were exchanged
        (launch,) = opt._launches
        if far:
            far_away(launch, dtype.itemsize)
        for grads in tame(sizes, 2):
            step(opt, params, there(g.to(dtype) for g in grads))
        assert opt._launches == [launch] and not counters(launch).any()
        found.append(written(opt))
    same_bits(*found)
