"""The rules in Triton, one block per header of csrc/rules: the same operations in the same order, so the same bits."""

import triton
import triton.language as tl

from .adam import adam, adam_direction, adam_moments, adam_start, coupled_decay, decoupled_decay, descend
from .curvature import curvature_adam, curvature_sgd, slope_adam, slope_sgd
from .rule import (
    Element,
    G,
    M,
    P,
    Rule,
    Sweep,
    V,
    as_left,
    average,
    correction,
    divide,
    double,
    f32,
    power,
    product,
    root,
    widen,
)

__all__ = ["adam", "curvature_adam", "curvature_sgd", "slope_adam", "slope_sgd"]  # of other files

# SGD with momentum, step for step torch.optim.SGD; and without, which has no state at all.


@triton.jit
def sgd_start(h, t):
    first = t == 1  # the buffer starts as the gradient itself, not damped
    return (
        f32(h.weight_decay),
        f32(tl.where(first, 0.0, h.momentum)),
        f32(tl.where(first, 1.0, 1 - h.dampening)),
        f32(h.lr),
        f32(tl.where(h.nesterov != 0, h.momentum, 0.0)),
    )


@triton.jit
def sgd_apply(c, x):
    m = c.momentum * x.m + c.take * x.g
    return Element(x.p - c.lr * tl.where(c.nesterov != 0, x.g + c.nesterov * m, m), x.g, m, x.v)


@triton.jit
def momentum_direction(c, x):
    return x.m


sgd = Rule(
    sgd_start, sgd_apply, scalars="coupled momentum take lr nesterov", second=Sweep(P | G | M, P | M),
    direction=momentum_direction,
)  # fmt: skip


@triton.jit
def sgd_plain_start(h, t):
    return f32(h.weight_decay), f32(h.lr)


@triton.jit
def sgd_plain_apply(c, x):
    return Element(x.p - c.lr * x.g, x.g, x.m, x.v)


@triton.jit
def sgd_plain_direction(c, x):
    return tl.zeros_like(x.p)  # no state to tell it from


sgd_plain = Rule(
    sgd_plain_start, sgd_plain_apply, scalars="coupled lr", second=Sweep(P | G, P), direction=sgd_plain_direction
)

# AdaBelief (arXiv 2010.07468; author code adabelief-pytorch 0.2): eps accumulates in the state.


@triton.jit
def rectification(beta2, t):
    """RAdam (arXiv 1908.03265, section 4.2): 0 while the variance of the adaptive step is intractable."""
    limit = 2 / (1 - beta2) - 1
    decayed = power(beta2, t)
    length = limit - 2 * t * decayed / (1 - decayed)
    ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    return tl.where(length < 5, 0.0, tl.sqrt(tl.where(length < 5, 1.0, ratio)))


@triton.jit
def adabelief_start(h, t):
    rectified = tl.where(h.rectify != 0, rectification(h.beta2, t), 1.0)
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(correction(h.beta1, t) * tl.where(rectified > 0, rectified, 1.0)),
        f32(correction(h.beta2, t)),
        f32(h.eps),
        f32(h.lr),
        decoupled_decay(h),
        f32(tl.where(rectified > 0, 0.0, 1.0)),
    )


@triton.jit
def adabelief_moments(c, x):
    m = average(x.m, c.c1, x.g)
    d = x.g - m
    return Element(x.p, x.g, m, average(x.v, c.c2, d * d) + c.eps)


@triton.jit
def adabelief_direction(c, x):
    return divide(c.ic1 * x.m, tl.where(c.plain != 0, 1.0, root(c.ic2 * x.v) + c.eps))


@triton.jit
def adabelief_apply(c, x):
    return descend(c, x, adabelief_direction(c, x))


adabelief = Rule(
    adabelief_start, adabelief_apply, scalars="coupled c1 c2 ic1 ic2 eps lr decay plain", moments=adabelief_moments,
    direction=adabelief_direction, second=Sweep(P | G | M | V, P | M | V),
)  # fmt: skip

# AdaM3 (= AdaMomentum, arXiv 2106.11514; author code): the second moment is of m, eps lives inside it.


@triton.jit
def adam3_moments(c, x):
    m = average(x.m, c.c1, x.g)
    return Element(x.p, x.g, m, average(x.v, c.c2, m * m) + c.eps)


@triton.jit
def adam3_direction(c, x):
    return divide(c.ic1 * x.m, root(c.ic2 * x.v))


@triton.jit
def adam3_apply(c, x):
    return descend(c, x, adam3_direction(c, x))


adam3 = Rule(
    adam_start, adam3_apply, scalars="coupled c1 c2 ic1 ic2 eps lr decay", moments=adam3_moments,
    direction=adam3_direction, second=Sweep(P | G | M | V, P | M | V),
)  # fmt: skip

# LARS (arXiv 1708.03888, Algorithm 1); lr_in_momentum is the paper's and MLPerf's placement of lr.


@triton.jit
def lars_start(h, t):
    return (
        f32(h.momentum),
        f32(h.weight_decay),
        f32(h.nesterov),
        f32(tl.where(h.lr_in_momentum != 0, 1.0, h.lr)),
    )


@triton.jit
def lars_stats(c, x):
    return product(x.p, x.p), product(x.g, x.g)


@triton.jit
def lars_finish(h, layer):
    norm_p, norm_g, ratio = double(0.0), double(0.0), double(1.0)
    if layer.adapt:
        norm_p, norm_g = tl.sqrt(layer.stats[0]), tl.sqrt(layer.stats[1])
        ratio = h.trust_coefficient * norm_p / (norm_g + h.weight_decay * norm_p + h.eps)
        ratio = tl.where(h.larc != 0, tl.where(ratio > h.lr, 1.0, ratio / h.lr), ratio)
        ratio = tl.where((norm_p != 0) & (norm_g != 0), ratio, 1.0)
    take = ratio * tl.where(h.lr_in_momentum != 0, h.lr, 1.0)
    return (f32(take),), layer.state, (norm_p, norm_g, ratio)


@triton.jit
def lars_apply(c, x):
    d = c.take * (x.g + c.weight_decay * x.p)
    m = c.momentum * x.m + d
    return Element(x.p - c.lr * tl.where(c.nesterov != 0, d + c.momentum * m, m), x.g, m, x.v)


lars = Rule(
    lars_start, lars_apply, scalars="momentum weight_decay nesterov lr", finished="take", stats=lars_stats,
    finish=lars_finish, direction=momentum_direction, first=Sweep(P | G, 0), second=Sweep(P | G | M, P | M), sums=2,
    reports=3,
)  # fmt: skip

# LAMB (arXiv 1904.00962 v5, Algorithm 2) and LAMBC (arXiv 2011.13584: the ratio bounded from above).


@triton.jit
def lamb_start(h, t):
    corrected = h.bias_correction != 0
    return (
        f32(1 - h.beta1),
        f32(tl.where(h.grad_averaging != 0, 1.0, 1 / (1 - h.beta1))),
        f32(1 - h.beta2),
        f32(tl.where(corrected, correction(h.beta1, t), 1.0)),
        f32(tl.where(corrected, correction(h.beta2, t), 1.0)),
        f32(h.eps),
        f32(h.weight_decay),
        f32(h.lr),
    )


@triton.jit
def lamb_moments(c, x):
    return Element(x.p, x.g, average(x.m, c.c1, c.take * x.g), average(x.v, c.c2, x.g * x.g))


@triton.jit
def lamb_update(c, x):
    return adam_direction(c, x) + c.weight_decay * x.p


@triton.jit
def lamb_stats(c, x):
    u = lamb_update(c, x)
    return product(x.p, x.p), product(u, u)


@triton.jit
def lamb_recall(h, layer):
    return (f32(layer.report[2]),)


@triton.jit
def lamb_finish(h, layer):
    norm_p, norm_u, ratio = double(0.0), double(0.0), double(1.0)
    if layer.adapt:
        norm_p, norm_u = tl.sqrt(layer.stats[0]), tl.sqrt(layer.stats[1])
        ratio = tl.where((norm_p != 0) & (norm_u != 0), norm_p / norm_u, 1.0)
        ratio = tl.where(ratio < h.lower, h.lower, tl.where(ratio > h.upper, h.upper, ratio))
    report = (norm_p, norm_u, ratio)
    return lamb_recall(h, as_left(layer, layer.state, report)), layer.state, report


@triton.jit
def lamb_direction(c, x):
    return c.ratio * adam_direction(c, x)


@triton.jit
def lamb_apply(c, x):
    return Element(x.p - c.lr * (c.ratio * lamb_update(c, x)), x.g, x.m, x.v)


lamb = Rule(
    lamb_start, lamb_apply, scalars="c1 take c2 ic1 ic2 eps weight_decay lr", finished="ratio", moments=lamb_moments,
    stats=lamb_stats, finish=lamb_finish, direction=lamb_direction, recall=lamb_recall,
    first=Sweep(P | G | M | V, M | V), second=Sweep(P | M | V, P), sums=2, reports=3,
)  # fmt: skip

# NovoGrad (arXiv 1905.11286, Algorithm 1): one second moment per layer.


@triton.jit
def novograd_start(h, t):
    return f32(h.beta1), f32(h.lr)


@triton.jit
def novograd_stats(c, x):
    return (product(x.g, x.g),)


@triton.jit
def novograd_finish(h, layer):
    squares = layer.stats[0]
    v = layer.state  # 0 until the first non-zero gradient
    v = tl.where(v == 0, squares, v + (1 - h.beta2) * (squares - v))
    average = tl.where(h.grad_averaging != 0, 1 - h.beta1, 1.0)
    denominator = tl.sqrt(v) + h.eps
    take = tl.where(denominator != 0, average / denominator, 0.0)
    return (f32(take), f32(average * h.weight_decay)), v, (tl.sqrt(squares), v)


@triton.jit
def novograd_apply(c, x):
    m = c.beta1 * x.m + (c.take * x.g + c.weight_decay * x.p)
    return Element(x.p - c.lr * m, x.g, m, x.v)


novograd = Rule(
    novograd_start, novograd_apply, scalars="beta1 lr", finished="take weight_decay", stats=novograd_stats,
    finish=novograd_finish, direction=momentum_direction, first=Sweep(G, 0), second=Sweep(P | G | M, P | M), sums=1,
    reports=2,
)  # fmt: skip

# Aida (arXiv 2203.13273; author code): K mutual projections of each layer's gradient and momentum.


@triton.jit
def first_moment(c, x):
    return Element(x.p, x.g, average(x.m, c.c1, x.g), x.v)


@triton.jit
def aida_stats(c, x):
    return product(x.g, x.g), product(x.m, x.m), product(x.g, x.m)


@triton.jit
def aida_finish(h, layer):
    """Every iterate is a multiple of g or m, so that K projections need no further sweep: r = b*m - a*g."""
    a, b = double(1.0), double(1.0)
    norm_g, norm_m, cosine = double(0.0), double(0.0), double(0.0)
    if layer.adapt:
        gg, mm, gm = layer.stats
        for _ in range(h.k.to(tl.int32)):
            s = a * b * gm  # of the old a and b both
            a = a * s / (a * a * gg + h.xi)
            b = b * s / (b * b * mm + h.xi)
        norm_g, norm_m = tl.sqrt(gg), tl.sqrt(mm)
        cosine = tl.where((norm_g != 0) & (norm_m != 0), gm / (norm_g * norm_m), 0.0)
    return (f32(a), f32(b)), layer.state, (norm_g, norm_m, cosine)


@triton.jit
def aida_apply(c, x):
    r = c.b * x.m - c.a * x.g
    x = Element(x.p, x.g, x.m, average(x.v, c.c2, r * r) + c.eps)
    return descend(c, x, adam3_direction(c, x))


aida = Rule(
    adam_start, aida_apply, scalars="coupled c1 c2 ic1 ic2 eps lr decay", finished="a b", moments=first_moment,
    stats=aida_stats, finish=aida_finish, direction=adam3_direction, first=Sweep(G | M, M),
    second=Sweep(P | G | M | V, P | V), sums=3, reports=3,
)  # fmt: skip

# LAdam and LAdaBelief, pre-processing (arXiv 2203.13273 v1-v3, author code): one second moment per layer.


@triton.jit
def ladam_pre_start(h, t):
    return coupled_decay(h), f32(1 - h.beta1), f32(h.belief), f32(h.lr), decoupled_decay(h)


@triton.jit
def ladam_pre_stats(c, x):
    q = tl.where(c.belief != 0, x.g - x.m, x.g)
    return (product(q, q),)


@triton.jit
def ladam_pre_recall(h, layer):
    return (f32(correction(h.beta1, layer.t) / tl.sqrt(correction(h.beta2, layer.t) * layer.state)),)


@triton.jit
def ladam_pre_finish(h, layer):
    mean = tl.where(layer.elements > 0, layer.stats[0] / layer.elements, 0.0)
    v = layer.state + ((1 - h.beta2) * (mean - layer.state) + h.eps)
    return ladam_pre_recall(h, as_left(layer, v, (v,))), v, (v,)


@triton.jit
def ladam_direction(c, x):
    return c.scale * x.m


@triton.jit
def ladam_apply(c, x):
    return descend(c, x, ladam_direction(c, x))


ladam_pre = Rule(
    ladam_pre_start, ladam_apply, scalars="coupled c1 belief lr decay", finished="scale", moments=first_moment,
    stats=ladam_pre_stats, finish=ladam_pre_finish, direction=ladam_direction, recall=ladam_pre_recall,
    first=Sweep(G | M, M), second=Sweep(P | M, P), sums=1, reports=1,
)  # fmt: skip

# LAdam and LAdaBelief, post-processing [ours: the abstract of arXiv 2203.13273 v1 only names it]: the elementwise
# second moment is kept and its root averaged over the layer when it is used.


@triton.jit
def ladam_post_start(h, t):
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(h.belief),
        f32(tl.where(h.belief != 0, h.eps, 0.0)),
        f32(h.lr),
        decoupled_decay(h),
    )


@triton.jit
def ladam_post_moments(c, x):
    m = average(x.m, c.c1, x.g)
    q = tl.where(c.belief != 0, x.g - m, x.g)
    return Element(x.p, x.g, m, average(x.v, c.c2, q * q) + c.inner_eps)  # AdaBelief's v has eps in it, Adam's not


@triton.jit
def ladam_post_stats(c, x):
    return (widen(root(x.v)),)


@triton.jit
def ladam_post_recall(h, layer):
    denominator = layer.report[0]
    return (f32(tl.where(denominator != 0, correction(h.beta1, layer.t) / denominator, 0.0)),)


@triton.jit
def ladam_post_finish(h, layer):
    mean = tl.where(layer.elements > 0, layer.stats[0] / layer.elements, 0.0)
    denominator = tl.sqrt(correction(h.beta2, layer.t)) * mean + h.eps
    report = (denominator,)
    return ladam_post_recall(h, as_left(layer, layer.state, report)), layer.state, report


ladam_post = Rule(
    ladam_post_start, ladam_apply, scalars="coupled c1 c2 belief inner_eps lr decay", finished="scale",
    moments=ladam_post_moments, stats=ladam_post_stats, finish=ladam_post_finish, direction=ladam_direction,
    recall=ladam_post_recall, first=Sweep(G | M | V, M | V), second=Sweep(P | M, P), sums=1, reports=1,
)  # fmt: skip

# SET-Adam (arXiv 2302.01029): down-scaling, eps-embedding and down-translating of v at use; v itself stays Adam's.


@triton.jit
def setadam_start(h, t):
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(correction(h.beta1, t)),
        f32(h.eps),
        f32(h.lr),
        decoupled_decay(h),
    )


@triton.jit
def setadam_stats(c, x):
    return widen(x.v), product(x.v, x.v), x.v


@triton.jit
def setadam_recall(h, layer):
    cosine, least = layer.report
    shift = tl.where(cosine != 0, h.tau * least, float("-inf"))  # no report yet: w = inf, no way
    return f32(correction(h.beta2, layer.t) * (cosine * cosine)), f32(shift)


@triton.jit
def setadam_finish(h, layer):
    """v -> sqrt(scale*v + eps) is monotone, so the layer's least v gives the least w: one round of stats does."""
    squared_cosine, least = double(1.0), double(0.0)
    if layer.adapt:
        some = layer.elements > 0
        sum, squares, minimum = layer.stats
        squared_cosine = tl.where(some & (squares != 0), sum * sum / (layer.elements * squares), 1.0)
        scale = correction(h.beta2, layer.t) * squared_cosine
        least = tl.where(some, tl.sqrt(scale * minimum + h.eps), 0.0)
    report = (tl.sqrt(squared_cosine), least)
    return setadam_recall(h, as_left(layer, layer.state, report)), layer.state, report


@triton.jit
def setadam_direction(c, x):
    w = root(c.scale * x.v + c.eps) - c.shift
    return divide(c.ic1 * x.m, w)


@triton.jit
def setadam_apply(c, x):
    return descend(c, x, setadam_direction(c, x))


setadam = Rule(
    setadam_start, setadam_apply, scalars="coupled c1 c2 ic1 eps lr decay", finished="scale shift",
    moments=adam_moments, stats=setadam_stats, finish=setadam_finish, direction=setadam_direction,
    recall=setadam_recall, first=Sweep(G | M | V, M | V), second=Sweep(P | M | V, P), sums=2, minima=1, reports=2,
)  # fmt: skip

# AdamNorm and AdaBeliefNorm (AdaNorm, arXiv 2210.06364; author code): a gradient shorter than its running norm is
# lengthened to it before it enters m.


@triton.jit
def adanorm_start(h, t):
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(correction(h.beta1, t)),
        f32(correction(h.beta2, t)),
        f32(h.eps),
        f32(h.lr),
        decoupled_decay(h),
        f32(h.belief),
    )


@triton.jit
def adanorm_stats(c, x):
    return (product(x.g, x.g),)


@triton.jit
def adanorm_finish(h, layer):
    norm, reach, unit, e = double(0.0), double(1.0), double(1.0), layer.state
    if layer.adapt:
        norm = tl.sqrt(layer.stats[0])
        e += (1 - h.gamma) * (norm - e)
        lengthen = (norm > double(1e-37)) & (e > norm)  # of less than that 1/norm passes fp32's range
        reach, unit = tl.where(lengthen, e, 1.0), tl.where(lengthen, 1 / norm, 1.0)
    return (f32(reach), f32(unit)), e, (norm, e, reach * unit)


@triton.jit
def adanorm_apply(c, x):
    lengthened = c.reach * (c.unit * x.g)  # in this order: reach * unit can pass fp32's range
    m = average(x.m, c.c1, lengthened)
    q = tl.where(c.belief != 0, lengthened - m, x.g)
    x = Element(x.p, x.g, m, average(x.v, c.c2, q * q) + c.eps)
    return descend(c, x, adam_direction(c, x))


adanorm = Rule(
    adanorm_start, adanorm_apply, scalars="coupled c1 c2 ic1 ic2 eps lr decay belief", finished="reach unit",
    stats=adanorm_stats, finish=adanorm_finish, direction=adam_direction, first=Sweep(G, 0),
    second=Sweep(P | G | M | V, P | M | V), sums=1, reports=3,
)  # fmt: skip
