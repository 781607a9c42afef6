"""The layer-wise rules and Adam's kin once more, in place and vector by vector, as the authors' code goes about it.

Each takes one float64 layer and returns what `layer_stats()` reports. No sum is shared, no bias correction folded,
no branch made a mask: what these have in common with `layerfused.reference` is the paper alone. SGD, Adam and AdamW
are not here, torch.optim has them.
"""

import math

import torch


def decay_and_average(p, g, m, h):
    if h.decoupled:
        p.mul_(1 - h.lr * h.weight_decay)
    else:
        g = g.add(p, alpha=h.weight_decay)
    m.mul_(h.beta1).add_(g, alpha=1 - h.beta1)
    return g


def average_square(v, x, h):
    v.mul_(h.beta2).addcmul_(x, x, value=1 - h.beta2)


def apply(p, m, denominator, h, t):
    p.sub_(h.lr * m / (1 - h.beta1**t) / denominator)


def debiased_root(v, h, t):
    return (v / (1 - h.beta2**t)) ** 0.5


def adabelief(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_var"]
    g = decay_and_average(p, g, m, h)
    average_square(v, g - m, h)
    v.add_(h.eps)
    rho_max = 2 / (1 - h.beta2) - 1
    rho = rho_max - 2 * t * h.beta2**t / (1 - h.beta2**t)
    if not h.rectify:
        apply(p, m, debiased_root(v, h, t) + h.eps, h, t)
    elif rho >= 5:
        share = (rho - 4) / (rho_max - 4) * (rho - 2) / (rho_max - 2) * rho_max / rho
        apply(p, math.sqrt(share) * m, debiased_root(v, h, t) + h.eps, h, t)
    else:
        apply(p, m, 1.0, h, t)
    return {}


def adam3(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_sq"]
    decay_and_average(p, g, m, h)
    average_square(v, m, h)
    v.add_(h.eps)
    apply(p, m, debiased_root(v, h, t), h, t)
    return {}


def lars(p, g, s, h, t):
    buf, ratio, norm_p, norm_g = s["momentum_buffer"], 1.0, p.norm().item(), g.norm().item()
    if norm_p > 0 and norm_g > 0:
        ratio = h.trust_coefficient * norm_p / (norm_g + h.weight_decay * norm_p + h.eps)
        ratio = min(ratio / h.lr, 1) if h.larc else ratio
    inside, outside = (h.lr, 1) if h.lr_in_momentum else (1, h.lr)
    d = inside * ratio * (g + h.weight_decay * p)
    buf.mul_(h.momentum).add_(d)
    p.sub_(outside * (d + h.momentum * buf if h.nesterov else buf))
    return {"param_norm": norm_p, "grad_norm": norm_g, "trust_ratio": ratio}


def lamb(p, g, s, h, t):
    m, v, ratio = s["exp_avg"], s["exp_avg_sq"], 1.0
    m.mul_(h.beta1).add_(g, alpha=1 - h.beta1 if h.grad_averaging else 1)
    average_square(v, g, h)
    m_hat, v_hat = (m / (1 - h.beta1**t), v / (1 - h.beta2**t)) if h.bias_correction else (m, v)
    u = m_hat / (v_hat.sqrt() + h.eps) + h.weight_decay * p
    norm_p, norm_u = p.norm().item(), u.norm().item()
    if norm_p > 0 and norm_u > 0:
        ratio = norm_p / norm_u
    ratio = min(max(ratio, h.lower), h.upper)
    p.sub_(h.lr * ratio * u)
    return {"param_norm": norm_p, "update_norm": norm_u, "trust_ratio": ratio}


def novograd(p, g, s, h, t):
    m, v, norm = s["exp_avg"], s["exp_avg_sq"], g.norm()
    v.copy_(norm**2 if v == 0 else h.beta2 * v + (1 - h.beta2) * norm**2)
    bracket = g / (v.sqrt() + h.eps) + h.weight_decay * p
    m.mul_(h.beta1).add_(bracket, alpha=1 - h.beta1 if h.grad_averaging else 1)
    p.sub_(h.lr * m)
    return {"grad_norm": norm, "second_moment": v}


def aida(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_var"]
    g = decay_and_average(p, g, m, h)
    x, y = g, m
    for _ in range(int(h.k)):
        x, y = (x @ y) / (x @ x + h.xi) * x, (x @ y) / (y @ y + h.xi) * y
    average_square(v, y - x, h)
    v.add_(h.eps)
    apply(p, m, debiased_root(v, h, t), h, t)
    return {"grad_norm": g.norm(), "exp_avg_norm": m.norm(), "cos": torch.cosine_similarity(g, m, dim=0, eps=1e-300)}


def ladam_pre(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_sq"]
    g = decay_and_average(p, g, m, h)
    v.copy_(h.beta2 * v + (1 - h.beta2) * ((g - m if h.belief else g) ** 2).mean() + h.eps)
    apply(p, m, debiased_root(v, h, t), h, t)
    return {"second_moment": v}


def ladam_post(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_sq"]
    g = decay_and_average(p, g, m, h)
    average_square(v, g - m if h.belief else g, h)
    if h.belief:
        v.add_(h.eps)  # as AdaBelief does
    denominator = debiased_root(v, h, t).mean() + h.eps
    apply(p, m, denominator, h, t)
    return {"denominator": denominator}


def setadam(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_sq"]
    g = decay_and_average(p, g, m, h)
    average_square(v, g, h)
    cosine = torch.cosine_similarity(v, torch.ones_like(v), dim=0) if v.any() else torch.ones(()).double()
    w = (v * cosine**2 / (1 - h.beta2**t) + h.eps) ** 0.5
    apply(p, m, w - h.tau * w.min(), h, t)
    return {"cos": cosine, "minimum": w.min()}


def adanorm(p, g, s, h, t):
    m, v, e, scale = s["exp_avg"], s["exp_avg_sq"], s["exp_grad_norm"], 1.0
    if h.decoupled:
        p.mul_(1 - h.lr * h.weight_decay)
    else:
        g = g + h.weight_decay * p
    e.copy_(h.gamma * e + (1 - h.gamma) * g.norm())
    if g.norm() > 0 and e > g.norm():
        scale = e / g.norm()
    m.mul_(h.beta1).add_(g * scale, alpha=1 - h.beta1)
    average_square(v, g * scale - m if h.belief else g, h)
    v.add_(h.eps)
    apply(p, m, debiased_root(v, h, t) + h.eps, h, t)
    return {"grad_norm": g.norm(), "norm_ema": e, "scale": scale}
