"""The Triton engine: one persistent kernel that runs any rule over any plan, in one launch per step.

Programs claim the plan's items in order from a ticket counter. An item waits only for items with smaller tickets,
which are running somewhere already: no deadlock at any grid. Whoever arrives last at a layer adds up its chunks'
partial sums in the order of their slots and finishes the layer; whoever leaves the launch last counts the steps and
clears the counters, so that a launch can be replayed as it is. No optimizer is known here by name.
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import triton
import triton.language as tl

from .rule import Element, Rule, Total, double, f32, product
from .storage import load, store

LANES = tl.constexpr(1024)  # slots added side by side

# As in csrc/plan.h and csrc/rule.h.
NORM, REDUCE, APPLY, WHOLE = (tl.constexpr(kind) for kind in range(4))
P, G, M, V = (tl.constexpr(1 << bit) for bit in range(4))


@dataclass(frozen=True, eq=False)
class Spec:
    """What a kernel is compiled for. One object per variant: Triton tells variants apart by identity.

    Attributes:
        rule: whose mathematics.
        hyper: names of the group's row.
        storage: Triton's types of p, g, m and v in memory.
        tile: elements that are in registers at once, a power of 2.
        phases: which parts of a step (bits as in csrc/plan.h).
        clip: whether gradients are clipped by the global norm.
        live: whether some hyper-parameter is a tensor on the device.
        stateful: whether a layer has a float64 state.
        mixed: whether some layer of a rule with stats is without them (`adapt=False`).
    """

    rule: Rule
    hyper: tuple[str, ...]
    storage: tuple
    tile: int
    phases: int
    clip: bool
    live: bool
    stateful: bool
    mixed: bool

    @cached_property
    def Row(self):
        return namedtuple("Row", self.hyper)

    @cached_property
    def Started(self):
        return namedtuple("Started", self.rule.scalars.split())

    @cached_property
    def Finished(self):
        return namedtuple("Finished", (self.rule.scalars + " " + self.rule.finished).split())

    @property
    def width(self) -> int:
        """Numbers in a group's row."""
        return len(self.hyper)

    @property
    def reads(self) -> int:
        """Operands of both sweeps in one."""
        return self.rule.first.reads | self.rule.second.reads

    @property
    def writes(self) -> int:
        return self.rule.first.writes | self.rule.second.writes

    @property
    def terms(self) -> int:
        return self.rule.sums + self.rule.minima

    @property
    def finished(self) -> int:
        return len(self.rule.finished.split())

    @property
    def started(self) -> int:
        return len(self.rule.scalars.split())

    @property
    def couples(self) -> bool:
        return "coupled" in self.rule.scalars.split()

    norms = property(lambda self: self.phases & 1 != 0)
    reduces = property(lambda self: self.phases & 2 != 0)
    finishes = property(lambda self: self.phases & 4 != 0)
    applies = property(lambda self: self.phases & 8 != 0)
    only_norms = property(lambda self: self.phases == 1)
    only_finishes = property(lambda self: self.phases == 4)
    once = property(lambda self: self.phases & 14 == 14)  # a layer is reduced, finished and applied in one launch

    @cached_property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows the variant by: it does not see functions inside of a tuple."""
        functions = [part for part in self.rule if hasattr(part, "cache_key")]
        data = [part for part in self.rule if part not in functions]
        rest = (data, self.hyper, self.storage, self.tile, self.phases, self.clip, self.live, self.stateful, self.mixed)
        return " ".join([*(function.cache_key for function in functions), repr(rest)])


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
    row: tl.tensor  # float64: max_norm, then per group the gradient's sign and the hyper-parameters
    place: tl.tensor  # int64, as row: where on the device a value lives; 0: it is in the row; odd: it is float64


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

    counters: tl.tensor  # int32: as named below
    partials: tl.tensor  # float64 [1 + terms, chunks]: of the norm, then of the stats
    finished: tl.tensor  # float32 [layers, finished]


class Table(NamedTuple):
    plan: Plan
    given: Given
    kept: Kept
    work: Work


TICKET, LEFT, NORMS, NORM_READY, ARRIVED = (tl.constexpr(k) for k in range(5))  # a layer's ARRIVED, READY come in turn


class Chunk(NamedTuple):
    """A chunk of the plan; its slot is its index."""

    slot: tl.tensor
    tensor: tl.tensor
    start: tl.tensor
    count: tl.tensor  # 0 where the tensor has no gradient: then nothing of it is read, summed or written
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
    time: tl.tensor  # the number of this step, from 1


@triton.jit
def run(t, spec: tl.constexpr):
    """One launch: whatever phases of a step `spec` names, by any number of programs."""
    if spec.only_finishes:
        finish_all(t, spec)
    else:
        run_items(t, spec)
    leave(t, spec)


@triton.jit
def run_items(t, spec: tl.constexpr):
    items, norms = small(t.plan.sizes), small(t.plan.sizes + 1)
    ticket = claim(t)
    if spec.norms:
        while ticket < norms:
            norm_chunk(t, ticket, norms, spec)
            ticket = claim(t)
        if not spec.only_norms:
            wait(t.work.counters + NORM_READY)  # acquires the norm
    else:
        ticket += norms
    if not spec.only_norms:
        factor, happens = clip(t, spec)
        group, time, started = nobody(spec)
        while happens & (ticket < items):
            item = item_of(t, ticket)
            if (item.layer.group != group) | (item.time != time):  # most items share them with the one before
                group, time = item.layer.group, item.time
                started = spec.rule.start(row_of(t, group, spec), time)
            run_item(t, item, started, factor, spec)
            ticket = claim(t)
            if not spec.norms:
                ticket += norms


@triton.jit
def claim(t):
    return tl.atomic_add(t.work.counters + TICKET, 1, sem="relaxed")  # orders nothing: flags do


@triton.jit
def wait(flag):
    while tl.atomic_add(flag, 0, sem="acquire") == 0:
        pass


@triton.jit
def clip(t, spec: tl.constexpr):
    """The factor that clips the gradients, and whether the step takes place: not with a norm that is not finite."""
    factor, happens = double(1.0), True
    if spec.clip:
        norm, most = tl.load(t.kept.norm), tl.load(t.given.row)
        factor = tl.where(norm > most, most / norm, 1.0)
        happens = norm < float("inf")
    return factor, happens


@triton.jit
def nobody(spec: tl.constexpr):
    """A group and a time that no item has, and scalars of the right number."""
    started = ()
    for _ in tl.static_range(tl.constexpr(spec.started)):
        started = started + (tl.full((), 0.0, tl.float32),)
    return tl.full((), -1, tl.int32), double(0.0), started


@triton.jit
def run_item(t, item, started, factor, spec: tl.constexpr):
    if spec.terms == 0:
        if spec.applies:
            apply_elementwise(t, item, started, factor, spec)
    elif spec.once:
        if item.kind == WHOLE:
            whole_layer(t, item, started, factor, spec)
        elif item.kind == REDUCE:
            reduce_chunk(t, item, started, factor, spec)
        else:
            apply_chunk(t, item, started, factor, spec)
    elif spec.reduces:  # a whole layer is its only chunk
        if item.kind != APPLY:
            reduce_chunk(t, item, started, factor, spec)
    elif item.kind != REDUCE:
        apply_chunk(t, item, started, factor, spec)


# Items


@triton.jit
def norm_chunk(t, slot, chunks, spec: tl.constexpr):
    chunk = chunk_of(t, slot)
    sum = double(0.0)
    for first in range(0, chunk.count, spec.tile):
        g = read(t, tile_of(chunk, first, spec), spec, G).g
        sum += tl.sum(product(g, g), axis=0)
    tl.store(t.work.partials + slot, sum)
    tl.debug_barrier()  # of all threads, before one of them speaks for them
    # releases this chunk's partial sum, acquires everybody's for the last to arrive
    if tl.atomic_add(t.work.counters + NORMS, 1, sem="acq_rel") == chunks - 1:
        tl.store(t.kept.norm, tl.sqrt(added(t.work.partials, chunks)))
        tl.debug_barrier()
        tl.atomic_xchg(t.work.counters + NORM_READY, 1, sem="release")  # publishes the norm


@triton.jit
def reduce_chunk(t, item, started, factor, spec: tl.constexpr):
    chunk, layer = item.chunk, item.layer
    c = spec.Started(*started)
    scale = scale_of(t, layer, factor, spec)
    sums = no_sums(spec)
    for first in range(0, chunk.count, spec.tile):
        tile = tile_of(chunk, first, spec)
        x = read(t, tile, spec, spec.rule.first.reads)
        x = spec.rule.moments(c, prepared(t, x, c, tile, scale, spec, spec.rule.first.reads))
        sums = with_sums(sums, c, x, tile, spec)
        write(t, x, tile, spec, spec.rule.first.writes)
    chunks = small(t.plan.sizes + 1)
    for k in tl.static_range(tl.constexpr(spec.terms)):
        tl.store(t.work.partials + (1 + k) * chunks + chunk.slot, sums[k])
    tl.debug_barrier()  # of all threads, before one of them speaks for them
    arrived = t.work.counters + ARRIVED + 2 * layer.number
    # releases this chunk's partial sums and moments, acquires everybody's for the last to arrive
    if tl.atomic_add(arrived, 1, sem="acq_rel") == layer.chunks - 1:
        sums = combined(t, layer, chunks, spec)
        keep_stats(t, layer, sums, spec)
        if spec.finishes:
            finish(t, layer, item.time, sums, True, True, spec)
        tl.debug_barrier()
        tl.atomic_xchg(arrived + 1, 1, sem="release")  # publishes scalars, and with them the moments, to `apply`


@triton.jit
def apply_chunk(t, item, started, factor, spec: tl.constexpr):
    chunk, layer = item.chunk, item.layer
    if without_stats(layer, spec):
        apply_elementwise(t, item, started, factor, spec)
    else:
        if spec.reduces:
            wait(t.work.counters + ARRIVED + 2 * layer.number + 1)  # acquires what the layer's last to arrive published
        c = spec.Finished(*(started + finished_of(t, layer, spec)))
        scale = scale_of(t, layer, factor, spec)
        for first in range(0, chunk.count, spec.tile):
            tile = tile_of(chunk, first, spec)
            x = read(t, tile, spec, spec.rule.second.reads)
            x = prepared(t, x, c, tile, scale, spec, spec.rule.second.reads)
            write(t, spec.rule.apply(c, x), tile, spec, spec.rule.second.writes)


@triton.jit
def without_stats(layer, spec: tl.constexpr):
    answer: tl.constexpr = False
    if spec.mixed:
        answer = layer.adapt == 0
    return answer


@triton.jit
def whole_layer(t, item, started, factor, spec: tl.constexpr):
    """A layer of one tile: read once, written once."""
    tile, layer = tile_of(item.chunk, 0, spec), item.layer
    c = spec.Started(*started)
    scale = scale_of(t, layer, factor, spec)
    x = read(t, tile, spec, spec.reads)
    x = spec.rule.moments(c, prepared(t, x, c, tile, scale, spec, spec.reads))
    sums = with_sums(no_sums(spec), c, x, tile, spec)
    keep_stats(t, layer, sums, spec)
    c = spec.Finished(*(started + finish(t, layer, item.time, sums, True, True, spec)))
    write(t, spec.rule.apply(c, x), tile, spec, spec.writes)


@triton.jit
def apply_elementwise(t, item, started, factor, spec: tl.constexpr):
    """A chunk of a layer without stats: it has nothing to wait for."""
    chunk, layer = item.chunk, item.layer
    finished = finish(t, layer, item.time, (), False, chunk.slot == layer.first, spec)
    c = spec.Finished(*(started + finished))
    scale = scale_of(t, layer, factor, spec)
    for first in range(0, chunk.count, spec.tile):
        tile = tile_of(chunk, first, spec)
        x = prepared(t, read(t, tile, spec, spec.reads), c, tile, scale, spec, spec.reads)
        write(t, spec.rule.apply(c, spec.rule.moments(c, x)), tile, spec, spec.writes)


@triton.jit
def finish_all(t, spec: tl.constexpr):
    """The phase between `reduce` and `apply` by itself: somebody may have changed the stats."""
    _, happens = clip(t, spec)
    if happens:
        number = tl.program_id(0).to(tl.int64)  # (in the interpreter a loop over `range` would give a Python int)
        while number < small(t.plan.sizes + 2):
            layer = layer_of(t, number)
            if not without_stats(layer, spec):
                sums = ()
                for k in tl.static_range(tl.constexpr(spec.terms)):
                    sums = sums + (tl.load(t.kept.stats + layer.number * spec.terms + k),)
                finish(t, layer, time_of(t, chunk_of(t, layer.first)), sums, True, True, spec)
            number += tl.num_programs(0)


@triton.jit
def leave(t, spec: tl.constexpr):
    """The last program to leave counts the step and clears the counters."""
    tl.debug_barrier()  # of all threads, before one of them speaks for them
    # releases all that this program did, acquires all that anybody did for the last to leave
    if tl.atomic_add(t.work.counters + LEFT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        if spec.applies:
            _, happens = clip(t, spec)
            if happens:
                advance(t)
            else:
                tl.store(t.kept.skipped, tl.load(t.kept.skipped) + 1)
        counters = small(t.plan.sizes + 4)
        for first in range(0, counters, LANES):
            slots = first + tl.arange(0, LANES)
            tl.store(t.work.counters + slots, tl.zeros([LANES], tl.int32), mask=slots < counters)


@triton.jit
def advance(t):
    tensors = small(t.plan.sizes + 3)
    for first in range(0, tensors, LANES):
        slots = first + tl.arange(0, LANES)
        inside = slots < tensors
        step = tl.load(t.kept.step + slots, mask=inside) + tl.load(t.given.counted + slots, mask=inside)
        tl.store(t.kept.step + slots, step, mask=inside)


# Layers


@triton.jit
def finish(t, layer, time, sums, adapt: tl.constexpr, keep, spec: tl.constexpr):
    """The layer's scalars; they, the report and the layer's state are kept if a tensor of it has a gradient."""
    elements = tl.load(t.given.elements + layer.number)
    state = double(0.0)
    if spec.stateful:
        state = tl.load(t.kept.state + layer.state)
    h = row_of(t, layer.group, spec)
    finished, state, report = spec.rule.finish(h, Total(sums, elements.to(tl.float64), time, adapt, state))
    if keep & (elements >= 0):
        for k in tl.static_range(tl.constexpr(spec.finished)):
            tl.store(t.work.finished + layer.number * spec.finished + k, finished[k])
        for k in tl.static_range(tl.constexpr(spec.rule.reports)):
            tl.store(t.kept.report + layer.number * spec.rule.reports + k, report[k])
        if spec.stateful and adapt:
            for k in range(layer.states):  # alike in every member of the layer
                tl.store(t.kept.state + layer.state + k, state)
    return finished


@triton.jit
def finished_of(t, layer, spec: tl.constexpr):
    values = ()
    for k in tl.static_range(tl.constexpr(spec.finished)):
        values = values + (tl.load(t.work.finished + layer.number * spec.finished + k),)
    return values


@triton.jit
def no_sums(spec: tl.constexpr):
    """What sums and minima start from."""
    values = ()
    for _ in tl.static_range(tl.constexpr(spec.rule.sums)):
        values = values + (double(0.0),)
    for _ in tl.static_range(tl.constexpr(spec.rule.minima)):
        values = values + (double(float("inf")),)
    return values


@triton.jit
def with_sums(before, c, x, tile, spec: tl.constexpr):
    """Sums and minima with those of a tile."""
    inside = tl.arange(0, tl.constexpr(spec.tile)) < tile.count
    terms = spec.rule.stats(c, x)
    values = ()
    for k in tl.static_range(tl.constexpr(spec.rule.sums)):
        values = values + (before[k] + tl.sum(tl.where(inside, terms[k], 0.0), axis=0),)
    for k in tl.static_range(tl.constexpr(spec.rule.sums), tl.constexpr(spec.terms)):
        least = tl.min(tl.where(inside, terms[k], float("inf")), axis=0).to(tl.float64)
        values = values + (tl.minimum(before[k], least),)
    return values


@triton.jit
def combined(t, layer, chunks, spec: tl.constexpr):
    """A layer's sums and minima from those of its chunks."""
    values = ()
    for k in tl.static_range(tl.constexpr(spec.rule.sums)):
        values = values + (added(t.work.partials + (1 + k) * chunks + layer.first, layer.chunks),)
    for k in tl.static_range(tl.constexpr(spec.rule.sums), tl.constexpr(spec.terms)):
        values = values + (least(t.work.partials + (1 + k) * chunks + layer.first, layer.chunks),)
    return values


@triton.jit
def added(at, count):
    """A sum in an order that depends on the count alone."""
    lanes = tl.zeros([LANES], tl.float64)
    for first in range(0, count, LANES):
        slots = first + tl.arange(0, LANES)
        lanes += tl.load(at + slots, mask=slots < count, other=0.0)
    return tl.sum(lanes, axis=0)


@triton.jit
def least(at, count):
    lanes = tl.full([LANES], float("inf"), tl.float64)
    for first in range(0, count, LANES):
        slots = first + tl.arange(0, LANES)
        lanes = tl.minimum(lanes, tl.load(at + slots, mask=slots < count, other=float("inf")))
    return tl.min(lanes, axis=0)


@triton.jit
def keep_stats(t, layer, sums, spec: tl.constexpr):
    for k in tl.static_range(tl.constexpr(spec.terms)):
        tl.store(t.kept.stats + layer.number * spec.terms + k, sums[k])


# Rows of the tables


@triton.jit
def item_of(t, ticket):
    """An item of the plan with all that is known of it."""
    kind, index = small(t.plan.items + 2 * ticket), small(t.plan.items + 2 * ticket + 1)
    if kind == WHOLE:  # the index is the layer's, which has one chunk
        index = small(t.plan.layers + 7 * index + 1)
    chunk = chunk_of(t, index)
    return Item(kind, chunk, layer_of(t, chunk.layer), time_of(t, chunk))


@triton.jit
def chunk_of(t, slot):
    at = t.plan.chunks + 4 * slot
    tensor = small(at)
    count = tl.where(tl.load(t.given.address + 4 * tensor + 1) != 0, small(at + 2), 0)
    return Chunk(slot, tensor, tl.load(at + 1), count, small(at + 3))


@triton.jit
def small(at):
    """A number of rows or of a chunk's elements: it fits 32 bits, which saves registers."""
    return tl.load(at).to(tl.int32)


@triton.jit
def layer_of(t, number):
    at = t.plan.layers + 7 * number
    return Layer(number, small(at), small(at + 1), small(at + 2), small(at + 4), small(at + 5), small(at + 6))


@triton.jit
def time_of(t, chunk):
    """The number of this step, from 1."""
    return tl.load(t.kept.step + chunk.tensor).to(tl.float64) + 1


@triton.jit
def tile_of(chunk, first, spec: tl.constexpr):
    return Tile(chunk.tensor, chunk.start + first, tl.minimum(chunk.count - first, spec.tile))


@triton.jit
def row_of(t, group, spec: tl.constexpr):
    """A group's hyper-parameters, by name."""
    values = ()
    for k in tl.static_range(tl.constexpr(spec.width)):
        values = values + (value_of(t, 2 + group * (1 + spec.width) + k, spec),)
    return spec.Row(*values)


@triton.jit
def scale_of(t, layer, factor, spec: tl.constexpr):
    """What a gradient is multiplied with: its sign, and the clip's factor."""
    return f32(tl.load(t.given.row + 1 + layer.group * (1 + spec.width)) * factor)


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


# Elements


@triton.jit
def read(t, tile, spec: tl.constexpr, reads: tl.constexpr):
    """The operands of a sweep as they lie in memory; zeros for those that it does not read."""
    zero = tl.zeros([tl.constexpr(spec.tile)], tl.float32)
    p, g, m, v = zero, zero, zero, zero
    if P & reads:
        p = load(place_of(t, tile, 0, spec), tile.count, spec.storage[0], spec.tile)
    if G & reads:
        g = load(place_of(t, tile, 1, spec), tile.count, spec.storage[1], spec.tile)
    if M & reads:
        m = load(place_of(t, tile, 2, spec), tile.count, spec.storage[2], spec.tile)
    if V & reads:
        v = load(place_of(t, tile, 3, spec), tile.count, spec.storage[3], spec.tile)
    return Element(p, g, m, v)


@triton.jit
def write(t, x, tile, spec: tl.constexpr, writes: tl.constexpr):
    if P & writes:
        store(place_of(t, tile, 0, spec), x.p, tile.count, spec.storage[0], spec.tile)
    if M & writes:
        store(place_of(t, tile, 2, spec), x.m, tile.count, spec.storage[2], spec.tile)
    if V & writes:
        store(place_of(t, tile, 3, spec), x.v, tile.count, spec.storage[3], spec.tile)


@triton.jit
def place_of(t, tile, operand: tl.constexpr, spec: tl.constexpr):
    """The address of a tile's first element."""
    size: tl.constexpr = spec.storage[operand].primitive_bitwidth // 8
    return tl.load(t.given.address + 4 * tile.tensor + operand) + tile.start * size


@triton.jit
def prepared(t, x, c, tile, scale, spec: tl.constexpr, reads: tl.constexpr):
    """The gradient as rules see it: with its sign, clipped, with coupled decay."""
    g = x.g
    if G & reads:
        g = scale * g
        if spec.couples:
            p = x.p
            if (P & reads) == 0:  # read for the decay alone, where there is any
                count = tl.where(c.coupled != 0, tile.count, 0)
                p = load(place_of(t, tile, 0, spec), count, spec.storage[0], spec.tile)
            g = tl.where(c.coupled != 0, g + c.coupled * p, g)
    return Element(x.p, g, x.m, x.v)
