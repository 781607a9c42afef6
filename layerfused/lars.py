"""LARS."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class LARS(Optimizer):
    """LARS (You et al., arXiv 1708.03888, Algorithm 1): SGD with a trust ratio per layer.

    ratio = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps), 1 where |p| or |g| is 0;
    `layer_stats()` tells param_norm, grad_norm and trust_ratio.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor. Near 1: with the usual 1e-3 nothing is learned.
        momentum: >= 0.
        weight_decay: inside of the ratio and of the step, >= 0.
        trust_coefficient: > 0.
        eps: in the ratio's denominator, >= 0.
        nesterov: step along d + momentum * buf; needs momentum > 0.
        lr_in_momentum: the paper's and MLPerf's placement, buf = momentum * buf + lr * d; differs when lr moves.
        larc: ratio = min(ratio / lr, 1), so that lr is an upper bound; a zero norm's ratio stays 1 [ours].
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="lars",
        hyper=("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "nesterov", "lr_in_momentum", "larc"),
        states=("momentum_buffer",),
        report=("param_norm", "grad_norm", "trust_ratio"),
        reference=reference.lars,
        direction=reference.lars_direction,
    )

    def __init__(
        self,
        params,
        lr=1.0,
        momentum=0.9,
        weight_decay=1e-4,
        *,
        trust_coefficient=1e-3,
        eps=1e-8,
        nesterov=False,
        lr_in_momentum=False,
        larc=False,
        **common,
    ):
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps
        )
        defaults |= dict(nesterov=nesterov, lr_in_momentum=lr_in_momentum, larc=larc)
        super().__init__(params, defaults, **common)
