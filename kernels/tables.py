"""The tables that a launch works on, and how their rows are found."""

from typing import NamedTuple

import triton
import triton.language as tl

from .rule import f32

WHOLE = tl.constexpr(3)  # a kind of item, as in csrc/plan.h


class Plan(NamedTuple):
    """The schedule (csrc/plan.h), int64 on the device."""

    sizes: tl.tensor  # items, chunks (with as many norm items in front), layers, tensors, counters
    items: tl.tensor
    chunks: tl.tensor
    layers: tl.tensor


class Given(NamedTuple):
    """What the host says of this step."""

    address: tl.tensor  # int64 [tensors, 4]: p, g, m, v; 0 is an operand that is not there
    counted: tl.tensor  # int64 [tensors]: 1 where this step counts
    elements: tl.tensor  # int64 [layers]: of the tensors with a gradient, -1 if there is none
    row: tl.tensor  # float64: max_norm, ahead, then per group the gradient's sign and the hyper-parameters
    place: tl.tensor  # int64, as row: where on the device a value lives; 0: it is in the row; odd: it is float64
    predicted: tl.tensor  # int64 [tensors]: addresses of predicted weights; empty where there are none
    rest: tl.tensor  # int64 [tensors]: addresses of the parameters' other halves; empty where they have none
    noise: tl.tensor  # int64 [tensors, 2]: seed and place of its random numbers; empty where nothing is left to chance


class Kept(NamedTuple):
    """What a step writes beside parameters and states."""

    step: tl.tensor  # float32 [tensors]
    state: tl.tensor  # float64 [slots]
    stats: tl.tensor  # float64 [layers, terms]
    report: tl.tensor  # float64 [layers, reports]
    norm: tl.tensor  # float64: the gradient norm over all tensors
    skipped: tl.tensor  # int64: steps that a norm that is not finite has turned into nothing


class Work(NamedTuple):
    """What lives for a launch. Counters are zero between launches."""

    counters: tl.tensor  # int32: as named in engine.py
    partials: tl.tensor  # float64 [1 + terms, chunks]: of the norm, then of the stats
    finished: tl.tensor  # float32 [layers, finished]


class Table(NamedTuple):
    plan: Plan
    given: Given
    kept: Kept
    work: Work


class Chunk(NamedTuple):
    """A chunk of the plan; its slot is its index."""

    slot: tl.tensor
    tensor: tl.tensor
    start: tl.tensor
    count: tl.tensor  # 0 where the tensor takes no part: then nothing of it is read, summed or written
    layer: tl.tensor


class Tile(NamedTuple):
    """What of a chunk is in registers at once."""

    tensor: tl.tensor
    start: tl.tensor
    count: tl.tensor


class Layer(NamedTuple):
    """A layer of the plan."""

    number: tl.tensor
    group: tl.tensor
    first: tl.tensor
    chunks: tl.tensor
    adapt: tl.tensor
    state: tl.tensor
    states: tl.tensor


class Item(NamedTuple):
    """A piece of work."""

    kind: tl.tensor
    chunk: Chunk
    layer: Layer
    time: tl.tensor  # the number of the step that it belongs to, from 1


@triton.jit
def item_of(t, ticket, spec: tl.constexpr):
    """An item of the plan with all that is known of it."""
    kind, index = small(t.plan.items + 2 * ticket), small(t.plan.items + 2 * ticket + 1)
    if kind == WHOLE:  # the index is the layer's, which has one chunk
        index = small(t.plan.layers + 7 * index + 1)
    chunk = chunk_of(t, index, spec)
    return Item(kind, chunk, layer_of(t, chunk.layer), time_of(t, chunk, spec))


@triton.jit
def chunk_of(t, slot, spec: tl.constexpr):
    at = t.plan.chunks + 5 * slot
    tensor = small(at)
    count = tl.where(takes_part(t, tensor, spec), small(at + 2), 0)
    return Chunk(slot, tensor, tl.load(at + 1), count, small(at + 3))


@triton.jit
def takes_part(t, tensor, spec: tl.constexpr):
    """A tensor with a gradient; where predictions go by a counted step, one that has taken a step."""
    if spec.counted:
        return tl.load(t.kept.step + tensor) > 0
    else:
        return tl.load(t.given.address + 4 * tensor + 1) != 0


@triton.jit
def small(at):
    """A number of rows or of a chunk's elements: it fits 32 bits, which saves registers."""
    return tl.load(at).to(tl.int32)


@triton.jit
def layer_of(t, number):
    at = t.plan.layers + 7 * number
    return Layer(number, small(at), small(at + 1), small(at + 2), small(at + 4), small(at + 5), small(at + 6))


@triton.jit
def time_of(t, chunk, spec: tl.constexpr):
    """The number of this step, from 1."""
    time = tl.load(t.kept.step + chunk.tensor).to(tl.float64)
    if not spec.counted:
        time += 1
    return time


@triton.jit
def tile_of(chunk, first, spec: tl.constexpr):
    return Tile(chunk.tensor, chunk.start + first, tl.minimum(chunk.count - first, spec.tile))


@triton.jit
def row_of(t, group, spec: tl.constexpr):
    """A group's hyper-parameters, by name."""
    values = ()
    for k in tl.static_range(tl.constexpr(spec.width)):
        values = values + (value_of(t, 3 + group * (1 + spec.width) + k, spec),)
    return spec.Row(*values)


@triton.jit
def scale_of(t, layer, factor, spec: tl.constexpr):
    """What a gradient is multiplied with: its sign, and the clip's factor."""
    return f32(value_of(t, 2 + layer.group * (1 + spec.width), spec) * factor)


@triton.jit
def value_of(t, at, spec: tl.constexpr):
    value = tl.load(t.given.row + at)
    if spec.live:
        place = tl.load(t.given.place + at)
        if place % 2 == 1:
            value = tl.load((place - 1).to(tl.pointer_type(tl.float64)))
        elif place != 0:
            value = tl.load(place.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value
