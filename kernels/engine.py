"""The Triton engine: one persistent kernel that runs any rule over any plan, in one launch per step.

Programs claim the plan's items in order from a ticket counter. An item waits only for items with smaller tickets,
which are running somewhere already: no deadlock at any grid. Whoever arrives last at a layer adds up its chunks'
partial sums in the order of their slots and finishes the layer; whoever leaves the launch last counts the steps and
clears the counters, so that a launch can be replayed as it is. No optimizer is known here by name.
"""

import triton
import triton.language as tl

from .elements import G, prepared, read, write, write_ahead
from .layers import finish, finished_of, recalled
from .rule import double, product
from .sums import LANES, added, combined, keep_stats, no_sums, with_sums
from .tables import WHOLE, chunk_of, item_of, layer_of, row_of, scale_of, small, tile_of, time_of

REDUCE, APPLY = tl.constexpr(1), tl.constexpr(2)  # kinds of items, as in csrc/plan.h
# Counters, each in a cache line of its own, for who polls one drops it; then of each layer ARRIVED and READY in turn.
TICKET, LEFT, NORMS, NORM_READY, ARRIVED = (tl.constexpr(32 * k) for k in range(5))


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
    ticket = claim(t, norms, spec)
    if spec.norms:
        while ticket < norms:
            norm_chunk(t, ticket, norms, spec)
            ticket = claim(t, norms, spec)
        if not spec.only_norms:
            wait(t.work.counters + NORM_READY)  # acquires the norm
    if not spec.only_norms:
        factor, happens = clip(t, spec)
        group, time, started = nobody(spec)
        while happens & (ticket < items):
            item = item_of(t, ticket, spec)
            if (item.layer.group != group) | (item.time != time):  # most items share them with the one before
                group, time = item.layer.group, item.time
                started = spec.rule.start(row_of(t, group, spec), time)
            run_item(t, item, started, factor, spec)
            ticket = claim(t, norms, spec)


@triton.jit
def claim(t, norms, spec: tl.constexpr):
    """The next item; the norm's, which come first, are passed over where this launch has not that phase."""
    ticket = tl.atomic_add(t.work.counters + TICKET, 1, sem="relaxed")  # orders nothing: flags do
    if not spec.norms:
        ticket += norms
    return ticket


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
    if spec.predicts:
        if item.kind != REDUCE:
            predict_chunk(t, item, started, spec)
    elif spec.terms == 0:
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
    chunk = chunk_of(t, slot, spec)
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
            finish(t, layer, item.time, sums, spec, adapt=True, keep=True)
        tl.debug_barrier()
        tl.atomic_xchg(arrived + 1, 1, sem="release")  # publishes scalars, and with them the moments, to `apply`


@triton.jit
def apply_chunk(t, item, started, factor, spec: tl.constexpr):
    if spec.mixed:
        if item.layer.adapt == 0:
            apply_elementwise(t, item, started, factor, spec)
        else:
            apply_finished(t, item, started, factor, spec)
    else:
        apply_finished(t, item, started, factor, spec)


@triton.jit
def apply_finished(t, item, started, factor, spec: tl.constexpr):
    """A chunk of a layer that `finish` gave its scalars."""
    layer = item.layer
    if spec.reduces:
        wait(t.work.counters + ARRIVED + 2 * layer.number + 1)  # acquires what the layer's last to arrive published
    c = spec.Finished(*(started + finished_of(t, layer, spec)))
    update(t, item, c, factor, spec, False, spec.rule.second.reads, spec.rule.second.writes)


@triton.jit
def whole_layer(t, item, started, factor, spec: tl.constexpr):
    """A layer of one tile: read once, written once."""
    tile, layer = tile_of(item.chunk, 0, spec), item.layer
    c = spec.Started(*started)
    scale = scale_of(t, layer, factor, spec)
    x = read(t, tile, spec, spec.both.reads)
    x = spec.rule.moments(c, prepared(t, x, c, tile, scale, spec, spec.both.reads))
    sums = with_sums(no_sums(spec), c, x, tile, spec)
    keep_stats(t, layer, sums, spec)
    c = spec.Finished(*(started + finish(t, layer, item.time, sums, spec, adapt=True, keep=True)))
    apply(t, c, x, tile, spec, spec.both.writes)


@triton.jit
def apply_elementwise(t, item, started, factor, spec: tl.constexpr):
    """A chunk of a layer without stats: it has nothing to wait for."""
    first = item.chunk.slot == item.layer.first  # one chunk speaks for the layer
    c = spec.Finished(*(started + finish(t, item.layer, item.time, (), spec, adapt=False, keep=first)))
    update(t, item, c, factor, spec, True, spec.both.reads, spec.both.writes)


@triton.jit
def update(t, item, c, factor, spec: tl.constexpr, first: tl.constexpr, reads: tl.constexpr, writes: tl.constexpr):
    """The update of a chunk; with its moments where this is its first sweep."""
    chunk = item.chunk
    scale = scale_of(t, item.layer, factor, spec)
    for begin in range(0, chunk.count, spec.tile):
        tile = tile_of(chunk, begin, spec)
        x = prepared(t, read(t, tile, spec, reads), c, tile, scale, spec, reads)
        if first:
            x = spec.rule.moments(c, x)
        apply(t, c, x, tile, spec, writes)


@triton.jit
def apply(t, c, x, tile, spec: tl.constexpr, writes: tl.constexpr):
    x = spec.rule.apply(c, x)
    write(t, x, tile, spec, writes)
    if spec.leads:
        write_ahead(t, x, c, tile, spec)


@triton.jit
def predict_chunk(t, item, started, spec: tl.constexpr):
    """Predicted weights from what lies in memory; nothing else is written."""
    chunk, layer = item.chunk, item.layer
    c = spec.Started(*started)
    if spec.recalls:
        c = spec.Finished(*(started + recalled(t, layer, item.time, spec)))
    for begin in range(0, chunk.count, spec.tile):
        tile = tile_of(chunk, begin, spec)
        write_ahead(t, read(t, tile, spec, spec.ahead.reads), c, tile, spec)


@triton.jit
def finish_all(t, spec: tl.constexpr):
    """The phase between `reduce` and `apply` by itself: somebody may have changed the stats."""
    _, happens = clip(t, spec)
    if happens:
        number = tl.program_id(0).to(tl.int64)  # (in the interpreter a loop over `range` would give a Python int)
        while number < small(t.plan.sizes + 2):
            layer = layer_of(t, number)
            if layer.adapt != 0:
                sums = ()
                for k in tl.static_range(tl.constexpr(spec.terms)):
                    sums = sums + (tl.load(t.kept.stats + layer.number * spec.terms + k),)
                finish(t, layer, time_of(t, chunk_of(t, layer.first, spec), spec), sums, spec, adapt=True, keep=True)
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
                tl.atomic_add(t.kept.skipped, 1, sem="relaxed")  # of one thread; nobody else counts
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
