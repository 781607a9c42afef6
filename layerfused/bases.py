"""What `XGrad` wraps: optimizers whose steps leave predicted weights, by their own launch or in three phases."""

from collections import defaultdict

import torch

from . import reference
from .leading import Lead
from .optimizer import Optimizer
from .rows import keys_of

TORCH = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def base_of(optimizer) -> "Base":
    """The base for an optimizer.

    Raises:
        TypeError, ValueError: if it cannot be wrapped, with the reason.
    """
    if isinstance(optimizer, Optimizer):
        return Ours(optimizer)
    if type(optimizer) in TORCH:
        return Torchs(optimizer)
    known = "layerfused's optimizers, torch.optim.SGD, torch.optim.Adam and torch.optim.AdamW"
    raise TypeError(f"XGrad cannot wrap {type(optimizer).__module__}.{type(optimizer).__qualname__}: it knows {known}")


class Base:
    """An optimizer, its parameters' true weights, and how predictions of them are made.

    A subclass adds `check()` (raises if it cannot be wrapped), `has_stepped()`, `predict(ahead, predicted)` (writes
    predictions from the true weights, or from what the parameters hold) and `keys(group)`.
    """

    def __init__(self, optimizer):
        self.optimizer, self.lead = optimizer, Lead(0)
        self.check()

    def params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def hold(self) -> None:
        """Takes what the parameters hold for their true weights."""
        params = self.params()
        if params:
            torch._foreach_copy_([self.lead.of(p) for p in params], params)

    def restore(self) -> None:
        """Puts the true weights into the parameters."""
        params = self.params()
        if params:
            torch._foreach_copy_(params, [self.lead.of(p) for p in params])

    def kept(self) -> dict:
        """What has to be saved beside the optimizer's state_dict."""
        return {}

    def keep(self, saved: dict) -> None:
        """Takes what `kept()` gave."""

    def add_param_group(self, group: dict) -> None:
        groups = self.optimizer.param_groups
        before = len(groups)
        self.optimizer.add_param_group(group)
        try:
            self.check()
        except BaseException:
            del groups[before:]
            raise

    def let_go(self) -> None:
        """Leaves the optimizer as one that nobody wraps."""
        if self.lead.live:
            with torch.no_grad():
                self.restore()

    def prepare(self, ahead: float, predicted: bool) -> bool:
        """Makes ready for the optimizer's step; whether the parameters still hold predictions."""
        raise NotImplementedError

    def complete(self, ahead: float) -> None:
        """After the optimizer's step."""

    def reached_all(self) -> bool:
        """Whether the last step has written predictions for every parameter."""
        return True

    def shares_layers(self) -> bool:
        """Whether a step of one tensor changes what is predicted of another."""
        return False


class Ours(Base):
    """An optimizer of this package: its launches write true and predicted weights in one sweep."""

    def check(self) -> None:
        optimizer = self.optimizer
        if getattr(optimizer, "needs_closure", False):
            raise TypeError(f"XGrad cannot wrap {type(optimizer).__name__}, whose step() evaluates the model itself")
        if optimizer._spreads:
            raise TypeError("XGrad does not serve DTensor parameters yet: use the optimizer without it")
        if optimizer._released:
            raise ValueError("XGrad cannot wrap an optimizer that releases its gradients: remove() the release first")
        for group in optimizer.param_groups:
            if group["differentiable"]:
                raise ValueError("XGrad cannot wrap differentiable=True: the restored weights would cut the graph")
            if group["precision"] is not None:
                raise ValueError(f"XGrad cannot wrap precision={group['precision']!r}: use precision=None")
            rule = optimizer.rule_of(group)
            if rule.direction is None:
                remedy = "use momentum > 0" if "momentum" in group else "give its lf.Rule a `direction`"
                raise ValueError(f"{type(optimizer).__name__} has nothing to predict weights from: {remedy}")
            if rule.triton is not None and rule.triton.direction is None and "triton" in optimizer.engines:
                raise ValueError(f"the Triton form of rule {rule.name!r} has no `direction`: give it one, too")

    def has_stepped(self) -> bool:
        self.optimizer._current()
        return any(bool(table.step.any()) for table in self.optimizer._tables)

    def _aim(self, ahead: float, predicted: bool) -> None:
        optimizer, lead = self.optimizer, self.lead
        if not predicted:
            self.hold()
        launches = optimizer._current()
        if optimizer._lead is not lead or lead.ahead != ahead:
            optimizer._lead, lead.ahead = lead, ahead
            lead.guide(launches)

    def prepare(self, ahead: float, predicted: bool) -> bool:
        self._aim(ahead, predicted)
        skips = self.optimizer.skipped_steps
        self._skips = int(skips) if skips.device.type == "cpu" else None
        return predicted

    def predict(self, ahead: float, predicted: bool) -> None:
        self._aim(ahead, predicted)
        self.optimizer._predict()

    def let_go(self) -> None:
        super().let_go()
        if self.optimizer._lead is self.lead:
            self.optimizer._lead = None
            for launch in self.optimizer._launches or ():
                launch.lead(None, 0.0)

    def keys(self, group: dict) -> tuple[str, ...]:
        """What of a group a prediction depends on."""
        return keys_of(self.optimizer.rule_of(group))

    def shares_layers(self) -> bool:
        return any(group["layer"] == "group" for group in self.optimizer.param_groups)

    def reached_all(self) -> bool:
        skips = self.optimizer.skipped_steps
        if self.optimizer.defaults["max_grad_norm"] and (skips.device.type != "cpu" or int(skips) != self._skips):
            return False  # on a device nobody knows without waiting for it
        return all(p.grad is not None for p in self.params())

    def kept(self) -> dict:
        reports = self.optimizer._reports()
        return {"reports": [reports[p] for p in self.params()]}

    def keep(self, saved: dict) -> None:
        reports = saved.get("reports", [None] * len(self.params()))
        known = {p: rows for p, rows in zip(self.params(), reports, strict=True) if rows is not None}
        self.optimizer._current()
        for table in self.optimizer._tables:
            table.recall(known)


class Torchs(Base):
    """SGD, Adam or AdamW of torch.optim: the weights are put back, stepped and predicted one after the other."""

    def check(self) -> None:
        for group in self.optimizer.param_groups:
            name = type(self.optimizer).__name__
            if group.get("momentum") == 0:
                raise ValueError(f"torch.optim.{name} without momentum has nothing to predict from: use momentum > 0")
            if group.get("amsgrad") or group.get("differentiable"):
                option = "amsgrad" if group.get("amsgrad") else "differentiable"
                raise ValueError(f"XGrad cannot wrap torch.optim.{name} with {option}=True")

    def has_stepped(self) -> bool:
        return bool(self.optimizer.state)

    def prepare(self, ahead: float, predicted: bool) -> bool:
        if predicted:
            self.restore()
        return False

    def complete(self, ahead: float) -> None:
        if ahead:
            self.predict(ahead, predicted=False)

    def predict(self, ahead: float, predicted: bool) -> None:
        self.restore() if predicted else self.hold()
        for group in self.optimizer.param_groups:
            params = [p for p in group["params"] if self.optimizer.state.get(p)]
            if "momentum" in group:
                params = [
                    p for p in params if group["momentum"] and self.optimizer.state[p]["momentum_buffer"] is not None
                ]
            if params:
                self._predict_group(group, params, ahead)

    def keys(self, group: dict) -> tuple[str, ...]:
        """What of a group a prediction depends on."""
        return "lr", "betas", "eps", "momentum"

    def _predict_group(self, group: dict, params: list, ahead: float) -> None:
        """params -= ahead * lr * delta, by torch's multi-tensor operations."""
        columns = defaultdict(list)
        for p in params:
            for name, value in self.optimizer.state[p].items():
                columns[name].append(value)
        reach = -ahead * float(group["lr"])
        if "momentum_buffer" in columns:
            way = torch._foreach_mul(columns["momentum_buffer"], reach)
        else:
            (beta1, beta2), steps = group["betas"], [int(step) for step in columns["step"]]
            ic1, ic2 = ([1 / (1 - reference.power(float(beta), t)) for t in steps] for beta in (beta1, beta2))
            denominators = torch._foreach_mul(columns["exp_avg_sq"], ic2)
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, group["eps"])
            way = torch._foreach_mul(columns["exp_avg"], [reach * c for c in ic1])
            torch._foreach_div_(way, denominators)
        torch._foreach_add_(params, way)
