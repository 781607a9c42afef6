"""Where true and predicted weights lie while an optimizer leads (see `Launch.lead`)."""

import torch

from .table import lies_like


class Lead:
    """True weights in a copy, predictions of them in the parameters.

    Args:
        ahead: steps that are predicted; 0 leaves the true weights in the parameters, too.
    """

    def __init__(self, ahead: float):
        self.ahead, self._copies = ahead, {}

    def of(self, p: torch.Tensor) -> torch.Tensor:
        """The true weights of a parameter; of one that is new, or was given another type or layout, what it holds."""
        copy = self._copies.get(p)
        if copy is None or copy.shape != p.shape or copy.dtype != p.dtype or copy.device != p.device:
            copy = self._copies[p] = torch.empty_like(p, requires_grad=False, memory_format=torch.preserve_format)
            copy.copy_(p.detach())
        elif not lies_like(copy, p):
            copy = self._copies[p] = torch.empty_like(p, requires_grad=False).copy_(copy)
        return copy

    def guide(self, launches: list) -> None:
        """Tells launches from where to where."""
        for launch in launches:
            launch.lead([self.of(p) for p in launch.table.params], self.ahead)

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())
