"""Steps of parameters that are spread over ranks: measured on a few ranks here, predicted for 8 to 1,024 GPUs."""

import dataclasses
import json
import sys
from pathlib import Path

from . import device as devices
from . import machine, report, scale_model, scale_ranks
from . import shapes as models
from . import spec as specs
from .gpus import GPUS, changed
from .model import change, numbers
from .scale_ranks import GATHER, LOCAL, NORMS, STEP, Case

WHOLE_RANKS = 2  # on which `--shapes` are measured: what fits this memory, and one core each
METHODS = {
    STEP: "LAMB(max_grad_norm=None) on DTensors, Shard(0) over a 1-D mesh as FSDP2 cuts, gradients set by hand",
    LOCAL: "the same on plain tensors over the same memory: what lies on the rank, taken for whole layers",
    GATHER: "one all-gather of the packed block of stats alone, of the size that the step exchanges",
    NORMS: "two norms of each DTensor, an all-reduce of one number each: a re-creation of the least that an optimizer "
    "does which is written tensor by tensor; it leaves out the step itself. On one rank torch leaves the reduction out",
    "order": "contenders take turns in the rows of a Williams design, a barrier before each; a process of one thread "
    "for each rank, gloo. More ranks than cores wait for each other",
    "median_ms": "wall time of the slowest rank, median of the rounds",
    "host_ms": "processor time of the calling thread (time.thread_time): median of the rounds, of the busiest rank",
    "collectives": "in one call, as torch's CommDebugMode counts",
    "ratio": "(step - all-gather) / local step, of the medians",
    "others_cpus": "CPUs that others than the ranks kept busy during the rounds; above 0.1 is a noisy run",
    "predicted": "see bench/scale_model.py: no number of it is measured",
}
NOT_MEASURED = [
    "anything on GPUs or between machines; more ranks than this machine's cores run one after the other",
    "fully_shard itself, backward passes, overlap of the exchange with anything",
    "timm's LAMB: the re-creation has half of its collectives, and none of its arithmetic",
]


def add_arguments(parser):
    add = parser.add_argument
    add("--ranks", type=numbers, default=(1, 2, 4), metavar="N,…", help="processes of each run (default: 1,2,4)")
    add("--layers", type=numbers, default=(75, 300, 1200), metavar="N,…", help="vectors of 16 (default: 75,300,1200)")
    add("--groups", type=numbers, default=(465,), metavar="N,…", help="vectors with a group each (default: 465)")
    add("--shapes", default="bert-base", help=f"measured on {WHOLE_RANKS} ranks: list of models or FILE.json")
    add("--repeats", type=int, default=5, metavar="N", help="rounds, at least (default: 5)")
    add("--seconds", type=float, default=2.0, metavar="S", help="of each row's rounds, about (default: 2)")
    add("--limit", type=float, default=180.0, metavar="S", help="after which a run's processes end (default: 180)")
    add("--model", action="store_true", help="predict only")
    add("--predict", default="bert-large,llama-8b-slice", metavar="SHAPES", help="'' for none")
    add("--gpus", type=numbers, default=(8, 16, 32, 64, 128, 256, 512, 1024), metavar="N,…")
    add("--device", choices=GPUS, default="h100")
    add("--set", type=change, action="append", default=[], metavar="FIELD=NUMBER", help="of bench/scale_model.py")
    add("--json", type=Path, metavar="OUT.json")


def cases(args, ranks):
    """What is measured on so many ranks."""
    found = [Case(f"{n} vectors", [(16,)] * n) for n in args.layers]
    found += [Case(f"{n} groups", [(16,)] * n, grouped=True, norms=False) for n in args.groups]
    if ranks == WHOLE_RANKS:
        for name in specs.split(args.shapes):
            found.append(Case(Path(name).stem, [shape for _, shape in models.load(name)], norms=False))
    return found


def measure(args):
    """Rows of all runs, and notes on those that were not finished."""
    rows, notes = [], []
    for ranks in args.ranks:
        print(f"measuring, ranks: {ranks} …", file=sys.stderr)
        more, reason = scale_ranks.launched(ranks, cases(args, ranks), args.repeats, args.seconds, args.limit)
        rows += more
        notes += [{"ranks": ranks, "reason": reason}] if reason else []
    return rows, notes


def table(rows):
    """A line for each contender."""
    names = ["ranks", "case", "elements", "contender", "median ms", "p10", "p90", "host ms", "collectives", "block B"]
    lines = [[*names, "ratio"]]
    for row in rows:
        for one in row["contenders"]:
            own = one["contender"] == STEP
            times = [report.number(one[key]) for key in ("median_ms", "p10_ms", "p90_ms", "host_ms")]
            facts = [str(row["ranks"]), row["case"], f"{row['elements']:,}", one["contender"]]
            block = f"{row['block_bytes']:,}" if own else ""
            lines.append([*facts, *times, f"{one['collectives']:,}", block, f"{row['ratio']:.2f}" if own else ""])
    return report.aligned(lines)


def wanted(rows):
    """What was asked for beside what was found."""
    found = []
    for row in rows:
        step = next(one for one in row["contenders"] if one["contender"] == STEP)
        if row["case"] in ("300 vectors", "465 groups"):
            where = f"host time of a step, {row['case']}, ranks: {row['ranks']}"
            found.append(f"{where}: {step['host_ms']:.2f} ms; wanted: at most 1")
        elif row["case"] == "bert-base":
            where = f"(step - all-gather) / local step, bert-base, ranks: {row['ranks']}"
            found.append(f"{where}: {row['ratio']:.2f}; wanted: at most 1.3")
    return found


def predict(args, gpu, network):
    return [
        scale_model.row(name, gpus, gpu, network) for name in specs.split(args.predict) for gpus in sorted(args.gpus)
    ]


def check(args):
    """Every complaint comes before the measuring."""
    if not args.model and (min(args.ranks) < 1 or min(args.layers + args.groups) < 1 or args.repeats < 1):
        raise ValueError("--ranks, --layers, --groups and --repeats must be >= 1")
    if min(args.gpus) < 1 or not 0 < args.limit < float("inf"):
        raise ValueError("--gpus must be >= 1, --limit a positive number of seconds")
    for name in specs.split(args.shapes) + specs.split(args.predict):
        models.load(name)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return GPUS[args.device], changed(scale_model.Network(), dict(args.set))


def run(args):
    try:
        gpu, network = check(args)
    except (ValueError, OSError) as error:
        args.error(str(error))
    rows, notes = ([], []) if args.model else measure(args)
    found = predict(args, gpu, network)
    if args.json:
        result = document(args, gpu, network) | {"skipped": notes, "rows": rows, "predicted": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(printed(rows, notes)))
    if found:
        print(scale_model.text(found, gpu, network))


def document(args, gpu, network):
    """What JSON holds beside the numbers."""
    result = machine.origin("scale", args, devices.on("cpu"), [scale_model.OPTIMIZER]) | {"threads": 1}
    constants = {"device": dataclasses.asdict(gpu), "network": dataclasses.asdict(network)}
    return result | {"methods": METHODS, "not_measured": NOT_MEASURED, "constants": constants}


def printed(rows, notes):
    """Of the measured part, all lines."""
    noisy = [row["others_cpus"] for row in rows if (row["others_cpus"] or 0) > 0.1]
    lines = [table(rows), *wanted(rows)] if rows else []
    lines += [f"NOISY: other processes kept up to {max(noisy):.1f} CPUs busy"] if noisy else []
    lines += [f"ranks: {note['ranks']}: {note['reason']}" for note in notes]
    return [*lines, *(f"not measured: {what}" for what in NOT_MEASURED), ""]
