"""Programs of one launch that run at once, in the interpreter: any order of their steps ends, with the same bits.

Every program is a thread, of which one runs at a time. Before each atomic operation, where alone programs see each
other, a seeded draw says who goes on. On a GPU the device does that (test_triton_bits.py).
"""

import random
from threading import Condition, Thread

import numpy as np
import pytest
import triton.language as tl
from device_cases import written
from engines import ONE_PER_RULE, same_bits, starts, tame
from test_engine_bits import mixed
from triton_cases import MARKS, counters, exchange, needs_interpreter, plans, train

from layerfused.kernels import engine

pytestmark = [*MARKS, needs_interpreter]
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
SIZES = (5, 300, 0, 200)


class Schedule:
    """Runs the programs of a grid in turns that a seed draws.

    Attributes:
        turns: who ran, turn by turn.
    """

    def __init__(self, grid, seed):
        self.grid, self.draw, self.turns = grid, random.Random(seed), []
        self.changed, self.running, self.left, self.errors = Condition(), None, [], []

    def run(self, kernel):
        self.left = list(range(self.grid))
        self.programs = [Thread(target=self._program, args=(kernel, i), daemon=True) for i in range(self.grid)]
        self.running = self.draw.choice(self.left)
        for thread in self.programs:
            thread.start()
        for thread in self.programs:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in self.programs), "the programs wait for each other"
        if self.errors:
            raise self.errors[0]

    def _program(self, kernel, number):
        self._await(number)
        try:
            kernel()
        except Exception as error:
            self.errors.append(error)
        self.left.remove(number)
        self._hand_on()

    def switch(self):
        """The running program lets the draw say who goes on."""
        number = self.running
        self._hand_on()
        self._await(number)

    def _hand_on(self):
        with self.changed:
            self.running = self.draw.choice(self.left) if self.left else None
            self.turns.append(self.running)
            self.changed.notify_all()

    def _await(self, number):
        with self.changed:
            self.changed.wait_for(lambda: self.running == number)


@pytest.fixture
def scheduled(monkeypatch):
    """Makes launches run by a Schedule; returns a function that starts a new one."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    now, real = [], engine.run.rewrite()

    def run(t, spec: tl.constexpr):
        if interpreted_program() == 0:  # in its turn the first runs all of them
            now[-1].run(lambda: real(t, spec))

    def interpreted_program():
        return builder.grid_idx[0]

    from triton.runtime.interpreter import interpreter_builder as builder

    def atomic(method):
        def switching(self, *arguments):
            now[-1].switch()
            return method(self, *arguments)

        return switching

    def program(self, axis):
        return TensorHandle(np.array([now[-1].running], dtype=np.int32), tl.int32)

    monkeypatch.setattr(engine.run, "rewrite", lambda: run)
    monkeypatch.setattr(Builder, "create_get_program_id", program)
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        monkeypatch.setattr(Builder, name, atomic(getattr(Builder, name)))

    def start(grid, seed):
        plans(monkeypatch, grid=grid)
        now.append(Schedule(grid, seed))
        return now[-1]

    return start


# Leaves out most of the orders, and what a memory model allows beyond them.
@pytest.mark.parametrize("clip", [None, 2.0], ids=["", "clip"])
@RULES
def test_any_order_gives_the_same_bits(name, clip, scheduled):
    found, orders = [], set()
    for seed, grid in enumerate((1, 3, 7)):
        schedule = scheduled(grid, seed)
        opt, _ = train(name, starts(SIZES), tame(SIZES, 1), mixed(name), max_grad_norm=clip)
        found.append(written(opt))
        assert not counters(opt).any()
        assert len(set(schedule.turns) - {None}) == grid
        orders.add(tuple(schedule.turns))
    assert len(orders) == 3
    for other in found[1:]:
        same_bits(other, found[0])


@pytest.mark.parametrize("where", ["wait", "combined"])
def test_orders_tell_what_is_wrong(where, scheduled, monkeypatch):
    """Who does not wait, and a layer that somebody finishes before its last chunk arrived, give other bits."""

    def final(seed):
        scheduled(3, seed)
        return written(train("lamb", starts((300,)), tame((300,), 2))[0])

    right, old = final(0), exchange(monkeypatch, where, None)
    exchange(monkeypatch, where, {"wait": lambda flag: None, "combined": early(old)}[where])
    with pytest.raises(AssertionError, match="bits differ"):
        for seed in range(8):
            same_bits(final(seed), right)


def early(combined):
    """Of what the first chunk left in the place of the last one's."""

    def of_fewer(t, layer, chunks, spec):
        return combined(t, layer._replace(chunks=layer.chunks - 1), chunks, spec)

    return of_fewer
