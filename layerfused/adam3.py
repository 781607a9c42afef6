"""AdaM3, also known as AdaMomentum."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class AdaM3(Optimizer):
    """AdaM3 (AdaMomentum, arXiv 2106.11514; author code): the second state averages m squared.

    The first step is about 10 * lr * sign(g) at beta1 = 0.9: warm lr up over some hundred steps.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: inside of the state alone, > 0.
        weight_decay: >= 0.
        decoupled: AdamW's decay instead of coupled L2.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="adam3",
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled"),
        states=("exp_avg", "exp_avg_sq"),
        reference=reference.adam3,
        direction=reference.adam3_direction,
        layerwise=False,
    )
    positive_eps = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, *, decoupled=True, **common):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=decoupled)
        super().__init__(params, defaults, **common)
