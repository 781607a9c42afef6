"""`python -m bench scale`: a small run on 1 and 2 ranks, what a run that fails leaves, and the model's own numbers.

Left out: 4 ranks, how long anything takes, and whether the network's constants are true.
"""

import json
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scale_model, scale_ranks, shapes
from bench.__main__ import main
from bench.gpus import GPUS
from bench.scale_model import Network
from bench.scale_ranks import GATHER, LOCAL, NORMS, STEP, Case


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "small.json"
    path.write_text(json.dumps([[3, 5], [1], [7]]))  # the second rank has nothing of [1]
    return str(path)


@pytest.fixture(scope="module")
def found(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("scale") / "deep" / "scale.json"
    words = ["--ranks", "1,2", "--layers", "4", "--groups", "3", "--shapes", small, "--predict", small]
    words += ["--repeats", "2", "--seconds", "0", "--limit", "240", "--gpus", "64,65", "--json", str(out)]
    main(["scale", *words])
    return json.loads(out.read_text())


def test_rows(found):
    assert found["skipped"] == [] and found["threads"] == 1
    cases = [(row["ranks"], row["case"], row["tensors"], row["groups"]) for row in found["rows"]]
    assert cases == [
        *((1, "4 vectors", 4, 1), (1, "3 groups", 3, 3)),
        *((2, "4 vectors", 4, 1), (2, "3 groups", 3, 3), (2, "small", 3, 1)),
    ]
    for row in found["rows"]:
        assert row["block_bytes"] == 8 * 2 * row["tensors"], "LAMB has two sums of each layer"
        counts = {one["contender"]: one["collectives"] for one in row["contenders"]}
        norms = {NORMS: 2 * row["tensors"] * (row["ranks"] > 1)} if row["case"] == "4 vectors" else {}
        assert counts == {STEP: 1, LOCAL: 0, GATHER: 1} | norms
        medians = {one["contender"]: one["median_ms"] for one in row["contenders"]}
        assert row["ratio"] == pytest.approx((medians[STEP] - medians[GATHER]) / medians[LOCAL])
        for one in row["contenders"]:
            assert one["rounds"] == 2 and one["p10_ms"] <= one["median_ms"] <= one["p90_ms"]
            assert 0 < one["host_ms"] <= one["p90_ms"] + 0.1, "a thread is busy at most all the time"


def test_predictions_beside_what_was_measured(found):
    first, second = found["predicted"]
    assert (first["gpus"], first["collective"]) == (64, "all-gather") and first["others_collectives"] == 13
    assert (second["gpus"], second["collective"]) == (65, "all-reduce")
    (measured,) = (row for row in found["rows"] if row["case"] == "small")
    for row in (first, second):
        assert row["block_bytes"] == measured["block_bytes"] and row["elements_each"] == 5 + 1 + 1
        assert row["collective_ms"] == row[row["collective"].replace("-", "_") + "_ms"]
        assert row["step_ms"] == pytest.approx(row["own_ms"] + row["collective_ms"] + row["small_kernels_ms"])
        assert row["others_step_ms"] == pytest.approx(row["own_ms"] + row["others_collectives_ms"])


def test_what_is_printed(capsys):
    main(["scale", "--model", "--predict", "tiny", "--gpus", "8", "--set", "tree_s=1", "--device", "a100"])
    printed = capsys.readouterr().out
    row = scale_model.row("tiny", 8, GPUS["a100"], Network(tree_s=1.0))
    assert "PREDICTED, nothing measured" in printed and "on a100s" in printed and "tree_s=1 " in printed
    assert f"{row['others_step_ms']:,.0f}" in printed and row["others_step_ms"] > 1e3 * row["others_collectives"]


def test_a_rank_that_fails_leaves_the_rows_before_and_a_reason():
    rows, reason = scale_ranks.launched(1, [Case("good", [(4,)]), Case("bad", [])], 1, 0, 240)
    assert [row["case"] for row in rows] == ["good"]
    assert "empty parameter list" in reason


def test_nothing_outlives_the_limit():
    rows, reason = scale_ranks.launched(2, [Case("never", [(4,)])], 1, 0, 0.1)
    assert rows == [] and "not done after 0.1 s" in reason
    assert multiprocessing.active_children() == []


def ring(gpus, size):
    return Network().all_gather(gpus, size) * 1e6


def tree(gpus, size):
    return Network().all_reduce(gpus, size) * 1e6


def test_collectives():
    """In µs: NCCL's own expectation of 16 bytes on two nodes of 8 H100, and sums by hand."""
    assert tree(16, 16) == pytest.approx(25.201847, abs=1e-3)
    assert tree(8, 0) == pytest.approx(6.8 + 2 * 7 * 0.6) and tree(1, 0) == pytest.approx(6.8)
    assert tree(1024, 0) == pytest.approx(6.8 + 2 * (7 * 0.6 + 7 * 5))
    assert ring(8, 141e3) == pytest.approx(6.6 + 7 * 0.6 + 7)
    assert ring(64, 20.4e3) == pytest.approx(6.6 + 56 * 1 + 7 * 2.7 + 63)


@pytest.fixture
def ranks(monkeypatch):
    """Makes this process rank `rank` of `size`, where collectives do nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(rank, size):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return init_device_mesh("cpu", (size,))

    monkeypatch.setattr("layerfused.build.agree", lambda mesh, told: None)  # nobody answers
    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(8,), (5, 3), (3, 2, 2), (1,)])
def test_parts_are_those_of_torch(ranks, shape):
    from torch.distributed.tensor import Shard, distribute_tensor

    for rank in range(4):
        mesh = ranks(rank, 4)
        part = scale_ranks.spread(shape, mesh, torch.Generator())
        theirs = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None)
        assert part.shape == shape and part.to_local().shape == part.grad.to_local().shape == theirs.to_local().shape
        if rank == 0:
            assert shapes.sharded([("x", shape)], 4) == [("x", tuple(part.to_local().shape))]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 65])
def test_small_kernels_are_those_of_the_exchange(ranks, size):
    """Those that write anything: `fill_` and `amin` find nothing, since LAMB has no minima."""
    mesh = ranks(0, size)
    opt = scale_ranks.optimizer([scale_ranks.spread((16,), mesh, torch.Generator())], Case("", []))
    opt.step()
    with Calls() as calls:
        opt._exchanges[0].run()
    written = sum(calls.counts[name] for name in ("zeros", "index", "index_put_", "add", "cat"))
    assert written == scale_model.small_kernels(size)
    idle = {"view", "slice", "select", "alias", "lift_fresh", "new_empty", "fill_", "amin"}
    collective = {"c10d::_allgather_base_", "c10d::allreduce_"}
    assert calls.counts.keys() <= {"zeros", "index", "index_put_", "add", "cat"} | idle | collective


def test_a_shard_of_shapes_by_name():
    assert shapes.load("tiny:3") == [(name, (6,)) for name, _ in shapes.load("tiny")]
    with pytest.raises(ValueError, match="unknown shapes 'tiny:0'"):
        shapes.load("tiny:0")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ranks", "0"], "--ranks, --layers, --groups and --repeats must be >= 1"),
        (["--gpus", "0"], "--gpus must be >= 1"),
        (["--limit", "0"], "--limit a positive number"),
        (["--predict", "bert"], "unknown shapes 'bert'"),
        (["--set", "node=0"], "node=0 is not FIELD=NUMBER > 0 with a FIELD of node, ring_s"),
    ],
)
def test_complaints(words, complaint, capsys):
    with pytest.raises(SystemExit):
        main(["scale", *words])
    assert complaint in capsys.readouterr().err
