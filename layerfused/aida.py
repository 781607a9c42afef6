"""Aida."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class Aida(Optimizer):
    """Aida (Zhang et al., arXiv 2203.13273; author code): the second state averages what k mutual projections of a
    layer's gradient and momentum leave of their difference.

    `layer_stats()` tells grad_norm, exp_avg_norm and cos, the cosine of their angle (0 where one is 0 [ours]).

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: inside of the state alone, > 0.
        weight_decay: >= 0.
        k: number of projections, an integer >= 0; 0 is AdaBelief without its outer eps.
        xi: guards the projections' denominators, > 0.
        decoupled: AdamW's decay instead of the authors' coupled L2.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="aida",
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "k", "xi", "decoupled"),
        states=("exp_avg", "exp_avg_var"),
        report=("grad_norm", "exp_avg_norm", "cos"),
        reference=reference.aida,
        direction=reference.aida_direction,
    )
    positive_eps = True

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        k=2,
        xi=1e-20,
        decoupled=False,
        **common,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, k=k, xi=xi, decoupled=decoupled)
        super().__init__(params, defaults, **common)
