"""AdamNorm and AdaBeliefNorm."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class AdamNorm(Optimizer):
    """AdamNorm (AdaNorm, arXiv 2210.06364; author code): a gradient shorter than usual is lengthened before m takes it.

    e = gamma*e + (1 - gamma)*|g| per layer; where e > |g|, m takes g * e/|g|. eps is inside of the state and outside
    of the root. A zero gradient stays (the author code gives NaN) [ours]. `layer_stats()` tells grad_norm, norm_ema
    and scale.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: >= 0.
        weight_decay: >= 0.
        gamma: decay of the running norm, in [0, 1).
        decoupled: AdamW's decay instead of coupled L2.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="adanorm",
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "gamma", "belief", "decoupled"),
        states=("exp_avg", "exp_avg_sq"),
        scalar="exp_grad_norm",
        report=("grad_norm", "norm_ema", "scale"),
        reference=reference.adanorm,
        direction=reference.adam_direction,
    )
    belief = False

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, gamma=0.95, decoupled=False, **common
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, gamma=gamma, decoupled=decoupled)
        super().__init__(params, defaults, **common)


class AdaBeliefNorm(AdamNorm):
    """AdaBeliefNorm: as `AdamNorm`, with AdaBelief's second state, of (lengthened g - m)^2.

    Arguments, report and errors are those of `AdamNorm`.
    """

    belief = True
