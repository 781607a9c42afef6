"""What a kernel is compiled for: a rule, the types in memory, the phases of a step."""

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property

from .rule import M, P, Rule, Sweep, V
from .storage import KAHAN, MASTER, REMAINDER


@dataclass(frozen=True, eq=False, repr=False)
class Spec:
    """What a kernel is compiled for. Triton tells variants apart by `repr` in a process and `cache_key` on disk.

    Attributes:
        rule: whose mathematics.
        hyper: names of the group's row.
        storage: Triton's types of p, g, m and v in memory.
        tile: elements that are in registers at once, a power of 2.
        phases: which parts of a step (bits as in csrc/plan.h).
        clip: whether gradients are clipped by the global norm.
        live: whether some hyper-parameter is a tensor on the device.
        stateful: whether a layer has a float64 state.
        mixed: whether some layer of a rule with stats is without them (`adapt=False`).
        leads: whether predicted weights are written beside the true ones.
        ways: how p, g, m and v are stored (as in csrc/storage.h): g and m always to nearest.
    """

    rule: Rule
    hyper: tuple[str, ...]
    storage: tuple
    tile: int
    phases: int
    clip: bool
    live: bool
    stateful: bool
    mixed: bool
    leads: bool = False
    ways: tuple[int, ...] = (0, 0, 0, 0)

    @cached_property
    def Row(self):
        return namedtuple("Row", self.hyper)

    @cached_property
    def Started(self):
        return namedtuple("Started", self.rule.scalars.split())

    @cached_property
    def Finished(self):
        return namedtuple("Finished", (self.rule.scalars + " " + self.rule.finished).split())

    @property
    def width(self) -> int:
        """Numbers in a group's row."""
        return len(self.hyper)

    @property
    def both(self) -> Sweep:
        """Both sweeps in one."""
        first, second = self.rule.first, self.rule.second
        return Sweep(first.reads | second.reads, first.writes | second.writes)

    @property
    def terms(self) -> int:
        return self.rule.sums + self.rule.minima

    @property
    def finished(self) -> int:
        return len(self.rule.finished.split())

    @property
    def started(self) -> int:
        return len(self.rule.scalars.split())

    @property
    def couples(self) -> bool:
        return "coupled" in self.rule.scalars.split()

    @property
    def halves(self) -> bool:
        """Whether a parameter has a second half at an address of its own."""
        return self.ways[0] in (MASTER.value, REMAINDER.value, KAHAN.value)

    @property
    def ahead(self) -> Sweep:
        """What a sweep that only predicts needs: the states that `apply` goes by, beside the weight."""
        return Sweep(P | (self.rule.second.reads & (M | V)), 0)

    recalls = property(lambda self: self.rule.recall is not None)
    norms = property(lambda self: self.phases & 1 != 0)
    reduces = property(lambda self: self.phases & 2 != 0)
    finishes = property(lambda self: self.phases & 4 != 0)
    applies = property(lambda self: self.phases & 8 != 0)
    predicts = property(lambda self: self.phases & 16 != 0)
    counted = property(lambda self: self.phases & 48 == 16)  # what is predicted goes by a step that has been counted
    only_norms = property(lambda self: self.phases == 1)
    only_finishes = property(lambda self: self.phases == 4)
    once = property(lambda self: self.phases & 14 == 14)  # a layer is reduced, finished and applied in one launch

    @cached_property
    def cache_key(self) -> str:
        """All that the code depends on, the source of the rule's functions too: Triton looks into no tuple for them."""
        sizes = (self.hyper, self.storage, self.ways, self.tile, self.phases)
        rest = (*sizes, self.clip, self.live, self.stateful, self.mixed, self.leads)
        return " ".join([*(getattr(part, "cache_key", repr(part)) for part in self.rule), repr(rest)])

    def __repr__(self) -> str:
        return self.cache_key
