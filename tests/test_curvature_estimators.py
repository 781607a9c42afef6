"""What each estimator estimates: the blocks of an explicit Hessian, through the package's own steps.

lr=0 keeps the weights, no momentum (SGD) or a gradient that never changes (AdamW) keeps the direction, ema=0 makes the
stored average this step's value. float64 runs on the reference engine and is exact but for the product; float32 runs
on the native one. Left out: networks of more than some dozen weights, whose blocks nobody can write down.
"""

import pytest
import torch
from curvature_oracle import (
    ESTIMATORS,
    PRODUCTS,
    REACH,
    ULP,
    blocks,
    loss,
    make,
    parameters,
    reach,
    start,
    state_of,
    stats,
    take_step,
    third,
)

DRAWS = 100
INDEFINITE, TWISTED = 5, 0  # seeds of weights with negative diagonal blocks, and with a negative joint product
each_flavour = pytest.mark.parametrize("flavour", ["sgd", "adamw"])
each_product = pytest.mark.parametrize("product", PRODUCTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Point:
    """A loss at its start: directions, what d'Hd is between any two layers, and what an estimate may be off by."""

    def __init__(self, flavour, seed=INDEFINITE):
        self.loss, self.p = loss(0), start(seed, 1.5)
        params = [p.clone().requires_grad_() for p in self.p]
        self.g = torch.autograd.grad(self.loss(params), params)
        self.d = [g if flavour == "sgd" else g / (g.abs() + 1e-8) for g in self.g]
        whole, flat = blocks(self.loss, self.p), [d.reshape(-1) for d in self.d]
        self.pairs = torch.stack([torch.stack([a @ block @ b for block, b in zip(row, flat, strict=True)])
                                  for row, a in zip(whole, flat, strict=True)])  # fmt: skip
        self.dd = self.pairs.new_tensor([d.square().sum() for d in self.d])
        self.hessian = torch.cat([torch.cat(row, 1) for row in whole]).norm()

    def exact(self):
        return self.pairs.diagonal() / self.dd

    def signed(self, signs):
        """One draw: s_l d_l'(Hz)_l / |d_l|^2 with z_l = s_l d_l. All signs alike: the joint product."""
        return signs * (self.pairs @ signs) / self.dd

    def spread(self, signs):
        return [s * d for s, d in zip(signs.tolist(), self.d, strict=True)]

    def rounding(self, dtype, product):
        """Of an estimate, per layer: d and Hz are right to some ulps, and a difference over h magnifies those of the
        gradients and of the point p + hz by |p| / |h d|: 1e3 in float32, 1e6 in float64. float(h) is a float32."""
        size, p = self.dd.sum().sqrt() / self.dd.sqrt(), torch.cat([p.reshape(-1) for p in self.p]).norm()
        g = self.pairs.new_tensor([g.norm() for g in self.g])
        if product == "double-backward":
            return (16 * ULP if dtype == torch.float32 else 1e-12) * self.hessian * size
        ulp = ULP if dtype == torch.float32 else 2**-53
        return (16 * ULP * self.hessian + 4 / REACH[dtype] * ulp * (self.hessian + g / p)) * size

    def truncation(self, dtype, product, z):
        """Taylor: (h/2) D^3 f[z, z, d_l] / |d_l|^2; the term after it is a hundredth of the vector D^3 f[z, z, .]."""
        if product == "double-backward":
            return torch.zeros_like(self.dd)
        terms = third(self.loss, self.p, z)
        along = self.pairs.new_tensor([float((a * b).sum()) for a, b in zip(terms, self.d, strict=True)]).abs()
        whole = torch.cat([x.reshape(-1) for x in terms]).norm()
        return reach(self.p, self.d, REACH[dtype]) / 2 * (1.01 * along + 0.01 * whole * self.dd.sqrt()) / self.dd

    def close(self, found, want, dtype, product, z):
        off, allowed = (found - want).abs(), self.rounding(dtype, product) + self.truncation(dtype, product, z)
        assert (off <= allowed).all(), f"off by {off.tolist()}, allowed {allowed.tolist()}"


def still(flavour, dtype, seed=INDEFINITE, **options):
    params = parameters(start(seed, 1.5), dtype)
    plain = {"momentum": 0.0} if flavour == "sgd" else {}
    options = {"lr": 0.0, "weight_decay": 0.0, "ema": 0.0, **plain, **options}
    return make(flavour, params, **options), params


def curvatures(opt, params):
    """This step's estimates with their signs."""
    return torch.stack([state_of(opt, p, "exp_avg_curvature").clone().reshape(()) for p in params])


def column(opt, name):
    return torch.tensor([report[name] for report in stats(opt)], dtype=torch.float64)


@each_dtype
@each_product
@each_flavour
def test_exact_is_the_diagonal_block(flavour, product, dtype):
    point, (opt, params) = Point(flavour), still(flavour, dtype, estimator="exact", product=product)
    take_step(opt, params, loss(0))
    found = curvatures(opt, params)
    for k in range(5):  # each layer has a product of its own, which misses it by a term of its own
        alone = point.spread(torch.eye(5, dtype=torch.float64)[k])
        off, allowed = (
            abs(found - point.exact())[k],
            point.rounding(dtype, product) + point.truncation(dtype, product, alone),
        )
        assert off <= allowed[k], f"layer {k} is off by {off:.3e}, allowed {allowed[k]:.3e}"
    assert torch.equal(column(opt, "curvature"), found.abs())
    assert (point.exact() < 0).any(), "no negative block, so the sign is not tested"


@each_dtype
@each_product
@each_flavour
def test_joint_is_its_definition(flavour, product, dtype):
    point, (opt, params) = Point(flavour, TWISTED), still(flavour, dtype, TWISTED, product=product)
    take_step(opt, params, loss(0))
    ones = torch.ones_like(point.dd)
    point.close(curvatures(opt, params), point.signed(ones).abs(), dtype, product, point.d)
    assert torch.equal(column(opt, "sign"), ones)
    assert (point.signed(ones) < 0).any(), "no negative value, so the absolute value is not tested"


@each_dtype
@each_product
@each_flavour
def test_signs_is_unbiased(flavour, product, dtype):
    """Each draw is its definition, up to rounding and truncation; the mean over draws is within 4 standard errors."""
    point, (opt, params) = Point(flavour), still(flavour, dtype, estimator="signs", product=product)
    drawn, definition, missed, off = [], [], torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(DRAWS):
        take_step(opt, params, loss(0))
        signs = column(opt, "sign")
        drawn.append(curvatures(opt, params))
        definition.append(point.signed(signs))
        off = torch.maximum(off, (drawn[-1] - definition[-1]).abs())
        if len(drawn) <= 16:
            missed = torch.maximum(missed, point.truncation(dtype, product, point.spread(signs)))
            point.close(drawn[-1], definition[-1], dtype, product, point.spread(signs))
    assert (off <= 4 * (point.rounding(dtype, product) + missed)).all()
    for name, draws in {"found": torch.stack(drawn), "defined": torch.stack(definition)}.items():
        error = draws.std(0) / DRAWS**0.5
        bias = missed if name == "found" else 0.0
        assert ((draws.mean(0) - point.exact()).abs() <= 4 * error + bias).all(), name
    assert all(torch.equal(p.detach(), q.to(dtype)) for p, q in zip(params, point.p, strict=True))


def test_signs_are_fair_independent_and_the_optimizers_own():
    """Twins draw alike whatever torch's seed is; the stream of the user stays where it was."""
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        opt, params = still("sgd", torch.float32, estimator="signs")
        before = torch.get_rng_state()
        rows = []
        for _ in range(DRAWS):
            take_step(opt, params, loss(0))
            rows.append(column(opt, "sign"))
        assert torch.equal(torch.get_rng_state(), before)
        seen.append(torch.stack(rows))
    assert torch.equal(*seen)
    signs = seen[0]
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    moments = signs.T @ signs / DRAWS - torch.eye(5)
    assert moments.abs().max() <= 4 / DRAWS**0.5 and signs.mean(0).abs().max() <= 4 / DRAWS**0.5
    assert abs((signs[1:] * signs[:-1]).mean()) <= 4 / (5 * DRAWS) ** 0.5


@each_dtype
@pytest.mark.parametrize("estimator", ESTIMATORS)
@each_flavour
def test_products_agree(flavour, estimator, dtype):
    """Finite differences against double backward, both of the package, to what Taylor and rounding allow."""
    point, found = Point(flavour), []
    for product in PRODUCTS:
        opt, params = still(flavour, dtype, estimator=estimator, product=product)
        take_step(opt, params, loss(0))
        found.append(curvatures(opt, params))
    signs = column(opt, "sign") if estimator == "signs" else torch.ones_like(point.dd)
    chosen = torch.eye(5, dtype=torch.float64) if estimator == "exact" else signs.expand(5, 5)
    missed = torch.stack([point.truncation(dtype, PRODUCTS[0], point.spread(chosen[k]))[k] for k in range(5)])
    allowed = missed + point.rounding(dtype, PRODUCTS[0]) + point.rounding(dtype, PRODUCTS[1])
    off = (found[0] - found[1]).abs()
    assert (off <= allowed).all(), f"off by {off.tolist()}, allowed {allowed.tolist()}"
    assert (off > 0).any(), "the same product twice"


@each_flavour
def test_all_zero_weights_still_have_a_reach(flavour):
    """h |d| = 1e-3 where |p| = 0: x = (0, 0) of a loss with the Hessian [[3, 1], [1, 2]]."""
    hessian = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    for product in PRODUCTS:
        params = parameters([torch.zeros(2)])
        options = {"momentum": 0.0} if flavour == "sgd" else {}
        opt = make(flavour, params, weight_decay=0.0, lr=0.0, ema=0.0, product=product, **options)
        opt.step(lambda params=params: params[0].double() @ hessian @ params[0].double() / 2 + params[0].sum())
        assert stats(opt)[0]["curvature"] == pytest.approx(3.5, rel=1e-3)  # (1, 1)'H(1, 1) / 2
