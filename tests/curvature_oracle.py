"""Curvature step sizes as algorithms.md, section 4, has them: float64, plain autograd, one layer after another.

    oracle = Oracle("sgd", params, estimator="signs")    # params: float64 copies that it keeps for itself
    reports = oracle.step([loss], signs)                 # loss(params) -> 0-dim; signs: one per layer, for "signs"

`Row` has a layer's hyper-parameters, `pieces` of a layer are (number of the parameter, slice of its elements).
Products are exact by default; "finite-difference" takes the same difference of gradients as the package (REACH, by
type), so that what is left between the two is rounding. `blocks` are explicit Hessians, for some dozen weights.
"""

import math
from dataclasses import dataclass, field

import torch

import layerfused

REPORT = ("param_norm", "direction_norm", "descent", "slope", "sign", "curvature", "step_size")
RULES, ESTIMATORS = ("quadratic", "self-concordant"), ("joint", "signs", "exact")
PRODUCTS = ("finite-difference", "double-backward")
REACH = {torch.float32: 1e-3, torch.float64: 1e-6}  # |h d| over |p|


@dataclass(frozen=True)
class Row:
    """Hyper-parameters of a layer, at the defaults that both classes share."""

    lr: float = 1.0
    momentum: float = 0.9
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    step_rule: str = "quadratic"
    ema: float = 0.9
    damping: float = 1e-4
    max_step: float = 10.0
    maximize: bool = False


@dataclass
class Layer:
    pieces: list
    row: Row = field(default_factory=Row)
    slope: float = 0.0  # the averages as they are stored: not bias corrected
    curvature: float = 0.0

    def take(self, tensors):
        """The elements of the layer out of tensors that look like the parameters."""
        return torch.cat([tensors[i].reshape(-1)[piece] for i, piece in self.pieces])


def tensors_as_layers(params, row):
    return [Layer([(i, slice(0, p.numel()))], row) for i, p in enumerate(params)]


class Oracle:
    def __init__(self, flavour, params, row=None, *, layers=None, estimator="joint", product=PRODUCTS[1], dtype=None):
        self.flavour, self.estimator, self.product = flavour, estimator, product
        self.relative = REACH[dtype or params[0].dtype]
        self.params = [p.detach().double().clone().requires_grad_() for p in params]
        self.layers = layers or tensors_as_layers(params, row or Row())
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t = [0 for _ in self.params]
        self.skipped = 0

    def step(self, losses, signs=None):
        """A dict from REPORT for every layer (None where no gradient is), or None for a step that is skipped."""
        loss, grads = self._gradients(losses, self.params)
        there = [i for i, g in enumerate(grads) if g is not None]
        if not all(x.isfinite().all() for x in (loss, *(grads[i] for i in there))):
            self.skipped += 1
            return None
        g = self._signed([torch.zeros_like(p) if x is None else x for p, x in zip(self.params, grads, strict=True)])
        used = [n for n, layer in enumerate(self.layers) if any(i in there for i, _ in layer.pieces)]
        for i in there:
            self.t[i] += 1
        d = [self._direction(i, g[i].detach()) if i in there else torch.zeros_like(p)
             for i, p in enumerate(self.params)]  # fmt: skip
        signs = signs or [1.0] * len(self.layers)
        products = self._products(losses, g, d, signs)
        reports = [self._finish(n, g, d, products[n], signs[n]) if n in used else None
                   for n in range(len(self.layers))]  # fmt: skip
        self._apply(reports, d)
        return reports

    def _gradients(self, losses, params):
        """The sum of the losses and its gradients, themselves with a graph."""
        with torch.enable_grad():
            loss = sum(loss(params) for loss in losses)
            return loss, list(torch.autograd.grad(loss, params, create_graph=True, allow_unused=True))

    def _signed(self, grads):
        """Gradients of what is minimised."""
        sign = [1.0] * len(grads)
        for layer in self.layers:
            for i, _ in layer.pieces:
                sign[i] = -1.0 if layer.row.maximize else 1.0
        return [s * g for s, g in zip(sign, grads, strict=True)]

    def _row_of(self, i):
        return next(layer.row for layer in self.layers if any(i == j for j, _ in layer.pieces))

    def _direction(self, i, g):
        row, t, p = self._row_of(i), self.t[i], self.params[i].detach()
        if self.flavour == "sgd":
            self.m[i] = row.momentum * self.m[i] + (1 - row.momentum) * (g + row.weight_decay * p)
            return self.m[i] / (1 - row.momentum**t)
        beta1, beta2 = row.betas
        self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
        self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
        return self.m[i] / (1 - beta1**t) / ((self.v[i] / (1 - beta2**t)).sqrt() + row.eps)

    # Products with the Hessian

    def _products(self, losses, g, d, signs):
        """Of each layer l, the piece (Hz)_l: with z = d, z_l = sign_l d_l, or z = d_l alone ("exact")."""
        if self.estimator == "exact":
            return [layer.take(self._product(losses, g, d, self._spread(d, [float(k == n) for k in self._numbers()])))
                    for n, layer in enumerate(self.layers)]  # fmt: skip
        product = self._product(losses, g, d, self._spread(d, signs))
        return [layer.take(product) for layer in self.layers]

    def _numbers(self):
        return range(len(self.layers))

    def _spread(self, d, factors):
        """d with every layer multiplied by its factor."""
        z = [torch.zeros_like(x).reshape(-1) for x in d]
        for layer, factor in zip(self.layers, factors, strict=True):
            for i, piece in layer.pieces:
                z[i][piece] = factor * d[i].reshape(-1)[piece]
        return [x.view_as(y) for x, y in zip(z, d, strict=True)]

    def _product(self, losses, g, d, z):
        if self.product == "double-backward":
            return hessian_times(g, self.params, z)
        h = reach(self.params, d, self.relative)
        moved = [(p + h * x).detach().requires_grad_() for p, x in zip(self.params, z, strict=True)]
        _, grads = self._gradients(losses, moved)
        second = self._signed([torch.zeros_like(p) if x is None else x for p, x in zip(moved, grads, strict=True)])
        return [(b - a).detach() / h for a, b in zip(g, second, strict=True)]

    # What becomes of them

    def _finish(self, n, g, d, product, sign):
        layer, row = self.layers[n], self.layers[n].row
        g, d, p = layer.take(g).detach(), layer.take(d), layer.take(self.params).detach()
        dd, descent, decay = float(d @ d), float(g @ d), row.weight_decay if self.flavour == "sgd" else 0.0
        rho = (descent + decay * float(p @ d)) / dd if dd else 0.0
        kappa = sign * float(d @ product) / dd + decay if dd else 0.0
        if self.estimator == "joint":
            kappa = abs(kappa)
        t = max(self.t[i] for i, _ in layer.pieces)
        if math.isfinite(rho):
            layer.slope += (1 - row.ema) * (rho - layer.slope)
        if math.isfinite(kappa) and dd:
            layer.curvature += (1 - row.ema) * (kappa - layer.curvature)
        slope, curvature = layer.slope / (1 - row.ema**t), abs(layer.curvature / (1 - row.ema**t))
        good = slope > 0 and dd > 0 and math.isfinite(kappa)
        alpha = step_size(row, slope, curvature, dd) if good else 0.0
        numbers = (p.norm(), dd**0.5, descent, slope, sign, curvature, alpha)
        return {name: float(x) for name, x in zip(REPORT, numbers, strict=True)}

    def _apply(self, reports, d):
        with torch.no_grad():
            for layer, report in zip(self.layers, reports, strict=True):
                for i, piece in layer.pieces if report else ():
                    p, u = self.params[i].view(-1)[piece], d[i].reshape(-1)[piece]
                    decay = layer.row.weight_decay if self.flavour == "adamw" else 0.0
                    p -= layer.row.lr * report["step_size"] * (u + decay * p)


def step_size(row, slope, curvature, dd):
    """From the mean slope along d, the mean curvature along d and |d|^2."""
    if row.step_rule == "quadratic":
        below = curvature + row.damping
        return min(slope / below, row.max_step) if below else row.max_step
    q, delta = slope * dd, (dd * (curvature + row.damping)) ** 0.5
    return min(q / ((q + delta) * delta), row.max_step) if delta else row.max_step


def reach(params, d, relative):
    """h with h |d| = relative |p| over the model; |p| is taken for 1 where all weights are zero."""
    p, d = (float(torch.cat([x.detach().reshape(-1) for x in xs]).norm()) for xs in (params, d))
    return relative * (p or 1.0) / d if d else 0.0


def hessian_times(g, params, z):
    """Hz out of gradients that have a graph; where they have none, the loss is linear and Hz is zero."""
    traced = [(a, b) for a, b in zip(g, z, strict=True) if a.requires_grad]
    if not traced:
        return [torch.zeros_like(p) for p in params]
    a, b = zip(*traced, strict=True)
    found = torch.autograd.grad(a, params, b, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if x is None else x for p, x in zip(params, found, strict=True)]


def blocks(loss, params):
    """The Hessian as a matrix for every pair of parameters."""
    params = tuple(p.detach().double() for p in params)
    whole = torch.autograd.functional.hessian(lambda *ps: loss(ps), params)
    return [[x.reshape(p.numel(), q.numel()) for x, q in zip(row, params, strict=True)]
            for row, p in zip(whole, params, strict=True)]  # fmt: skip


def third(loss, params, z):
    """The vector D^3 f[z, z, .], by which a difference of gradients misses Hz: (h/2) of it, and less."""
    params = [p.detach().double().requires_grad_() for p in params]
    g = torch.autograd.grad(loss(params), params, create_graph=True)
    once = torch.autograd.grad(g, params, z, create_graph=True)
    return torch.autograd.grad(once, params, z)


# The package beside the oracle

CLASSES = {"sgd": "CurvatureSGD", "adamw": "CurvatureAdamW"}
SHAPES = ((4, 3), (4,), (2, 4), (2,), ())
ULP = 2**-24  # half an ulp of float32 at 1: what one rounding costs


def start(seed=0, scale=0.7):
    """Weights of a small network whose last parameter is 0-dim: float64 numbers that float32 holds."""
    random = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=random)).double() for shape in SHAPES]


def loss(seed, samples=8):
    """loss(params) of a batch. Float64 inside whatever the parameters are, so that a gradient is rounded once."""
    random = torch.Generator().manual_seed(1000 + seed)
    x, y = (torch.randn(samples, n, generator=random, dtype=torch.float64) for n in (3, 2))

    def evaluate(params):
        w1, b1, w2, b2, s = (p.double() for p in params)
        return (s.exp() * (torch.tanh(x @ w1.T + b1) @ w2.T + b2) - y).square().mean()

    return evaluate


def parameters(values, dtype=torch.float32):
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def make(flavour, params, **options):
    return getattr(layerfused, CLASSES[flavour])(params, **options)


def take_step(opt, params, *losses):
    """One step on the sum of the losses."""
    closures = [lambda loss=loss: loss(params) for loss in losses]
    return opt.step(closures if len(closures) > 1 else closures[0])


def state_of(opt, p, *names):
    return next(opt.state[p][name] for name in names if name in opt.state[p])


def stats(opt):
    """`layer_stats()` as a list of dicts, one a layer; every tensor of a layer="group" tells the same."""
    found = list(opt.layer_stats().values())
    layers = []
    for group in opt.param_groups:
        own = [found.pop(0) for _ in group["params"]]
        for columns in own[:1] if group["layer"] == "group" else own:
            lists = {name: x if isinstance(x, list) else [x] for name, x in columns.items()}
            layers += [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return layers


def adopt(oracle, opt, params):
    """Puts the oracle where the optimizer is: weights, averages, steps."""
    for i, p in enumerate(params):
        oracle.params[i] = p.detach().double().clone().requires_grad_()
        oracle.m[i] = state_of(opt, p, "exp_avg", "momentum_buffer").detach().double().clone()
        if "exp_avg_sq" in opt.state[p]:
            oracle.v[i] = opt.state[p]["exp_avg_sq"].detach().double().clone()
        oracle.t[i] = int(opt.state[p]["step"])
    for layer in oracle.layers:
        (i, piece), *_ = layer.pieces
        place = [n for n, other in enumerate(x for x in oracle.layers if x.pieces[0][0] == i) if other is layer][0]
        layer.slope, layer.curvature = (
            float(opt.state[params[i]][name].reshape(-1)[place]) for name in ("exp_avg_slope", "exp_avg_curvature")
        )


def all_finite(opt, params):
    """No NaN and no infinity in weights, states and reports."""
    tensors = [x for p in params for x in (p, *opt.state[p].values())]
    reports = [torch.tensor(list(report.values())) for report in stats(opt)]
    return all(x.isfinite().all() for x in (*tensors, *reports))
