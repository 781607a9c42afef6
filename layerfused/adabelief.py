"""AdaBelief."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class AdaBelief(Optimizer):
    """AdaBelief (Zhuang et al., arXiv 2010.07468; author code adabelief-pytorch 0.2): steps by belief in the gradient.

    The second state averages (g - m)^2 and takes eps in at every step, as the author code does.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: inside of the state and added to the root, >= 0.
        weight_decay: >= 0.
        decoupled: AdamW's decay (the authors' default) instead of coupled L2.
        rectify: RAdam's rectification (arXiv 1908.03265, section 4.2); while its length is below 5 the step is
            lr * m, bias corrected [code]; eps enters as without it [ours].
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="adabelief",
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "rectify"),
        states=("exp_avg", "exp_avg_var"),
        reference=reference.adabelief,
        direction=reference.adabelief_direction,
        layerwise=False,
    )

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-16,
        weight_decay=0.0,
        *,
        decoupled=True,
        rectify=False,
        **common,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=decoupled, rectify=rectify)
        super().__init__(params, defaults, **common)
