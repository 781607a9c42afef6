"""The rules as their papers write them: one short function per rule, in plain torch.

Engines are held against these; float64 and `differentiable=True` run on them. All are called alike, and
`p_new, report = lamb(p, g, s, h, t, adapt)` takes and gives:

    p, g     one layer, flat, float32 or float64; g is signed, unscaled and clipped, without coupled weight decay
    s        name -> tensor: elementwise states flat like p, layer scalars 0-dim float64; new tensors are put in
    h        the hyper-parameters of the group (floats; lr may be a 0-dim tensor)
    t        number of this step, from 1
    adapt    False leaves the layer-wise factor out; the base rules have none and do not look
    report   what `layer_stats()` shows; with adapt=False no sums are taken and norms read 0 [ours]

`lr, delta = lamb_direction(s, h, t, report)` is where that step went beside the decay, as of the states that it left,
and what it was multiplied with. Weight prediction goes there again (XGrad, arXiv 2305.18240; for rules that its authors
have not: [ours]).

Nothing is written in place or read back from a device: derivatives pass through p, g and lr. Sums over a layer and
what follows from them are float64, elementwise arithmetic has p's dtype. [ours]: no public source gives it.
"""

import torch


def power(beta, t):
    """beta**t for an integer t >= 0 by squaring, the same operations in the same order as the engines' finish."""
    result = 1.0
    while t > 0:
        if t & 1:
            result *= beta
        beta, t = beta * beta, t >> 1
    return result


def corrections(h, t):
    """ic1, ic2: what makes averages that started at 0 unbiased."""
    return 1 / (1 - power(h.beta1, t)), 1 / (1 - power(h.beta2, t))


def ema(v, q, beta):
    """The average v moved towards q; beta*v + (1 - beta)*q, both rounded, would bias v by 1e-4 at beta = 0.9999."""
    return v + (1 - beta) * (q - v)


def root(x):
    """The square root, with derivative 0 instead of infinity at 0: else a zero gradient makes NaN of 0 * inf."""
    return x.masked_fill(x == 0, 1).sqrt().masked_fill(x == 0, 0)


def quotient(a, b, otherwise):
    """a / b, and `otherwise` where b is 0, with finite derivatives in both cases."""
    return torch.where(b == 0, otherwise, a / b.masked_fill(b == 0, 1))


def dot(a, b):
    return (a.double() * b.double()).sum()


def norm(x):
    return root(dot(x, x))


def global_norm(grads):
    """The norm of all tensors of a list together, float64 and 0-dim, on the device of the first."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    return root(sum((dot(g, g).to(total.device) for g in grads), total))


def momentum(p, g, s, h):
    """What Adam's kin begin with: g with coupled decay, and its average m (stored)."""
    g = g if h.decoupled else g + h.weight_decay * p
    m = s["exp_avg"] = ema(s["exp_avg"], g, h.beta1)
    return g, m


def descend(p, way, h, decoupled=False):
    """p - lr*u, less lr*weight_decay of p where the decay is decoupled (p *= 1 - lr*wd would round wd away)."""
    lr, u = way
    return p - (lr * u + (h.lr * h.weight_decay) * p if decoupled else lr * u)


def need(adapt, rule, base):
    if not adapt:
        raise ValueError(f"adapt must be True for {rule}, got {adapt}: nothing of it would be left, use {base}")


def buffer_direction(s, h, t, report):
    return h.lr, s["momentum_buffer"]


def sgd(p, g, s, h, t, adapt):
    """SGD with momentum, as torch.optim.SGD: the first buffer is g itself, undamped."""
    g = g + h.weight_decay * p
    buf = s["momentum_buffer"] = g if t == 1 else h.momentum * s["momentum_buffer"] + (1 - h.dampening) * g
    return descend(p, (h.lr, g + h.momentum * buf if h.nesterov else buf), h), {}


def sgd_plain(p, g, s, h, t, adapt):
    """SGD without momentum, as torch.optim.SGD."""
    return descend(p, (h.lr, g + h.weight_decay * p), h), {}


def adam_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t)
    return h.lr, ic1 * s["exp_avg"] / (root(ic2 * s["exp_avg_sq"]) + h.eps)


def adam(p, g, s, h, t, adapt):
    """Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1); decoupled: AdamW (arXiv 1711.05101); as in torch.optim."""
    g, m = momentum(p, g, s, h)
    s["exp_avg_sq"] = ema(s["exp_avg_sq"], g * g, h.beta2)
    return descend(p, adam_direction(s, h, t, {}), h, h.decoupled), {}


def rectification(beta2, t):
    """RAdam's factor (arXiv 1908.03265, section 4.2); 0 while the variance of an adaptive step is intractable."""
    limit, decayed = 2 / (1 - beta2) - 1, power(beta2, t)
    length = limit - 2 * t * decayed / (1 - decayed)
    if length < 5:
        return 0.0
    return ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5


def adabelief_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t)
    factor = rectification(h.beta2, t) if h.rectify else 1.0
    if not factor:
        return h.lr, ic1 * s["exp_avg"]
    return h.lr, factor * ic1 * s["exp_avg"] / (root(ic2 * s["exp_avg_var"]) + h.eps)


def adabelief(p, g, s, h, t, adapt):
    """AdaBelief (arXiv 2010.07468; author code adabelief-pytorch 0.2): eps accumulates in the state.

    Rectified, the step has no denominator while RAdam's length is below 5 [code]; later the outer eps stands beside
    sqrt(ic2*v) as without rectification, not beside sqrt(v) [ours].
    """
    g, m = momentum(p, g, s, h)
    s["exp_avg_var"] = ema(s["exp_avg_var"], (g - m) ** 2, h.beta2) + h.eps
    return descend(p, adabelief_direction(s, h, t, {}), h, h.decoupled), {}


def adam3_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t)
    return h.lr, ic1 * s["exp_avg"] / root(ic2 * s["exp_avg_sq"])


def adam3(p, g, s, h, t, adapt):
    """AdaM3, also AdaMomentum (arXiv 2106.11514; author code with rectify=False): v averages m squared.

    eps is in the state only. The first step is about 10*lr*sign(g) at beta1 = 0.9: warm lr up.
    """
    g, m = momentum(p, g, s, h)
    s["exp_avg_sq"] = ema(s["exp_avg_sq"], m * m, h.beta2) + h.eps
    return descend(p, adam3_direction(s, h, t, {}), h, h.decoupled), {}


def lars_direction(s, h, t, report):
    return 1.0 if h.lr_in_momentum else h.lr, s["momentum_buffer"]


def lars(p, g, s, h, t, adapt):
    """LARS (arXiv 1708.03888; lr_in_momentum as there and in MLPerf, larc as in apex, but 1 at a zero norm [ours])."""
    ratio, param_norm, grad_norm = 1.0, 0.0, 0.0
    if adapt:
        param_norm, grad_norm = norm(p), norm(g)
        ratio = quotient(h.trust_coefficient * param_norm, grad_norm + h.weight_decay * param_norm + h.eps, 1.0)
        if h.larc:
            ratio = (ratio / h.lr).clamp(max=1.0)
        ratio = ratio.masked_fill((param_norm == 0) | (grad_norm == 0), 1.0)
    d = (h.lr * ratio if h.lr_in_momentum else ratio) * (g + h.weight_decay * p)
    buf = s["momentum_buffer"] = h.momentum * s["momentum_buffer"] + d
    p = descend(p, (1.0 if h.lr_in_momentum else h.lr, d + h.momentum * buf if h.nesterov else buf), h)
    return p, {"param_norm": param_norm, "grad_norm": grad_norm, "trust_ratio": ratio}


def lamb_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t) if h.bias_correction else (1.0, 1.0)
    return h.lr, report["trust_ratio"] * (ic1 * s["exp_avg"] / (root(ic2 * s["exp_avg_sq"]) + h.eps))


def lamb(p, g, s, h, t, adapt):
    """LAMB (arXiv 1904.00962 v5, Algorithm 2); LAMBC (arXiv 2011.13584; author code): the ratio bounded from above.

    The bounds hold for a zero norm's ratio 1 too, not for the ratio 1 of adapt=False [ours].
    """
    ic1, ic2 = corrections(h, t) if h.bias_correction else (1.0, 1.0)
    take = 1.0 if h.grad_averaging else 1 / (1 - h.beta1)  # so that g enters m with coefficient 1
    m = s["exp_avg"] = ema(s["exp_avg"], take * g, h.beta1)
    v = s["exp_avg_sq"] = ema(s["exp_avg_sq"], g * g, h.beta2)
    u = ic1 * m / (root(ic2 * v) + h.eps) + h.weight_decay * p
    ratio, param_norm, update_norm = 1.0, 0.0, 0.0
    if adapt:
        param_norm, update_norm = norm(p), norm(u)
        ratio = quotient(param_norm, update_norm, 1.0).masked_fill(param_norm == 0, 1.0).clamp(h.lower, h.upper)
    return descend(p, (h.lr, ratio * u), h), {
        "param_norm": param_norm,
        "update_norm": update_norm,
        "trust_ratio": ratio,
    }


def novograd_direction(s, h, t, report):
    return h.lr, s["exp_avg"]


def novograd(p, g, s, h, t, adapt):
    """NovoGrad (arXiv 1905.11286, Algorithm 1): one v per layer, begun by the first g, zeros passed over [ours]."""
    need(adapt, "novograd", "SGD")
    squares, v = dot(g, g), s["exp_avg_sq"]
    v = s["exp_avg_sq"] = torch.where(v == 0, squares, ema(v, squares, h.beta2))
    take = 1 - h.beta1 if h.grad_averaging else 1.0
    m = s["exp_avg"] = h.beta1 * s["exp_avg"] + take * (g / (root(v) + h.eps) + h.weight_decay * p)
    return descend(p, (h.lr, m), h), {"grad_norm": root(squares), "second_moment": v}


def aida_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t)
    return h.lr, ic1 * s["exp_avg"] / root(ic2 * s["exp_avg_var"])


def aida(p, g, s, h, t, adapt):
    """Aida (arXiv 2203.13273; author code): k mutual projections of the layer's g and m; their difference gives v.

    Every iterate is a multiple of g or m, so that three sums serve any k: r = b*m - a*g. eps is in the state only.
    k = 0 (and adapt=False) is AdaBelief without its outer eps. cos reads 0 where g or m is 0 [ours].
    """
    g, m = momentum(p, g, s, h)
    a, b, report = 1.0, 1.0, {"grad_norm": 0.0, "exp_avg_norm": 0.0, "cos": 0.0}
    if adapt:
        gg, mm, gm = dot(g, g), dot(m, m), dot(g, m)
        for _ in range(int(h.k)):
            ab = a * b * gm  # both projections are of the old pair
            a, b = a * ab / (a * a * gg + h.xi), b * ab / (b * b * mm + h.xi)
        report = {"grad_norm": root(gg), "exp_avg_norm": root(mm), "cos": quotient(gm, root(gg) * root(mm), 0.0)}
    s["exp_avg_var"] = ema(s["exp_avg_var"], (b * m - a * g) ** 2, h.beta2) + h.eps
    return descend(p, aida_direction(s, h, t, report), h, h.decoupled), report


def ladam_pre_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t)
    return h.lr, ic1 / root(ic2 * s["exp_avg_sq"]) * s["exp_avg"]


def ladam_pre(p, g, s, h, t, adapt):
    """LAdam and LAdaBelief, pre-processing (arXiv 2203.13273 v1-v3; author code): one second moment per layer."""
    need(adapt, "ladam_pre", "Adam or AdaBelief")
    g, m = momentum(p, g, s, h)
    q = g - m if h.belief else g
    s["exp_avg_sq"] = ema(s["exp_avg_sq"], dot(q, q) / max(q.numel(), 1), h.beta2) + h.eps
    report = {"second_moment": s["exp_avg_sq"]}
    return descend(p, ladam_pre_direction(s, h, t, report), h, h.decoupled), report


def ladam_post_direction(s, h, t, report):
    denominator = torch.as_tensor(report["denominator"])
    return h.lr, quotient(corrections(h, t)[0] * s["exp_avg"], denominator, 0.0)


def ladam_post(p, g, s, h, t, adapt):
    """LAdam and LAdaBelief, post-processing [ours; the abstract of arXiv 2203.13273 v1 only names it].

    Adam's or AdaBelief's v (the latter with eps in it) is kept, and its root averaged over the layer at use. (The mean
    of 1/(root + eps) would be ruled by one dead element.)
    """
    need(adapt, "ladam_post", "Adam or AdaBelief")
    g, m = momentum(p, g, s, h)
    q, inner = (g - m, h.eps) if h.belief else (g, 0.0)
    v = s["exp_avg_sq"] = ema(s["exp_avg_sq"], q * q, h.beta2) + inner
    report = {"denominator": root(corrections(h, t)[1] * v).double().sum() / max(v.numel(), 1) + h.eps}
    return descend(p, ladam_post_direction(s, h, t, report), h, h.decoupled), report


def setadam_direction(s, h, t, report):
    ic1, ic2 = corrections(h, t)
    w = root(ic2 * report["cos"] ** 2 * s["exp_avg_sq"] + h.eps) - h.tau * report["minimum"]
    return (h.lr, ic1 * s["exp_avg"] / w) if report["cos"] != 0 else (0.0, w)  # 0: loaded, and not known yet


def setadam(p, g, s, h, t, adapt):
    """SET-Adam (arXiv 2302.01029): v scaled down by its angle to the ones, eps inside the root, the minimum taken off.

    v itself stays Adam's. [ours]: tau = 0.5, eps = 1e-16 (convolutional networks want more), the decoupled option,
    cos = 1 where all v are 0. adapt=False: cos = 1, tau = 0.
    """
    g, m = momentum(p, g, s, h)
    v = s["exp_avg_sq"] = ema(s["exp_avg_sq"], g * g, h.beta2)
    squared_cosine, minimum = 1.0, 0.0
    if adapt and v.numel() > 0:
        squared_cosine = quotient(v.double().sum() ** 2, v.numel() * dot(v, v), 1.0)
        minimum = root(corrections(h, t)[1] * squared_cosine * v.min() + h.eps)
    report = {"cos": squared_cosine**0.5, "minimum": minimum}
    return descend(p, setadam_direction(s, h, t, report), h, h.decoupled), report


def adanorm(p, g, s, h, t, adapt):
    """AdamNorm and AdaBeliefNorm (AdaNorm, arXiv 2210.06364; author code): a g shorter than usual is lengthened.

    eps is in the state and outside the root. [ours]: a norm <= 1e-37 lengthens nothing (author code: NaN), adapt=False
    rests e.
    """
    g = g if h.decoupled else g + h.weight_decay * p
    grad_norm, reach, unit = 0.0, 1.0, 1.0
    if adapt:
        grad_norm = norm(g)
        e = s["exp_grad_norm"] = ema(s["exp_grad_norm"], grad_norm, h.gamma)
        short = (e > grad_norm) & (grad_norm > 1e-37)
        reach, unit = torch.where(short, e, 1.0), torch.where(short, grad_norm, 1.0)
    longer = reach * (g / unit)  # reach/unit first could pass float32's range (1e18 over 1e-30)
    m = s["exp_avg"] = ema(s["exp_avg"], longer, h.beta1)
    s["exp_avg_sq"] = ema(s["exp_avg_sq"], (longer - m if h.belief else g) ** 2, h.beta2) + h.eps
    report = {"grad_norm": grad_norm, "norm_ema": s["exp_grad_norm"], "scale": reach / unit}
    return descend(p, adam_direction(s, h, t, report), h, h.decoupled), report


def find_slope(p, g, d, decay, s, h, t):
    """rho = g.d / d.d of a layer, averaged: how steep the loss falls along d. `decay` is what decay adds to g.d."""
    dd, descent = dot(d, d), dot(g, d)
    rho = quotient(descent + decay, dd, 0.0)
    old = s["exp_avg_slope"]
    e = s["exp_avg_slope"] = torch.where(rho.isfinite(), ema(old, rho, h.ema), old)
    found = {"param_norm": norm(p), "direction_norm": root(dd), "descent": descent}
    return s["report"] | found | {"slope": e / (1 - power(h.ema, t))}


def find_step(g, d, decay, s, h, t):
    """kappa = z.Hz / z.z along z = sign*d, from a second gradient; averaged; and the step size that it allows."""
    report = s["report"]
    dd = report["direction_norm"] ** 2
    kappa = (dot(g, d) - h.base * report["descent"]) / (h.reach * report["sign"] * dd) + decay
    old, found = s["exp_avg_curvature"], (dd != 0) & kappa.isfinite()
    e = s["exp_avg_curvature"] = torch.where(found, ema(old, kappa if h.signed_average else kappa.abs(), h.ema), old)
    curvature = e.abs() / (1 - power(h.ema, t))
    step = report["slope"] / (curvature + h.damping)
    if h.self_concordant:  # Gao & Goldfarb
        fall, delta = report["slope"] * dd, report["direction_norm"] * (curvature + h.damping) ** 0.5
        step = fall / ((fall + delta) * delta)
    step = step.nan_to_num(h.max_step, h.max_step).clamp(max=h.max_step)  # no damping, no curvature: 0 / 0
    step = torch.where(found & (report["slope"] > 0), step, 0.0)
    return report | {"curvature": curvature, "step_size": step}


def slope_sgd_direction(s, h, t, report):
    return -h.reach * report["sign"], s["momentum_buffer"] / (1 - power(h.momentum, t))


def slope_sgd(p, g, s, h, t, adapt):
    """The first launch of CurvatureSGD: the averaged gradient, which is the direction, and the slope along it."""
    s["momentum_buffer"] = ema(s["momentum_buffer"], g + h.weight_decay * p, h.momentum)
    _, d = slope_sgd_direction(s, h, t, s["report"])
    return p, find_slope(p, g, d, h.weight_decay * dot(p, d), s, h, t)


def curvature_sgd_direction(s, h, t, report):
    return h.lr, report["step_size"] * (s["momentum_buffer"] / (1 - power(h.momentum, t)))


def curvature_sgd(p, g, s, h, t, adapt):
    """The second launch of CurvatureSGD: the curvature along the direction, and a step of the size that it allows."""
    report = find_step(g, s["momentum_buffer"] / (1 - power(h.momentum, t)), h.weight_decay, s, h, t)
    return descend(p, curvature_sgd_direction(s, h, t, report), h), report


def slope_adam_direction(s, h, t, report):
    return -h.reach * report["sign"], adam_direction(s, h, t, report)[1]


def slope_adam(p, g, s, h, t, adapt):
    """The first launch of CurvatureAdamW: Adam's moments, their direction, and the slope along it."""
    s["exp_avg"] = ema(s["exp_avg"], g, h.beta1)
    s["exp_avg_sq"] = ema(s["exp_avg_sq"], g * g, h.beta2)
    return p, find_slope(p, g, adam_direction(s, h, t, {})[1], 0.0, s, h, t)


def curvature_adam_direction(s, h, t, report):
    return h.lr, report["step_size"] * adam_direction(s, h, t, report)[1]


def curvature_adam(p, g, s, h, t, adapt):
    """The second launch of CurvatureAdamW: the curvature along Adam's direction, and a step of the size it allows."""
    d = adam_direction(s, h, t, {})[1]
    report = find_step(g, d, 0.0, s, h, t)
    return descend(p, (h.lr, report["step_size"] * (d + h.weight_decay * p)), h), report
