"""Interleaved timing: contenders take turns, so that a noisy minute falls on all of them."""

import gc
import time

import torch

from .device import cpu_seconds


def turns(n):
    """Rows of a Williams design over n contenders: each starts and stands everywhere, and follows each other alike.

    Plain rotation would keep everyone behind the same neighbour, and so with the same leftovers in the caches.
    """
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]
    rows = [[(i + r) % n for i in zigzag] for r in range(n)]
    return rows if n % 2 == 0 else [turn for row in rows for turn in (row, row[::-1])]


def interleave(calls, repeats, seconds, clock=cpu_seconds):
    """Samples in seconds per call: at least `repeats` rounds, then more until `seconds` of wall time are used."""
    samples = [[] for _ in calls]
    rows = turns(len(calls))
    gc.collect()
    gc.disable()  # a collection inside one contender's turn would be booked on it
    deadline, done = time.perf_counter() + seconds, 0
    try:
        while done < repeats or time.perf_counter() < deadline:
            for i in rows[done % len(rows)]:
                samples[i].append(clock(calls[i]))
            done += 1
    finally:
        gc.enable()
    return samples


def summary(samples):
    """Rounds, and median, 10th and 90th percentile in milliseconds."""
    levels = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    quantiles = torch.quantile(torch.tensor(samples, dtype=torch.float64), levels) * 1e3
    return {"rounds": len(samples)} | dict(zip(("median_ms", "p10_ms", "p90_ms"), quantiles.tolist(), strict=True))


def host_seconds(call, device, limit=0.5):
    """Median host time of one call until it returns, the device idle before: 5 to 200 calls, about `limit` seconds."""
    samples, end = [], time.perf_counter() + limit
    for _ in range(3):
        call()
    while len(samples) < 5 or (len(samples) < 200 and time.perf_counter() < end):
        device.synchronize()
        samples.append(cpu_seconds(call))
    return summary(samples)["median_ms"] / 1e3


class Copy:
    """The yardstick: one copy between two fp32 buffers as large as the model, as one more contender.

    At least what the device asks for, so that caches do not serve it; at most 1 GiB, beyond which only memory is lost.
    """

    def __init__(self, elements, device):
        n = min(max(elements, device.copy_elements), 2**28)
        self.source = torch.ones(n, device=device.name)
        self.target = self.source.clone()
        self.bytes = 2 * self.source.nbytes  # read and written

    def step(self):
        self.target.copy_(self.source)

    def row(self, samples):
        """The copy's line: its median is the run's yardstick."""
        line = summary(samples)
        return line | {"bytes": self.bytes, "gb_per_s": self.bytes / line["median_ms"] / 1e6}
