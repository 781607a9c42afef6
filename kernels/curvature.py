"""Curvature step sizes (after arXiv 2305.13664), as in csrc/curvature.h: two rules a flavour, for two gradients.

The first launch finds the direction d and how steep the loss falls along it; then the gradient is taken once more, a
little further along sign*d; the second finds from it the curvature there, and how far to go. Both report into the same
columns: param_norm, direction_norm, descent, slope; sign, which the host writes; curvature, step_size.
"""

import triton
import triton.language as tl

from .adam import adam_direction, adam_moments
from .rule import Element, G, M, P, Rule, Sweep, V, average, correction, double, f32, product


@triton.jit
def finite(x):
    return x - x == 0


# The first launch: moments, the direction that they give, and the slope along it.


@triton.jit
def slope_recall(h, layer):
    """A prediction goes uphill by reach*sign: there the gradient is taken once more."""
    return (f32(-(h.reach * layer.report[4])),)


@triton.jit
def slope_found(h, layer, pp, dd, descent, decay):
    """rho = g.d / d.d, averaged. `decay` is what weight decay adds to the descent."""
    rho = tl.where(dd != 0, (descent + decay) / dd, 0.0)
    e = layer.state
    e = tl.where(finite(rho), e + (1 - h.ema) * (rho - e), e)
    slope = e * correction(h.ema, layer.t)
    return slope_recall(h, layer), e, (tl.sqrt(pp), tl.sqrt(dd), descent, slope, None, None, None)


@triton.jit
def slope_apply(c, x):
    return x


@triton.jit
def slope_sgd_start(h, t):
    return f32(1 - h.momentum), f32(correction(h.momentum, t)), f32(h.weight_decay)


@triton.jit
def slope_sgd_moments(c, x):
    return Element(x.p, x.g, average(x.m, c.c1, x.g + c.weight_decay * x.p), x.v)


@triton.jit
def unbiased(c, x):
    return c.ic1 * x.m


@triton.jit
def slope_sgd_stats(c, x):
    d = unbiased(c, x)
    return product(x.p, x.p), product(d, d), product(x.g, d), product(x.p, d)


@triton.jit
def slope_sgd_finish(h, layer):
    pp, dd, gd, pd = layer.stats
    return slope_found(h, layer, pp, dd, gd, h.weight_decay * pd)


slope_sgd = Rule(
    slope_sgd_start, slope_apply, scalars="c1 ic1 weight_decay", finished="lr", moments=slope_sgd_moments,
    stats=slope_sgd_stats, finish=slope_sgd_finish, direction=unbiased, recall=slope_recall,
    first=Sweep(P | G | M, M), second=Sweep(M, 0), sums=4, reports=7,
)  # fmt: skip


@triton.jit
def slope_adam_start(h, t):
    return (
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(correction(h.beta1, t)),
        f32(correction(h.beta2, t)),
        f32(h.eps),
    )


@triton.jit
def slope_adam_stats(c, x):
    d = adam_direction(c, x)
    return product(x.p, x.p), product(d, d), product(x.g, d)


@triton.jit
def slope_adam_finish(h, layer):
    pp, dd, gd = layer.stats
    return slope_found(h, layer, pp, dd, gd, double(0.0))


slope_adam = Rule(
    slope_adam_start, slope_apply, scalars="c1 c2 ic1 ic2 eps", finished="lr", moments=adam_moments,
    stats=slope_adam_stats, finish=slope_adam_finish, direction=adam_direction, recall=slope_recall,
    first=Sweep(P | G | M | V, M | V), second=Sweep(M | V, 0), sums=3, reports=7,
)  # fmt: skip

# The second launch: the curvature along the direction, and a step of the size that it allows.


@triton.jit
def curvature_recall(h, layer):
    return (f32(layer.report[6]),)


@triton.jit
def step_found(h, layer, decay):
    """kappa = z.Hz / z.z, averaged, and the step size. `decay` is weight decay's share of the curvature."""
    norm, descent, slope, sign = layer.report[1], layer.report[2], layer.report[3], layer.report[4]
    dd = norm * norm
    kappa = (layer.stats[0] - h.base * descent) / (h.reach * sign * dd) + decay
    found = (dd != 0) & finite(kappa)
    e = layer.state
    e = tl.where(found, e + (1 - h.ema) * (tl.where(h.signed_average != 0, kappa, tl.abs(kappa)) - e), e)
    curvature = tl.abs(e) * correction(h.ema, layer.t)
    damped = curvature + h.damping
    fall, delta = slope * dd, norm * tl.sqrt(damped)  # self-concordant: Gao & Goldfarb
    step = tl.where(h.self_concordant != 0, fall / ((fall + delta) * delta), slope / damped)
    step = tl.where(found & (slope > 0), tl.where(step < h.max_step, step, h.max_step), 0.0)
    return (f32(step),), e, (None, None, None, None, None, curvature, step)


@triton.jit
def curvature_sgd_start(h, t):
    return f32(correction(h.momentum, t)), f32(h.lr)


@triton.jit
def curvature_sgd_stats(c, x):
    return (product(x.g, unbiased(c, x)),)


@triton.jit
def curvature_sgd_finish(h, layer):
    return step_found(h, layer, h.weight_decay)


@triton.jit
def curvature_sgd_direction(c, x):
    return c.step * unbiased(c, x)


@triton.jit
def curvature_sgd_apply(c, x):
    return Element(x.p - c.lr * curvature_sgd_direction(c, x), x.g, x.m, x.v)


curvature_sgd = Rule(
    curvature_sgd_start, curvature_sgd_apply, scalars="ic1 lr", finished="step", stats=curvature_sgd_stats,
    finish=curvature_sgd_finish, direction=curvature_sgd_direction, recall=curvature_recall, first=Sweep(G | M, 0),
    second=Sweep(P | M, P), sums=1, reports=7,
)  # fmt: skip


@triton.jit
def curvature_adam_start(h, t):
    return f32(correction(h.beta1, t)), f32(correction(h.beta2, t)), f32(h.eps), f32(h.weight_decay), f32(h.lr)


@triton.jit
def curvature_adam_stats(c, x):
    return (product(x.g, adam_direction(c, x)),)


@triton.jit
def curvature_adam_finish(h, layer):
    return step_found(h, layer, double(0.0))


@triton.jit
def curvature_adam_direction(c, x):
    return c.step * adam_direction(c, x)


@triton.jit
def curvature_adam_apply(c, x):
    return Element(x.p - c.lr * (c.step * (adam_direction(c, x) + c.weight_decay * x.p)), x.g, x.m, x.v)


curvature_adam = Rule(
    curvature_adam_start, curvature_adam_apply, scalars="ic1 ic2 eps weight_decay lr", finished="step",
    stats=curvature_adam_stats, finish=curvature_adam_finish, direction=curvature_adam_direction,
    recall=curvature_recall, first=Sweep(G | M | V, 0), second=Sweep(P | M | V, P), sums=1, reports=7,
)  # fmt: skip
