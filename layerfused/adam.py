"""Adam and AdamW."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule

RULE = Rule(
    name="adam",
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled"),
    states=("exp_avg", "exp_avg_sq"),
    reference=reference.adam,
    direction=reference.adam_direction,
    layerwise=False,
)


class Adam(Optimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1), step for step as torch.optim.Adam without amsgrad.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: coupled L2, >= 0.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = RULE
    decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **common):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **common)


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2), step for step as torch.optim.AdamW without amsgrad.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, >= 0: a step takes lr * weight_decay of p away.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = RULE
    decoupled = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **common):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **common)
