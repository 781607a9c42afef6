"""What the engines that work on addresses share: every step looks at the memory of every tensor anew."""

from array import array
from itertools import chain

import torch

from . import _cpu
from .gradients import check_gradient
from .plan import Phase
from .precision import ways_of
from .table import Table, lies_like

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/storage.h


class Launch:
    """All groups of a table in one native call or kernel launch.

    Attributes:
        absent, moved: how many parameters had no gradient at the last `read()`, whether any lay elsewhere.
        kinds: the storage types of its gradients, a bit for each.
        ways: per parameter the ways of p and of v, as in csrc/storage.h.
        rests, seeds, places: per parameter the address of its rest (0: none), and what its noise is drawn by.
        leads, ahead: whether predicted weights are written beside the true ones, and of how many steps ahead.
    """

    on_chip = 0  # elements up to which a layer is read and written once, whatever its sweeps
    spread = False  # whether its layers lie on several ranks, so that their stats are exchanged before `finish`
    scales = False  # whether it undoes GradScaler's scale, and heeds its verdict, on the device
    live = False  # whether hyper-parameters that are tensors on the device are read there
    leads, ahead = False, 0.0

    def __init__(self, table: Table, state: dict):
        self.table = table
        self._entries = [state[p] for p in table.params]
        for name in table.rule.states:
            types = {entries[name].dtype for entries in self._entries} - STORAGE.keys()
            if types:  # an engine would take it for another type and write over its memory
                raise ValueError(f"state {name!r} has dtype {types.pop()}: cast it to float32, bfloat16 or float16")
        self._reader = _cpu.Reader(table.params, self._entries, table.rule.entries, len(table.rule.states))
        self._copies = []
        self._set_precision()

    def _set_precision(self) -> None:
        table, second = self.table, self.table.rule.states[1:]
        drawn = [entries[second[0]].dtype if second else None for entries in self._entries]
        self.ways = [ways_of(words, p.dtype, v) for words, p, v in zip(table.words, table.params, drawn, strict=True)]
        if any(table.words):
            self._reader.set_ways(*map(list, zip(*self.ways, strict=True)), table.rests)
        named = zip(self._entries, table.rests, strict=True)
        rests = (entries[name].data_ptr() if name else 0 for entries, name in named)
        self.rests, self.seeds, self.places = array("q", rests), array("q", table.seeds), array("q", table.places)

    @staticmethod
    def variant(p: torch.Tensor, entries: dict, rule, words: tuple[str, ...]) -> tuple:
        """What must be alike in one launch, beside rule and device."""
        return ()

    def _look(self) -> list[int]:
        """Addresses of what a step writes beside parameters and states."""
        table = self.table
        return [x.data_ptr() for x in (table.step, table.scalars, self.stats, table.report, self.norm)]

    def read(self) -> bool:
        """Reads every address anew. Answers False if a parameter or state is not what the table was made for.

        Raises:
            ValueError, TypeError: for a gradient that cannot be used; nothing has been written.
        """
        if self._outputs != self._look():  # a packed tensor was given another storage, through one of its views
            return False
        changed, odd, self.moved, self.absent, self.kinds = self._reader.read()
        if changed:
            return False
        self._copies = [self._copy(i) for i in odd]
        return True

    def _copy(self, i: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A gradient that does not lie like its parameter is copied so that it does, for this step."""
        p = self.table.params[i]
        g = check_gradient(p)
        wanted = dtype or (g.dtype if g.dtype in STORAGE else torch.float32)
        if g.dtype != wanted or not lies_like(g, p) or g.is_neg():
            g = torch.empty_like(p, dtype=wanted, memory_format=torch.preserve_format, requires_grad=False).copy_(
                g.detach()
            )
        self._reader.replace_gradient(i, g.data_ptr() or -1, STORAGE[wanted])
        self.kinds |= 1 << STORAGE[wanted]
        return g

    def lead(self, true: list[torch.Tensor] | None, ahead: float, predicted: list[torch.Tensor] | None = None) -> None:
        """From now on weights are read and written in `true`, and predicted ones go to `predicted`.

        Args:
            true: per parameter of the table, a tensor that lies in memory like it; None: no longer.
            ahead: steps that are predicted; 0 copies.
            predicted: tensors like `true`; None: the parameters themselves.
        """
        self.leads, self.true, self.ahead, self.predicted = true is not None, true, ahead, predicted

    def prepare(self, phases: int, rows: list, max_norm: float) -> None:
        """Does what could fail, so that several launches are not left half done by the second's failure."""

    def written(self) -> list:
        """The parameters that a step writes: raw writes are unseen by autograd unless their versions are counted."""
        params = self.table.params
        return [p for p in params if p.grad is not None] if self.absent else params


class DeviceLaunch(Launch):
    """A kernel launch per step: whether the step takes place is decided on the device, and counted there.

    Attributes:
        stats: float64 [layers, terms]: what `reduce` leaves and `finish` takes.
        norm: float64, 0-dim: the gradient norm, computed by the phase NORM or given.
    """

    live = True  # hyper-parameters that are tensors on the device are read there, by the kernel

    def __init__(self, table: Table, state: dict, terms: int):
        super().__init__(table, state)
        self.device = table.step.device
        self.stats = self._zeros(len(table.layers), terms)
        self.norm = self._zeros()
        self._unheeded = torch.zeros((), dtype=torch.int64, device=self.device)  # skips that another launch counts

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def run(self, phases: int, rows: list, max_norm: float, skipped: torch.Tensor | None = None) -> bool:
        """Runs phases of a step. Whether it is skipped is decided on the device, and counted in `skipped` there.

        Raises:
            RuntimeError and what else a launch raises if it fails; the next step begins as if it had not been.
        """
        if phases & Phase.FINISH and phases & Phase.APPLY and not phases & Phase.REDUCE:
            self.run(Phase.FINISH, rows, max_norm)  # nothing of a launch waits for all of its layers
            phases = Phase.APPLY
        here = skipped is not None and skipped.device == self.device
        self._run(phases, rows, max_norm, skipped if here else self._unheeded)
        if skipped is not None and not here and phases & Phase.APPLY and max_norm > 0:
            skipped += (~self.norm.isfinite()).to(skipped.device)
        if phases & (Phase.APPLY | Phase.PREDICT):  # until then another phase may read them
            self._copies = []
            self._reader.release()
        return True

    def _run(self, phases: int, rows: list, max_norm: float, skipped: torch.Tensor) -> None:
        """Brings to the device what changed, and launches."""
        raise NotImplementedError


def numbers_of(rows: list, max_norm: float, ahead: float = 1.0) -> tuple[array, array]:
    """`max_norm`, `ahead` and all rows as numbers, and as places: where a number lives on the device, else 0.

    The address of a float64 is made odd. A number that lives on the device is 0 here.
    """
    values = [max_norm, ahead, *chain.from_iterable(rows)]
    places = array("q", bytes(8 * len(values)))
    if any(issubclass(kind, torch.Tensor) for kind in set(map(type, values))):
        for k, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                values[k], places[k] = 0.0, _place_of(value)
    return array("d", values), places


def _place_of(value: torch.Tensor) -> int:
    return value.data_ptr() + (value.dtype == torch.float64)
