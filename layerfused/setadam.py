"""SET-Adam."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class SETAdam(Optimizer):
    """SET-Adam (Zhang, arXiv 2302.01029): Adam's second moment scaled down, embedded and translated down at use.

    Per layer v is scaled by the squared cosine of its angle to the ones, eps is added inside of the root, and tau
    times the layer's least root is taken off; what is stored is Adam's. `layer_stats()` tells cos and minimum.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: inside of the root, > 0; the default is [ours], convolutional networks want it larger (1e-8 and up).
        weight_decay: >= 0.
        tau: share of the least root that is taken off, in [0, 1); the default is [ours].
        decoupled: AdamW's decay instead of coupled L2 [ours].
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="setadam",
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "tau", "decoupled"),
        states=("exp_avg", "exp_avg_sq"),
        report=("cos", "minimum"),
        reference=reference.setadam,
        direction=reference.setadam_direction,
    )
    positive_eps = True

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, *, tau=0.5, decoupled=False, **common
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, tau=tau, decoupled=decoupled)
        super().__init__(params, defaults, **common)
