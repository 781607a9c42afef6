"""The CUDA engine's bits (device_bits.py, too): any interleaving, every misalignment, and both other engines."""

import pytest
import torch
from cuda_cases import Cuda, counters
from device_bits import *  # noqa: F403
from device_bits import displaced
from device_cases import Twins, same_numbers, written
from engines import ONE_PER_RULE, same_bits, starts, tame, wild
from test_engine_bits import mixed
from test_engine_storage import set_gradient

from layerfused.backends import triton_is_missing

ENGINE = Cuda
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
SIZES = (5, 300, 0, 200, 1, 77)
SCHEDULES = [(1, 0), (2, 1), (3, 2), (3, 3), (7, 4), (7, 4), (40, 5)]  # blocks, seed; one of them twice


# Stats, norm, report and everything a step writes. Leaves out most of the interleavings, and on the host what a memory
# model allows beyond them (test_cuda_sanitizers.py).
@pytest.mark.parametrize("clip", [None, 2.0], ids=["", "clip"])
@RULES
def test_any_order_gives_the_same_bits(name, clip, engine):
    found = []
    for grid, seed in SCHEDULES:
        engine.plans(grid=grid, seed=seed)
        opt, _ = engine.train(name, starts(SIZES), tame(SIZES, 1), mixed(name), max_grad_norm=clip)
        (launch,) = opt._launches
        found.append(written(opt) | {"stats": launch.stats.cpu(), "norm": launch.norm.cpu()})
        assert not engine.counters(opt).any()
    for other in found[1:]:
        same_bits(other, found[0])


def test_counters_are_where_tests_look_for_them(engine):
    """Tickets that begin behind the last item: nothing is worked on, and the launch clears them all the same."""
    engine.plans(grid=2)
    opt, params = engine.train("lamb", starts(SIZES), tame(SIZES, 1))
    before = written(opt)
    counters(opt._launches[0])[0] = 10**6
    assert engine.counters(opt).any()
    opt.step()
    assert not engine.counters(opt).any()
    after = written(opt)
    same_bits(*({key: x for key, x in one.items() if "step" not in key} for one in (after, before)))


# On chip, and of several chunks, with tails. On the host a vector at a misaligned address stops the process.
SHIFTED = (7, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@RULES
def test_every_offset_of_every_operand(name, dtype, engine):
    """In one launch; one operand of each tensor 1 to 7 elements behind an aligned address, or all of them."""
    engine.plans(tile=16, grid=2)
    alone = [[n * (i == k) for i in range(4)] for k in range(4) for n in range(1, 8)]
    together = [[n + 3 * i & 7 for i in range(4)] for n in range(1, 8)]
    values, (grads,) = starts(SHIFTED), tame(SHIFTED, 1)

    def final(rows):
        params = [torch.nn.Parameter(displaced(x.to(dtype), row[0])) for row in rows for x in values]
        opt = engine.make(name, params, max_grad_norm=1e9)
        for i, p in enumerate(params):
            row = rows[i // len(values)]
            set_gradient(p, displaced(grads[i % len(values)].to(dtype), row[1]))
            for key, offset in zip(opt.rule_of(opt.param_groups[0]).states, row[2:], strict=False):
                opt.state[p][key] = displaced(torch.zeros(p.numel(), dtype=dtype), offset)
        opt.step()
        return written(opt)

    rows = [*alone, *together]
    same_bits(final(rows), final([[0] * 4] * len(rows)))


# Every rule once, two chunks; what each engine does under its options is compared with the CPU's elsewhere.
@pytest.mark.skipif(bool(triton_is_missing()), reason=triton_is_missing())
@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
@RULES
def test_three_engines_make_one_result(name, engine, monkeypatch):
    from triton_cases import Triton

    sizes, pairs = (130,), []
    for other in (engine, Triton(monkeypatch)):
        other.plans(grid=2)
        twins = Twins(other, name, starts(sizes), max_grad_norm=1.0)
        twins.step(next(wild(sizes, 1)))
        pairs.append([written(opt) for opt in twins.opts])
    for (one, own), other in zip(pairs, pairs[::-1], strict=True):
        same_numbers(own, one)
        same_numbers(own, other[1])
