"""The table of one launch: which tensors it takes, how they are cut into layers, and where its results go."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from . import _cpu
from .plan import LayerSpec, Span, cut_rows
from .precision import RESTS, STATES, place_of, rest_dtype, rest_of, way_of, words_of
from .rule import Rule
from .storing import begin_anew


def state_dtype(parameter: torch.Tensor, words: Sequence[str] = ()) -> torch.dtype:
    """States are float32 whatever the parameter's type, unless `precision` says otherwise; float64 keeps float64."""
    if STATES in words:
        return torch.bfloat16
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gap or overlap, in whatever order."""
    if 0 in tensor.shape:
        return True  # whatever its strides: an empty shard of columns has those of the whole
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def rows_outermost(tensor: torch.Tensor) -> bool:
    """Whether each index of dimension 0 is a stretch of memory of its own."""
    if tensor.ndim == 0 or tensor.shape[0] <= 1 or tensor.numel() == 0:
        return True
    return tensor.stride(0) * tensor.shape[0] == tensor.numel()


class Table:
    """Parameters of one rule on one device, with their layers and what every engine writes for them.

    Args:
        rule, groups: the rule and the parameter groups.
        members: the parameters, group by group.
        parts: the `Parts` that say what these tensors are in the optimizer; None: each is whole, and numbered as here.

    Attributes:
        members: the parameters, group by group.
        params: the same in one list.
        layers: a `LayerSpec` per layer, in the order of the parameters.
        slots: per parameter, its range of slots for the scalars of its layers.
        layer_slots: per layer, its range of slots: one, or with layer="group" one per member, kept alike.
        words, rests: per parameter, what its group's `precision` says, and the name in `state` of its rest, or None.
        seeds, places: per parameter, what its noise is drawn by.
        step: float32 [parameters], of which `state["step"]` are views (one addition counts them all).
        scalars: float64 [slots], of which `state[rule.scalar]` are views.
        report: float64 [layers, len(rule.report)], overwritten by every step.
    """

    def __init__(self, rule: Rule, groups: list[dict], members: Sequence[Sequence[torch.Tensor]], parts=None):
        self.rule, self.groups, self.members = rule, groups, members
        self._spans = parts.spans if parts else whole_spans
        self.params = [p for params in members for p in params]
        self.words = [words_of(g["precision"]) for g, params in zip(groups, members, strict=True) for _ in params]
        self.rests = [rest_of(words, p.dtype) for words, p in zip(self.words, self.params, strict=True)]
        self.seeds = [group["seed"] for group, params in zip(groups, members, strict=True) for _ in params]
        self._kept = []  # of the parameters with a rest: itself, rest, way, and when they belonged together
        self.places = [parts.place(p) if parts else place_of(i) for i, p in enumerate(self.params)]
        self.layers, self.slots, self.layer_slots = [], [], []
        first = 0
        for number, (group, params) in enumerate(zip(groups, members, strict=True)):
            self._add_group(number, group, params, first)
            first += len(params)
        device = self.params[0].device
        self.step = torch.zeros(len(self.params), dtype=torch.float32, device=device)
        slots = self.slots[-1].stop if rule.scalar and self.slots else 0
        self.scalars = torch.zeros(slots, dtype=torch.float64, device=device)
        self.report = torch.zeros(len(self.layers), len(rule.report), dtype=torch.float64, device=device)

    def _add_group(self, number: int, group: dict, params: Sequence[torch.Tensor], first: int) -> None:
        rule, layer = self.rule, group["layer"]
        stats = rule.layerwise and group["adapt"]
        slot = self.slots[-1].stop if self.slots else 0
        if layer == "group" and rule.layerwise and params:
            spans = tuple(self._spans(i, p, "tensor")[0][0] for i, p in enumerate(params, first))
            self.layers.append(LayerSpec(spans, number, stats))
            self.slots += [range(slot + i, slot + i + 1) for i in range(len(params))]
            self.layer_slots.append(range(slot, slot + len(params)))
            return
        for i, p in enumerate(params, first):
            cut = self._spans(i, p, layer if rule.layerwise else "tensor")
            self.layers += [LayerSpec(tuple(spans), number, stats) for spans in cut]
            self.layer_slots += [range(k, k + 1) for k in range(slot, slot + len(cut))]
            self.slots.append(range(slot, slot + len(cut)))
            slot += len(cut)

    def adopt(self, state: dict) -> None:
        """Makes the entries of `state` that are missing, and gathers steps and layer scalars into packed tensors.

        Raises:
            ValueError: if an entry does not fit its parameter.
        """
        for i, p in enumerate(self.params):
            entries = state[p]
            for name in self.rule.states:
                entries[name] = fitting_state(entries.get(name), p, name, self.words[i])
            for name in {*RESTS.values()} - {*self.rule.entries}:
                old = entries.pop(name, None)
                if name == self.rests[i]:
                    entries[name] = fitting_rest(old, p, name)
                    self._kept.append([p, entries[name], way_of(self.words[i], p.dtype), None])
            self._pack(entries, "step", self.step[i])
        self.adopt_scalars(state)
        self.check_steps()

    def check_rests(self) -> None:
        """Makes rests fit again whose parameter somebody else may have written since `note_rests`."""
        for p, rest, way, seen in self._kept:
            if seen != (p._version, p.data_ptr()):
                begin_anew(p.detach(), rest, way)

    def note_rests(self) -> None:
        """Parameters and rests belong together now."""
        for one in self._kept:
            one[3] = one[0]._version, one[0].data_ptr()

    def adopt_scalars(self, state: dict) -> None:
        """The part of `adopt` that is about layer scalars."""
        for p, slots in zip(self.params, self.slots, strict=True):
            if self.rule.scalar:
                view = self.scalars[slots.start] if len(slots) == 1 else self.scalars[slots.start : slots.stop]
                self._pack(state[p], self.rule.scalar, view)

    def recall(self, reports: dict) -> None:
        """Takes over what was reported of the parameters' layers before, where they are cut as they were."""
        known = [reports.get(p) for p in self.params]
        if not self.rule.report or all(rows is None for rows in known):
            return
        report = self.report.cpu()
        for rows, numbers in zip(known, self.layers_of(), strict=True):
            if rows is not None and rows.shape == (len(numbers), len(self.rule.report)):
                report[numbers] = rows
        self.report.copy_(report)

    @staticmethod
    def _pack(entries: dict, name: str, view: torch.Tensor) -> None:
        old = entries.get(name)
        if old is not None:
            old = torch.as_tensor(old)
            if old.numel() != view.numel():
                raise ValueError(
                    f"state {name!r} has {old.numel()} values where the layers of its parameter need {view.numel()}"
                )
            view.copy_(old.reshape(view.shape))
        entries[name] = view

    def operand_bytes(self, state: dict) -> list[tuple[int, int, int, int]]:
        """Per parameter, the bytes of one element of p, g, m and v."""
        names = (*self.rule.states, None, None)[:2]
        sizes = []
        for p in self.params:
            g = p.element_size() if p.grad is None else p.grad.element_size()
            sizes.append((p.element_size(), g, *(state[p][n].element_size() if n else 0 for n in names)))
        return sizes

    def rest_bytes(self) -> list[tuple[int, int]]:
        """Per parameter, the bytes of an element that reading and writing it take beside its own."""
        costs = {"master": (2, 4), "remainder": (2, 2), "compensation": (2, 2)}  # a master is read alone
        return [costs.get(name, (0, 0)) for name in self.rests]

    def layers_of(self) -> list[list[int]]:
        """Per parameter, the numbers of the layers that it has a part in."""
        numbers = [[] for _ in self.params]
        for number, spec in enumerate(self.layers):
            for tensor in {span.tensor for span in spec.spans}:
                numbers[tensor].append(number)
        return numbers

    def check_steps(self) -> None:
        """Raises ValueError if the tensors of one layer have not taken the same number of steps."""
        for spec in self.layers:
            tensors = {span.tensor for span in spec.spans}
            if len(tensors) == 1:
                continue  # agrees with itself; reading it would synchronise
            steps = {float(self.step[tensor]) for tensor in tensors}
            if len(steps) > 1:
                raise ValueError(f"the tensors of a layer='group' must agree in step, got {sorted(steps)}")


def whole_spans(number: int, tensor: torch.Tensor, layer) -> list[list[Span]]:
    """The layers of a tensor that is all here: one span each."""
    sizes = cut_rows(tensor.shape, layer)
    return [[Span(number, end - size, size)] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def fitting_state(old: torch.Tensor | None, p: torch.Tensor, name: str, words: Sequence[str] = ()) -> torch.Tensor:
    """An elementwise state that lies in memory like its parameter: `old` itself if it does, else a copy, else zeros."""
    if old is None:
        return untouched_like(p, state_dtype(p, words)).zero_()
    if old.shape != p.shape:
        raise ValueError(f"state {name!r} has shape {tuple(old.shape)}, its parameter has {tuple(p.shape)}")
    if not old.is_floating_point():
        raise ValueError(f"state {name!r} has dtype {old.dtype}, a floating-point type is needed")
    if old.device == p.device and lies_like(old, p):
        return old
    return torch.empty_like(p, dtype=old.dtype, memory_format=torch.preserve_format).copy_(old)


def fitting_rest(old: torch.Tensor | None, p: torch.Tensor, name: str) -> torch.Tensor:
    """As `fitting_state`, of what is kept beside a parameter; a new one says that nothing was lost yet."""
    dtype = rest_dtype(name, p)
    if old is None:
        new = untouched_like(p, dtype)
        return new.copy_(p.detach()) if name == "master" else new.zero_()
    if old.shape != p.shape or old.dtype != dtype:
        raise ValueError(
            f"state {name!r} is {old.dtype} of shape {tuple(old.shape)}, its parameter of shape {tuple(p.shape)} needs "
            f"{dtype}"
        )
    if old.device == p.device and lies_like(old, p):
        return old
    return untouched_like(p, dtype).copy_(old)


def untouched_like(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory that lies like a parameter's, on large pages where the machine has them."""
    new = torch.empty_like(p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
    if new.device.type == "cpu":
        _cpu.prefer_huge_pages(new.data_ptr(), new.nbytes)
    return new


def lies_like(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return all(s == t or n <= 1 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def check_overlap(params: Sequence[torch.Tensor]) -> None:
    """Raises ValueError if two parameters share memory: a step would update it twice."""
    ranges = []
    for p in params:
        if p.numel() and not p.untyped_storage().nbytes():
            raise ValueError(f"parameter of shape {tuple(p.shape)} has no storage (resized to 0?): give it one first")
        if p.numel():
            last = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            ranges.append((p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size(), p.device, is_dense(p)))
    ranges.sort(key=lambda r: (str(r[2]), r[0]))
    for one, other in pairwise(ranges):
        # two views with gaps may lie between each other's elements: they are taken at their word
        if one[2] == other[2] and other[0] < one[1] and one[0] != 0 and (one[3] or other[3]):
            raise ValueError(
                f"two parameters share memory at {other[0]:#x}: pass one of them, or give each a storage of its own "
                "(p.data = p.data.clone())"
            )
