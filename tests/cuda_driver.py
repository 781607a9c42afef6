"""Drives the CUDA engine built for the host without torch, for builds that torch's process cannot load (sanitizers).

    python cuda_driver.py JOB    JOB is a JSON object, see `main`

Prints one line per case, its name and a hash of everything the engine wrote, the same for every build and schedule.
"""

import ctypes
import hashlib
import json
import random
import sys
from array import array

from native_driver import STORAGE, TYPES, load, numbers, packed

P, G, M, V = 1, 2, 4, 8
WAYS = {P: ((0,), (0, 1, 2, 3, 4), (0, 1, 3, 4)), V: ((0,), (0, 4), (0,))}  # of each storage type: csrc/storage.h
PREDICT = 16  # a phase


class Memory:
    """Bytes from malloc itself, so that AddressSanitizer watches their end; `offset` bytes behind its alignment."""

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    withheld = 0  # bytes that are missing at the end

    def __init__(self, content, offset=0):
        self.size = max(len(content) - self.withheld, 0)
        self.begin = self.libc.malloc(self.size + offset)
        self.address = self.begin + offset
        ctypes.memmove(self.address, content, self.size)

    def content(self):
        return ctypes.string_at(self.address, self.size)

    def __del__(self):
        self.libc.free(self.begin)


def tensor(source, values, ways=((0,),) * 3):
    """Memory of a random storage type, often misaligned, and its storage code."""
    kind = STORAGE[source.choice(TYPES)]
    return placed(source, packed(values, TYPES[kind]), 2 if kind else 4), kind | source.choice(ways[kind]) << 2


def placed(source, content, size):
    return Memory(content, size * source.choice([0, 0, 1, 2, 3]))


def rest(source, values, code):
    """What is kept beside a parameter, if its way keeps something."""
    if code >> 2 == 1:
        return placed(source, packed(values, "torch.float32"), 4)
    return placed(source, bytes(2 * len(values)), 2) if code >> 2 in (2, 3) else None


def cut(source, n):
    """The sizes of one, two or three layers that a tensor is cut into."""
    places = sorted(source.randint(0, n) for _ in range(source.choice([0, 0, 1, 2])))
    return [b - a for a, b in zip([0, *places], [*places, n], strict=True)]


def specs_of(plan, source, sizes, case):
    """Layers of a tensor, of several tensors or of a part of one, with and without stats, in two groups."""
    specs, i = [], 0
    while i < len(sizes):
        joined = source.choice([1, 1, 1, 2, 3]) if case["stats"] else 1
        members = range(i, min(i + joined, len(sizes)))
        i, group = members.stop, source.randrange(2)
        cuts = cut(source, sizes[members[0]]) if len(members) == 1 and case["stats"] else []
        spans = [(plan.Span(k, 0, sizes[k]) for k in members)]
        if len(cuts) > 1:
            spans = [[plan.Span(members[0], sum(cuts[:k]), n)] for k, n in enumerate(cuts)]
        stats = case["stats"] > 0 and (case["fixed"] or source.random() < 0.8)
        specs += [plan.LayerSpec(tuple(each), group, stats) for each in spans]
    return specs


class Run:
    """One case under one seed: its tensors, its plan, its engine."""

    def __init__(self, cuda, plan, case, seed):
        source = self.source = random.Random(seed)
        tile = cuda.TILE
        edges = [0, 1, 3, 4, 17, tile - 1, tile, tile + 4, cuda.WHOLE, cuda.WHOLE + 1, 2 * cuda.WHOLE + 5]
        self.sizes = [source.choice(edges) for _ in range(source.randint(0, 5))] + [source.choice(edges[4:])]
        values = [numbers(source, n) for n in self.sizes]
        leads = source.random() < 0.5
        ways = {} if leads else WAYS  # no launch has both
        masks = [bit for bit in (P, M, V) if case["masks"] & bit]
        self.operands = {bit: [tensor(source, x, ways.get(bit, ((0,),) * 3)) for x in values] for bit in masks}
        self.rests = [rest(source, x, code) for x, (_, code) in zip(values, self.operands[P], strict=True)]
        for bit in (M, V):
            for memory, _ in self.operands.get(bit, ()):
                ctypes.memset(memory.address, 0, memory.size)
        specs = specs_of(plan, source, self.sizes, case)
        options = {"chunk": source.choice([tile // 2, tile + 8, 2 * tile]), "ahead": source.choice([0, tile, 4 * tile])}
        made = plan.make_plan(specs, whole=source.choice([0, cuda.WHOLE]), norm=True, **options)
        self.engine = cuda.Engine(case["rule"], *made.packed(), len(self.sizes), 2)
        self.engine.blocks = source.randint(1, 3)
        if not leads:
            seeds, places = (array("q", [source.getrandbits(53) for _ in values]) for _ in range(2))
            rests = array("q", (one.address if one else 0 for one in self.rests))
            self.engine.set_precision(rests, seeds, array("q", (2 * place for place in places)))
        self.workspace = Memory(bytes(self.engine.workspace_bytes))
        self.engine.bind(0, self.workspace.address, 0)
        slots, layers = made.layers[-1].state + made.layers[-1].states, len(specs)
        counts = (4 * len(self.sizes), 8 * slots, 8 * layers * case["stats"], 8 * layers * case["reports"], 8)
        self.outputs = [Memory(bytes(size)) for size in counts]
        self.engine.set_outputs(*(memory.address for memory in self.outputs))
        self.numbers = array("d", [1.0, 2.0, 1.0, *case["row"], -1.0, *case["row"]])  # max_norm, ahead, a row each
        self.places = array("q", bytes(8 * len(self.numbers)))
        self.live = Memory(array("f", self.numbers[3:4]).tobytes())  # lr on the device
        self.predicted = [Memory(bytes(p.size)) for p, _ in self.operands[P]] if leads else []
        self.skipped, self.scale = Memory(bytes(8)), Memory(array("f", [4.0]).tobytes())
        self.found_inf = Memory(bytes(4))

    def give(self):
        """This step's gradients, some of which are missing, and one number that lives on the device or does not."""
        addresses, types = array("q"), array("q")
        self.gradients = [tensor(self.source, numbers(self.source, n)) for n in self.sizes]
        for i, gradient in enumerate(self.gradients):
            row = [self.operands[bit][i] if bit in self.operands else None for bit in (P, M, V)]
            row.insert(1, gradient if self.source.random() < 0.8 else None)
            addresses.extend(x[0].address if x else 0 for x in row)
            types.append(sum((x[1] if x else 0) << 8 * k for k, x in enumerate(row)))
        self.places[3] = self.live.address if self.source.random() < 0.3 else 0
        predicted = array("q", (memory.address for memory in self.predicted))
        self.engine.give(0, addresses, types, self.numbers, self.places, predicted)

    def step(self, way, phases):
        self.give()
        clip, scaled = way != "step", way == "phases"
        scaling = (self.scale.address, self.found_inf.address) if scaled else (0, 0)
        for phase in phases:
            self.engine.run(phase, 0, clip, self.skipped.address, *scaling)
        if self.predicted:
            self.engine.run(PREDICT, 0, False, self.skipped.address, 0, 0)

    def hash(self):
        found = hashlib.sha256()
        tensors = [memory for rows in self.operands.values() for memory, _ in rows]
        rests = [one for one in self.rests if one]
        for memory in [*tensors, *rests, *self.predicted, *self.outputs, self.skipped]:
            found.update(memory.content())
        return found.hexdigest()[:16]


def main(job):
    """module, plan: paths; cases: name -> rule, row of hyper-parameters, stats, reports, masks of its operands, fixed
    (layers without stats not allowed); seeds: plans of each; steps; withheld: bytes that memory is too short by."""
    Memory.withheld = job["withheld"]
    cuda, plan = load("_cuda", job["module"]), load("plan", job["plan"])
    phase = plan.Phase
    ways = {
        "step": [phase.STEP & ~phase.NORM],
        "clipped": [phase.STEP],
        "phases": [phase.NORM, phase.REDUCE, phase.FINISH, phase.APPLY],
    }
    for name, case in job["cases"].items():
        for seed in range(job["seeds"]):
            way = list(ways)[seed % 3]
            run = Run(cuda, plan, case, seed)
            for _ in range(job["steps"]):
                run.step(way, ways[way])
            print(name, seed, run.hash(), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
