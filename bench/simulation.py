"""Kernels on a device, simulated event by event: blocks that take jobs in order, and the memory they share.

What is assumed:
- A launch keeps so many blocks on each multiprocessor; whichever is free takes the next job in the list: our ticket
  counter, or the hardware's scheduler for kernels with a block per job.
- A block works tile by tile: it asks for all operands of a tile, waits for them, computes, writes without waiting. So
  what one block has in flight is one tile's reads, and only other blocks hide its waiting.
- DRAM and L2 are servers with one queue each. A request waits for what was asked before it, then for its latency.
  Reads and writes of DRAM cost the same, by what a copy reaches.
- The four schedulers of a multiprocessor issue INSTRUCTIONS for each operand that an element reads or writes.
- What is marked as read for the last time leaves L2 first. A dirty line is written when its room is needed, so that
  DRAM rests while a stretch of `apply` finds all in L2; with `eager` it is written at once. Nobody has told which of
  the two a device does: the truth should lie between.
- L2 holds nothing of use at the start. What is dirty at the end is written within the step, in place of what the
  kernel before has left dirty.
Not modelled: the host, clocks and power, DRAM pages and refresh, L1, TLBs, caches' sets, what two halves of L2 copy.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from .cache import Cache

INSTRUCTIONS = 8.6  # LAMB's machine code without contraction has about 86 for its 10 operands
LANES = 128  # instructions of threads that a multiprocessor issues in a cycle
OPERANDS = range(4)  # p, g, m, v: bits of the masks, as in csrc/rule.h


class Touch(NamedTuple):
    """What happens to one operand of a tile; `width` in bytes an element."""

    operand: int
    width: int
    reads: bool
    writes: bool
    keep: bool


class Sweep(NamedTuple):
    """One pass over some elements.

    Attributes:
        read, written: bytes an element.
        wide: tiles that a block asks for at once.
    """

    touches: tuple[Touch, ...]
    read: int
    written: int
    wide: int


class Job(NamedTuple):
    """A piece of work for one block, over `count` elements whose first tile is number `tile`.

    With two sweeps the block keeps its elements on chip and waits for its own gate between them.
    """

    tile: int
    count: int
    sweeps: Sequence[Sweep]
    waits: int | None = None  # for this gate, before the first sweep
    arrives: int | None = None  # at this gate, after the first sweep


class Kernel(NamedTuple):
    """How a kernel's blocks work.

    Attributes:
        tile: elements that a block works on at once.
        blocks: on each multiprocessor.
        item_s: from one job's end to the next job's first read.
        arrive_s: from a sweep's end until its sums are known to have arrived.
    """

    tile: int
    blocks: int
    item_s: float
    arrive_s: float = 0.0


class Gate:
    """Opens when all have arrived and the last of them has combined what they brought, which takes `seconds`.

    Who passes needs `look_s`, to see that it is open and to read what was left there.
    """

    def __init__(self, arrivals, seconds, look_s=0.0):
        self.missing, self.seconds, self.look_s = arrivals, seconds, look_s
        self.opens, self.waiting = None, []


def sweep_of(masks, widths, kept=0, wide=1):
    """A sweep from its masks (read, written), bytes an element of each operand, and a mask of what is used again."""
    reads, writes = masks
    bits = [(k, 1 << k) for k in OPERANDS if (reads | writes) >> k & 1 and widths[k]]
    touches = tuple(Touch(k, widths[k], bool(reads & b), bool(writes & b), bool(kept & b)) for k, b in bits)
    read, written = (sum(touch.width for touch in touches if touch[way]) for way in (2, 3))
    return Sweep(touches, read, written, wide)


class Device:
    """A device at work.

    Attributes:
        now: when the last kernel ended.
        launches: so far.
        requested, hits, dram: bytes asked of L2, found there, and moved between L2 and DRAM.
    """

    def __init__(self, gpu, eager=False):
        self.gpu, self.cache = gpu, Cache(gpu.l2_capacity, eager)
        self.now, self.launches = 0.0, 0
        self.requested = self.hits = self.dram = 0
        self._l2_free = self._dram_free = 0.0
        self._issue_free = [0.0] * gpu.processors

    def launch(self, kernel, jobs, gates=()):
        """Runs a kernel to its end."""
        self.now += self.gpu.launch_s
        self.launches += 1
        tickets, heap = iter(jobs), []
        number = min(len(jobs), kernel.blocks * self.gpu.processors)
        blocks = [self._block(kernel, k, tickets, gates, heap) for k in range(number)]
        heap += [(self.now, k) for k in range(number)]
        for block in blocks:
            next(block)
        while heap:
            self.now, k = heapq.heappop(heap)
            then = blocks[k].send(self.now)
            if then is not None:
                heapq.heappush(heap, (then, k))
        if next(tickets, None) is not None or any(gate.waiting for gate in gates):
            raise RuntimeError(f"{number} blocks wait for each other: what they keep on chip is too large")

    def finish(self):
        """Writes back what is dirty."""
        written = self.cache.flush()
        self.dram += written
        self._dram_free = max(self._dram_free, 0.0) + written / self.gpu.bandwidth
        self.now = max(self.now, self._dram_free)

    def _block(self, kernel, k, tickets, gates, heap):
        """A block's life: yields when it goes on, or None while it waits at a gate; is sent the time when it does."""
        now = yield
        processor = k % self.gpu.processors
        for job in tickets:
            now = yield now + kernel.item_s
            gate = None if job.waits is None else gates[job.waits]
            for sweep in job.sweeps:
                if gate is not None:
                    now = yield self._pass(gate, k, now)
                step = sweep.wide * kernel.tile
                for begin in range(0, job.count, step):
                    count = min(step, job.count - begin)
                    now = yield self._load(now, job.tile + begin // kernel.tile, count, kernel.tile, sweep)
                    now = yield self._compute(now, processor, count, sweep)
                if job.arrives is not None and gate is not gates[job.arrives]:
                    gate = gates[job.arrives]
                    now = yield self._arrive(gate, now + kernel.arrive_s, heap)
        yield None

    def _pass(self, gate, k, now):
        if gate.opens is None:
            gate.waiting.append(k)
            return None
        return max(now, gate.opens) + gate.look_s

    def _arrive(self, gate, now, heap):
        gate.missing -= 1
        if gate.missing:
            return now
        gate.opens = now + gate.seconds
        for k in gate.waiting:
            heapq.heappush(heap, (gate.opens + gate.look_s, k))
        gate.waiting = []
        return gate.opens

    def _load(self, now, first, count, tile, sweep):
        """When the reads of some tiles have come; their writes are queued with them."""
        missed = returned = 0
        for k, begin in enumerate(range(0, count, tile), first):
            elements = min(tile, count - begin)
            for operand, width, reads, writes, keep in sweep.touches:
                size = width * elements
                hit, written = self.cache.touch(4 * k + operand, size, writes, keep)
                self.hits += size * (reads + writes - (not hit))  # a write behind a read finds the line there
                returned += written
                if reads and not hit:
                    missed += size
        gpu = self.gpu
        self.requested += count * (sweep.read + sweep.written)
        self.dram += missed + returned
        service = count * (sweep.read / gpu.l2_read + sweep.written / gpu.l2_write)
        self._l2_free = max(self._l2_free, now) + service
        self._dram_free = max(self._dram_free, now) + (missed + returned) / gpu.bandwidth
        there = self._l2_free + gpu.l2_s
        return max(there, self._dram_free + gpu.dram_s) if missed else there

    def _compute(self, now, processor, count, sweep):
        """When the multiprocessor has issued the tile's instructions, after those of its other blocks."""
        requests = sum(touch.reads + touch.writes for touch in sweep.touches)
        cycles = count * requests * INSTRUCTIONS / LANES
        done = max(self._issue_free[processor], now) + cycles / self.gpu.clock
        self._issue_free[processor] = done
        return done
