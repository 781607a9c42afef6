"""SGD, with momentum and without."""

from . import reference
from .optimizer import Optimizer
from .rule import Rule


class SGD(Optimizer):
    """Stochastic gradient descent, step for step as torch.optim.SGD.

    Args:
        params: see `Optimizer`.
        lr: step size, >= 0; a float or a 0-dim tensor.
        momentum: >= 0; with 0 nothing is stored.
        dampening: of what enters the buffer, any number; the first step is not damped, as in torch.
        weight_decay: coupled L2, >= 0.
        nesterov: step along g + momentum * buf; needs momentum > 0 and dampening 0.
        common: `max_grad_norm`, `maximize`, `differentiable`, `backend`, `foreach`, `fused`, `capturable`,
            `precision`, `seed`, `norm_group`, `amp_scaling`: see `Optimizer`.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    rule = Rule(
        name="sgd",
        hyper=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        states=("momentum_buffer",),
        reference=reference.sgd,
        direction=reference.buffer_direction,
        layerwise=False,
    )
    plain = Rule(name="sgd_plain", hyper=("lr", "weight_decay"), reference=reference.sgd_plain, layerwise=False)

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, **common):
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, defaults, **common)

    def rule_of(self, group):
        return self.rule if group["momentum"] else self.plain

    def state_dict(self):
        """As `Optimizer.state_dict`; a buffer not filled yet is None where torch's would damp its first step.

        Elsewhere its zeros do as well, and torch.distributed.checkpoint needs a tensor to load into.
        """
        saved = super().state_dict()
        damped = {key for group in saved["param_groups"] if group["dampening"] for key in group["params"]}
        for key in damped & saved["state"].keys():
            own = saved["state"][key]
            if "momentum_buffer" in own and not own["step"]:
                saved["state"][key] = {**own, "momentum_buffer": None}
        return saved
