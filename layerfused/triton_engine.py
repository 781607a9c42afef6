"""The Triton engine under one table: a plan on the device, a reader of addresses, one kernel launch per step."""

from array import array
from contextlib import nullcontext
from functools import cache
from itertools import chain

import torch
import triton.language as tl

from .forms import triton_form
from .kernels import INTERPRETED, Spec, engine, tables
from .launch import STORAGE, DeviceLaunch, numbers_of
from .plan import Phase, make_plan
from .precision import STOCHASTIC, ways_of
from .table import Table, state_dtype

TILE = 1024  # elements in registers at once, a power of 2; a layer of up to so many is read once and written once
CHUNK = 4 * TILE  # what an item costs beside its elements (ticket, rows, fence) is paid once for four tiles
AHEAD = 1 << 21  # elements: what 4 programs on each of 132 multiprocessors have in flight, so an apply rarely waits
WARPS = 4
PROGRAMS = 4  # on each multiprocessor: what 128 registers a thread allow
REGISTERS = 128  # without a bound ptxas aims lower and spills

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonLaunch(DeviceLaunch):
    """One kernel launch per step for all groups of a table, whose tensors share their storage types."""

    engine = "triton"

    def __init__(self, table: Table, state: dict):
        self._form = triton_form(table.rule)
        super().__init__(table, state, self._form.sums + self._form.minima)
        *types, p_way, v_way = self.variant(table.params[0], self._entries[0], table.rule, table.words[0])
        self._storage, self._ways = [TYPES[dtype] for dtype in types], (p_way, 0, 0, v_way)
        self.on_chip = TILE
        self._mixed = not all(spec.stats for spec in table.layers)
        self._compiled = set()
        self._make_plan()
        self._make_given()
        self._outputs = self._look()

    @staticmethod
    def variant(p: torch.Tensor, entries: dict, rule, words: tuple[str, ...]) -> tuple:
        """What must be alike in one launch: the storage types of p, m and v, and the ways of p and v."""
        states = [entries[name].dtype if name in entries else state_dtype(p, words) for name in rule.states]
        types = (p.dtype, *(*states, torch.float32, torch.float32)[:2])
        return *types, *ways_of(words, p.dtype, types[2])

    def _make_plan(self) -> None:
        table, layers = self.table, len(self.table.layers)
        plan = make_plan(table.layers, chunk=CHUNK, whole=TILE, ahead=AHEAD, norm=True)
        counters = engine.ARRIVED.value + 2 * layers
        sizes = array("q", (len(plan.items), len(plan.chunks), layers, len(table.params), counters))
        rows = [torch.frombuffer(row, dtype=torch.int64).to(self.device, copy=True) for row in (sizes, *plan.packed())]
        self._plan, self._items = tables.Plan(*rows), len(plan.items)
        finished = len(self._form.finished.split())
        self._work = tables.Work(
            torch.zeros(counters, dtype=torch.int32, device=self.device),
            self._zeros(1 + self.stats.shape[1], len(plan.chunks)),
            torch.zeros(layers * finished, dtype=torch.float32, device=self.device),
        )

    def _make_given(self) -> None:
        """One stretch of memory for all that the host says, so that one copy brings it to the device."""
        tensors, layers = len(self.table.params), len(self.table.layers)
        row = 2 + len(self.table.groups) * (1 + len(self.table.rule.hyper))
        halves, drawn = self.table.rests[0] is not None, STOCHASTIC in self._ways
        sizes = (4 * tensors, tensors, layers, row, row, tensors * self.leads, tensors * halves, 2 * tensors * drawn)
        begins = [0]
        for size in sizes:
            begins.append(begins[-1] + size + size % 2)  # each at a multiple of 16 bytes
        self._host = array("q", bytes(8 * begins[-1]))
        self._host_tensor = torch.frombuffer(self._host, dtype=torch.int64)
        self._device = torch.zeros_like(self._host_tensor, device=self.device)
        view, parts = memoryview(self._host), list(zip(begins, sizes, strict=False))
        here = [view[begin : begin + size] for begin, size in parts]
        self._addresses, self._counted, self._elements, self._row, self._place, self._ahead, rests, noise = here
        if halves:
            rests[:] = self.rests
        if drawn:
            noise[:] = array("q", chain.from_iterable(zip(self.seeds, self.places, strict=True)))
        there = [self._device[begin : begin + size] for begin, size in parts]
        there[3] = there[3].view(torch.float64)
        self._given, self._sent, self._present = tables.Given(*there), b"", None

    def lead(self, true: list | None, ahead: float, predicted: list | None = None) -> None:
        led = self.leads
        super().lead(true, ahead, predicted)
        self._led = [None if tensors is None else addresses_of(tensors) for tensors in (true, predicted)]
        if led != self.leads:
            present = self._present or [True] * len(self.table.params)
            self._make_given()
            self._count(present)

    # The step

    def read(self) -> bool:
        """As `Launch.read`; a launch has one storage type for all gradients, float32 where they have several."""
        if not super().read():
            return False
        present = [p.grad is not None for p in self.table.params] if self.absent else None
        if self.kinds & (self.kinds - 1):
            found = enumerate(self._reader.g_storage)
            others = [k for k, kind in found if kind != STORAGE[torch.float32] and (present is None or present[k])]
            self._copies += [self._copy(k, torch.float32) for k in others]
            self.kinds = 1 << STORAGE[torch.float32]
        self._gradients = list(TYPES.values())[max(self.kinds.bit_length() - 1, 0)]
        if self._sent == b"" or present != self._present:
            self._present = present
            self._count(present or [True] * len(self.table.params))
        return True

    def _count(self, present: list[bool]) -> None:
        """Elements per layer that take part in this step, and which tensors count it."""
        counted = [0] * len(present)
        for number, spec in enumerate(self.table.layers):
            taking = [span.stands_for for span in spec.spans if present[span.tensor]]
            self._elements[number] = sum(taking) if taking else -1
            for span in spec.spans:
                counted[span.tensor] |= bool(taking)
        self._counted[:] = array("q", counted)

    def _run(self, phases: int, rows: list, max_norm: float, skipped: torch.Tensor) -> None:
        live = self._send(rows, max_norm)
        self._launch(self._table(skipped), self._spec(phases, max_norm > 0, live))

    def prepare(self, phases: int, rows: list, max_norm: float) -> None:
        """As `Launch.prepare`: what the host says is sent, and what is not yet compiled, is."""
        spec = self._spec(phases, max_norm > 0, self._send(rows, max_norm))
        if not INTERPRETED and spec not in self._compiled:
            with self._on_device():
                engine.run.warmup(self._table(self._unheeded), spec, grid=(1,), **options())
            self._compiled.add(spec)

    def _table(self, skipped: torch.Tensor) -> tables.Table:
        table = self.table
        kept = tables.Kept(table.step, table.scalars, self.stats, table.report, self.norm, skipped)
        return tables.Table(self._plan, self._given, kept, self._work)

    def _spec(self, phases: int, clip: bool, live: bool) -> Spec:
        rule, p, *states = self.table.rule, *self._storage
        g = tl.float32 if phases & Phase.PREDICT else self._gradients  # not looked at
        leads = self.leads and phases & (Phase.APPLY | Phase.PREDICT) != 0
        rest = TILE, phases, clip, live, bool(rule.scalar), self._mixed, leads
        return spec_of(self._form, rule.hyper, (p, g, *states), *rest, self._ways)

    def _launch(self, table: tables.Table, spec: Spec) -> None:
        grid = (min(self._items, programs(self.device)),)
        try:
            with self._on_device():
                engine.run[grid](table, spec, **options())
        except BaseException:
            self._work.counters.zero_()
            raise

    def _on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _send(self, rows: list, max_norm: float) -> bool:
        """Brings what the host says to the device if it has changed; whether some value lives there already."""
        numbers, places = numbers_of(rows, max_norm, self.ahead)
        self._reader.addresses(self._addresses)
        if self.leads:
            own, (true, predicted) = self._addresses[::4], self._led
            self._ahead[:] = own if predicted is None else predicted
            own[:] = true
        self._place[:] = places
        self._row.cast("B").cast("d")[:] = numbers
        now = self._host.tobytes()
        if now != self._sent:
            self._upload()
            self._sent = now
        return any(places)

    def _upload(self) -> None:
        self._sent = b""
        if self.device.type != "cuda":
            self._device.copy_(self._host_tensor)
            return
        with self._on_device():
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "addresses or hyper-parameters changed since the last step, which a CUDA graph cannot capture: "
                    "take one step with these gradients and groups before the capture"
                )
            # torch keeps the pinned copy until the device has read it
            self._device.copy_(self._host_tensor.pin_memory(), non_blocking=True)

    def workspace_bytes(self) -> int:
        tensors = (*self._plan, *self._work, self._device, self.stats, self.table.report, self.norm)
        return self._reader.workspace_bytes + len(self._host) * 8 + sum(x.nbytes for x in tensors)


def addresses_of(tensors: list[torch.Tensor]) -> array:
    return array("q", map(torch.Tensor.data_ptr, tensors))


@cache
def spec_of(*fields) -> Spec:
    """One object per variant: its key is long to make."""
    return Spec(*fields)


def options() -> dict:
    """How the kernel is compiled. enable_fp_fusion: a contracted a*b+c has other bits than the CPU's."""
    bound = {} if torch.version.hip else {"maxnreg": REGISTERS}  # AMD's compiler has no such option
    return {"num_warps": WARPS, "enable_fp_fusion": False, **bound}


@cache
def programs(device: torch.device) -> int:
    """How many programs fill a device."""
    if device.type != "cuda":
        return 1  # the interpreter runs one after the other
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
