"""Loads and stores of tiles: 16 bytes at a time where memory allows, float32 in registers, our own rounding to 16 bits.

An operand comes as an int64 address. Whether it can be moved in vectors is found out for each operand by itself: a
misaligned view slows down nobody else.
"""

import triton
import triton.language as tl


@triton.jit
def has_vectors(at, count):
    return (at % 16 == 0) & (count % 8 == 0)


@triton.jit
def load(at, count, storage: tl.constexpr, CHUNK: tl.constexpr):
    """`count` elements from address `at` on, as float32; zeros behind them."""
    offsets = tl.arange(0, CHUNK)
    x = tl.zeros([CHUNK], storage)
    if has_vectors(at, count):  # `// 8 * 8` tells the compiler that a vector shares one predicate
        start = tl.multiple_of(at.to(tl.pointer_type(storage)), 16)
        x = tl.load(start + offsets, mask=offsets < count // 8 * 8, other=0)
    else:
        start = at.to(tl.pointer_type(storage))
        x = tl.load(start + offsets, mask=offsets < count, other=0)
    return x.to(tl.float32)


@triton.jit
def store(at, x, count, storage: tl.constexpr, CHUNK: tl.constexpr):
    """The first `count` elements of a float32 tile to address `at`."""
    offsets = tl.arange(0, CHUNK)
    bits = rounded(x, storage)
    if has_vectors(at, count):
        start = tl.multiple_of(at.to(tl.pointer_type(bits.dtype)), 16)
        tl.store(start + offsets, bits, mask=offsets < count // 8 * 8)
    else:
        start = at.to(tl.pointer_type(bits.dtype))
        tl.store(start + offsets, bits, mask=offsets < count)


@triton.jit
def rounded(x, storage: tl.constexpr):
    """float32 to its storage: to nearest even in integers, as csrc/cpu/storage.h (Triton's interpreter truncates)."""
    bits = x
    if storage == tl.bfloat16:
        bits = bf16_bits(x.to(tl.uint32, bitcast=True))
    elif storage == tl.float16:
        bits = fp16_bits(x.to(tl.uint32, bitcast=True))
    return bits


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
