"""Random layers for the plan's tests, and a team of workers that runs a plan in slow motion."""

from collections import Counter, deque

from hypothesis import strategies as st

from layerfused.plan import Kind, LayerSpec, Span


@st.composite
def layer_lists(draw):
    """Layers of one or several tensors, with and without stats, cut from tensors that may hold several layers."""
    specs, tensor, start = [], 0, 0
    for number in range(draw(st.integers(0, 12))):
        spans = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 3]))):
            if draw(st.booleans()):  # else the next layer of the same tensor
                tensor, start = tensor + 1, 0
            count, elsewhere = draw(st.integers(0, 40)), draw(st.sampled_from([None, 0, 100]))
            spans.append(Span(tensor, start, count, elsewhere if elsewhere is None else count + elsewhere))
            start += count
        specs.append(LayerSpec(tuple(spans), number % 2, draw(st.sampled_from([True, True, False]))))
    return specs


OPTIONS = st.fixed_dictionaries(
    {
        "chunk": st.integers(1, 9),
        "whole": st.sampled_from([0, 1, 10, 100]),
        "ahead": st.integers(0, 60),
        "norm": st.booleans(),
    }
)


def touched(plan, item):
    """The chunks an item works on."""
    if item.kind != Kind.WHOLE:
        return [item.index]
    layer = plan.layers[item.index]
    return list(range(layer.first, layer.first + layer.chunks))


def needs_reduce(plan, chunk):
    return plan.layers[plan.chunks[chunk].layer].adapt


class Workers:
    """A team as an engine runs it: tickets in order, the next claimed at most `hold` ahead, run in ascending order.

    An item takes two turns, so that others come between its begin and its end.
    """

    def __init__(self, plan, count, hold):
        self.plan, self.hold = plan, hold
        self.held = [deque() for _ in range(count)]
        self.begun, self.ticket, self.ended = set(), 0, []
        self.arrived, self.norms, self.log = Counter(), 0, []

    def ready(self, item):
        """Whether what an item waits for has ended."""
        if item.kind == Kind.NORM:
            return True
        chunks = len(self.plan.chunks)
        if self.plan.items[0].kind == Kind.NORM and self.norms < chunks:
            return False
        waits = item.kind == Kind.APPLY and needs_reduce(self.plan, item.index)
        number = self.plan.chunks[item.index].layer if waits else None
        return not waits or self.arrived[number] == self.plan.layers[number].chunks

    def moves(self, worker):
        """What a worker can do now: claim, begin, end; nothing while it waits or is done."""
        held = self.held[worker]
        claims = ["claim"] if len(held) < self.hold and self.ticket < len(self.plan.items) else []
        if held and held[0] in self.begun:
            return ["end", *claims]
        return ["begin", *claims] if held and self.ready(self.plan.items[held[0]]) else claims

    def act(self, worker, move):
        held = self.held[worker]
        if move == "claim":
            held.append(self.ticket)
            self.ticket += 1
        elif move == "begin":
            self.begun.add(held[0])
        else:
            item = self.plan.items[held[0]]
            self.norms += item.kind == Kind.NORM
            if item.kind == Kind.REDUCE:
                self.arrived[self.plan.chunks[item.index].layer] += 1
            self.ended.append(held.popleft())
