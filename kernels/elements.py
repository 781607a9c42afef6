"""Tiles between memory and registers: 16 bytes at a time where memory allows, float32 inside, our own rounding.

An operand comes as an int64 address. Whether it can be moved in vectors is found out for each operand by itself: a
misaligned view slows down nobody else.
"""

import triton
import triton.language as tl

from .rule import Element, f32

P, G, M, V = (tl.constexpr(1 << bit) for bit in range(4))  # as in csrc/rule.h


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
                p = load(place_of(t, tile, 0, spec), count, spec.storage[0], spec.tile)
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
    offsets = tl.arange(0, TILE)
    bits = rounded(x, storage)
    if has_vectors(at, count):
        start = tl.multiple_of(at.to(tl.pointer_type(bits.dtype)), 16)
        tl.store(start + offsets, bits, mask=offsets < count // 8 * 8)
    else:
        start = at.to(tl.pointer_type(bits.dtype))
        tl.store(start + offsets, bits, mask=offsets < count)


@triton.jit
def rounded(x, storage: tl.constexpr):
    """float32 to its storage: to nearest even in integers, as csrc/storage.h (Triton's interpreter truncates)."""
    bits = x
    if storage == tl.bfloat16:
        bits = bf16_bits(x.to(tl.uint32, bitcast=True))
    elif storage == tl.float16:
        bits = fp16_bits(x.to(tl.uint32, bitcast=True))
    return bits


@triton.jit
def stored(x, storage: tl.constexpr):
    """float32 as it comes back from its storage."""
    if storage == tl.bfloat16:
        x = bf16_value(rounded(x, storage))
    elif storage == tl.float16:
        x = rounded(x, storage).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def bf16_value(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)  # they are float32's upper half


@triton.jit
def bf16_bits(u):
    nearest = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    quiet = (u >> 16) | 0x40  # a NaN must not round to infinity
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, quiet, nearest).to(tl.uint16)


@triton.jit
def fp16_bits(u):
    sign = (u >> 16) & 0x8000
    magnitude = u & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    half = magnitude.to(tl.float32, bitcast=True) + 0.5  # this addition rounds to 2^-24 for us
    subnormal = half.to(tl.uint32, bitcast=True) - 0x3F000000
    finite = tl.where(magnitude < (113 << 23), subnormal, normal)
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    return (sign | tl.where(magnitude >= (143 << 23), special, finite)).to(tl.uint16)
