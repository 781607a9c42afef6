"""Step sizes from curvature: CurvatureSGD and CurvatureAdamW."""

from . import reference
from .curvature_step import REPORT, Curvature
from .rule import Rule

SETTINGS = ("ema", "damping", "max_step", "self_concordant", "signed_average", "reach", "base")
SGD = ("lr", "momentum", "weight_decay", *SETTINGS)
ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay", *SETTINGS)


def rule_of(name: str, hyper: tuple, states: tuple, scalar: str) -> Rule:
    step, way = getattr(reference, name), getattr(reference, f"{name}_direction")
    return Rule(name, hyper, step, way, states, scalar, REPORT, needs_adapt=True)


class CurvatureSGD(Curvature):
    """Momentum whose step size in each layer comes from the curvature there: no learning rate to tune.

    After Bahamou & Goldfarb (arXiv 2305.13664), whose abstract fixes what is wanted (layer-wise step sizes from the
    stochastic curvature in the diagonal blocks of the Hessian, at about one more gradient a step); every formula is
    [ours]:

        buf = mu*buf + (1-mu)*(g + weight_decay*p); d = buf / (1-mu^t)
        rho = g.d / d.d and kappa = z.Hz / z.z of each layer, both as averages without bias
        alpha = rho / (|kappa| + damping), at most max_step, 0 where rho <= 0; p -= lr * alpha * d

    `step(closure)` evaluates the loss, makes a launch for d and rho, moves the parameters a little along z (a launch),
    evaluates the loss again with the same random numbers, puts buffers and weights back, and makes a launch for kappa,
    alpha and the update. A step whose gradients are not finite changes nothing and is counted in `skipped_steps`.
    `layer_stats()` tells param_norm, direction_norm, descent (g.d), slope (rho), sign, curvature (kappa), step_size.

    Args:
        params: see `Optimizer`.
        lr: a factor on the step sizes found, >= 0, for schedulers; a float or a 0-dim tensor.
        momentum: mu, in [0, 1).
        weight_decay: coupled L2, >= 0; its curvature is counted.
        step_rule: "quadratic", or "self-concordant" (Gao & Goldfarb): q = rho*d.d, delta = |d|*sqrt(kappa + damping),
            alpha = q / ((q + delta) * delta).
        estimator: of kappa. "joint" (z = d in all layers at once, average of |kappa|; contains what the layers do to
            each other, since they move together), "signs" (z = +-d at random, unbiased for the layer's own block,
            average of the signed value), "exact" (a product for each layer: tests and small models).
        product: "finite-difference" (|z| * reach = 1e-3 of the norm of all weights; for bfloat16 3e-2, float16 1e-2,
            float64 1e-6; any kernel, DDP) or "double-backward" (exact; one process).
        ema: decay of the averages of rho and kappa, in [0, 1).
        damping: added to kappa, >= 0.
        max_step: bound on alpha, > 0.
        common: `maximize`, `backend`, `foreach`, `fused`, `capturable` and the group key `layer`: see `Optimizer`.

    Memory: with finite differences a copy of the weights and a second gradient; with double backward the graph, the
    direction and the product.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = rule_of("slope_sgd", SGD, ("momentum_buffer",), "exp_avg_slope")
    second = rule_of("curvature_sgd", SGD, ("momentum_buffer",), "exp_avg_curvature")

    def __init__(
        self,
        params,
        lr=1.0,
        momentum=0.9,
        weight_decay=0.0,
        *,
        step_rule="quadratic",
        estimator="joint",
        product="finite-difference",
        ema=0.9,
        damping=1e-4,
        max_step=10.0,
        **common,
    ):
        options = dict(step_rule=step_rule, estimator=estimator, product=product)
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ema=ema, damping=damping)
        super().__init__(params, defaults | dict(max_step=max_step), options, **common)


class CurvatureAdamW(Curvature):
    """AdamW whose step size in each layer comes from the curvature there: no learning rate to tune.

    As `CurvatureSGD`, with Adam's direction and decoupled decay: d = ic1*m / (sqrt(ic2*v) + eps),
    p -= lr * alpha * (d + weight_decay*p).

    Args:
        params: see `Optimizer`.
        lr: a factor on the step sizes found, >= 0, for schedulers; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, scaled by the step size, >= 0.
        step_rule, estimator, product, ema, damping, max_step: see `CurvatureSGD`.
        common: `maximize`, `backend`, `foreach`, `fused`, `capturable` and the group key `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = rule_of("slope_adam", ADAM, ("exp_avg", "exp_avg_sq"), "exp_avg_slope")
    second = rule_of("curvature_adam", ADAM, ("exp_avg", "exp_avg_sq"), "exp_avg_curvature")

    def __init__(
        self,
        params,
        lr=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        step_rule="quadratic",
        estimator="joint",
        product="finite-difference",
        ema=0.9,
        damping=1e-4,
        max_step=10.0,
        **common,
    ):
        options = dict(step_rule=step_rule, estimator=estimator, product=product)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema=ema, damping=damping)
        super().__init__(params, defaults | dict(max_step=max_step), options, **common)
