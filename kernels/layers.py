"""The scalars of a layer: found by a rule's `finish`, kept for who applies, recalled from what was reported."""

import triton
import triton.language as tl

from .rule import Total, double
from .tables import row_of


@triton.jit
def finish(t, layer, time, sums, spec: tl.constexpr, adapt: tl.constexpr, keep):
    """The layer's scalars; they, the report and the layer's state are kept if a tensor of it has a gradient."""
    elements = tl.load(t.given.elements + layer.number)
    state, before = state_of(t, layer, spec), ()
    if adapt:  # without, several chunks finish their layer at once, and one of them writes
        before = report_of(t, layer, spec)
    h = row_of(t, layer.group, spec)
    # in place, for a name would make a tensor of `adapt`
    finished, state, report = spec.rule.finish(h, Total(sums, elements.to(tl.float64), time, adapt, state, before))
    if keep & (elements >= 0):
        if adapt:
            tl.debug_barrier()  # every thread has read state and report before one of them writes them
        for k in tl.static_range(tl.constexpr(spec.finished)):
            tl.store(t.work.finished + layer.number * spec.finished + k, finished[k])
        for k in tl.static_range(tl.constexpr(spec.rule.reports)):
            if report[k] is not None:
                tl.store(t.kept.report + layer.number * spec.rule.reports + k, report[k])
        if spec.stateful and adapt:
            for k in range(layer.states):  # alike in every member of the layer
                tl.store(t.kept.state + layer.state + k, state)
    return finished


@triton.jit
def recalled(t, layer, time, spec: tl.constexpr):
    """Those of `finish` that `direction` needs, for a step that is over."""
    total = Total((), double(0.0), time, True, state_of(t, layer, spec), report_of(t, layer, spec))
    return spec.rule.recall(row_of(t, layer.group, spec), total)


@triton.jit
def state_of(t, layer, spec: tl.constexpr):
    state = double(0.0)
    if spec.stateful:
        state = tl.load(t.kept.state + layer.state)
    return state


@triton.jit
def report_of(t, layer, spec: tl.constexpr):
    values = ()
    for k in tl.static_range(tl.constexpr(spec.rule.reports)):
        values = values + (tl.load(t.kept.report + layer.number * spec.rule.reports + k),)
    return values


@triton.jit
def finished_of(t, layer, spec: tl.constexpr):
    values = ()
    for k in tl.static_range(tl.constexpr(spec.finished)):
        values = values + (tl.load(t.work.finished + layer.number * spec.finished + k),)
    return values
