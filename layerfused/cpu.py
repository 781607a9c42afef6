"""The CPU engine under one table: a plan, a reader of addresses, one native call per step."""

from array import array
from itertools import chain

import torch

from . import _cpu
from .forms import needs_of
from .launch import STORAGE, Launch
from .plan import Phase, make_plan
from .table import Table

CHUNK = 64 * 1024  # elements: four operands of it fit a 2 MiB L2
WHOLE = CHUNK  # layers up to this size are one worker's: reduced and applied from its own cache
AHEAD = CHUNK
PER_THREAD = 32 * 1024  # with fewer elements than this per thread, waking one costs more than it brings


class CpuLaunch(Launch):
    """One native call per step for all groups of a table.

    Attributes:
        stats: float64 [layers, stats]: what `reduce` leaves and `finish` takes.
        norm: float64, 0-dim: the gradient norm, computed by the phase NORM or given.
    """

    engine = "cpu"

    def __init__(self, table: Table, state: dict):
        super().__init__(table, state)
        rule = table.rule
        self.stats = torch.zeros(len(table.layers), needs_of(rule).terms, dtype=torch.float64)
        self.norm = torch.zeros((), dtype=torch.float64)
        plan = make_plan(table.layers, chunk=CHUNK, whole=WHOLE, ahead=AHEAD, norm=True)
        self._native = _cpu.Engine(rule.name, *plan.packed(), len(table.params))
        self._bind()
        self._elements = sum(span.count for spec in table.layers for span in spec.spans)

    def _bind(self) -> None:
        columns, table = [], self.table
        for name in (*table.rule.states, None, None)[:2]:
            states = [entries[name] for entries in self._entries] if name else []
            absent = [0] * (0 if name else len(self._entries))
            columns.append(array("q", chain(map(torch.Tensor.data_ptr, states), absent)))
            columns.append(array("q", chain((STORAGE[s.dtype] for s in states), absent)))
        columns[3] = array("q", (kind | way << 2 for kind, (_, way) in zip(columns[3], self.ways, strict=True)))
        self._native.set_states(*columns)
        if any(self.table.words):
            self._native.set_precision(self.rests, self.seeds, self.places)
        self._outputs = self._look()
        self._native.set_outputs(*self._outputs)

    def lead(self, true: list | None, ahead: float, predicted: list | None = None) -> None:
        super().lead(true, ahead, predicted)
        columns = (array("q", map(torch.Tensor.data_ptr, tensors or ())) for tensors in (true, predicted))
        self._native.lead(*columns, ahead)

    def run(self, phases: int, rows: list, max_norm: float, skipped: torch.Tensor | None = None) -> bool:
        """Runs phases of a step; False if it is skipped, and counted, because the gradient norm is not finite."""
        threads = max(1, min(torch.get_num_threads(), self._elements // PER_THREAD))
        happened = self._native.run(phases, self._reader, array("d", [*chain.from_iterable(rows)]), max_norm, threads)
        if phases & (Phase.APPLY | Phase.PREDICT):  # until then another phase may read them
            self._copies = []
            self._reader.release()
            if phases & Phase.APPLY and not happened and skipped is not None:
                skipped += 1
        return happened

    def workspace_bytes(self) -> int:
        tensors = (self.stats, self.table.report, self.norm)
        return self._native.workspace_bytes + self._reader.workspace_bytes + sum(x.nbytes for x in tensors)
