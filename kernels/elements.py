"""Tiles between memory and registers: 16 bytes at a time where memory allows, float32 inside.

An operand comes as an int64 address. Whether it can be moved in vectors is found out for each operand by itself: a
misaligned view slows down nobody else.
"""

import triton
import triton.language as tl

from .rule import Element, f32
from .storage import (
    KAHAN,
    MASTER,
    REMAINDER,
    STOCHASTIC,
    bf16_value,
    compensation,
    joined,
    noise_of,
    rounded,
    split,
    stochastic,
    value,
)

P, G, M, V = (tl.constexpr(1 << bit) for bit in range(4))  # as in csrc/rule.h


@triton.jit
def read(t, tile, spec: tl.constexpr, reads: tl.constexpr):
    """The operands of a sweep as they lie in memory; zeros for those that it does not read."""
    zero = tl.zeros([tl.constexpr(spec.tile)], tl.float32)
    p, g, m, v = zero, zero, zero, zero
    if P & reads:
        p = load_p(t, tile, tile.count, spec)
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
        store_p(t, x.p, tile, spec)
    if M & writes:
        store(place_of(t, tile, 2, spec), x.m, tile.count, spec.storage[2], spec.tile)
    if V & writes:
        put(place_of(t, tile, 3, spec), chosen(t, x.v, tile, 3, spec), tile.count, spec.tile)


@triton.jit
def load_p(t, tile, count, spec: tl.constexpr):
    """The parameter as rules see it: of both its halves, where it has two."""
    at = place_of(t, tile, 0, spec)
    if spec.ways[0] == MASTER:
        p = load(rest_of(t, tile, spec), count, tl.float32, spec.tile)
    elif spec.ways[0] == REMAINDER:
        high = fetch(at, count, tl.uint16, spec.tile)
        p = joined(high, fetch(rest_of(t, tile, spec), count, tl.int16, spec.tile))
    elif spec.ways[0] == KAHAN:
        p = load(at, count, spec.storage[0], spec.tile)
        p += load(rest_of(t, tile, spec), count, spec.storage[0], spec.tile)
    else:
        p = load(at, count, spec.storage[0], spec.tile)
    return p


@triton.jit
def store_p(t, p, tile, spec: tl.constexpr):
    """The parameter, and its other half."""
    at = place_of(t, tile, 0, spec)
    if spec.ways[0] == REMAINDER:
        bits, rest = split(p)
    else:
        bits, rest = chosen(t, p, tile, 0, spec), p
        if spec.ways[0] == KAHAN:
            rest = rounded(compensation(p, value(bits, spec.storage[0])), spec.storage[0])
    put(at, bits, tile.count, spec.tile)
    if spec.halves:
        put(rest_of(t, tile, spec), rest, tile.count, spec.tile)


@triton.jit
def chosen(t, x, tile, operand: tl.constexpr, spec: tl.constexpr):
    """What is stored of an operand: the nearest number, or one of the two beside it by chance."""
    if spec.ways[operand] == STOCHASTIC:
        seed, place = tl.load(t.given.noise + 2 * tile.tensor), tl.load(t.given.noise + 2 * tile.tensor + 1)
        if operand == 3:
            place += 1  # v's own numbers
        step = tl.load(t.kept.step + tile.tensor).to(tl.int64) + 1
        noise = noise_of(seed, place, step, tile.start, spec.tile)
        bits = stochastic(x, noise, spec.storage[operand])
    else:
        bits = rounded(x, spec.storage[operand])
    return bits


@triton.jit
def rest_of(t, tile, spec: tl.constexpr):
    """The address of the other half of a tile's parameter."""
    size: tl.constexpr = 4 if spec.ways[0] == MASTER else 2
    return tl.load(t.given.rest + tile.tensor) + tile.start * size


@triton.jit
def write_ahead(t, x, c, tile, spec: tl.constexpr):
    """The predicted weight, from what is stored, so that it has the same bits when it is made from memory later."""
    x = Element(stored(x.p, spec.storage[0]), x.g, stored(x.m, spec.storage[2]), stored(x.v, spec.storage[3]))
    predicted = x.p - f32(tl.load(t.given.row + 1)) * c.lr * spec.rule.direction(c, x)
    size: tl.constexpr = spec.storage[0].primitive_bitwidth // 8
    at = tl.load(t.given.predicted + tile.tensor) + tile.start * size
    store(at, predicted, tile.count, spec.storage[0], spec.tile)


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
                p = load_p(t, tile, count, spec)
            g = tl.where(c.coupled != 0, g + c.coupled * p, g)
    return Element(x.p, g, x.m, x.v)


@triton.jit
def has_vectors(at, count):
    return (at % 16 == 0) & (count % 8 == 0)


@triton.jit
def load(at, count, storage: tl.constexpr, TILE: tl.constexpr):
    """`count` elements from address `at` on, as float32; zeros behind them."""
    if storage == tl.bfloat16:  # Triton's interpreter errs where it is subnormal
        x = bf16_value(fetch(at, count, tl.uint16, TILE))
    else:
        x = fetch(at, count, storage, TILE).to(tl.float32)
    return x


@triton.jit
def fetch(at, count, storage: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    x = tl.zeros([TILE], storage)
    if has_vectors(at, count):  # `// 8 * 8` tells the compiler that a vector shares one predicate
        start = tl.multiple_of(at.to(tl.pointer_type(storage)), 16)
        x = tl.load(start + offsets, mask=offsets < count // 8 * 8, other=0)
    else:
        start = at.to(tl.pointer_type(storage))
        x = tl.load(start + offsets, mask=offsets < count, other=0)
    return x


@triton.jit
def store(at, x, count, storage: tl.constexpr, TILE: tl.constexpr):
    """The first `count` elements of a float32 tile to address `at`."""
    put(at, rounded(x, storage), count, TILE)


@triton.jit
def put(at, bits, count, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    if has_vectors(at, count):
        start = tl.multiple_of(at.to(tl.pointer_type(bits.dtype)), 16)
        tl.store(start + offsets, bits, mask=offsets < count // 8 * 8)
    else:
        start = at.to(tl.pointer_type(bits.dtype))
        tl.store(start + offsets, bits, mask=offsets < count)


@triton.jit
def stored(x, storage: tl.constexpr):
    """float32 as it comes back from its storage."""
    return value(rounded(x, storage), storage)
