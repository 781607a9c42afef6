"""The plan: which piece of which layer is worked on when. Pure functions of sizes; no tensors, no device.

A layer is cut into chunks. Workers claim items in the order of the list, so that an item may wait for items before it
and never for one behind it: no deadlock with any number of workers.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Kind:
    """Kinds of items, as in csrc/plan.h."""

    NORM, REDUCE, APPLY, WHOLE = range(4)


class Phase:
    """Parts of a step that an engine can be asked for, as in csrc/plan.h."""

    NORM, REDUCE, FINISH, APPLY = 1, 2, 4, 8
    STEP = 15
    PREDICT = 16  # predicted weights from true ones and states, of the last step
    UNCOUNTED = 32  # with PREDICT: of a step that is under way


class Span(NamedTuple):
    """`count` elements of tensor number `tensor`, from `start` on.

    They stand for `elements` of their layer: for more than there are where the rest lies on other ranks. None: `count`.
    """

    tensor: int
    start: int
    count: int
    elements: int | None = None

    @property
    def stands_for(self) -> int:
        return self.count if self.elements is None else self.elements


class Chunk(NamedTuple):
    """A span of one layer that is worked on at once; its index is the slot of its partial sums.

    The first chunk of a span stands for all of its layer's elements that are not here.
    """

    tensor: int
    start: int
    count: int
    layer: int
    elements: int


class Layer(NamedTuple):
    """A run of chunks. Its float64 state is kept alike in `states` slots from `state` on, one per tensor."""

    group: int
    first: int
    chunks: int
    elements: int
    adapt: int
    state: int
    states: int


class Item(NamedTuple):
    """A piece of work: `index` is a layer for WHOLE and a chunk for every other kind."""

    kind: int
    index: int


class LayerSpec(NamedTuple):
    """What the plan is told of a layer: its spans, its group's number, and whether stats are taken over it."""

    spans: tuple[Span, ...]
    group: int
    stats: bool


class Plan(NamedTuple):
    chunks: list[Chunk]
    layers: list[Layer]
    items: list[Item]

    def packed(self) -> tuple[array, array, array]:
        """Items, chunks and layers as flat int64 arrays, the form in which engines take them."""
        return tuple(
            array("q", (field for row in rows for field in row)) for rows in (self.items, self.chunks, self.layers)
        )


def cut_rows(shape: Sequence[int], layer) -> list[int]:
    """The sizes, in elements, of the layers that a parameter of this shape is cut into.

    Args:
        shape: the parameter's shape.
        layer: "tensor" or "group" (the parameter is not cut), "slices" (each index of dimension 0), an int (that many
            equal blocks of dimension 0) or a tuple of row counts.

    Raises:
        ValueError: if `layer` does not fit the shape.
    """
    shape = tuple(shape)
    elements = 1
    for size in shape:
        elements *= size
    if layer in ("tensor", "group"):
        return [elements]
    rows = shape[0] if shape else 0
    if not shape:
        raise ValueError(
            f"layer={layer!r} cuts dimension 0, which a 0-dim parameter has not; use layer='tensor' for it"
        )
    if layer == "slices":
        counts = [1] * rows
    elif isinstance(layer, int):
        if rows % layer:
            raise ValueError(f"layer={layer} does not divide the {rows} rows of a parameter of shape {shape}")
        counts = [rows // layer] * layer
    else:
        counts = list(layer)
        if sum(counts) != rows:
            raise ValueError(f"layer={tuple(layer)} has {sum(counts)} rows, the parameter of shape {shape} has {rows}")
    row = elements // rows if rows else 0
    return [count * row for count in counts] or [0]


def make_plan(layers: Iterable[LayerSpec], *, chunk: int, whole: int, ahead: int, norm: bool = False) -> Plan:
    """The items for all layers, in order.

    Args:
        layers: what to work on; every tensor's spans in ascending order.
        chunk: elements per chunk, a property of the backend and never of the number of workers, so that sums are
            taken in one order.
        whole: layers of one chunk and at most this many elements are one item: reduced, finished and applied by one
            worker.
        ahead: elements that are reduced between a layer's last `reduce` and its first `apply`, so that nobody waits
            for it; more would push the layer out of the cache.
        norm: put items for the global gradient norm in front.
    """
    if chunk < 1 or whole < 0 or ahead < 0:
        raise ValueError(f"chunk must be >= 1, whole and ahead >= 0, got {chunk}, {whole}, {ahead}")
    plan, work = Plan([], [], []), []
    waiting = deque()  # chunks to apply, with the elements that were reduced when their layer was
    reduced = 0
    for number, spec in enumerate(layers):
        layer = _add_layer(plan, spec, number, chunk)
        chunks = range(layer.first, layer.first + layer.chunks)
        if not spec.stats or (layer.chunks == 1 and plan.chunks[layer.first].count <= whole):
            work += [Item(Kind.WHOLE, number)] if spec.stats else [Item(Kind.APPLY, c) for c in chunks]
            reduced += sum(span.count for span in spec.spans)
            work += _due(waiting, reduced - ahead)
            continue
        for c in chunks:
            work.append(Item(Kind.REDUCE, c))
            reduced += plan.chunks[c].count
            work += _due(waiting, reduced - ahead)
        waiting.extend((c, reduced) for c in reversed(chunks))  # what was reduced last is still in the cache
    work += [Item(Kind.APPLY, c) for c, _ in waiting]
    if norm:
        plan.items.extend(Item(Kind.NORM, c) for c in range(len(plan.chunks)))
    plan.items.extend(work)
    return plan


def _due(waiting: deque, until: int) -> Iterable[Item]:
    """Applies of layers whose last `reduce` came when at most `until` elements were reduced."""
    while waiting and waiting[0][1] <= until:
        yield Item(Kind.APPLY, waiting.popleft()[0])


def _add_layer(plan: Plan, spec: LayerSpec, number: int, chunk: int) -> Layer:
    first, tensors = len(plan.chunks), {span.tensor for span in spec.spans}
    state = plan.layers[-1].state + plan.layers[-1].states if plan.layers else 0
    for span in spec.spans:
        # an empty span still gets a chunk: its tensor counts steps and its layer is finished like any other
        for start in range(span.start, span.start + max(span.count, 1), chunk):
            count = min(chunk, span.start + span.count - start)
            elsewhere = span.stands_for - span.count if start == span.start else 0
            plan.chunks.append(Chunk(span.tensor, start, count, number, count + elsewhere))
    elements = sum(span.stands_for for span in spec.spans)
    layer = Layer(spec.group, first, len(plan.chunks) - first, elements, int(spec.stats), state, len(tensors))
    plan.layers.append(layer)
    return layer
