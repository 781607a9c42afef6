"""Drives the native CPU engine without torch, for builds that torch's process cannot load (sanitizers).

    python native_driver.py JOB    JOB is a JSON object, see `main`

Prints one line per case, its name and a hash of everything the engine wrote, the same for every build and team.
"""

import ctypes
import hashlib
import importlib.util
import json
import random
import struct
import sys
from array import array
from types import SimpleNamespace

STORAGE = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}
TYPES = list(STORAGE)
SIZES = (0, 1, 17, 63, 64, 65, 127, 128, 129, 1000, 2100, 400, 333)  # against chunks of 64 and tiles of 2,048


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Memory:
    """Bytes from malloc itself, so that AddressSanitizer watches their ends."""

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    withheld = 0  # bytes that are missing at the end

    def __init__(self, content):
        self.size = max(len(content) - self.withheld, 0)
        self.address = self.libc.malloc(self.size) or 0
        ctypes.memmove(self.address, content, self.size)

    def content(self):
        return ctypes.string_at(self.address, self.size)

    def __del__(self):
        self.libc.free(self.address)


def packed(values, dtype):
    """Numbers as this type stores them; bf16 by truncation: any will do."""
    if dtype == "torch.bfloat16":
        return b"".join(struct.pack("<f", x)[2:] for x in values)
    return struct.pack(f"<{len(values)}{'e' if dtype == 'torch.float16' else 'f'}", *values)


def numbers(source, n):
    return [source.uniform(-2, 2) for _ in range(n)]


class Tensor:
    """As much of a tensor as csrc/cpu/reader.cpp asks for."""

    device = SimpleNamespace(type="cpu", index=None)

    def __init__(self, values, dtype):
        self.memory, self.dtype, self.shape, self.grad = Memory(packed(values, dtype)), dtype, (len(values),), None

    def data_ptr(self):
        return self.memory.address

    def stride(self):
        return (1,)


def specs_of(plan, layerwise, fixed):
    """A layer per tensor, one tensor in three slices, two tensors as one layer, one without stats if there may be."""
    specs, last = [], len(SIZES) - 1
    for i, n in enumerate(SIZES[:-2]):
        cuts = [300, 1, 699] if n == 1000 and layerwise else [n]
        stats = layerwise and (fixed or n != 129)
        starts = [sum(cuts[:k]) for k in range(len(cuts))]
        specs += [
            plan.LayerSpec((plan.Span(i, start, cut),), i % 2, stats) for start, cut in zip(starts, cuts, strict=True)
        ]
    pair = tuple(plan.Span(i, 0, SIZES[i]) for i in (last - 1, last))
    layers = [pair] if layerwise else [(span,) for span in pair]
    return specs + [plan.LayerSpec(spans, 0, layerwise) for spans in layers]


def way_of(i):
    """By which way parameter i is stored, as csrc/storage.h counts: each of them for bf16, and for fp16 what it has."""
    way = 1 + (i // 3 + 3 * (i % 3 == 2)) % 4
    return 0 if i % 3 == 0 else 3 if (i % 3, way) == (2, 2) else way


class Run:
    """One case: its tensors, its plan, its engine; `kept`: 16-bit numbers are stored by other ways than to nearest."""

    def __init__(self, cpu, plan, job, case, norm, kept=False):
        source = random.Random(0)
        needs = cpu.rules()[case["rule"]]
        stats = needs["sums"] + needs["minima"]
        masks = needs["reduce"][0] | needs["apply"][0]
        self.params = [Tensor(numbers(source, n), TYPES[i % 3]) for i, n in enumerate(SIZES)]
        every = ((4, 3), (8, 9))  # m and v: their bits in a mask, and how often their type changes
        self.states = [
            [Tensor([0.0] * n, TYPES[(i // often) % 3]) for i, n in enumerate(SIZES)] if masks & bit else None
            for bit, often in every
        ]
        specs = specs_of(plan, stats > 0, case["fixed"])
        made = plan.make_plan(specs, chunk=job["chunk"], whole=job["whole"], ahead=job["ahead"], norm=norm)
        self.native = cpu.Engine(case["rule"], *made.packed(), len(SIZES))
        slots = made.layers[-1].state + made.layers[-1].states
        sizes = (4 * len(SIZES), 8 * slots, 8 * len(specs) * stats, 8 * len(specs) * needs["reports"], 8)
        self.outputs = [Memory(bytes(size)) for size in sizes]
        self.native.set_outputs(*(memory.address for memory in self.outputs))
        drawn = [4 * kept * (TYPES[(i // 9) % 3] == "torch.bfloat16") for i in range(len(SIZES))]  # v's, see `every`
        ways = [way_of(i) * kept for i in range(len(SIZES))], drawn
        kinds = {1: "torch.float32", 2: "torch.bfloat16"}  # of remainders any of 16 bits
        self.rests = [
            Tensor(numbers(source, n) if way == 1 else [0.0] * n, kinds.get(way, p.dtype)) if way in (1, 2, 3) else None
            for n, way, p in zip(SIZES, ways[0], self.params, strict=True)
        ]
        columns = []
        for states in self.states:
            columns.append(array("q", [x.data_ptr() for x in states] if states else [0] * len(SIZES)))
            columns.append(array("q", [STORAGE[x.dtype] for x in states] if states else [0] * len(SIZES)))
        columns[3] = array("q", [kind | way << 2 for kind, way in zip(columns[3], ways[1], strict=True)])
        self.native.set_states(*columns)
        self.reader = cpu.Reader(self.params, [{"rest": rest} for rest in self.rests], ())
        if kept:
            self.reader.set_ways(*ways, [rest and "rest" for rest in self.rests])
            rests = [rest.data_ptr() if rest else 0 for rest in self.rests]
            tensors = range(len(SIZES))
            self.native.set_precision(*(array("q", column) for column in (rests, [2**40 + 1] * len(SIZES), tensors)))
        self.rows = array("d", [1.0, *case["row"], -1.0, *case["row"]])

    def step(self, t, phases, max_norm, threads):
        source = random.Random(t + 1)
        for i, p in enumerate(self.params):
            p.grad = Tensor(numbers(source, SIZES[i]), TYPES[(i // 2) % 3]) if (t + i) % 5 else None
        self.reader.read()
        for phase in phases:
            assert self.native.run(phase, self.reader, self.rows, max_norm, threads)

    def hash(self):
        found = hashlib.sha256()
        tensors = [*self.params, *filter(None, self.rests), *(x for states in self.states if states for x in states)]
        for memory in [*(x.memory for x in tensors), *self.outputs]:
            found.update(memory.content())
        return found.hexdigest()[:16]


def main(job):
    """module, plan: paths; cases: name -> rule, row of hyper-parameters, fixed (layers without stats not allowed);
    chunk, whole, ahead: the plan's; threads, steps, repeat; withheld: bytes that tensors are too short by."""
    Memory.withheld = job["withheld"]
    cpu, plan = load("_cpu", job["module"]), load("plan", job["plan"])
    phase = plan.Phase
    ways = {
        "step": ([phase.STEP & ~phase.NORM], 0.0),
        "clipped": ([phase.STEP], 1.0),
        "phases": ([phase.NORM, phase.REDUCE, phase.FINISH, phase.APPLY], 1.0),
        "kept": ([phase.STEP], 1.0),
    }
    for name, case in job["cases"].items():
        for way, (phases, max_norm) in ways.items():
            hashes = set()
            for _ in range(job["repeat"]):
                run = Run(cpu, plan, job, case, max_norm > 0, way == "kept")
                for t in range(job["steps"]):
                    run.step(t, phases, max_norm, job["threads"])
                hashes.add(run.hash())
            print(name, way, *hashes, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
