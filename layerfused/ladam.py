"""LAdam and LAdaBelief: layer-wise step sizes by averaging the second moment."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "belief", "decoupled")
PRE = Rule(
    name="ladam_pre",
    hyper=HYPER,
    states=("exp_avg",),
    scalar="exp_avg_sq",
    report=("second_moment",),
    needs_adapt=True,
    reference=reference.ladam_pre,
    direction=reference.ladam_pre_direction,
)
POST = Rule(
    name="ladam_post",
    hyper=HYPER,
    states=("exp_avg", "exp_avg_sq"),
    report=("denominator",),
    needs_adapt=True,
    reference=reference.ladam_post,
    direction=reference.ladam_post_direction,
)


class LAdam(Optimizer):
    """LAdam, the layer-wise step sizes of arXiv 2203.13273 v1-v3 on Adam's second moment.

    "pre" [code]: one second moment per layer, of the mean of g^2, with eps inside. "post" [ours; the abstract only
    names it]: Adam's v is kept and its root averaged over the layer at use, with eps outside. `layer_stats()` tells
    second_moment ("pre") or denominator ("post"). `adapt=False` raises: nothing of the rule would be left.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        betas: decay of the two averages, each in [0, 1).
        eps: > 0.
        weight_decay: >= 0.
        processing: "pre" or "post".
        decoupled: AdamW's decay instead of coupled L2.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`, and the group keys `adapt` and `layer`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range, and for adapt=False.
    """

    positive_eps = True
    belief = False

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        processing="pre",
        decoupled=False,
        **common,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(**defaults, processing=processing, decoupled=decoupled), **common)

    def rule_of(self, group):
        return PRE if group["processing"] == "pre" else POST


class LAdaBelief(LAdam):
    """LAdaBelief: as `LAdam`, on AdaBelief's second moment, of (g - m)^2.

    Arguments, report and errors are those of `LAdam`; with processing="post" the kept v has eps in it, as
    AdaBelief's has.
    """

    belief = True
