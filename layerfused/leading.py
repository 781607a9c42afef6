"""Where true and predicted weights lie while an optimizer leads (see `Launch.lead`)."""

import torch

from .table import untouched_like


class Lead:
    """True weights in copies, predictions of them in the parameters.

    Args:
        ahead: steps that are predicted; 0 leaves the true weights in the parameters, too.

    Attributes:
        copies: parameter -> its true weights.
        live: whether the parameters hold predictions.
    """

    def __init__(self, ahead: float):
        self.ahead, self.copies, self.live = ahead, {}, False

    def of(self, p: torch.Tensor) -> torch.Tensor:
        """The true weights of a parameter; of one that is new, or was given another type or layout, what it holds."""
        known = self.copies.get(p)
        like = known is not None and (known.shape, known.dtype, known.device) == (p.shape, p.dtype, p.device)
        if not like or known.stride() != strides_like(p):
            known = self.copies[p] = untouched_like(p, p.dtype).copy_(known if like else p.detach())
        return known

    def guide(self, launches: list) -> None:
        """Tells launches from where to where."""
        for launch in launches:
            launch.lead([self.of(p) for p in launch.table.params], self.ahead)

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies.values())


def strides_like(p: torch.Tensor) -> tuple[int, ...]:
    """How a tensor made like `p` lies in memory: as `p` does, and without its gaps."""
    return torch.empty_like(p, device="meta", memory_format=torch.preserve_format).stride()
