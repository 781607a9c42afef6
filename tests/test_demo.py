"""The demo runs: twice the same numbers, real pictures, networks that have learnt."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import demo, demo_plots, digits

ROOT = Path(__file__).parent.parent
PNGS = ("demo_accuracy.png", "demo_trust_ratios.png")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def without_timings(part):
    if isinstance(part, dict):
        return {key: without_timings(value) for key, value in part.items() if key != "timings"}
    return [without_timings(value) for value in part] if isinstance(part, list) else part


def png_size(path):
    """Width and height from the header; fails where the file is no complete PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB\x60\x82")
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two runs in processes of their own: a global random state could not hide."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        command = [sys.executable, "-m", "bench.demo", "--quick", "--out", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "test accuracy" in done.stdout
    return folders


def test_same_seed_same_numbers(quick):
    first, second = (json.loads((folder / "demo.json").read_text()) for folder in quick)
    assert without_timings(first) == without_timings(second)
    assert first != without_timings(first)


def test_every_optimizer_learns(quick):
    result = json.loads((quick[0] / "demo.json").read_text())
    assert list(result["optimizers"]) == list(demo.QUICK)
    for name, row in result["optimizers"].items():
        assert row["accuracy"] > 3 / digits.CLASSES, name  # chance is 1 of 10, three times that no luck
        assert row["lr"] in [point["lr"] for point in row["grid"]] and row["diverged_at"] is None
        assert row["timings"]["steps_per_s"] > 0 and row["timings"]["optimizer_ms"] > 0
        assert len(row["curve"]["steps"]) == len(row["curve"]["accuracy"]) == 3


def test_trust_ratios_of_every_matrix(quick):
    ratios = json.loads((quick[0] / "demo.json").read_text())["trust_ratios"]["LAMB"]
    assert list(ratios) == [name for name, p in digits.network().named_parameters() if p.ndim > 1]
    assert all(len(row) == 30 and all(ratio > 0 for ratio in row) for row in ratios.values())


def test_pictures(quick):
    for name in PNGS:
        width, height = png_size(quick[0] / name)
        assert width > 400 and height > 200


def test_divergence_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.CONTENDERS, "torch.SGD:fused", demo.Contender(1e30))
    demo.main(["--quick", "--optimizers", "torch.SGD:fused", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "demo.json").read_text())["optimizers"]["torch.SGD:fused"]
    assert 1 < row["diverged_at"] <= 30 and row["loss"] is None and 0 <= row["accuracy"] <= 1


def test_unknown_optimizer(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--optimizers", "LAMB,Lamp"])
    assert "unknown optimizers Lamp; choose from SGD" in capsys.readouterr().err


def test_every_contender_has_one_panel():
    drawn = [name for names in demo_plots.FAMILIES.values() for name in names]
    assert sorted(drawn) == sorted(demo.CONTENDERS)


def test_splits_are_disjoint_and_whole():
    data = digits.load()
    assert [len(part.y) for part in data] == [1077, 360, 360]
    for part in data:
        share = part.y.bincount(minlength=digits.CLASSES).double() / len(part.y)
        assert (share - 0.1).abs().max() < 0.01
