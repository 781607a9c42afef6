"""NovoGrad."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class NovoGrad(Optimizer):
    """NovoGrad (Ginsburg et al., arXiv 1905.11286, Algorithm 1): one second moment per layer.

    v = |g|^2 at first, then v = beta2*v + (1 - beta2)*|g|^2; m = beta1*m + g/(sqrt(v) + eps) + weight_decay*p;
    p -= lr*m. A layer whose first gradients are 0 takes the first that is not [ours]. `layer_stats()` tells grad_norm
    and second_moment. `adapt=False` raises: nothing of the rule would be left.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, enters m, >= 0.
        grad_averaging: multiplies what enters m by 1 - beta1.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range, and for adapt=False.
    """

    rule = Rule(
        name="novograd",
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "grad_averaging"),
        states=("exp_avg",),
        scalar="exp_avg_sq",
        report=("grad_norm", "second_moment"),
        needs_adapt=True,
        reference=reference.novograd,
        direction=reference.novograd_direction,
    )

    def __init__(
        self, params, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, *, grad_averaging=False, **common
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, grad_averaging=grad_averaging)
        super().__init__(params, defaults, **common)
