"""What a bench asks of a device, one class each: no other module of the bench knows devices by name."""

import json
import tempfile
import time
from collections import Counter
from functools import cache, cached_property
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from . import machine

CALLS = {"launches": "kernel", "memcpys": "gpu_memcpy", "memsets": "gpu_memset"}  # row's name: the profiler's category


def cpu_seconds(call):
    """Wall time of one call, until it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def traced(call, activity):
    """How many events of each category torch.profiler sees in one call, by the names of its trace format."""
    with profile(activities=[activity]) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(), strict=False)
    return Counter(event.get("cat") for event in trace["traceEvents"])


def calls_of(categories):
    """Launches, copies and fills; None for all where the profiler has seen no launch, as without CUPTI's permission."""
    seen = bool(categories["kernel"])
    return {name: categories[category] if seen else None for name, category in CALLS.items()}


class Cpu:
    name = "cpu"
    copy_elements = 2**26  # of the copy at least: 256 MiB, so that caches do not serve it
    returns_early = False  # whether step() returns before its work is done
    methods = {
        "time": "wall time of step()",
        "host_us": "step() of the same optimizer over as many tensors of one element each, until it returns",
    }
    not_measured = ["anything on a GPU", "launches, memcpys, allocated and peak memory: a GPU's"]

    @staticmethod
    def missing():
        """Why the device cannot be used; "" if it can."""
        return ""

    def synchronize(self):
        """Waits until the device has nothing left to do."""

    def timed(self, call):
        """Seconds that the device takes for one call."""
        return cpu_seconds(call)

    def launches(self, call):
        """Kernel launches, memory copies and memory fills of one call."""
        return dict.fromkeys(CALLS)

    def allocated(self):
        """Bytes that tensors hold on the device; None where nobody counts them."""

    def peak_bytes(self, call):
        """Bytes that one call takes at most, beside what is held already; None where nobody counts them."""

    def free_bytes(self):
        """Memory that can still be used."""
        return machine.free_bytes()

    def facts(self):
        """What there is to say of the device, beside the machine's processor."""
        return {}


class Cuda:
    """As `Cpu`, on the current CUDA device.

    Attributes:
        queued: copies that are queued before each timed call, see `timed`.
    """

    name = "cuda"
    copy_elements = 2**28  # 1 GiB, many times the L2
    returns_early = True
    most_queued = 64  # 256 MiB each: 9 ms at 4 TB/s; the driver's queue holds about 1,000 launches anyway
    methods = {
        "time": "a pair of events around step(), queued behind 256 MiB copies (up to 64, until the host is done with "
        "step() before the device begins): the launches' host time is hidden as behind a backward pass, and L2 is full "
        "of something else. Where the host needs longer than the copies (see host_us), its time shows",
        "host_us": "step() until it returns, the device idle before, over the same tensors",
        "launches": "kernels in one step as torch.profiler sees them, memcpys and memsets by themselves; counted when "
        "the group's times had been taken",
        "allocated_bytes": "growth of torch.cuda.memory_allocated by building and two steps: states and all beside",
        "peak_bytes": "torch.cuda.max_memory_allocated during one step, less what was allocated before it",
    }
    not_measured = ["steps in direct succession on an idle device: max(time, host time) bounds them from below"]

    def __init__(self):
        self.queued = 2

    @staticmethod
    def missing():
        return "" if torch.cuda.is_available() else "it needs a GPU, and torch.cuda.is_available() is False here"

    def synchronize(self):
        torch.cuda.synchronize()

    @cached_property
    def _buffers(self):
        return torch.zeros(2, 2**26, device="cuda")

    def _queue(self):
        """Work that keeps the device busy while the host prepares what is timed."""
        source, target = self._buffers
        for _ in range(self.queued):
            target.copy_(source)

    def timed(self, call):
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.synchronize()
            self._queue()
            start.record()
            call()
            end.record()
            late = start.query()  # the device has come to the call before the host was done with it
            end.synchronize()
            if not late or self.queued >= self.most_queued:
                return start.elapsed_time(end) / 1e3
            self.queued *= 2

    def launches(self, call):
        def finished():
            call()
            self.synchronize()

        self.synchronize()
        traced(self.synchronize, ProfilerActivity.CUDA)  # starts CUPTI, which may miss what comes meanwhile
        return calls_of(traced(finished, ProfilerActivity.CUDA))

    def allocated(self):
        return torch.cuda.memory_allocated()

    def peak_bytes(self, call):
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free_bytes(self):
        torch.cuda.empty_cache()  # what the allocator keeps for later counts as free
        return torch.cuda.mem_get_info()[0]

    def facts(self):
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "gpu_memory": found.total_memory,
            "gpu_l2": getattr(found, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }


DEVICES = {"cpu": Cpu, "cuda": Cuda}


@cache
def on(name):
    """The device of this name, as `torch.device.type` has it; one object for all."""
    return DEVICES[name]()
