"""Triton launches as parts of an optimizer (device_tables.py), and offsets of 64 bits."""

from types import SimpleNamespace

import pytest
import torch
from device_cases import there, written
from device_tables import *  # noqa: F403
from engines import ONE_PER_RULE, same_bits, starts, step, tame
from triton_cases import MARKS, Triton

from layerfused import triton_engine
from layerfused.plan import LayerSpec, Span

ENGINE, pytestmark = Triton, MARKS
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
FAR = 2**31 + 8  # elements


# More than 2^31 elements in a layer, without their memory.


def test_rows_of_a_huge_layer(monkeypatch):
    """Starts and counts are sent as int64."""
    elements = 2**33 + 5
    monkeypatch.setattr(triton_engine, "CHUNK", 2**26)
    huge = object.__new__(triton_engine.TritonLaunch)
    huge.table = SimpleNamespace(layers=[LayerSpec((Span(0, 0, elements),), 0, True)], params=[None])
    huge.device, huge.stats = torch.device("cpu"), torch.zeros(1, 2)
    huge._form = SimpleNamespace(finished="step")
    huge._make_plan()
    chunks = huge._plan.chunks.view(-1, 5)
    assert {x.dtype for x in huge._plan} == {torch.int64}
    assert chunks[:, 1].tolist() == list(range(0, elements, 2**26)) and chunks[:, 2].sum() == elements
    assert huge._plan.layers.view(-1, 7)[0, 3] == elements


@RULES
def test_offsets_of_64_bits(name, engine):
    """Chunks that start beyond 2^31 elements, of operands whose addresses lie as far in front."""
    engine.plans()
    sizes = (300, 50)
    near, params = engine.train(name, starts(sizes), [])
    far, others = engine.train(name, starts(sizes), [])
    (moved,) = far._launches
    moved._plan.chunks.view(-1, 5)[:, 1] += FAR
    reader = moved._reader

    class Far:
        def addresses(self, out):
            reader.addresses(out)
            for k, address in enumerate(out.tolist()):
                out[k] = address and address - 4 * FAR

        def __getattr__(self, what):
            return getattr(reader, what)

    moved._reader = Far()
    for grads in tame(sizes, 2):
        step(near, params, there(grads))
        step(far, others, there(grads))
    assert far._launches == [moved]
    same_bits(written(far), written(near))
