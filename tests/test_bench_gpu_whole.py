"""Whole runs of `python -m bench gpu` on a GPU that is made up: from the command line to results, plots and status."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bench_gpu import NCU, Fake, saved, states

from bench import device as devices
from bench import gpu, gpu_order, gpu_parts, gpu_report, report
from bench import spec as specs
from bench.__main__ import main
from bench.gpu_parts import Outcome


@pytest.fixture
def no_plots(monkeypatch):
    """A second each is saved."""
    monkeypatch.setattr(gpu_report, "plots", lambda document, folder: [])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `bench step` really writes."""
    folder = tmp_path_factory.mktemp("step")
    (folder / "few.json").write_text("[[40, 30], [7]]")
    words = ["--shapes", str(folder / "few.json"), "--optimizers", "AdamW", "--json", str(folder / "out.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices.Cpu, "copy_elements", 1024)
        main(["step", *words, "--against", ",".join(gpu_order.RIVALS), "--repeats", "1", "--seconds", "0"])
    return json.loads((folder / "out.json").read_text())


@pytest.fixture
def machine_with_gpu(monkeypatch, tmp_path, measured):
    """A GPU that answers what it is asked, and a `bench step` that finds the same times for every optimizer."""
    monkeypatch.setattr(devices.Cuda, "missing", staticmethod(lambda: ""))
    monkeypatch.setattr(devices.Cuda, "facts", lambda self: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    ours, *rivals = measured["rows"]

    class Machine(Fake):
        def run(self, words, limit, env):
            if "step" in words:
                option = dict(zip(words[4::2], words[5::2], strict=True))
                about = {"shapes": option["--shapes"], "dtype": option["--dtype"]}
                names = specs.split(option["--optimizers"])
                rows = [line | about for line in [*(ours | {"optimizer": name} for name in names), *rivals]]
                copies = [copy | {"shapes": about["shapes"]} for copy in measured["copies"]]
                (tmp_path / option["--json"]).write_text(json.dumps(measured | {"rows": rows, "copies": copies}))
            return super().run(words, limit, env)

    machine = Machine({"ncu": Outcome(0, NCU)}, takes=5)
    monkeypatch.setattr(gpu, "execute", machine.run)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=machine.clock))
    return machine


def status(*words):
    with pytest.raises(SystemExit) as error:
        main(["gpu", *words])
    return error.value.code


def test_a_whole_run(machine_with_gpu, tmp_path, capsys):
    assert status("--budget", "5000") == 0
    folder = tmp_path / "bench" / "results" / "nvidia-h200"
    found = saved(folder)
    assert set(states(found).values()) <= {"passed", "skipped"} and len(found["rows"]) == 10 * (2 * 13 + 2 * 2)
    assert found["parts"]["build"]["command"] == f"{Path(sys.executable).name} setup.py build_ext --inplace"
    assert found["sources"]["digest"] and found["machine"]["gpu"] == "NVIDIA H200" and found["command"]
    for dtype in ("fp32", "bf16"):
        assert (folder / f"ratios-{dtype}.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert [line.split()[4:] for line in shown.splitlines() if line.startswith("bf16, time")] == [
        ["bert-large", "resnet50", "gpt2", "many-small", "llama-8b-slice"]
    ]
    assert "LAdam(processing='post') triton" in shown
    assert "LARS(backend='triton')" in report.text(found), "`bench report` reads it as it reads a step's"
    assert str(tmp_path) not in json.dumps(found)


def test_a_second_whole_run_builds_and_does_nothing_else(machine_with_gpu, no_plots, tmp_path):
    assert status("--budget", "5000") == 0
    first = len(machine_with_gpu.ran)
    assert status("--budget", "5000", "--folder", str(tmp_path / "bench" / "results" / "nvidia-h200")) == 0
    assert [line.partition(" ")[2] for line in machine_with_gpu.ran[first:]] == [
        "setup.py build_ext --inplace",
        "-c import layerfused._cuda",
        "-c import layerfused.kernels",
    ]
    assert status("--budget", "5000", "--again") == 0
    assert len(machine_with_gpu.ran) == 2 * first + 3


def test_status_and_last_words_where_something_failed_or_was_left(machine_with_gpu, no_plots, tmp_path, capsys):
    machine_with_gpu.outcomes["setup.py"] = Outcome(1, "nvcc says no")
    assert status("--budget", "60") == 1
    found = states(saved(tmp_path / "bench" / "results" / "nvidia-h200"))
    assert found["build"] == "failed" and found["steps cuda"] == "skipped" and found["tune triton"] == "left"
    assert found["rows bert-large fp32 core"] == "passed", "Triton's"
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == [
        "failed: build: exit status 1: nvcc says no",
        "    nvcc says no",
        "the same command goes on with what was left",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys):
    assert status() == 2
    assert capsys.readouterr().err == (
        "python -m bench gpu: it needs a GPU, and torch.cuda.is_available() is False here\n"
    )
