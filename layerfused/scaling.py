"""GradScaler inside of the step: gradients that were multiplied with a scale, and steps that must not take place."""

import math
from typing import NamedTuple

import torch


class Scaling(NamedTuple):
    """What GradScaler hands to an optimizer with `amp_scaling=True`; one-element tensors, on whatever device.

    Attributes:
        scale: what the gradients were multiplied with; None: they are unscaled already.
        found: not 0 where one of them is not finite; None: nobody has looked.
    """

    scale: torch.Tensor | None
    found: torch.Tensor | None

    def on(self, device: torch.device) -> "Scaling":
        return Scaling(*(None if x is None else torch.as_tensor(x, device=device).reshape(()) for x in self))

    def undone(self, rows: list[tuple], launch) -> list[tuple]:
        """The groups' rows with the scale taken out by the gradients' sign; a launch that scales does it itself."""
        if self.scale is None or launch.scales:
            return rows
        scale = self.on(launch.table.step.device).scale.double()
        scale = scale if launch.live else float(scale)
        return [(row[0] / scale, *row[1:]) for row in rows]

    def unscale_norm(self, launch) -> None:
        """Takes the scale out of a launch's norm, unless it has done so itself."""
        if self.scale is not None and not launch.scales:
            launch.norm.div_(self.on(launch.norm.device).scale)

    def settle(self, launch) -> None:
        """A norm that is not finite lets a step change nothing: so does a gradient that is not."""
        found = self.on(launch.norm.device).found
        if found is not None and not launch.scales:
            launch.norm.masked_fill_(found != 0, math.inf)

    def give(self, launches: list) -> None:
        """Hands both to the launches that look at them on the device."""
        for launch in launches:
            if launch.scales:
                scale, found = self.on(launch.table.step.device)
                launch.grad_scale = None if scale is None else scale.float()
                launch.found_inf = None if found is None else found.float()


def scaling_of(optimizer) -> Scaling | None:
    """What GradScaler has left on the optimizer for this step, if anything."""
    if not optimizer.defaults["amp_scaling"]:
        return None
    given = Scaling(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))
    return None if given == (None, None) else given
