"""Bytes that the Triton engine really loads and stores (device_traffic.py).

Counted where the interpreter reads and writes, masks honoured: addresses within p, g, m and v only.
"""

import pytest
from device_cases import operands
from device_traffic import *  # noqa: F403
from device_traffic import SIZES
from engines import starts, tame
from triton_cases import MARKS, Count, Triton, needs_interpreter, plans, train

ENGINE, pytestmark = Triton, [*MARKS, needs_interpreter]


@pytest.mark.parametrize("name", ["lamb", "aida-k1", "sgd-decay"])
def test_the_count_sees_what_it_should(name, monkeypatch):
    """Nothing is read or written outside of any tensor."""
    plans(monkeypatch)
    opt, params = train(name, starts(SIZES), tame(SIZES, 1))
    count = Count(monkeypatch)
    opt.step()
    (launch,) = opt._launches
    ours = [*launch._plan, launch._device, *launch._work, launch.stats, launch.norm, launch.table.report,
            launch.table.step, launch.table.scalars, opt.skipped_steps, launch._unheeded]  # fmt: skip
    for kind, moves in count.moved.items():
        total = sum(width * len(at) for at, width in moves)
        assert count.within([*operands(opt, params), *ours], kind) == total
