"""One step of an optimizer: the order in which launches, the global norm and the ranks take their turns."""

import math
import warnings

import torch

from .exchange import group_device, summed
from .plan import Phase
from .scaling import Scaling


class Step:
    """What the launches of one step are given.

    Args:
        optimizer: whose step.
        launches: those that take part, their addresses read.
        max_norm: what gradients are clipped to; 0: not at all.
        scaling: what GradScaler has left for this step.
    """

    def __init__(self, optimizer, launches: list, max_norm: float, scaling: Scaling | None = None):
        self.optimizer, self.launches, self.max_norm, self.scaling = optimizer, launches, max_norm, scaling
        self.rows = [optimizer._rows(launch) for launch in launches]
        if scaling:
            self.rows = [scaling.undone(own, launch) for launch, own in zip(launches, self.rows, strict=True)]

    def take(self, grad_norm: torch.Tensor | float | None) -> None:
        """Takes the step.

        Args:
            grad_norm: the norm to clip by, if it is known already.
        """
        optimizer, scaling = self.optimizer, self.scaling
        if scaling:
            scaling.give(self.launches)
        phases = self.find_norm(grad_norm)
        work = [(launch, own, self._bound(launch)) for launch, own in zip(self.launches, self.rows, strict=True)]
        if len(work) > 1:
            for launch, *given in work:
                launch.prepare(phases, *given)
        self._exchange(work)
        skipped = optimizer.skipped_steps  # all launches skip together, and the first counts it
        for launch, *given in work:
            if launch.run(phases & ~Phase.REDUCE if launch.spread else phases, *given, skipped):
                torch.autograd.graph.increment_version(optimizer._parts.versions(launch.written()))
            elif not scaling:
                self._warn_of_skip()
            launch.table.note_rests()
            skipped = None
        if scaling:
            Scaling(None, None).give(self.launches)

    def find_norm(self, given: torch.Tensor | float | None = None) -> int:
        """Puts the norm into every launch that needs it, and answers the phases that are left.

        Raises:
            ValueError: for a given norm that is none, or that nobody asked for.
        """
        norm, scaling = self.optimizer.grad_norm, self.scaling
        natively = scaling is None or all(launch.scales for launch in self.launches)
        if given is not None:
            check_given(given, self.max_norm)
            norm.copy_(torch.as_tensor(given).reshape(()), non_blocking=True)
        elif not self.max_norm:
            if natively:
                return Phase.STEP & ~Phase.NORM
            norm.zero_()
        elif natively and self._is_one():
            return Phase.STEP
        else:
            norm.copy_(self._total_norm())
        for launch in self.launches:
            if launch.norm is not norm:
                launch.norm.copy_(norm)
            if scaling:
                scaling.settle(launch)
        return Phase.STEP & ~Phase.NORM

    def _is_one(self) -> bool:
        """Whether one launch finds the whole norm by itself."""
        one = self.optimizer
        return len(one._launches) == len(self.launches) == 1 and not one._exchanges and one.norm_group is None

    def _total_norm(self) -> torch.Tensor:
        """The norm of all gradients, wherever they lie."""
        group, device = self.optimizer.norm_group, self.optimizer.grad_norm.device
        for launch, own in zip(self.launches, self.rows, strict=True):
            launch.run(Phase.NORM, own, self.max_norm)
            if self.scaling:
                self.scaling.unscale_norm(launch)
        squares = [launch.norm.to(device) ** 2 for launch in self.launches if not launch.spread]
        squares += [exchange.squared_norm().to(device) for exchange in self.optimizer._exchanges]
        total = sum(squares, torch.zeros((), dtype=torch.float64, device=device))
        if group is not None:
            total = summed(total.reshape(1).to(group_device(group)), group)[0].to(device)
        return total.sqrt()

    def _bound(self, launch) -> float:
        """What a launch clips to: with a bound of infinity it looks at its norm for the step's sake alone."""
        return self.max_norm or (math.inf if self.scaling and not launch.scales else 0.0)

    def _exchange(self, work: list[tuple]) -> None:
        """Takes the stats of layers that are spread over ranks, of what lies here and then of all."""
        given = {id(launch): rest for launch, *rest in work}
        for exchange in self.optimizer._exchanges:
            if exchange.size:
                for launch in exchange.launches:
                    launch.run(Phase.REDUCE, *given[id(launch)])
                exchange.run()

    def _warn_of_skip(self) -> None:
        """Once, and where the host knows without waiting for a device."""
        if not self.optimizer._warned:
            self.optimizer._warned = True
            warnings.warn(
                f"the gradient norm is {float(self.optimizer.grad_norm)}: this step changed nothing. Such steps are "
                "counted in skipped_steps; this warning is not repeated",
                stacklevel=6,  # the caller of step(), around which torch has put a wrapper
            )


def check_given(norm: torch.Tensor | float, max_norm: float) -> None:
    """Raises ValueError for a given norm that is not one number >= 0, or that nobody asked for."""
    if not max_norm:
        raise ValueError("grad_norm needs max_grad_norm: pass max_grad_norm to the constructor")
    if torch.as_tensor(norm).numel() != 1:
        raise ValueError(f"grad_norm must have one element, got shape {tuple(torch.as_tensor(norm).shape)}")
    if (not isinstance(norm, torch.Tensor) or norm.device.type == "cpu") and float(norm) < 0:
        raise ValueError(f"grad_norm must be >= 0, got {float(norm)}")
