"""The CUDA engine under one table: a plan on the device, a reader of addresses, one kernel launch per step."""

from array import array

import torch

from . import _cuda
from .forms import needs_of
from .launch import DeviceLaunch, numbers_of
from .plan import make_plan
from .table import Table

CHUNK = 4096  # elements an item works on
WHOLE = _cuda.WHOLE  # a layer of up to so many stays in one block's shared memory, read once and written once
AHEAD = 1 << 20  # elements that are reduced between a layer's last `reduce` and its first `apply`


class CudaLaunch(DeviceLaunch):
    """One kernel launch per step for all groups of a table, whatever the storage types.

    Attributes:
        grad_scale, found_inf: float32, 0-dim tensors on the device as GradScaler has them, or None: what gradients were
            multiplied with, and whether one of them is not finite (then nothing is changed, and the step counts as
            skipped).
    """

    engine = "cuda"
    on_chip, scales = WHOLE, True
    grad_scale = found_inf = None

    def __init__(self, table: Table, state: dict):
        super().__init__(table, state, needs_of(table.rule).terms)
        tensors = len(table.params)
        plan = make_plan(table.layers, chunk=CHUNK, whole=WHOLE, ahead=AHEAD, norm=True)
        self._native = _cuda.Engine(table.rule.name, *plan.packed(), tensors, len(table.groups))
        if any(map(any, self.ways)):
            self._native.set_precision(self.rests, self.seeds, self.places)
        self._workspace = torch.zeros(self._native.workspace_bytes, dtype=torch.uint8, device=self.device)
        self._native.bind(self.device.index or 0, self._workspace.data_ptr(), self._stream())
        self._outputs = self._look()
        self._native.set_outputs(*self._outputs)
        self._addresses, self._types = array("q", bytes(32 * tensors)), array("q", bytes(8 * tensors))
        self._true = self._predicted = array("q")

    def _stream(self) -> int:
        """The current stream, as the number by which the driver knows it."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def lead(self, true: list | None, ahead: float, predicted: list | None = None) -> None:
        super().lead(true, ahead, predicted)
        self._true = array("q", map(torch.Tensor.data_ptr, true or ()))
        self._predicted = array("q", map(torch.Tensor.data_ptr, predicted or ()))

    def prepare(self, phases: int, rows: list, max_norm: float) -> None:
        """As `Launch.prepare`: what is too much for a launch's argument is sent now."""
        self._reader.addresses(self._addresses)
        self._reader.types(self._types)
        predicted = self._predicted
        if self.leads:  # the reader knows of the parameters alone
            predicted = predicted or self._addresses[0::4]
            self._addresses[0::4] = self._true
        numbers = numbers_of(rows, max_norm, self.ahead)
        self._native.give(self._stream(), self._addresses, self._types, *numbers, predicted)

    def _run(self, phases: int, rows: list, max_norm: float, skipped: torch.Tensor) -> None:
        self.prepare(phases, rows, max_norm)
        scaling = [0 if x is None else x.data_ptr() for x in (self.grad_scale, self.found_inf)]
        self._native.run(phases, self._stream(), max_norm > 0, skipped.data_ptr(), *scaling)

    def workspace_bytes(self) -> int:
        tensors = (self._workspace, self.stats, self.table.report, self.norm)
        return self._reader.workspace_bytes + self._native.host_bytes + sum(x.nbytes for x in tensors)
