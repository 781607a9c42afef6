"""The constants of the engines on GPUs: what they may be, how to try others, how to search among them."""

import argparse
import itertools
import random
from contextlib import contextmanager
from importlib import import_module

CHUNK, AHEAD = (1024, 2048, 4096, 8192, 16384), tuple(2**k for k in range(18, 23))
AXES = {  # by backend; threads and registers of the CUDA engine are compiled in
    "cuda": {"CHUNK": CHUNK, "AHEAD": AHEAD},
    "triton": {
        "TILE": (512, 1024, 2048, 4096),
        "WARPS": (2, 4, 8, 16),
        "REGISTERS": (64, 96, 128, 168, 255),  # a thread, at most
        "PROGRAMS": (1, 2, 3, 4, 6, 8),
        "CHUNK": CHUNK,
        "AHEAD": AHEAD,
    },
}
MODULES = {"cuda": "layerfused.cuda", "triton": "layerfused.triton_engine"}
GAIN = 0.995  # a score must fall below so much of the best one's: less is noise


def axis(text):
    """`NAME=VALUE,…` as a pair of a constant's name and its values."""
    name, _, values = text.partition("=")
    try:
        found = tuple(int(value) for value in values.split(","))
    except ValueError:
        found = ()
    if name not in AXES["triton"] or not found or min(found) < 1:  # which has all names
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=INTEGER,… with a NAME of {', '.join(AXES['triton'])}")
    return name, found


def named(point):
    return " ".join(f"{name}={value}" for name, value in point.items())


def module(backend):
    """The module that holds the constants; Triton's takes a second to import, so only who sweeps waits for it."""
    return import_module(MODULES[backend])


def defaults(backend):
    """The constants as they stand."""
    return {name: getattr(module(backend), name) for name in AXES[backend]}


@contextmanager
def applied(backend, point):
    """The engine with these constants, which it reads when a launch is built and whenever it runs."""
    engine = module(backend)

    def put(constants):
        for name, value in constants.items():
            setattr(engine, name, value)
        if backend == "triton":
            engine.programs.cache_clear()

    before = defaults(backend)
    put(point)
    try:
        yield
    finally:
        put(before)


def kernels(backend):
    """By device, what Triton has compiled of its kernel in this process; nothing of other engines."""
    if backend != "triton":
        return []
    return [found[0] for found in getattr(module(backend).engine.run, "device_caches", {}).values()]


def registers(backend):
    """Registers and spilled words of a thread, the most of any kernel in use; None where nobody tells."""
    used = [kernel for compiled in kernels(backend) for kernel in compiled.values()]
    found = {name: [getattr(kernel, name, None) for kernel in used] for name in ("n_regs", "n_spills")}
    return {name: max((v for v in values if v is not None), default=None) for name, values in found.items()}


def descend(axes, start, score):
    """The best point along one axis after the other, until a whole round finds nothing better."""
    best, least, moved = start, score(start), True
    while moved:
        moved = False
        for name, values in axes.items():
            found = {value: score(best | {name: value}) for value in values}
            value = min(found, key=found.get)
            if found[value] < GAIN * least:
                best, least, moved = best | {name: value}, found[value], True
    return best


def scan(axes, start, score):
    """All combinations, in an order that leaves a fair sample where time runs out."""
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    random.Random(0).shuffle(points)
    return min([start, *points], key=score)
