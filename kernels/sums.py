"""Sums and minima over tiles, chunks and layers, each in an order that depends on sizes alone."""

import triton
import triton.language as tl

from .rule import double

LANES = tl.constexpr(1024)  # slots added side by side


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
