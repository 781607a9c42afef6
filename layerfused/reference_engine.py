"""The reference engine: the functions of `reference.py` over a table, on any device and in any floating-point type."""

from types import SimpleNamespace

import torch

from .gradients import check_gradient
from .plan import Phase, Span
from .precision import STATES, way_of
from .reference import global_norm
from .storing import join, noise_of, split, stochastic
from .table import Table


class ReferenceLaunch:
    """Plain torch, layer by layer: slow, exact, differentiable."""

    engine = "reference"
    live, on_chip, leads, spread, scales = False, 0, False, False, False
    variant = staticmethod(lambda p, entries, rule, words: ())

    def __init__(self, table: Table, state: dict):
        self.table, self.state = table, state
        self.norm = torch.zeros((), dtype=torch.float64, device=table.step.device)
        self._layouts = self._look()

    def _look(self) -> list:
        names = self.table.rule.entries
        return [
            (p.shape, p.stride(), p.dtype, p.device, [id(self.state[p].get(name)) for name in (*names, rest)])
            for p, rest in zip(self.table.params, self.table.rests, strict=True)
        ]

    def read(self) -> bool:
        """Checks every gradient. Answers False if a parameter or state is not what the table was made for."""
        for p in self.table.params:
            if p.grad is not None:
                check_gradient(p)
        self.absent = sum(p.grad is None for p in self.table.params)
        self.moved = True
        return self._look() == self._layouts

    def lead(self, true: list | None, ahead: float, predicted: list | None = None) -> None:
        """As `Launch.lead`."""
        self.leads, self.true, self.ahead, self.predicted = true is not None, true, ahead, predicted

    def prepare(self, phases: int, rows: list, max_norm: float) -> None:
        pass

    def workspace_bytes(self) -> int:
        return self.table.report.nbytes + self.norm.nbytes

    def written(self) -> list:
        return []  # torch's own in-place operations count versions themselves

    def run(self, phases: int, rows: list, max_norm: float, skipped: torch.Tensor | None = None) -> bool:
        """A whole step or its first half, NORM or PREDICT alone; False if it is skipped: the norm is not finite."""
        if phases & Phase.NORM:
            self.norm.copy_(global_norm([p.grad for p in self.table.params if p.grad is not None]))
        if phases == Phase.NORM:
            return True
        if phases | Phase.NORM | Phase.APPLY != Phase.STEP and not phases & Phase.PREDICT:
            raise ValueError("the reference engine runs whole steps only")
        norm = float(self.norm.detach()) if max_norm > 0 else 0.0
        if not norm < float("inf"):
            if skipped is not None and phases & Phase.APPLY:
                skipped += 1
            return False
        if phases & Phase.PREDICT:
            uncounted = bool(phases & Phase.UNCOUNTED)
            self._predict(rows, uncounted, only_present=uncounted)
            return True
        traced = self.norm.clone() if torch.is_grad_enabled() else norm  # differentiable: the clip has a derivative
        factor = max_norm / traced if norm > max_norm else 1.0
        updates = [self._update(n, spec, rows[spec.group], factor) for n, spec in enumerate(self.table.layers)]
        self._write([update for update in updates if update], bool(phases & Phase.APPLY))
        if self.leads and phases & Phase.APPLY:
            self._predict(rows, uncounted=False, only_present=True)
        return True

    def _present(self, spans) -> list[Span]:
        return [span for span in spans if self.table.params[span.tensor].grad is not None]

    def _weights(self, spans: list[Span]) -> list[torch.Tensor]:
        """The true weights."""
        return [self.true[span.tensor] if self.leads else self._weight(span.tensor) for span in spans]

    def _weight(self, i: int) -> torch.Tensor:
        p, rest = self.table.params[i], self.table.rests[i]
        return join(p, self.state[p][rest], way_of(self.table.words[i], p.dtype)) if rest else p

    def _known(self, number: int, spans: list[Span], row: tuple) -> tuple:
        """What the rule's functions take of a layer: states, with the last report among them, and the group's row."""
        table, rule = self.table, self.table.rule
        params = [table.params[span.tensor] for span in spans]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        s = {name: gather(spans, [self.state[p][name] for p in params], dtype) for name in rule.states}
        if rule.scalar:
            s[rule.scalar] = table.scalars[table.layer_slots[number].start].clone()
        s["report"] = dict(zip(rule.report, table.report[number].clone(), strict=True))
        return s, SimpleNamespace(**dict(zip(rule.hyper, row[1:], strict=True))), dtype

    def _update(self, number: int, spec, row: tuple, factor: float) -> tuple | None:
        """One layer's new values, nothing written yet; None if no tensor of it has a gradient."""
        table, rule = self.table, self.table.rule
        spans = self._present(spec.spans)
        if not spans:
            return None
        s, h, dtype = self._known(number, spans, row)
        t = int(table.step[spec.spans[0].tensor]) + 1
        g = gather(spans, [table.params[span.tensor].grad for span in spans], dtype) * (row[0] * factor)
        p, report = rule.reference(
            gather(spans, self._weights(spans), dtype), g, s, h, t, spec.stats or not rule.layerwise
        )
        return number, spans, p, s, report

    def _write(self, updates: list[tuple], count: bool) -> None:
        table, rule = self.table, self.table.rule
        self._noise = {}
        for number, spans, p, s, report in updates:
            if count:
                for span, piece in zip(spans, pieces(spans, p), strict=True):
                    self._store(span, piece)
            for stream, name in enumerate(rule.states):
                for span, piece in zip(spans, pieces(spans, s[name]), strict=True):
                    self._store_state(span, piece, name, stream)
            if rule.scalar:
                slots = table.layer_slots[number]
                table.scalars[slots.start : slots.stop] = s[rule.scalar]
            with torch.no_grad():
                for k, name in enumerate(rule.report):
                    table.report[number, k] = torch.as_tensor(report[name]).detach()
        tensors = {span.tensor for number, *_ in updates for span in table.layers[number].spans}
        with torch.no_grad():
            table.step[list(tensors)] += int(count)

    def _predict(self, rows: list, uncounted: bool, only_present: bool) -> None:
        """Predictions of all layers, or of the tensors that have a gradient, from what lies in memory."""
        table, rule = self.table, self.table.rule
        for number, spec in enumerate(table.layers):
            spans = self._present(spec.spans) if only_present else list(spec.spans)
            t = int(table.step[spec.spans[0].tensor]) + uncounted
            if not spans or t == 0:
                continue
            s, h, dtype = self._known(number, spans, rows[spec.group])
            predicted = gather(spans, self._weights(spans), dtype)
            if rule.direction:
                lr, delta = rule.direction(s, h, t, s["report"])
                predicted = predicted - self.ahead * lr * delta
            places = self.predicted or table.params
            scatter(spans, predicted, [places[span.tensor] for span in spans])

    def _store(self, span: Span, x: torch.Tensor) -> None:
        """Writes weights by their way."""
        table, i = self.table, span.tensor
        p = self.true[i] if self.leads else table.params[i]
        way = way_of(table.words[i], p.dtype)
        if table.rests[i]:
            x, rest = split(x, p.dtype, way)
            place(span, self.state[p][table.rests[i]], rest)
        elif way:
            x = self._drawn(span, p, x, 0)
        place(span, p, x)

    def _store_state(self, span: Span, x: torch.Tensor, name: str, stream: int) -> None:
        state = self.state[self.table.params[span.tensor]][name]
        if stream and STATES in self.table.words[span.tensor] and state.dtype == torch.bfloat16:
            x = self._drawn(span, state, x, stream)
        place(span, state, x)

    def _drawn(self, span: Span, tensor: torch.Tensor, x: torch.Tensor, stream: int) -> torch.Tensor:
        table, i = self.table, span.tensor
        if (i, stream) not in self._noise:
            noise = noise_of(tensor, table.seeds[i], table.places[i] | stream, int(table.step[i]) + 1)
            self._noise[i, stream] = noise.reshape(-1)
        return stochastic(x, tensor.dtype, self._noise[i, stream][span.start : span.start + span.count])


def gather(spans: list[Span], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The elements of one layer, flat, in the computing type."""
    pieces = [x.reshape(-1)[s.start : s.start + s.count] for s, x in zip(spans, tensors, strict=True)]
    copy = torch.is_grad_enabled()  # what autograd keeps of the old values must outlive the writing of the new ones
    pieces = [piece.to(dtype, copy=copy) for piece in pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def pieces(spans: list[Span], flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements of one layer, span by span."""
    return flat.split([span.count for span in spans])


def scatter(spans: list[Span], flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Writes the elements of one layer back to where they came from."""
    for span, x, piece in zip(spans, tensors, pieces(spans, flat), strict=True):
        place(span, x, piece)


def place(span: Span, x: torch.Tensor, piece: torch.Tensor) -> None:
    """Writes the elements of a span."""
    if span.count == x.numel():
        x.copy_(piece.view(x.shape))
    else:  # whole rows of dimension 0
        row = x.numel() // x.shape[0]
        x[span.start // row : (span.start + span.count) // row].copy_(piece.view(-1, *x.shape[1:]))
