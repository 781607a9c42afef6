"""Time of one optimizer step over a model's shapes, interleaved with competitors and a memory copy."""

import datetime
import gc
import json
import shlex
import sys
from pathlib import Path

import torch

from . import machine, report, timing
from . import shapes as models
from . import spec as specs
from .contender import DTYPES, Contender, parameters

METHODS = {
    "order": "contenders take turns in the rows of a Williams design: each follows each other equally often",
    "time": "cpu: wall time of step(); cuda: a pair of events around step() on an idle device, L2 not flushed",
    "gradients": "the same fixed tensors in every step and for every optimizer; parameters are shared, states are not",
    "copy": "torch copy_ between two fp32 buffers of the model's size (256 MiB to 1 GiB), one more contender; "
    "bytes read + written",
    "bytes": "compulsory: what the algorithm must move if all stays in cache between sweeps; requested: what the plan "
    "asks for; gb_per_s and percent_of_copy are by compulsory bytes and the median",
    "native_calls": "ours: launches by the plan's count; others: torch operator calls in one step, counted by a "
    "TorchDispatchMode; a foreach call counts once, though on a CPU it loops over the tensors",
    "host_us": "step() of the same optimizer over as many tensors of one element each, until it returns",
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
    add("--against", default="torch.AdamW:fused", help="list of competitors, [clip+]package.Name[:flag][(key=value,…)]")
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters and gradients")
    add("--device", choices=("cpu", "cuda"), default="cpu")
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
    return int(0.95 * machine.free_bytes(device) / (8 * max(elements, 1))) - 1


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


def host_us(contender):
    """Python overhead in µs: the contender's step where every tensor has one element."""
    p = contender.params[0]
    few = parameters([(1,)] * len(contender.params), p.dtype, p.device.type)
    return 1e6 * timing.host_seconds(Contender.build(contender.spec, few).step, p.device.type)


def row(contender, samples, copy):
    """One line of the report, without what is the same for the whole run."""
    line = {"optimizer": contender.spec.text, "ours": contender.ours, "engine": contender.engine}
    line |= timing.summary(samples) | contender.traffic() | contender.memory()
    compulsory = line["compulsory_bytes"]
    speed = compulsory and compulsory / line["median_ms"] / 1e6
    percent = speed and 100 * speed / copy["gb_per_s"]
    return line | {"gb_per_s": speed, "percent_of_copy": percent, "host_us": host_us(contender)}


def copy_row(copy, samples):
    """The copy's line: its median is the run's yardstick."""
    line = timing.summary(samples)
    return line | {"bytes": copy.bytes, "gb_per_s": copy.bytes / line["median_ms"] / 1e6}


def measure(contenders, copy, args):
    """Rows of one batch and the copy's row."""
    clock = timing.cuda_seconds if args.device == "cuda" else timing.cpu_seconds
    calls = [copy.step, *(c.step for c in contenders)]
    load = machine.OtherLoad()
    copied, *samples = timing.interleave(calls, args.repeats, args.seconds, clock)
    yardstick = copy_row(copy, copied) | {"others_cpus": load.cpus()}
    return [row(c, s, yardstick) for c, s in zip(contenders, samples, strict=True)], yardstick


def bench(name, args, notes):
    """All rows of one list of shapes: everyone over the same parameters, in batches where memory is short."""
    shapes = models.load(name)
    elements = models.elements(shapes)
    params = parameters([shape for _, shape in shapes], DTYPES[args.dtype], args.device)
    copy = timing.Copy(elements, args.device)
    ours, against = specs.split(args.optimizers), specs.split(args.against)
    common = {"device": args.device, "threads": args.threads, "dtype": args.dtype}
    common = {"shapes": Path(name).stem, "tensors": len(shapes), "elements": elements} | common
    rows, copies = [], []
    for batch, part in enumerate(batches(ours, against, room(elements, args.device))):
        contenders = enter(part, params, False, notes)
        rivals = enter(against, params, True, notes)
        measured, yardstick = measure(contenders + rivals, copy, args)
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
    texts = specs.split(args.optimizers) + specs.split(args.against)
    packages = {specs.parse(text).package.partition(".")[0] for text in texts}
    missing = NOT_MEASURED + (["anything on a GPU"] if args.device == "cpu" else [])
    return {
        "bench": "step",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m bench " + shlex.join(args.command),
        "machine": machine.describe(args.device),
        "versions": machine.versions(packages | {"layerfused", "numpy"}),
        "threads": args.threads,
        "repeats": args.repeats,
        "seconds": args.seconds,
        "methods": METHODS,
        "not_measured": missing,
        "skipped": notes,
        "copies": copies,
        "rows": rows,
    }


def check(args):
    """Every complaint comes before the measuring: spelling, shapes, device, matplotlib, output folders."""
    for text in specs.split(args.optimizers) + specs.split(args.against):
        specs.parse(text)
    for name in specs.split(args.shapes):
        models.load(name)
    if not specs.split(args.optimizers) or args.repeats < 1:
        raise ValueError("--optimizers must name at least one and --repeats must be >= 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch.cuda.is_available() is False here")
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
