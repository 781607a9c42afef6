"""Adam (arXiv 1412.6980, Algorithm 1), AdamW (arXiv 1711.05101), and what other rules have of them."""

import triton
import triton.language as tl

from .rule import Element, G, M, P, Rule, Sweep, V, average, correction, divide, f32, root


@triton.jit
def coupled_decay(h):
    return f32(tl.where(h.decoupled != 0, 0.0, h.weight_decay))


@triton.jit
def decoupled_decay(h):
    return f32(tl.where(h.decoupled != 0, h.lr * h.weight_decay, 0.0))


@triton.jit
def adam_start(h, t):
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(correction(h.beta1, t)),
        f32(correction(h.beta2, t)),
        f32(h.eps),
        f32(h.lr),
        decoupled_decay(h),
    )


@triton.jit
def adam_moments(c, x):
    return Element(x.p, x.g, average(x.m, c.c1, x.g), average(x.v, c.c2, x.g * x.g))


@triton.jit
def adam_direction(c, x):
    return divide(c.ic1 * x.m, root(c.ic2 * x.v) + c.eps)


@triton.jit
def descend(c, x, direction):
    return Element(x.p - (c.lr * direction + c.decay * x.p), x.g, x.m, x.v)


@triton.jit
def adam_apply(c, x):
    return descend(c, x, adam_direction(c, x))


adam = Rule(
    adam_start, adam_apply, scalars="coupled c1 c2 ic1 ic2 eps lr decay", moments=adam_moments,
    direction=adam_direction, second=Sweep(P | G | M | V, P | M | V),
)  # fmt: skip
