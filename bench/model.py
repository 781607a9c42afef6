"""A model on paper that is a program: predicted time and traffic of a step on a GPU that need not be there.

Simulates the plan's blocks, L2 and DRAM on a device of the table in `bench/gpus.py`; `bench/simulation.py` says what
is assumed. Our engine's constants are as they stand where none are given; lists of them make a sweep.
`--measured` holds the predictions against what `step` measured.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from functools import cache
from pathlib import Path

from . import device as devices
from . import machine
from . import shapes as models
from . import spec as specs
from .contender import DTYPES
from .gpus import GPUS, changed, recognised
from .model_report import median_error, sweep, table
from .ours import Case, Settings, Work
from .rivals import RIVALS, limits_of
from .simulation import Device

AXES = {  # of `bench.ours.Settings`
    "chunk": "elements of an item",
    "whole": "elements of a layer that one block keeps on chip; no more than a chunk",
    "ahead": "elements reduced between a layer's last `reduce` and its first `apply`",
    "blocks": "on each multiprocessor",
    "threads": "of a block; a tile has four elements for each",
    "resident": "elements of a layer that several blocks keep on chip: nothing that the engine has; default 0",
}
METHODS = {
    "predicted_ms": "an event simulation of blocks, L2 and DRAM; see bench/simulation.py. Nothing is measured",
    "l2_hits": "bytes of requests that found their line in L2, of all requested; a write behind its read counts as one",
    "words": "4-byte words between L2 and DRAM for each element, with what is written back",
    "percent_of_roofline": "compulsory bytes at the data sheet's bandwidth, in percent of the predicted time",
    "percent_of_copy": "the same at the bandwidth that a copy is taken to reach, as in `step`",
}
NOT_MEASURED = ["anything: these are predictions; which numbers are estimates is marked in bench/gpus.py and ours.py"]


def numbers(text):
    """`1024,2048` as a tuple of integers."""
    try:
        found = tuple(int(value) for value in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not INTEGER,… with each >= 0")
    return found


def change(text):
    name, _, value = text.partition("=")
    return name, value


def add_arguments(parser):
    add = parser.add_argument
    add("--device", choices=GPUS, default="h200")
    add("--shapes", default="resnet50", help=f"list of {', '.join(models.MODELS)} or FILE.json")
    add("--optimizers", default="LAMB(max_grad_norm=None),AdamW", help='ours: list of NAME or "NAME(key=value,…)"')
    add("--against", default=",".join(RIVALS), help=f"list of {', '.join(RIVALS)}; '' for none")
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters and gradients")
    for name, what in AXES.items():
        add(f"--{name}", type=numbers, metavar="N,…", help=what)
    add("--cuda", default="13", help="version that torch is built with: how much one of its launches holds")
    add("--eager", action="store_true", help="L2 writes back at once what is not read again, instead of when it must")
    add("--set", type=change, action="append", default=[], metavar="FIELD=NUMBER", help="of bench/gpus.py")
    add("--measured", nargs="+", type=Path, default=[], metavar="FILE.json", help="of `step --device cuda` or `gpu`")
    add("--json", type=Path, metavar="OUT.json")


case_of = cache(Case.of)


def predicted(shapes, text, dtype, gpu, settings, limits, eager=False):
    """One row.

    Raises:
        ValueError: for an optimizer, shapes or a type that there is no model of.
    """
    device = Device(gpu, eager)
    if text in RIVALS:
        rival = RIVALS[text](shapes, dtype, limits)
        rival.run(device)
        elements, compulsory = rival.elements, rival.compulsory
    else:
        case = case_of(shapes, text, dtype)
        Work(case, settings, gpu).run(device)
        elements, compulsory = case.elements, case.bytes(settings)["compulsory"]
    device.finish()
    row = {"shapes": Path(shapes).stem, "optimizer": text, "dtype": dtype, "device": gpu.name, "elements": elements}
    row |= {"predicted_ms": 1e3 * device.now, "launches": device.launches, "compulsory_bytes": compulsory}
    row |= {"requested_bytes": device.requested, "dram_bytes": device.dram}
    return row | ratios(row, device, gpu)


def ratios(row, device, gpu):
    """What is derived from a row's counts; None where there is nothing to divide by."""
    least = {"roofline": gpu.sheet_bandwidth, "copy": gpu.bandwidth}
    found = {f"percent_of_{k}": 100 * row["compulsory_bytes"] / rate / device.now for k, rate in least.items()}
    hits = device.hits / device.requested if device.requested else None
    return found | {"l2_hits": hits, "words": row["dram_bytes"] / 4 / row["elements"] if row["elements"] else None}


def listed(args, gpu):
    """Predictions for all shapes and optimizers, and notes on rivals that there is no model of."""
    rows, notes = [], []
    (settings,) = points(args)
    for shapes in specs.split(args.shapes):
        for text in specs.split(args.optimizers) + specs.split(args.against):
            try:
                rows.append(predicted(shapes, text, args.dtype, gpu, settings, limits_of(args.cuda), args.eager))
            except ValueError as error:
                if text not in RIVALS:
                    raise
                notes.append(f"skipped {text}: {error}")
    return rows, notes


def points(args):
    """All combinations of the constants."""
    start = Settings()
    axes = {name: getattr(args, name) or (getattr(start, name),) for name in AXES}
    return [start._replace(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def swept(args, gpu):
    """A row per case for each choice of constants; the score is the geometric mean of the times."""
    cases = list(itertools.product(specs.split(args.shapes), specs.split(args.optimizers)))
    found = []
    for settings in points(args):
        rows = [predicted(shapes, text, args.dtype, gpu, settings, None, args.eager) for shapes, text in cases]
        score = statistics.geometric_mean(row["predicted_ms"] for row in rows)
        found.append({"constants": settings._asdict(), "score": score, "rows": rows})
    return found


def compared(args):
    """Predictions beside what was measured, and notes on rows that there is no model of."""
    rows, notes = [], []
    for path in args.measured:
        document = json.loads(path.read_text())
        gpu, limits = measured_on(path, document, args)
        for row in document["rows"]:
            try:
                rows.append(_compared(row, gpu, points(args)[0], limits, args.eager))
            except ValueError as error:
                notes.append(f"skipped {row['shapes']}, {row['optimizer']}: {error}")
    return rows, notes


def measured_on(path, document, args):
    """The device of a file of measurements, and the limits of its torch."""
    name = document.get("machine", {}).get("gpu")
    if document.get("bench") not in ("step", "gpu") or not name:
        raise ValueError(f"{path} has no measurements on a GPU: give what `step --device cuda --json` or `gpu` wrote")
    return changed(recognised(name), dict(args.set)), limits_of(document["machine"].get("cuda") or args.cuda)


def _compared(row, gpu, settings, limits, eager):
    if row["ours"] and row["engine"] != "cuda":
        raise ValueError(f"the model is of the CUDA engine, this is {row['engine']}")
    if not row["ours"] and row["optimizer"] not in RIVALS:
        raise ValueError(f"no model of it; there is one of {', '.join(RIVALS)}")
    found = predicted(row["shapes"], row["optimizer"], row["dtype"], gpu, settings, limits, eager)
    error = 100 * (found["predicted_ms"] / row["median_ms"] - 1)
    return found | {"median_ms": row["median_ms"], "error_percent": error}


def check(args):
    """Every complaint comes before the simulating."""
    for text in specs.split(args.against):
        if text not in RIVALS:
            raise ValueError(f"no model of {text!r} in --against: there is one of {', '.join(RIVALS)}")
    if not specs.split(args.optimizers) or not specs.split(args.shapes):
        raise ValueError("--optimizers and --shapes must name at least one each")
    if not args.cuda.partition(".")[0].isdigit():
        raise ValueError(f"--cuda must be a version as 12.8 or 13, got {args.cuda!r}")
    for shapes, text in itertools.product(specs.split(args.shapes), specs.split(args.optimizers)):
        case_of(shapes, text, args.dtype)
    for point in points(args):
        if min(point.chunk, point.blocks, point.threads) < 1:
            raise ValueError("--chunk, --blocks and --threads must be >= 1")
        if point.resident > point.chunk * 32:
            raise ValueError(f"--resident {point.resident} is more than 32 blocks of --chunk hold: use fewer")
    if args.measured and len(points(args)) > 1:
        raise ValueError("--measured compares one choice of constants: give one number each")


def run(args):
    try:
        check(args)
        gpu = changed(GPUS[args.device], dict(args.set))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        result, printed = predictions(args, gpu)
    except (ValueError, ImportError, OSError) as error:
        args.error(str(error))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(printed)


def predictions(args, gpu):
    """The JSON's document and the printed table."""
    texts = specs.split(args.optimizers)
    result = machine.origin("model", args, devices.on("cpu"), texts)
    result |= {"methods": METHODS, "not_measured": NOT_MEASURED, "device": dataclasses.asdict(gpu)}
    where = f"PREDICTED for {gpu.name}: {gpu.processors} multiprocessors, copy {gpu.bandwidth / 1e12:.2f} TB/s, "
    where += f"L2 {gpu.l2_capacity / 2**20:.0f} MiB; {args.dtype}{', eager' * args.eager}"
    if not args.measured and len(points(args)) > 1:
        found = swept(args, gpu)
        return result | {"points": found}, "\n".join([sweep(found), where])
    rows, notes = compared(args) if args.measured else listed(args, gpu)
    constants = [" ".join(f"{k}={v}" for k, v in points(args)[0]._asdict().items())]
    last = [median_error(rows)] if args.measured else [where]
    printed = "\n".join([*([table(rows)] if rows else []), *notes, *constants, *last])
    return result | {"rows": rows, "skipped": notes, "constants": points(args)[0]._asdict()}, printed
