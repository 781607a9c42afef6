"""The rules in Triton, one block per header of csrc/rules: the same operations in the same order, so the same bits."""

import triton
import triton.language as tl

from .rule import (
    Element,
    G,
    M,
    P,
    Rule,
    Sweep,
    V,
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


sgd = Rule(sgd_start, sgd_apply, scalars="coupled momentum take lr nesterov", second=Sweep(P | G | M, P | M))


@triton.jit
def sgd_plain_start(h, t):
    return f32(h.weight_decay), f32(h.lr)


@triton.jit
def sgd_plain_apply(c, x):
    return Element(x.p - c.lr * x.g, x.g, x.m, x.v)


sgd_plain = Rule(sgd_plain_start, sgd_plain_apply, scalars="coupled lr", second=Sweep(P | G, P))

# Adam (arXiv 1412.6980, Algorithm 1) and, with decoupled decay, AdamW (arXiv 1711.05101).


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
        f32(correction(h.beta2, t)),
        f32(h.eps),
        f32(h.lr * correction(h.beta1, t)),
        decoupled_decay(h),
    )


@triton.jit
def adam_moments(c, x):
    return Element(x.p, x.g, average(x.m, c.c1, x.g), average(x.v, c.c2, x.g * x.g))


@triton.jit
def adam_apply(c, x):
    update = divide(c.step * x.m, root(c.ic2 * x.v) + c.eps) + c.decay * x.p
    return Element(x.p - update, x.g, x.m, x.v)


adam = Rule(
    adam_start, adam_apply, scalars="coupled c1 c2 ic2 eps step decay", moments=adam_moments,
    second=Sweep(P | G | M | V, P | M | V),
)  # fmt: skip

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
        f32(correction(h.beta2, t)),
        f32(h.eps),
        f32(h.lr * correction(h.beta1, t) * tl.where(rectified > 0, rectified, 1.0)),
        decoupled_decay(h),
        f32(tl.where(rectified > 0, 0.0, 1.0)),
    )


@triton.jit
def adabelief_moments(c, x):
    m = average(x.m, c.c1, x.g)
    d = x.g - m
    return Element(x.p, x.g, m, average(x.v, c.c2, d * d) + c.eps)


@triton.jit
def adabelief_apply(c, x):
    denominator = tl.where(c.plain != 0, 1.0, root(c.ic2 * x.v) + c.eps)
    return Element(x.p - (divide(c.step * x.m, denominator) + c.decay * x.p), x.g, x.m, x.v)


adabelief = Rule(
    adabelief_start, adabelief_apply, scalars="coupled c1 c2 ic2 eps step decay plain", moments=adabelief_moments,
    second=Sweep(P | G | M | V, P | M | V),
)  # fmt: skip

# AdaM3 (= AdaMomentum, arXiv 2106.11514; author code): the second moment is of m, eps lives inside it.


@triton.jit
def adam3_moments(c, x):
    m = average(x.m, c.c1, x.g)
    return Element(x.p, x.g, m, average(x.v, c.c2, m * m) + c.eps)


@triton.jit
def adam3_apply(c, x):
    return Element(x.p - (divide(c.step * x.m, root(c.ic2 * x.v)) + c.decay * x.p), x.g, x.m, x.v)


adam3 = Rule(
    adam_start, adam3_apply, scalars="coupled c1 c2 ic2 eps step decay", moments=adam3_moments,
    second=Sweep(P | G | M | V, P | M | V),
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
    return Element(x.p - c.step * tl.where(c.nesterov != 0, d + c.momentum * m, m), x.g, m, x.v)


lars = Rule(
    lars_start, lars_apply, scalars="momentum weight_decay nesterov step", finished="take", stats=lars_stats,
    finish=lars_finish, first=Sweep(P | G, 0), second=Sweep(P | G | M, P | M), sums=2, reports=3,
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
    )


@triton.jit
def lamb_moments(c, x):
    return Element(x.p, x.g, average(x.m, c.c1, c.take * x.g), average(x.v, c.c2, x.g * x.g))


@triton.jit
def lamb_update(c, x):
    return divide(c.ic1 * x.m, root(c.ic2 * x.v) + c.eps) + c.weight_decay * x.p


@triton.jit
def lamb_stats(c, x):
    u = lamb_update(c, x)
    return product(x.p, x.p), product(u, u)


@triton.jit
def lamb_finish(h, layer):
    norm_p, norm_u, ratio = double(0.0), double(0.0), double(1.0)
    if layer.adapt:
        norm_p, norm_u = tl.sqrt(layer.stats[0]), tl.sqrt(layer.stats[1])
        ratio = tl.where((norm_p != 0) & (norm_u != 0), norm_p / norm_u, 1.0)
        ratio = tl.where(ratio < h.lower, h.lower, tl.where(ratio > h.upper, h.upper, ratio))
    return (f32(h.lr * ratio),), layer.state, (norm_p, norm_u, ratio)


@triton.jit
def lamb_apply(c, x):
    return Element(x.p - c.step * lamb_update(c, x), x.g, x.m, x.v)


lamb = Rule(
    lamb_start, lamb_apply, scalars="c1 take c2 ic1 ic2 eps weight_decay", finished="step", moments=lamb_moments,
    stats=lamb_stats, finish=lamb_finish, first=Sweep(P | G | M | V, M | V), second=Sweep(P | M | V, P), sums=2,
    reports=3,
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
    finish=novograd_finish, first=Sweep(G, 0), second=Sweep(P | G | M, P | M), sums=1, reports=2,
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
    v = average(x.v, c.c2, r * r) + c.eps
    return Element(x.p - (divide(c.step * x.m, root(c.ic2 * v)) + c.decay * x.p), x.g, x.m, v)


aida = Rule(
    adam_start, aida_apply, scalars="coupled c1 c2 ic2 eps step decay", finished="a b", moments=first_moment,
    stats=aida_stats, finish=aida_finish, first=Sweep(G | M, M), second=Sweep(P | G | M | V, P | V), sums=3,
    reports=3,
)  # fmt: skip

# LAdam and LAdaBelief, pre-processing (arXiv 2203.13273 v1-v3, author code): one second moment per layer.


@triton.jit
def ladam_pre_start(h, t):
    return coupled_decay(h), f32(1 - h.beta1), f32(h.belief), decoupled_decay(h)


@triton.jit
def ladam_pre_stats(c, x):
    q = tl.where(c.belief != 0, x.g - x.m, x.g)
    return (product(q, q),)


@triton.jit
def ladam_pre_finish(h, layer):
    mean = tl.where(layer.elements > 0, layer.stats[0] / layer.elements, 0.0)
    v = layer.state + ((1 - h.beta2) * (mean - layer.state) + h.eps)
    step = h.lr * correction(h.beta1, layer.t) / tl.sqrt(correction(h.beta2, layer.t) * v)
    return (f32(step),), v, (v,)


@triton.jit
def ladam_apply(c, x):
    return Element(x.p - (c.step * x.m + c.decay * x.p), x.g, x.m, x.v)


ladam_pre = Rule(
    ladam_pre_start, ladam_apply, scalars="coupled c1 belief decay", finished="step", moments=first_moment,
    stats=ladam_pre_stats, finish=ladam_pre_finish, first=Sweep(G | M, M), second=Sweep(P | M, P), sums=1, reports=1,
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
def ladam_post_finish(h, layer):
    mean = tl.where(layer.elements > 0, layer.stats[0] / layer.elements, 0.0)
    denominator = tl.sqrt(correction(h.beta2, layer.t)) * mean + h.eps
    step = tl.where(denominator != 0, h.lr * correction(h.beta1, layer.t) / denominator, 0.0)
    return (f32(step),), layer.state, (denominator,)


ladam_post = Rule(
    ladam_post_start, ladam_apply, scalars="coupled c1 c2 belief inner_eps decay", finished="step",
    moments=ladam_post_moments, stats=ladam_post_stats, finish=ladam_post_finish, first=Sweep(G | M | V, M | V),
    second=Sweep(P | M, P), sums=1, reports=1,
)  # fmt: skip

# SET-Adam (arXiv 2302.01029): down-scaling, eps-embedding and down-translating of v at use; v itself stays Adam's.


@triton.jit
def setadam_start(h, t):
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(h.eps),
        f32(h.lr * correction(h.beta1, t)),
        decoupled_decay(h),
    )


@triton.jit
def setadam_stats(c, x):
    return widen(x.v), product(x.v, x.v), x.v


@triton.jit
def setadam_finish(h, layer):
    """v -> sqrt(scale*v + eps) is monotone, so the layer's least v gives the least w: one round of stats does."""
    scale = correction(h.beta2, layer.t)
    squared_cosine, least, shift = double(1.0), double(0.0), double(0.0)
    if layer.adapt:
        some = layer.elements > 0
        sum, squares, minimum = layer.stats
        squared_cosine = tl.where(some & (squares != 0), sum * sum / (layer.elements * squares), 1.0)
        scale = scale * squared_cosine
        least = tl.where(some, tl.sqrt(scale * minimum + h.eps), 0.0)
        shift = h.tau * least
    return (f32(scale), f32(shift)), layer.state, (tl.sqrt(squared_cosine), least)


@triton.jit
def setadam_apply(c, x):
    w = root(c.scale * x.v + c.eps) - c.shift
    return Element(x.p - (divide(c.step * x.m, w) + c.decay * x.p), x.g, x.m, x.v)


setadam = Rule(
    setadam_start, setadam_apply, scalars="coupled c1 c2 eps step decay", finished="scale shift",
    moments=adam_moments, stats=setadam_stats, finish=setadam_finish, first=Sweep(G | M | V, M | V),
    second=Sweep(P | M | V, P), sums=2, minima=1, reports=2,
)  # fmt: skip

# AdamNorm and AdaBeliefNorm (AdaNorm, arXiv 2210.06364; author code): a gradient shorter than its running norm is
# lengthened to it before it enters m.


@triton.jit
def adanorm_start(h, t):
    return (
        coupled_decay(h),
        f32(1 - h.beta1),
        f32(1 - h.beta2),
        f32(correction(h.beta2, t)),
        f32(h.eps),
        f32(h.lr * correction(h.beta1, t)),
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
    v = average(x.v, c.c2, q * q) + c.eps
    return Element(x.p - (divide(c.step * m, root(c.ic2 * v) + c.eps) + c.decay * x.p), x.g, m, v)


adanorm = Rule(
    adanorm_start, adanorm_apply, scalars="coupled c1 c2 ic2 eps step decay belief", finished="reach unit",
    stats=adanorm_stats, finish=adanorm_finish, first=Sweep(G, 0), second=Sweep(P | G | M | V, P | M | V), sums=1,
    reports=3,
)  # fmt: skip
