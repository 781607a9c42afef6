"""XGrad in three phases as algorithms.md, section 3, writes it: float64, plain torch, one tensor after the other.

    predict    w = p - ahead * lr * Delta    Delta from the states after the last step, lr and all else as now in force
    backward   gradients at w
    step       the rule's ordinary step of p with those gradients

The steps are those of transcriptions.py, with a few lines here for SGD and Adam: nothing is shared with
layerfused.reference. Then what the files test_xgrad*.py share: a network whose loss and gradients are computed in
float64 whatever type its weights have, so that no error is left but the optimizer's; snapshots; comparisons.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
import transcriptions
from cases import zero_state
from engines import NAMED, randn, same_bits
from torch.nn import Parameter
from transcriptions import apply, average_square, debiased_root, decay_and_average

from layerfused.cpu import CpuLaunch

# The two rules that transcriptions.py leaves to torch.optim


def sgd(p, g, s, h, t):
    g, buf = g + h.weight_decay * p, s["momentum_buffer"]
    buf.copy_(g if t == 1 else h.momentum * buf + (1 - h.dampening) * g)
    p.sub_(h.lr * (g + h.momentum * buf if h.nesterov else buf))
    return {}


def adam(p, g, s, h, t):
    m, v = s["exp_avg"], s["exp_avg_sq"]
    g = decay_and_average(p, g, m, h)
    average_square(v, g, h)
    apply(p, m, debiased_root(v, h, t) + h.eps, h, t)
    return {}


# Delta: what lr is multiplied with, without decoupled decay. `seen` is what the last step reported.


def ahead_of_adam(s, h, t, seen, second="exp_avg_sq"):
    return s["exp_avg"] / (1 - h.beta1**t) / (debiased_root(s[second], h, t) + h.eps)


def ahead_of_adabelief(s, h, t, seen):
    return ahead_of_adam(s, h, t, seen, "exp_avg_var")


def ahead_of_adam3(s, h, t, seen, second="exp_avg_sq"):
    return s["exp_avg"] / (1 - h.beta1**t) / debiased_root(s[second], h, t)


def ahead_of_aida(s, h, t, seen):
    return ahead_of_adam3(s, h, t, seen, "exp_avg_var")


def ahead_of_lamb(s, h, t, seen):
    if h.bias_correction:
        return seen["trust_ratio"] * ahead_of_adam(s, h, t, seen)
    return seen["trust_ratio"] * s["exp_avg"] / (s["exp_avg_sq"].sqrt() + h.eps)


def ahead_of_ladam_post(s, h, t, seen):
    return s["exp_avg"] / (1 - h.beta1**t) / (debiased_root(s["exp_avg_sq"], h, t).mean() + h.eps)


def ahead_of_setadam(s, h, t, seen):
    v = s["exp_avg_sq"]
    w = (v * (v.sum() ** 2 / (v.numel() * (v @ v))) / (1 - h.beta2**t) + h.eps).sqrt()
    return s["exp_avg"] / (1 - h.beta1**t) / (w - h.tau * w.min())


def buffer(s, h, t, seen):
    return s["momentum_buffer"]


DELTA = {
    "sgd": buffer, "adam": ahead_of_adam, "adabelief": ahead_of_adabelief, "adam3": ahead_of_adam3, "lars": buffer,
    "lamb": ahead_of_lamb, "novograd": lambda s, h, t, seen: s["exp_avg"], "aida": ahead_of_aida,
    "ladam_pre": ahead_of_adam3, "ladam_post": ahead_of_ladam_post, "setadam": ahead_of_setadam,
    "adanorm": ahead_of_adam,
}  # fmt: skip
STEP = {"sgd": sgd, "adam": adam}


class Oracle:
    """One of cases.py's CASES under XGrad, from the values of some parameters on; `row` replaces hyper-parameters."""

    def __init__(self, name, params, ahead, max_norm=None, **row):
        self.rule, self.ahead, self.max_norm = NAMED[name].rule, ahead, max_norm
        params = list(params)
        self.p = [p.detach().double().flatten().clone() for p in params]
        self.s = [zero_state(self.rule, p) for p in self.p]
        self.h = [SimpleNamespace(**{**NAMED[name].hyper, **row}) for _ in params]
        self.t, self.seen = [0] * len(self.p), [{}] * len(self.p)
        self.shapes = [p.shape for p in params]

    def follow(self, optimizer):
        """Takes lr and what else a schedule moves from where it stands in the groups."""
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        for i, group in enumerate(groups):
            found = {key: float(group[key]) for key in ("lr", "weight_decay", "momentum") if key in vars(self.h[i])}
            if "betas" in group:
                found["beta1"], found["beta2"] = group["betas"]
            vars(self.h[i]).update(found)

    def true(self):
        return [p.view(shape) for p, shape in zip(self.p, self.shapes, strict=True)]

    def predicted(self):
        return [self._ahead(i).view(shape) for i, shape in enumerate(self.shapes)]

    def _ahead(self, i):
        h, t = self.h[i], self.t[i]
        if t == 0:
            return self.p[i].clone()
        rate = 1.0 if getattr(h, "lr_in_momentum", False) else h.lr
        return self.p[i] - self.ahead * rate * DELTA[self.rule](self.s[i], h, t, self.seen[i])

    def step(self, grads):
        norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
        factor = self.max_norm / norm if self.max_norm and norm > self.max_norm else 1.0
        function = STEP.get(self.rule) or getattr(transcriptions, self.rule)
        for i, g in enumerate(grads):
            if g is not None:
                self.t[i] += 1
                g = g.flatten() * factor
                self.seen[i] = function(self.p[i], g, self.s[i], self.h[i], self.t[i])

    def train(self, batches, follow=None):
        for t in batches:
            if follow is not None:
                self.follow(follow)
            self.step(gradients(self.predicted(), t))


# A small network


def loss_of(weights, t):
    """Mean square error of a tanh network on batch t, which is drawn anew; the teacher stays."""
    w1, b1, w2, gain = (w.double() for w in weights)
    x = randn(8 * 4, 50 + t).double().view(8, 4)
    x, y = (z.to(w1.device) for z in (x, (x @ randn(12, 7).double().view(4, 3)).sin()))
    return (gain * (x @ w1.T + b1).tanh() @ w2.T - y).square().mean()


def gradients(weights, t):
    weights = [w.detach().clone().requires_grad_() for w in weights]
    return torch.autograd.grad(loss_of(weights, t), weights)


class Net(torch.nn.Module):
    """`net(t)` is the loss on batch t."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        values = [randn(24, 1).view(6, 4), randn(6, 2), randn(18, 3).view(3, 6), torch.tensor(0.8)]
        self.w1, self.b1, self.w2, self.gain = (Parameter(value.to(dtype)) for value in values)

    def forward(self, t):
        return loss_of((self.w1, self.b1, self.w2, self.gain), t)


def train(net, opt, batches, after=None):
    """The usual loop: zero_grad, forward, backward, step, `after` (a scheduler)."""
    for t in batches:
        opt.zero_grad()
        net(t).backward()
        opt.step()
        if after is not None:
            after()


@contextmanager
def phases_of(monkeypatch):
    """A list to which the CPU engine's calls within add their phases."""
    seen = []

    def run(launch, phases, *arguments):
        seen.append(phases)
        return original(launch, phases, *arguments)

    original = CpuLaunch.run
    with monkeypatch.context() as patch:
        patch.setattr(CpuLaunch, "run", run)
        yield seen


# Snapshots


def tensors(xg):
    return [p for group in xg.param_groups for p in group["params"]]


def values(params):
    return [p.detach().clone() for p in params]


def true_weights(xg):
    with xg.true_weights():
        return values(tensors(xg))


def snapshot(xg):
    """Copies of what is in the parameters, of the true weights and of the states, by name."""
    found = {}
    for i, p in enumerate(tensors(xg)):
        found[f"{i} live"] = p.detach().clone()
        found |= {f"{i} {name}": x.detach().clone() for name, x in xg.state.get(p, {}).items() if torch.is_tensor(x)}
    return found | {f"{i} true": p for i, p in enumerate(true_weights(xg))}


def assert_same(a, b):
    """Two optimizers, or their snapshots, are the same bits."""
    same_bits(*(x if isinstance(x, dict) else snapshot(x) for x in (a, b)))


def assert_leads(xg):
    """What is in the parameters is not the true weights."""
    assert any(not torch.equal(p, true) for p, true in zip(values(tensors(xg)), true_weights(xg), strict=True))


def assert_near(params, exact, start, times=1.0):
    """algorithms.md, section 6, `times` over: |p - exact| <= 1e-5 |exact - start| + 4e-7 |start|."""
    for p, q, p0 in zip(params, exact, start, strict=True):
        p, q, p0 = (x.detach().double().flatten() for x in (p, q, p0))
        error, bound = (p - q).norm(), times * (1e-5 * (q - p0).norm() + 4e-7 * p0.norm())
        assert error <= bound, f"off by {error:.3e}, allowed {bound:.3e}, in {p.numel()} elements"
