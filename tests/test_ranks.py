"""The helper of tests over several ranks: a rank that raises or hangs is named, and nobody is left behind.

Left out: a fork server that dies.
"""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import Collectives, Ranks, run


def answers(scale):
    total = torch.ones(2)
    with Collectives() as seen:
        dist.all_reduce(total)
        dist.all_gather([torch.empty(2) for _ in range(dist.get_world_size())], total)
    return scale * dist.get_rank(), total.tolist(), seen.seen


def fails():
    if dist.get_rank() == 1:
        raise KeyError("what was looked for")
    dist.barrier()


def hangs():
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_answers(world):
    want = [(2 * rank, [world, world], ["all_reduce", "all_gather"]) for rank in range(world)]
    assert run(answers, world, 2) == want


def test_the_rank_that_raises_comes_first():
    with pytest.raises(AssertionError, match=r"(?s)^rank 1 ended with 1:.*KeyError: 'what was looked for'.*rank 0"):
        run(fails, 2)


def test_a_rank_that_hangs_tells_where_it_stands():
    ranks = Ranks(hangs, 2)
    with pytest.raises(AssertionError, match=r"(?s)rank 1 hung.* in hangs"):
        ranks.results(timeout=2)
    assert not any(process.is_alive() for process in ranks.processes)
