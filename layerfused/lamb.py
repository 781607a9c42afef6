"""LAMB and LAMBC."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule

RULE = Rule(
    name="lamb",
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "grad_averaging", "lower", "upper"),
    states=("exp_avg", "exp_avg_sq"),
    report=("param_norm", "update_norm", "trust_ratio"),
    reference=reference.lamb,
    direction=reference.lamb_direction,
)


class LAMB(Optimizer):
    """LAMB (You et al., arXiv 1904.00962 v5, Algorithm 2): Adam's direction, a trust ratio per layer.

    u = ic1*m / (sqrt(ic2*v) + eps) + weight_decay * p, p -= lr * |p|/|u| * u, with ratio 1 where a norm is 0. Norms
    are of p before the update. Adaptation does not hang on weight_decay (as in apex and timm): it is `adapt`.
    `layer_stats()` tells param_norm, update_norm and trust_ratio.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, inside of u, >= 0.
        bias_correction: False sets ic1 = ic2 = 1.
        grad_averaging: False gives g the coefficient 1 in m.
        max_grad_norm: global clip, the field's convention; None turns it off and saves a pass over g.
        trust_clip: None, an upper bound, or (lower, upper) for the ratio, the 1 of a zero norm included.
        common: `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = RULE

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        *,
        bias_correction=True,
        grad_averaging=True,
        max_grad_norm=1.0,
        trust_clip=None,
        **common,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, trust_clip=trust_clip)
        defaults |= dict(bias_correction=bias_correction, grad_averaging=grad_averaging)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, **common)


class LAMBC(Optimizer):
    """LAMBC (arXiv 2011.13584; author code): LAMB whose trust ratio is bounded from above.

    The bound 1.0 is the authors' best (their signature says 10.0); without bias correction, global clip and weight
    decay, as theirs. `layer_stats()` tells param_norm, update_norm and trust_ratio.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, inside of u, >= 0.
        trust_clip: an upper bound, (lower, upper), or None for plain LAMB.
        bias_correction: False sets ic1 = ic2 = 1.
        grad_averaging: False gives g the coefficient 1 in m.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = RULE

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        *,
        trust_clip=1.0,
        bias_correction=False,
        grad_averaging=True,
        **common,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, trust_clip=trust_clip)
        defaults |= dict(bias_correction=bias_correction, grad_averaging=grad_averaging)
        super().__init__(params, defaults, **common)
