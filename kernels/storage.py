"""How numbers are stored: float32 in registers, 16 bits in memory, and ways to keep more of a parameter than that.

Everything is rounded in integers of our own, as csrc/storage.h and csrc/philox.h do, so that all engines have the same
bits (Triton's interpreter truncates bf16 and errs where it is subnormal).
"""

import triton
import triton.language as tl

NEAREST, MASTER, REMAINDER, KAHAN, STOCHASTIC = (tl.constexpr(way) for way in range(5))  # as in csrc/storage.h


@triton.jit
def rounded(x, storage: tl.constexpr):
    """float32 to its storage, to nearest even."""
    bits = x
    if storage == tl.bfloat16:
        bits = bf16_bits(x.to(tl.uint32, bitcast=True))
    elif storage == tl.float16:
        bits = fp16_bits(x.to(tl.uint32, bitcast=True))
    return bits


@triton.jit
def value(bits, storage: tl.constexpr):
    """float32 from its storage."""
    x = bits
    if storage == tl.bfloat16:
        x = bf16_value(bits)
    elif storage == tl.float16:
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
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


# Two halves of a parameter: the upper 16 bits rounded and the lower 16; or a number and what rounding took from it.


@triton.jit
def joined(high, low):
    """bf16 and the int16 that goes with it: float32."""
    return ((high.to(tl.uint32) << 16) + low.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """float32 as bf16 and int16. Ties go away from zero: nearest even could not be undone from 16 bits."""
    u = x.to(tl.uint32, bitcast=True)
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    high = tl.where(nan, (u >> 16) | 0x40, (u + 0x8000) >> 16)
    return high.to(tl.uint16), tl.where(nan, 0, u & 0xFFFF).to(tl.int16)


@triton.jit
def compensation(x, nearest):
    """What rounding x to `nearest` has taken from it; nothing where either is not finite."""
    error = x - nearest
    return tl.where(error - error == 0, error, 0.0)


# Stochastic rounding: up with the probability that is the distance from the number below.


@triton.jit
def stochastic(x, noise, storage: tl.constexpr):
    """float32 to 16 bits: `noise`, 16 random bits, is added below the last bit that stays."""
    u = x.to(tl.uint32, bitcast=True)
    finite = (u & 0x7FFFFFFF) < 0x7F800000
    if storage == tl.bfloat16:
        bits = tl.where(finite, ((u + noise) >> 16).to(tl.uint16), bf16_bits(u))
    else:
        bits = tl.where(finite, fp16_stochastic(u, noise), fp16_bits(u))
    return bits


@triton.jit
def fp16_stochastic(u, noise):
    magnitude = u & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + (noise >> 3)) >> 13
    normal = tl.where(normal > 0x7C00, 0x7C00, normal)
    drop = 126 - (magnitude >> 23)  # bits of the significand that a subnormal loses; of a normal it means nothing
    shift = tl.where(drop > 31, 31, drop)
    aligned = tl.where(shift < 16, noise >> ((16 - shift) & 31), noise << ((shift - 16) & 31))
    subnormal = tl.where(drop > 31, 0, (((magnitude & 0x7FFFFF) | 0x800000) + aligned) >> shift)
    return (((u >> 16) & 0x8000) | tl.where(magnitude < (113 << 23), subnormal, normal)).to(tl.uint16)


@triton.jit
def noise_of(seed, place, step, start, TILE: tl.constexpr):
    """16 random bits for each element of a tile that begins at `start` of its tensor: a Philox for 8 of them.

    A thread that holds 8 elements side by side makes their bits itself: nothing moves between threads.
    """
    eighth, behind = start // 8 + tl.arange(0, TILE // 8), start % 8
    a, b, c, d = words_of(seed, place, step, eighth)
    if behind != 0:  # a layer that is cut out of its tensor may begin anywhere: 8 words, of which bits are taken later
        e, f, g, h = words_of(seed, place, step, eighth + 1)
        for _ in range(behind // 2):
            a, b, c, d, e, f, g = b, c, d, e, f, g, h
        if behind % 2 == 1:
            a, b, c, d = half_behind(a, b), half_behind(b, c), half_behind(c, d), half_behind(d, e)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def words_of(seed, place, step, eighth):
    """Philox4x32-10 (Salmon et al., SC 2011): four words for 8 elements."""
    high, low = (place >> 32).to(tl.uint32), place.to(tl.uint32)
    return tl.philox(seed, eighth.to(tl.uint32), high, low, step.to(tl.uint32))


@triton.jit
def half_behind(word, following):
    return (word >> 16) | (following << 16)
