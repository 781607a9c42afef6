"""The CPU engine under one table: a plan, a reader of addresses, one native call per step."""

from array import array
from itertools import chain

import torch

from . import _cpu
from .gradients import check_gradient
from .plan import Phase, make_plan
from .table import Table, lies_like

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu/storage.h

CHUNK = 64 * 1024  # elements: four operands of it fit a 2 MiB L2
WHOLE = 64 * 1024  # layers up to this size are one worker's: reduced and applied from its own cache
AHEAD = CHUNK
PER_THREAD = 32 * 1024  # with fewer elements than this per thread, waking one costs more than it brings


class CpuLaunch:
    """One native call per step for all groups of a table.

    Attributes:
        stats: float64 [layers, stats]: what `reduce` leaves and `finish` takes.
        norm: float64, 0-dim: the gradient norm, computed by the phase NORM or given.
        absent, moved: how many parameters had no gradient at the last `read()`, whether any lay elsewhere.
    """

    engine = "cpu"

    def __init__(self, table: Table, state: dict):
        self.table, rule = table, table.rule
        self.stats = torch.zeros(len(table.layers), needs_of(rule)["stats"], dtype=torch.float64)
        self.norm = torch.zeros((), dtype=torch.float64)
        plan = make_plan(table.layers, chunk=CHUNK, whole=WHOLE, ahead=AHEAD, norm=True)
        self._native = _cpu.Engine(rule.name, *plan.packed(), len(table.params))
        self._entries = [state[p] for p in table.params]
        self._reader = _cpu.Reader(table.params, self._entries, rule.entries, len(rule.states))
        self._bind()
        self._elements = sum(span.count for spec in table.layers for span in spec.spans)

    def _bind(self) -> None:
        columns, table = [], self.table
        for name in (*table.rule.states, None, None)[:2]:
            states = [entries[name] for entries in self._entries] if name else []
            absent = [0] * (0 if name else len(self._entries))
            columns.append(array("q", chain(map(torch.Tensor.data_ptr, states), absent)))
            columns.append(array("q", chain((STORAGE[s.dtype] for s in states), absent)))
        self._native.set_states(*columns)
        self._outputs = self._look()
        self._native.set_outputs(*self._outputs)

    def _look(self) -> list[int]:
        table = self.table
        return [x.data_ptr() for x in (table.step, table.scalars, self.stats, table.report, self.norm)]

    def read(self) -> bool:
        """Reads every address anew. Answers False if a parameter or state is not what the table was made for.

        Raises:
            ValueError, TypeError: for a gradient that cannot be used; nothing has been written.
        """
        if self._outputs != self._look():  # a packed tensor was given another storage, through one of its views
            return False
        changed, odd, self.moved, self.absent = self._reader.read()
        if changed:
            return False
        self._copies = [self._copy(i) for i in odd]
        return True

    def _copy(self, i: int) -> torch.Tensor:
        """A gradient that does not lie like its parameter is copied so that it does, for this step."""
        p = self.table.params[i]
        g = check_gradient(p)
        if g.dtype not in STORAGE or not lies_like(g, p) or g.is_neg():
            dtype = g.dtype if g.dtype in STORAGE else torch.float32
            g = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(
                g.detach()
            )
        self._reader.replace_gradient(i, g.data_ptr() or -1, STORAGE[g.dtype])
        return g

    def written(self) -> list:
        """The parameters that a step writes: raw writes are unseen by autograd unless their versions are counted."""
        params = self.table.params
        return [p for p in params if p.grad is not None] if self.absent else params

    def run(self, phases: int, rows: list, max_norm: float) -> bool:
        """Runs phases of a step; False if it is skipped because the gradient norm is not finite."""
        threads = max(1, min(torch.get_num_threads(), self._elements // PER_THREAD))
        happened = self._native.run(phases, self._reader, array("d", chain.from_iterable(rows)), max_norm, threads)
        if phases & Phase.APPLY:  # until then another phase may read them
            self._copies = []
            self._reader.release()
        return happened

    def workspace_bytes(self) -> int:
        tensors = (self.stats, self.table.report, self.norm)
        return self._native.workspace_bytes + self._reader.workspace_bytes + sum(x.nbytes for x in tensors)


def needs_of(rule) -> dict:
    """Stats, operands read and written by each sweep of a rule, as the engine was compiled."""
    needs = _cpu.rules()[rule.name]
    return {**needs, "stats": needs["sums"] + needs["minima"]}
