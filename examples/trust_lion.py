"""A rule of one's own: Lion (arXiv 2302.06675, Algorithm 2) with LAMB's trust ratio, in one launch per step.

The mathematics is written twice: in Triton, for the GPU, and in torch, for every other device and as the oracle of
the tests. `python examples/trust_lion.py` trains a small network with it.
"""

import torch
import triton
import triton.language as tl

import layerfused as lf
from layerfused.kernels import Element, G, M, P, Rule, Sweep, average, double, f32, product


@triton.jit
def start(h, t):
    return f32(1 - h.beta1), f32(1 - h.beta2), f32(h.weight_decay)


@triton.jit
def update(c, x):
    d = average(x.m, c.c1, x.g)
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)) + c.weight_decay * x.p


@triton.jit
def stats(c, x):
    u = update(c, x)
    return product(x.p, x.p), product(u, u)


@triton.jit
def finish(h, layer):
    ratio = double(1.0)
    if layer.adapt:
        norm_p, norm_u = tl.sqrt(layer.stats[0]), tl.sqrt(layer.stats[1])
        ratio = tl.where((norm_p != 0) & (norm_u != 0), norm_p / norm_u, 1.0)
    return (f32(h.lr * ratio),), layer.state, (ratio,)


@triton.jit
def apply(c, x):
    return Element(x.p - c.step * update(c, x), x.g, average(x.m, c.c2, x.g), x.v)


IN_TRITON = Rule(
    start, apply, scalars="c1 c2 weight_decay", stats=stats, finish=finish, finished="step", sums=2, reports=1,
    first=Sweep(P | G | M, 0), second=Sweep(P | G | M, P | M),
)  # fmt: skip


def in_torch(p, g, s, h, t, adapt):
    m, ratio = s["exp_avg"], torch.ones((), dtype=torch.float64, device=p.device)
    u = torch.sign(m + (1 - h.beta1) * (g - m)) + h.weight_decay * p
    if adapt:
        norm_p, norm_u = p.double().norm(), u.double().norm()
        ratio = torch.where((norm_p != 0) & (norm_u != 0), norm_p / norm_u, 1.0)
    s["exp_avg"] = m + (1 - h.beta2) * (g - m)
    return p - (h.lr * ratio).to(p.dtype) * u, {"trust_ratio": ratio}


class TrustLion(lf.Optimizer):
    rule = lf.Rule(
        name="trust_lion",
        hyper=("lr", "beta1", "beta2", "weight_decay"),
        states=("exp_avg",),
        report=("trust_ratio",),
        reference=in_torch,
        triton=IN_TRITON,
    )

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, **common):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **common)


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)).to(device)
    opt = TrustLion(lf.param_groups(model, weight_decay=0.1), lr=2e-3)
    x, y = torch.randn(512, 64, device=device), torch.randint(10, (512,), device=device)
    for step in range(101):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(opt.engines, opt.layer_stats())


if __name__ == "__main__":
    main()
