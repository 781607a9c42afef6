"""Small replications on real data of what the optimizers' papers claim; a table, a plot, all numbers as JSON.

Each optimizer is trained from three seeds at each of its learning rates; the rate is chosen by the mean result on
validation data (of `curvature`, whose claim it is, by the final training loss), and all that its name does not say is
its default. Results are printed whatever they say.
"""

import json
import time
from pathlib import Path

import torch

from . import claims, machine, sweep, train_plots, watch
from . import device as devices
from .report import aligned, where
from .studies import STUDIES, quick, task

PACKAGES = ("layerfused", "scikit-learn", "numpy")


def add_arguments(parser):
    add = parser.add_argument
    add("--study", choices=STUDIES, required=True, help="; ".join(f"{k}: {v.question}" for k, v in STUDIES.items()))
    add("--quick", action="store_true", help="one epoch, one seed, two learning rates: does it run?")
    add("--processes", type=int, default=2, metavar="N", help="trainings at once, of one thread each (default: 2)")
    add("--json", type=Path, metavar="OUT.json")
    add("--plot", type=Path, metavar="OUT.png")


def described(study, small):
    """What was trained on what, for the JSON."""
    settings = [setting._asdict() for setting in study.settings]
    contenders = [c._asdict() | {"label": c.label} for c in study.contenders]
    tasks = {setting.task: task(setting.task, small).facts for setting in study.settings}
    found = {"question": study.question, "choice": study.choice, "seeds": study.seeds}
    return found | {"settings": settings, "contenders": contenders, "tasks": tasks}


def results(args, study):
    """The whole document of one study."""
    from tqdm import tqdm  # here: the bench's other commands do without it

    before, start = torch.get_num_threads(), time.perf_counter()
    rates = [1 if setting.rates_from else len(c.rates) for setting in study.settings for c in study.contenders]
    with tqdm(total=len(study.seeds) * sum(rates), unit="run", mininterval=5, disable=args.quick) as bar:
        rows = sweep.study_rows(study, args.quick, lambda jobs: sweep.train_all(jobs, args.processes, bar))
    torch.set_num_threads(before)
    document = machine.origin("train", args, devices.on("cpu"), [c.text for c in study.contenders])
    document["versions"] |= machine.versions(PACKAGES)
    document |= {"study": args.study, "quick": args.quick, "processes": args.processes, "threads": 1}
    document |= described(study, args.quick) | {"rows": rows, "claims": claims.answers(rows, study.answer)}
    spent = sum(run["cpu_s"] for row in rows for point in row["grid"] for run in point["runs"])
    return document | {"cpu_s": spent, "wall_s": time.perf_counter() - start}


def columns(study):
    """What the table shows beside results: name to cell."""
    number = claims.number
    extra = {
        watch.ranges: {
            "decades": lambda row: number(claims.mean_of_layers(claims.decades, row)),
            "std / mean": lambda row: number(claims.mean_of_layers(claims.deviations, row)),
        },
        watch.trust_ratios: {
            "bounded %": lambda row: number(claims.bound(row)[0]),
            "largest ratio": lambda row: number(claims.bound(row)[1]),
        },
    }
    return extra.get(STUDIES[study].watch, {})


def table(document):
    """One line per setting and optimizer."""
    extra = columns(document["study"])
    head = ["setting", "optimizer", "lr", "test accuracy", "test loss", "training loss", "CPU s", *extra]
    lines = [head]
    for row in document["rows"]:
        mean, std = row["mean"], row["std"]
        accuracy = claims.shown(mean["test_accuracy"], std["test_accuracy"], 100, " %")
        found = [claims.shown(mean[name], std[name]) for name in ("test_loss", "train_loss")]
        lr = f"{row['lr']:g}" + "*" * row["at_edge"]
        found += [claims.number(mean["cpu_s"]), *(cell(row) for cell in extra.values())]
        lines.append([row["setting"], row["optimizer"], lr, accuracy, *found])
    return aligned(lines)


def text(document):
    answers = [f"{'holds' if found['holds'] else 'FAILS'}  {found['claim']}" for found in document["claims"]]
    edge = ["* the chosen learning rate is the first or last of its grid"] * any(r["at_edge"] for r in document["rows"])
    seeds = f"mean ± standard deviation over seeds {document['seeds']}; "
    seeds += f"{document['wall_s']:.0f} s, {document['cpu_s']:.0f} CPU s of training"
    parts = [document["question"], "", table(document), *edge, seeds, "", *answers, "", where(document)]
    return "\n".join(parts)


def run(args):
    if args.processes < 1:
        args.error(f"--processes must be >= 1, got {args.processes}")
    study = STUDIES[args.study]
    document = results(args, quick(study) if args.quick else study)
    print(text(document))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, allow_nan=False) + "\n")
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        train_plots.plot(document, args.plot)
