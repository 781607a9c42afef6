"""Where a bench ran, as data for its JSON: versions, processor, memory. No host names, no paths."""

import datetime
import os
import platform
import shlex
import time
from importlib import metadata
from pathlib import Path

import torch

from . import spec as specs


def _first(path, key):
    """The value behind `key :` in a file of /proc, or None."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _last_level_cache():
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return caches[-1].read_text().strip() if caches else None


def describe():
    """Processor, cores, last-level cache, memory, instruction set."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "last_level_cache": _last_level_cache(),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(packages):
    """Versions of Python, torch and the named packages; None for one that is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in sorted(set(packages) - {"torch"}):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def origin(bench, args, device, texts):
    """Where results come from: the call, the machine, and the versions of what the optimizers' specs name."""
    packages = {specs.parse(text).package.partition(".")[0] for text in texts}
    return {
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m bench " + shlex.join(args.command),
        "machine": describe() | device.facts(),
        "versions": versions(packages | {"layerfused", "numpy", "triton"}),
        "threads": torch.get_num_threads(),
    }


def _busy_seconds():
    """CPU seconds of the whole machine so far, stolen ones included; None without /proc/stat."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """How many CPUs others kept busy since this was made.

    Two threads on two cores meet at a barrier after every tensor: where one core is taken, each meeting waits for a
    scheduler slice (4 ms were measured for a step of 0.2 ms), and medians do not help against that.
    """

    def __init__(self):
        self.busy, self.own, self.wall = _busy_seconds(), time.process_time(), time.perf_counter()

    def cpus(self):
        """Their average number, None where the system does not tell."""
        if self.busy is None:
            return None
        others = _busy_seconds() - self.busy - (time.process_time() - self.own)
        return max(0.0, others / (time.perf_counter() - self.wall))


def free_bytes():
    """Memory that the system and the control group leave."""
    available = _first("/proc/meminfo", "MemAvailable")
    free = int(available.split()[0]) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)
