"""What the bench asks of devices. Without a GPU its CUDA half is tested on stand-ins for torch.cuda's events.

They leave out that real events, the profiler's CUDA activity and the allocator's counts are what they are taken for:
the last test asks a GPU where there is one.
"""

import json
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from bench import device as devices
from bench import report, timing
from bench.__main__ import main

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.parametrize("words", [["step", "--device", "cuda"], ["tune"]])
def test_no_gpu_is_said_before_measuring(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert "it needs a GPU, and torch.cuda.is_available() is False here" in capsys.readouterr().err


def test_both_devices_answer_alike():
    def asked(device):
        return {name for name in dir(device) if not name.startswith("_")}

    assert asked(devices.Cuda) - asked(devices.Cpu) == {"most_queued"}
    assert asked(devices.Cpu) <= asked(devices.Cuda)


def stand_in(monkeypatch, host_takes):
    """A GPU whose copies take 1 ms and whose step takes 3; `queued` copies later it begins with what is timed."""
    now = SimpleNamespace(host=0.0, device=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now.device = max(now.device, now.host)

        def query(self):
            return self.time <= now.host

        def synchronize(self):
            now.host = max(now.host, self.time)

        def elapsed_time(self, end):
            return end.time - self.time

    def work(host, device):
        now.host += host
        now.device = max(now.device, now.host) + device

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(now, "host", max(now.host, now.device)))
    gpu = devices.Cuda()
    monkeypatch.setattr(devices.Cuda, "_queue", lambda self: [work(0, 1) for _ in range(self.queued)])
    return gpu, lambda: work(host_takes, 3)


@pytest.mark.parametrize(("host", "queued"), [(0.5, 2), (1.5, 2), (3, 4), (5.5, 8), (40, 64)])
def test_host_time_hides_behind_as_many_copies_as_it_takes(monkeypatch, host, queued):
    gpu, call = stand_in(monkeypatch, host)
    assert gpu.timed(call) == pytest.approx(3e-3)
    assert gpu.queued == queued


def test_host_time_shows_where_no_queue_hides_it(monkeypatch):
    gpu, call = stand_in(monkeypatch, 100)
    assert gpu.timed(call) == pytest.approx((100 - 64 + 3) / 1e3)
    assert gpu.queued == gpu.most_queued == 64


def test_host_seconds_wait_for_an_idle_device():
    waited = SimpleNamespace(synchronize=lambda: seen.append("wait"))
    seen = []
    timing.host_seconds(lambda: seen.append("call"), waited, limit=0)
    assert seen == ["call"] * 3 + ["wait", "call"] * 5


def test_the_profiler_trace_is_counted_by_category():
    """On a CPU the categories are others, but the file is the same."""
    a = torch.ones(3)
    found = devices.traced(lambda: a + a, ProfilerActivity.CPU)
    assert found["cpu_op"] == 1 and found["kernel"] == 0
    assert not devices.traced(lambda: None, ProfilerActivity.CPU)["cpu_op"]


def test_kernels_and_copies_are_told_apart():
    seen = Counter({"kernel": 4, "gpu_memcpy": 1, "cuda_runtime": 9, "gpu_user_annotation": 1, None: 3})
    assert devices.calls_of(seen) == {"launches": 4, "memcpys": 1, "memsets": 0}
    assert set(devices.calls_of(Counter({"cuda_runtime": 9})).values()) == {None}


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_copy_is_larger_than_caches(name, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "ones", lambda n, device: asked.append((n, device)) or torch.zeros(1, device=device))
    for elements in (1, 2**27, 2**40):
        timing.Copy(elements, devices.on(name))
    sizes = {"cpu": (2**26, 2**27, 2**28), "cuda": (2**28,) * 3}[name]
    assert asked == [(size, name) for size in sizes]


def test_columns_without_numbers_are_left_out():
    rows = [{"optimizer": "A", "engine": "x", "native_calls": 3}, {"optimizer": "B", "engine": "y", "native_calls": 1}]
    names = ["optimizer", "native calls", "launches", "peak MiB"]
    assert report.filled(rows, names) == names[:2]
    assert report.filled([rows[0] | {"launches": None}, rows[1] | {"launches": 5}], names) == names[:3]


@needs_gpu
def test_a_run_on_a_gpu(tmp_path, capsys):
    out, small = tmp_path / "out.json", tmp_path / "small.json"
    small.write_text(json.dumps([[300, 200], [4096], [64, 3, 7, 7]]))
    words = ["--optimizers", "LAMB(max_grad_norm=None)", "--against", "torch.AdamW:fused,torch.AdamW:foreach"]
    words += ["--repeats", "5", "--seconds", "0", "--json", str(out)]
    main(["step", "--device", "cuda", "--shapes", str(small), *words])
    found = json.loads(out.read_text())
    ours, fused, foreach = found["rows"]
    assert ours["engine"] == "triton" and ours["launches"] == ours["native_calls"] == 1 and ours["memcpys"] == 0
    assert 1 <= fused["launches"] < foreach["launches"]
    for row in found["rows"]:
        assert row["allocated_bytes"] > 0 <= row["peak_bytes"] and row["median_ms"] < 1e3 * row["first_step_s"]
        assert 0 < row["host_us"] and 0 < row["percent_of_copy"]
    assert found["machine"]["gpu"] and found["copies"][0]["bytes"] == 2 * 2**30
    assert "launches" in capsys.readouterr().out


def test_cpu_seconds():
    assert 0.01 <= devices.on("cpu").timed(lambda: time.sleep(0.01)) < 1
