"""Time of one optimizer step over a model's shapes, interleaved with competitors and a memory copy."""

import gc
import json
import sys
from pathlib import Path

import torch

from . import device as devices
from . import machine, report, timing
from . import shapes as models
from . import spec as specs
from .contender import DTYPES, Contender, parameters

METHODS = {
    "order": "contenders take turns in the rows of a Williams design: each follows each other equally often",
    "gradients": "the same fixed tensors in every step and for every optimizer; parameters are shared, states are not",
    "copy": "torch copy_ between two fp32 buffers of the model's size, at least 256 MiB on a CPU and 1 GiB on a GPU, "
    "at most 1 GiB; one more contender; bytes read + written",
    "first_step_s": "wall time of the first step over these tensors, which makes states and compiles; what Triton has "
    "compiled already, in this process or in its cache on disk, is not compiled again",
    "bytes": "compulsory: what the algorithm must move if all stays in cache between sweeps; requested: what the plan "
    "asks for; gb_per_s and percent_of_copy are by compulsory bytes and the median",
    "native_calls": "ours: launches by the plan's count; others: torch operator calls in one step, counted by a "
    "TorchDispatchMode; a foreach call counts once, though on a CPU it loops over the tensors",
    "workspace_bytes": "opt.workspace_bytes(): held beside parameters, gradients and states",
    "others_cpus": "CPUs that other processes kept busy during the rounds, from /proc/stat; above 0.1 is a noisy run",
    "ratios": "median of the row / median of the competitor, both of this run",
}
NOT_MEASURED = [
    "requested and workspace bytes of competitors; compulsory bytes of competitors other than torch's SGD, Adam, AdamW",
    "a step inside real training: here nothing else uses the caches between two steps but the other contenders",
]


def add_arguments(parser):
    add = parser.add_argument
    add("--shapes", default="resnet50", help=f"list of {', '.join(models.MODELS)} or FILE.json")
    add("--optimizers", default="LAMB,LAMB(max_grad_norm=None),AdamW", help='list of NAME or "NAME(key=value,…)"')
    add("--against", default="torch.AdamW:fused", help="list of competitors, [clip+][groups+]package.Name[:flag][(…)]")
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters and gradients")
    add("--device", choices=devices.DEVICES, default="cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=int, default=15, help="rounds at least, whatever they take")
    add("--seconds", type=float, default=10.0, help="wall time per shape after which no further round begins")
    add("--json", type=Path, metavar="OUT.json")
    add("--plot", type=Path, metavar="OUT.png")


def batches(ours, against, room):
    """Cuts `ours` so that each part with all competitors makes at most `room` contenders, the states memory holds."""
    size = min(room - len(against), len(ours))
    if size < 1:
        remedy = "name fewer competitors or smaller shapes"
        raise MemoryError(f"memory holds the states of {room} optimizers, {len(against) + 1} are needed: {remedy}")
    return [ours[i : i + size] for i in range(0, len(ours), size)]


def room(elements, device):
    """How many optimizers' states fit: two fp32 tensors each, and two spare ones for what foreach code allocates."""
    return int(0.95 * device.free_bytes() / (8 * max(elements, 1))) - 1


def enter(texts, params, optional, notes):
    """Builds contenders; a competitor that is absent or cannot serve here is left out and noted."""
    entered = []
    for text in texts:
        try:
            entered.append(Contender.build(specs.parse(text), params))
        except (ImportError, RuntimeError) as error:
            if not optional:
                raise
            note = {"optimizer": text, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
            if note not in notes:
                notes.append(note)
                print(f"skipped {text}: {note['reason']}", file=sys.stderr)
    return entered


def speed(contender, samples, yardstick):
    """What the samples say of a contender, against the copy's row."""
    line = {"optimizer": contender.spec.text, "ours": contender.ours, "engine": contender.engine}
    line |= timing.summary(samples) | contender.traffic()
    compulsory = line["compulsory_bytes"]
    found = compulsory and compulsory / line["median_ms"] / 1e6
    percent = found and 100 * found / yardstick["gb_per_s"]
    return line | {"gb_per_s": found, "percent_of_copy": percent, "first_step_s": contender.first_step_s}


def measure(contenders, copy, device, args):
    """Rows of one batch and the copy's row; the profiler comes last, so that it disturbs no timing of its batch."""
    calls = [copy.step, *(c.step for c in contenders)]
    load = machine.OtherLoad()
    copied, *samples = timing.interleave(calls, args.repeats, args.seconds, device.timed)
    yardstick = copy.row(copied) | {"others_cpus": load.cpus()}
    rows = [speed(c, s, yardstick) for c, s in zip(contenders, samples, strict=True)]
    rows = [row | c.memory() | {"host_us": c.host_us()} for row, c in zip(rows, contenders, strict=True)]
    return [row | device.launches(c.step) for row, c in zip(rows, contenders, strict=True)], yardstick


def bench(name, args, notes):
    """All rows of one list of shapes: everyone over the same parameters, in batches where memory is short."""
    shapes = models.load(name)
    elements, device = models.elements(shapes), devices.on(args.device)
    params = parameters([shape for _, shape in shapes], DTYPES[args.dtype], args.device)
    copy = timing.Copy(elements, device)
    ours, against = specs.split(args.optimizers), specs.split(args.against)
    common = {"device": args.device, "threads": args.threads, "dtype": args.dtype}
    common = {"shapes": Path(name).stem, "tensors": len(shapes), "elements": elements} | common
    rows, copies = [], []
    for batch, part in enumerate(batches(ours, against, room(elements, device))):
        contenders = enter(part, params, False, notes)
        rivals = enter(against, params, True, notes)
        measured, yardstick = measure(contenders + rivals, copy, device, args)
        medians = {line["optimizer"]: line["median_ms"] for line in measured[len(contenders) :]}
        for line in measured:
            line["ratios"] = {rival: line["median_ms"] / median for rival, median in medians.items()}
        rows += [common | {"batch": batch} | line for line in measured]
        copies.append({"shapes": common["shapes"], "batch": batch} | yardstick)
        del contenders, rivals  # their states make room for the next batch
        gc.collect()
    if not all(torch.isfinite(p.detach().sum()) for p in params):
        notes.append({"optimizer": name, "reason": "parameters were no longer finite at the end; times may be off"})
    return rows, copies


def document(args, rows, copies, notes):
    """What the JSON holds: rows, and all that is needed to read and repeat them."""
    device = devices.on(args.device)
    return machine.origin("step", args, device, specs.split(args.optimizers) + specs.split(args.against)) | {
        "repeats": args.repeats,
        "seconds": args.seconds,
        "methods": METHODS | device.methods,
        "not_measured": NOT_MEASURED + device.not_measured,
        "skipped": notes,
        "copies": copies,
        "rows": rows,
    }


def check(args):
    """Every complaint comes before the measuring: spelling, shapes, device, matplotlib, output folders."""
    missing = devices.DEVICES[args.device].missing()
    if missing:
        args.error(f"--device {args.device}: {missing}")
    for text in specs.split(args.optimizers) + specs.split(args.against):
        specs.parse(text)
    for name in specs.split(args.shapes):
        models.load(name)
    if not specs.split(args.optimizers) or args.repeats < 1:
        raise ValueError("--optimizers must name at least one and --repeats must be >= 1")
    for path in filter(None, (args.json, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.plot:
        import matplotlib  # noqa: F401


def run(args):
    check(args)
    torch.set_num_threads(args.threads)
    rows, copies, notes = [], [], []
    for name in specs.split(args.shapes):
        print(f"measuring {name} …", file=sys.stderr)
        more = bench(name, args, notes)
        rows, copies = rows + more[0], copies + more[1]
    result = document(args, rows, copies, notes)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report.text(result))
    if args.plot:
        report.plot(result, args.plot)
