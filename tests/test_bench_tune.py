"""The sweep of an engine's constants: its search on made-up scores, its rows in Triton's interpreter.

Where there is no GPU this leaves out compiling, registers as Triton reports them (stand-ins here) and every number.
"""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from bench import constants, report, tune
from bench import device as devices
from bench.__main__ import main

POINT = {"TILE": 64, "WARPS": 4, "REGISTERS": 128, "PROGRAMS": 1, "CHUNK": 128, "AHEAD": 256}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("quick_interpreter")


def arguments(tmp_path, *words):
    shapes = tmp_path / "small.json"
    shapes.write_text(json.dumps([[30, 20], [7]]))
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    words = [
        "--backend=triton",
        "--shapes",
        str(shapes),
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "out.json"),
        *words,
    ]
    args = parser.parse_args(words)
    args.command = ["tune", *words]
    return args


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep over tiny shapes with a copy of 4 KiB, and whatever the device cannot do taken out."""
    monkeypatch.setattr(type(devices.on(DEVICE)), "copy_elements", 1024)
    axes = [f"--axis={axis}" for axis in ("TILE=64", "CHUNK=128,256", "WARPS=4", "REGISTERS=128", "PROGRAMS=1")]
    axes += ["--axis=AHEAD=256"]
    return tune.Sweep(arguments(tmp_path, *axes), devices.on(DEVICE))


AXES = {"CHUNK": (1, 2, 3, 4), "WARPS": (1, 2, 4), "AHEAD": (5, 6)}
START = {"CHUNK": 1, "WARPS": 1, "AHEAD": 5}


def valley(point):
    """More WARPS are better, and CHUNK best alike: it shows in the second round only that it should have moved."""
    return 10 + 0.1 * (point["CHUNK"] - point["WARPS"]) ** 2 - point["WARPS"]


def test_descent_goes_round_until_nothing_is_better():
    seen = []
    best = constants.descend(AXES, START, lambda point: seen.append(dict(point)) or valley(point))
    assert best == {"CHUNK": 4, "WARPS": 4, "AHEAD": 5} and seen[0] == START
    assert len(seen) == 1 + 3 * (4 + 3 + 2), "two rounds that move, one that does not"


def test_descent_leaves_noise_alone():
    assert constants.descend(AXES, START, lambda point: 1 - 0.001 * (point["WARPS"] > 1)) == START


def test_descent_leaves_a_start_that_fails():
    assert constants.descend(AXES, START, lambda point: 1.0 if point["WARPS"] == 2 else float("inf"))["WARPS"] == 2


def test_scan_begins_with_the_start_and_leaves_nothing_out():
    seen = []
    constants.scan(AXES, START, lambda point: seen.append(tuple(point.values())) or 1.0)
    assert seen[0] == (1, 1, 5) and len(seen) == 25 and len(set(seen)) == 24


def test_axis():
    assert constants.axis("CHUNK=1024,4096") == ("CHUNK", (1024, 4096))


@pytest.mark.parametrize("text", ["CHUNK", "CHUNK=", "CHUNK=a", "CHUNK=0", "SIZE=3"])
def test_axis_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=INTEGER"):
        constants.axis(text)


def test_constants_reach_the_engine_and_go_back(sweep):
    """By the number of chunks that the plan has on the device; WARPS and REGISTERS are nothing to the interpreter."""
    before, chunks = constants.defaults("triton"), []
    for chunk in (128, 256):
        with constants.applied("triton", POINT | {"CHUNK": chunk}):
            opt = tune.Contender.build(sweep.cases[0].spec, sweep.cases[0].params).opt
        chunks.append(int(opt._launches[0]._plan.sizes[1]))
        assert opt._launches[0].on_chip == 64
    assert chunks == [5 + 1, 3 + 1] and constants.defaults("triton") == before


def test_the_cuda_engine_has_axes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(type(devices.on(DEVICE)), "copy_elements", 1024)
    args = arguments(tmp_path, "--backend=cuda", "--axis=CHUNK=2048", "--axis=AHEAD=1024,4096")
    tune.Sweep(args, devices.on(DEVICE)).run()
    found = json.loads(args.json.read_text())
    assert [point["constants"] for point in found["points"]][1:] == [
        {"CHUNK": 2048, "AHEAD": 1024},
        {"CHUNK": 2048, "AHEAD": 4096},
    ]
    assert {row["engine"] for point in found["points"] for row in point["rows"]} == {"cuda"}
    assert all(row["median_ms"] > 0 for point in found["points"] for row in point["rows"])


def test_a_sweep_and_its_table(sweep, capsys):
    sweep.run()
    found = json.loads(sweep.args.json.read_text())
    assert found["bench"] == "tune" and found["stopped"] is None and found["machine"] and "score" in found["methods"]
    tried = [point["constants"] for point in found["points"]]
    assert tried == [POINT | {"CHUNK": chunk} for chunk in (constants.defaults("triton")["CHUNK"], 128, 256)]
    for row in found["points"][0]["rows"]:
        assert row["median_ms"] > 0 and row["gb_per_s"] > 0 and row["percent_of_copy"] > 0 and row["first_step_s"] > 0
        assert (row["n_regs"] is None) == (DEVICE == "cpu") and row["engine"] == "triton"
    main(["report", str(sweep.args.json)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1: small, LAMB(max_grad_norm=None)", "2: small, AdamW"]
    shares = [float(line.split()[len(POINT)]) for line in lines[3 : 3 + len(tried)]]
    assert shares == sorted(shares) and 1.0 in shares


def test_what_cannot_run_is_kept_with_its_reason(sweep, monkeypatch):
    """A failure in one of the cases; the compiler's own errors are longer than one line."""
    measured, score = sweep.measured, sweep.score(POINT)

    def fails(case):
        if case.spec.name == "AdamW":
            raise RuntimeError("out of resource: registers\n 1 2 3\nRequired: 300")
        return measured(case)

    monkeypatch.setattr(sweep, "measured", fails)
    assert sweep.score(POINT | {"WARPS": 2}) == float("inf") > score
    lamb, adamw = sweep.points[1]["rows"]
    assert lamb["median_ms"] and lamb["reason"] is None
    assert adamw["reason"] == "RuntimeError: out of resource: registers … Required: 300"
    lines = report.sweep(json.loads(sweep.args.json.read_text())).splitlines()
    assert lines[3].startswith("64") and lines[4].split()[len(POINT)] == "–", "what failed comes last"
    assert lines[5] == f"{constants.named(POINT | {'WARPS': 2})}: 2 {adamw['reason']}"


def test_registers_and_spills_are_those_of_the_row(sweep, monkeypatch):
    """Stand-ins for Triton's cache of compiled kernels: device -> (kernels, …)."""
    compiled = {"of an earlier row": SimpleNamespace(n_regs=255, n_spills=99)}
    run = constants.module("triton").engine.run
    monkeypatch.setattr(run, "device_caches", {0: (compiled, {}, None)}, raising=False)

    def compiles(case):
        compiled["step"] = SimpleNamespace(n_regs=128, n_spills=12)
        compiled["other"] = SimpleNamespace(n_regs=None)
        return {"median_ms": 1.0}

    monkeypatch.setattr(sweep, "measured", compiles)
    row = sweep.row(POINT, sweep.cases[0])
    assert (row["n_regs"], row["n_spills"], row["reason"]) == (128, 12, "spills 12 words a thread")


def test_a_device_that_does_not_go_on_ends_the_sweep(sweep, monkeypatch):
    def fails(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(sweep, "measured", fails)
    monkeypatch.setattr(sweep, "device", SimpleNamespace(synchronize=fails))
    with pytest.raises(tune.Stopped, match="illegal memory access"):
        sweep.score(POINT)


def test_time_that_is_over_ends_the_sweep_after_the_start(sweep, monkeypatch):
    sweep.deadline = 0
    monkeypatch.setattr(sweep, "measured", lambda case: {"median_ms": 2.0})
    sweep.run()
    assert len(sweep.points) == 1 and sweep.points[0]["score"] == pytest.approx(2)
    assert "over before" in json.loads(sweep.args.json.read_text())["stopped"]


def test_triton_keeps_compiled_kernels_where_they_are_looked_for():
    """The name only: what the dict holds takes a GPU to see."""
    from triton.runtime import JITFunction

    assert isinstance(JITFunction(valley).device_caches, dict)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_command_on_a_gpu(tmp_path, capsys):
    shapes, out = tmp_path / "small.json", tmp_path / "out.json"
    shapes.write_text(json.dumps([[300, 200], [7]]))
    axes = ("PROGRAMS=4", "CHUNK=4096", "AHEAD=262144", "TILE=1024", "REGISTERS=128", "WARPS=2,4")
    words = [f"--axis={axis}" for axis in axes]
    main(["tune", "--backend=triton", "--shapes", str(shapes), "--repeats", "3", "--json", str(out), *words])
    found = json.loads(out.read_text())
    assert {point["constants"]["WARPS"] for point in found["points"]} == {2, 4}
    assert all(row["n_regs"] > 0 and row["n_spills"] is not None for p in found["points"] for row in p["rows"])
    assert report.number(found["points"][0]["score"]) in capsys.readouterr().err
