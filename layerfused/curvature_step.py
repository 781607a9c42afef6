"""A step that evaluates the model twice: what CurvatureSGD and CurvatureAdamW share."""

import math
from collections.abc import Callable, Sequence

import torch

from . import products
from .backends import launch_of
from .compiled import outside_of_graphs
from .forms import needs_of
from .leading import Lead
from .optimizer import Optimizer
from .plan import Phase
from .rule import Rule
from .step import Step
from .table import Table
from .traffic import G, P, passes, predicting, traffic

REPORT = ("param_norm", "direction_norm", "descent", "slope", "sign", "curvature", "step_size")
SIGN = REPORT.index("sign")
WHOLE_OPTIMIZERS = ("step_rule", "estimator", "product")
# |p| over the model times this is how far away the second gradient is taken: what rounding of p leaves of the way
REACH = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
WITHOUT = {
    "amp_scaling": "the step size needs losses and gradients of one scale",
    "max_grad_norm": "its step sizes are bounded by max_step",
    "differentiable": "it differentiates the model itself",
}


class Curvature(Optimizer):
    """What both flavours share: a step that evaluates the model twice, and the launches between.

    Attributes:
        second: the rule of the second launch; `rule` is the first's.
    """

    needs_closure = True
    spreads = takes_precision = False
    second: Rule

    def __init__(self, params, defaults: dict, options: dict, **common):
        for name in WITHOUT:
            if common.get(name):
                raise ValueError(f"{type(self).__name__} has no {name}, got {common[name]!r}: {WITHOUT[name]}")
        self._begin()
        super().__init__(params, {**defaults, **options}, **common)

    def _begin(self) -> None:
        self._reach, self._base = torch.ones((), dtype=torch.float64), 1.0
        self._left, self._copies, self._guided = {}, Lead(1.0), False

    def __setstate__(self, state: dict) -> None:
        self._begin()
        super().__setstate__(state)

    def _option(self, key: str) -> str:
        return self.param_groups[0][key]

    # What the rows take from here

    reach = property(lambda self: self._reach)
    base = property(lambda self: self._base)
    self_concordant = property(lambda self: float(self._option("step_rule") == "self-concordant"))
    signed_average = property(lambda self: float(self._option("estimator") != "joint"))

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        for key in WHOLE_OPTIMIZERS:
            chosen = (self.defaults if group is self.param_groups[0] else self.param_groups[0])[key]
            if group[key] != chosen:
                raise ValueError(f"{key} is the whole optimizer's: pass it to the constructor, not {group[key]!r} here")
        if "momentum" in group and not group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")

    def state_names(self, rule: Rule) -> tuple[str, ...]:
        return (*super().state_names(rule), self.second.scalar)

    def _build(self, agree: bool = False) -> None:
        """As the base's, and a second launch beside each, which shares steps, states and report with it."""
        super()._build(agree)
        self._seconds = []
        for launch in self._launches:
            first = launch.table
            table = Table(self.second, first.groups, first.members)
            table.step, table.report = first.step, first.report
            table.adopt_scalars(self.state)
            self._seconds.append(launch_of(launch.engine)(table, self.state))
        self._guided = False
        device = self._params[0].device if self._params else None
        self._reach = self._reach.to(device)

    # The step

    @outside_of_graphs
    def step(self, closure: Callable | Sequence[Callable]):
        """Takes one step.

        Args:
            closure: evaluates the model and returns the loss, a tensor with one element and a graph, without calling
                `backward()`; it is called twice, with the same random numbers. A sequence of closures stands for
                micro-batches, whose losses are added.

        Returns:
            The loss at the parameters that the step began with, detached. `p.grad` holds its gradients.

        Raises:
            TypeError, ValueError, RuntimeError: for a closure that is none of that, or gradients in `p.grad` that are
                not this optimizer's own; nothing is changed then. If the second evaluation fails, the parameters are
                as they were; the averages of the gradients have seen the first.
        """
        closures = products.checked_closures(closure)
        self._current()
        products.check_left_over(self._params, self._left)
        double = self._option("product") == "double-backward"
        if double and self._guided:  # it was the other one before
            self._build()
        self._held = False
        way = (products.DoubleBackward if double else products.FiniteDifference)(self._params, closures)
        loss = way.first()
        try:
            launches = self._read()
            if launches:
                self._take(way, launches)
        except BaseException:
            self._undo()
            raise
        finally:
            way.put_back()
            self._left = {p: (p.grad, p.grad._version) for p in self._params if p.grad is not None}
        return loss

    @torch.no_grad()
    def _undo(self) -> None:
        """Puts the weights back."""
        if self._held:
            torch._foreach_copy_(self._params, [self._copies.of(p) for p in self._params])

    def _hold(self) -> None:
        """Keeps the weights that the step begins with, from which it goes on after the parameters were moved."""
        torch._foreach_copy_([self._copies.of(p) for p in self._params], self._params)
        if not self._guided:
            for launch, second in zip(self._launches, self._seconds, strict=True):
                true = [self._copies.of(p) for p in launch.table.params]
                launch.lead(true, 1.0)
                second.lead(true, 0.0)
        self._guided = self._held = True

    @torch.no_grad()
    def _take(self, way, launches: list) -> None:
        seconds = [self._seconds[self._launches.index(launch)] for launch in launches]
        step = Step(self, launches, math.inf)
        if way.moves:
            self._hold()
        phases = step.find_norm()
        for launch, own in zip(launches, step.rows, strict=True):
            # a gradient that is not finite makes all launches of this step change nothing
            launch.run(phases & ~Phase.APPLY, own, math.inf)
        self._base = way.base
        self._reach.fill_(1.0)
        if way.moves:
            self._find_reach(launches)
        with way.along(self, launches) as gradients_at:
            gradients = self._gradients(launches, gradients_at)
        if [g is None for g in gradients] != [p.grad is None for p in self._params]:
            raise RuntimeError("the closure gave other parameters a gradient when it was called again")
        for p, g in zip(self._params, gradients, strict=True):
            p.grad = g
        for launch, second in zip(launches, seconds, strict=True):
            if not second.read():
                raise RuntimeError("the closure changed parameters or states of the optimizer")
            second.norm.copy_(launch.norm)
        skipped = self.skipped_steps
        for second in seconds:
            if second.run(Phase.STEP & ~Phase.NORM, self._rows(second), math.inf, skipped):
                torch.autograd.graph.increment_version(second.written())
            skipped = None

    def _find_reach(self, launches: list) -> None:
        """How far along the direction the gradient is taken once more."""
        sums = sum(self._squares(launch).to(self._reach.device) for launch in launches)
        norm, length = sums.sqrt().unbind()
        relative = max(REACH.get(p.dtype, 1e-3) for p in self._params)
        self._reach.copy_(relative * torch.where(norm > 0, norm, 1.0) / torch.where(length > 0, length, 1.0))

    @staticmethod
    def _squares(launch) -> torch.Tensor:
        """|p|^2 and |d|^2 over the layers that have a gradient, float64 on the launch's device."""
        norms = launch.table.report[:, :2]
        if launch.absent:
            there = [p.grad is not None for p in launch.table.params]
            here = [any(there[span.tensor] for span in spec.spans) for spec in launch.table.layers]
            norms = norms[torch.tensor(here, device=norms.device)]
        return norms.square().sum(0)

    def _gradients(self, launches: list, gradients_at: Callable) -> list:
        """The second gradients: along all directions at once, with random signs, or layer by layer."""
        tables = [launch.table for launch in launches]
        if self._option("estimator") != "exact":
            for table, signs in zip(tables, self._signs(tables), strict=True):
                table.report[:, SIGN] = signs
            return gradients_at()
        return self._blocks(tables, gradients_at)

    def _signs(self, tables: list[Table]) -> list:
        if self._option("estimator") == "joint":
            return [1.0] * len(tables)
        # of their own, so that every rank draws the same and the user's random numbers are not touched
        generator = torch.Generator().manual_seed(int(max(table.step.max() for table in self._tables)))
        return [2.0 * torch.randint(2, table.report.shape[:1], generator=generator) - 1 for table in tables]

    def _blocks(self, tables: list[Table], gradients_at: Callable) -> list:
        """A product for each layer, of which that layer's own part is kept."""
        parts = {}
        for table in tables:
            table.report[:, SIGN] = 0.0
        for table in tables:
            for number, spec in enumerate(table.layers):
                table.report[number, SIGN] = 1.0
                at = dict(zip(self._params, gradients_at(), strict=True))
                products.keep_part(parts, at, [(table.params[span.tensor], span) for span in spec.spans])
                table.report[number, SIGN] = 0.0
        for table in tables:
            table.report[:, SIGN] = 1.0
        return [parts.get(p) for p in self._params]

    def predict_along(self, launches: list, true: list | None) -> None:
        """Writes p + reach*sign*d into the parameters, or sign*d into tensors of zeros."""
        for launch in launches:
            if true is not None:
                at = dict(zip(self._params, true, strict=True))
                own = [at[p] for p in launch.table.params]
                launch.lead(own, 1.0, own)
            launch.run(Phase.PREDICT | Phase.UNCOUNTED, self._rows(launch), math.inf)

    def workspace_bytes(self) -> int:
        """As `Optimizer.workspace_bytes`, with the weights kept for finite differences."""
        return super().workspace_bytes() + sum(s.workspace_bytes() for s in self._seconds) + self._copies.nbytes

    def traffic(self) -> dict[str, int]:
        """As `Optimizer.traffic`: what the launches of one step move, and with finite differences the kept weights.

        A first pass over the gradients tells whether they are finite, a second finds the direction; then comes the move
        along it, and the second launch. What the model moves is not in it, nor the products that "exact" repeats.
        """
        moves, total = self._option("product") == "finite-difference", {"compulsory": 0, "requested": 0}
        for launch, second in zip(self._launches, self._seconds, strict=True) if self._current() else ():
            needs, table = needs_of(self.rule), launch.table
            first = passes(table, self.state, [(G, 0), needs.first, predicting(needs), (P * moves, P * moves)])
            for key, count in traffic(second.table, self.state, False, second.on_chip, moves).items():
                total[key] += first + count
        return {**total, "launches": 3 * sum(launch.engine != "reference" for launch in self._launches)}
