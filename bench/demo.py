"""Trains a small network on scikit-learn's digits once per optimizer: `python -m bench.demo`.

Writes demo.json, demo_accuracy.png and demo_trust_ratios.png. On one machine the same seed and threads give the same
demo.json, apart from what lies under a key "timings": steps_per_s and optimizer_ms (medians over the long training;
the second of opt.step() alone) of each optimizer, total_s of the whole.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import layerfused as lf

from . import demo_plots, digits, training
from . import spec as specs

FACTORS = (0.3, 1.0, 3.0, 10.0)
EVALUATE_EVERY = 10
SEE_TRUST_RATIOS_OF = "LAMB"
LINE = "{:20}{:>14}{:>9}{:>9}{:>19}"


class Contender(NamedTuple):
    """How an optimizer takes part: `FACTORS * scale` are its learning rates; with `decay` it gets `lf.param_groups`."""

    scale: float
    decay: float | None = None
    options: dict = {}


CONTENDERS = {
    "SGD": Contender(0.1, options={"momentum": 0.9}),
    "Adam": Contender(3e-3),
    "AdamW": Contender(3e-3),
    "AdaBelief": Contender(3e-3),
    "AdaM3": Contender(1e-3),
    "LARS": Contender(3.0, decay=1e-4),
    "LAMB": Contender(1e-2, decay=0.01),
    "LAMBC": Contender(1e-2, decay=0.0),
    "NovoGrad": Contender(1e-2),
    "Aida": Contender(3e-3),
    "LAdam": Contender(3e-3),
    "LAdaBelief": Contender(3e-3),
    "SETAdam": Contender(3e-3),
    "AdamNorm": Contender(3e-3),
    "AdaBeliefNorm": Contender(3e-3),
    "torch.SGD:foreach": Contender(0.1, options={"momentum": 0.9}),
    "torch.SGD:fused": Contender(0.1, options={"momentum": 0.9}),
    "torch.Adam:foreach": Contender(3e-3),
    "torch.Adam:fused": Contender(3e-3),
    "torch.AdamW:foreach": Contender(3e-3),
    "torch.AdamW:fused": Contender(3e-3),
}
QUICK = ("SGD", "LAMB", "torch.AdamW:fused")


class Task(NamedTuple):
    """What all optimizers share: the data, how long they train, and the bar that counts their steps."""

    data: training.Data
    seed: int
    batch: int
    steps: int
    search_steps: int
    bar: tqdm


def build(name, model, lr):
    contender, spec = CONTENDERS[name], specs.parse(name)
    grouped = contender.decay is not None
    params = lf.param_groups(model, weight_decay=contender.decay) if grouped else model.named_parameters()
    return specs.build(dataclasses.replace(spec, options=spec.options | contender.options | {"lr": lr}), params)


def train(task, name, lr, steps, watch=None):
    """Trains from the seed's weights through the seed's batches; `watch(step, model, opt)` follows each step."""
    model = digits.network(task.seed)
    opt = build(name, model, lr)
    done = task.bar.n

    def after_step(step):
        task.bar.update()
        if watch:
            watch(step, model, opt)

    run = training.train(model, opt, training.batches(task.data.train, task.batch, steps, task.seed), after_step)
    task.bar.update(done + steps - task.bar.n)  # a run that diverged still counts whole
    return model, run


def search(task, name):
    """The rate with the best validation accuracy, of equal ones that with the lowest loss; and the whole grid."""
    grid = []
    for factor in FACTORS:
        lr = float(f"{factor * CONTENDERS[name].scale:.3g}")
        model, run = train(task, name, lr, task.search_steps)
        grid.append({"lr": lr} | outcome(model, task.data.validation, run))
    best = max(grid, key=lambda row: (row["accuracy"], -math.inf if row["loss"] is None else -row["loss"]))
    return best["lr"], grid


def outcome(model, split, run):
    loss, accuracy = training.score(model, split)
    return {"accuracy": accuracy, "loss": training.finite(loss), "diverged_at": run.diverged_at}


def adapted(opt):
    """Names of the parameters that have a trust ratio of their own."""
    return [name for group in opt.param_groups if group["adapt"] for name in group["param_names"]]


def compete(task, name, lr):
    """The long training at the chosen rate: its row of demo.json, and LAMB's trust ratios by layer."""
    curve, ratios = {"steps": [], "accuracy": []}, {}

    def watch(step, model, opt):
        if step % EVALUATE_EVERY == 0:
            curve["steps"].append(step)
            curve["accuracy"].append(training.score(model, task.data.test)[1])
        if name == SEE_TRUST_RATIOS_OF:
            stats = opt.layer_stats()
            for layer in adapted(opt):
                ratios.setdefault(layer, []).append(training.finite(float(stats[layer]["trust_ratio"])))

    model, run = train(task, name, lr, task.steps, watch)
    timings = {"steps_per_s": run.step_seconds, "optimizer_ms": run.optimizer_seconds}
    medians = {key: statistics.median(seconds or [math.inf]) for key, seconds in timings.items()}
    optimizer_ms = training.finite(1e3 * medians["optimizer_ms"])
    timings = {"steps_per_s": 1 / medians["steps_per_s"], "optimizer_ms": optimizer_ms}
    return outcome(model, task.data.test, run) | {"curve": curve, "timings": timings}, ratios


def run_all(task, names):
    """Rows of all optimizers, each printed as soon as it is there, and the trust ratios seen on the way."""
    rows, ratios, searched = {}, {}, {}
    task.bar.write(LINE.format("optimizer", "test accuracy", "lr", "steps/s", "optimizer ms/step"))
    for name in names:
        task.bar.set_description(f"{name:19}")
        # foreach and fused are the same mathematics: one search, by fused, serves both
        searcher = name.replace(":foreach", ":fused")
        if searcher not in searched:
            searched[searcher] = search(task, searcher)
        lr, grid = searched[searcher]
        row, seen = compete(task, name, lr)
        rows[name], ratios = {"lr": lr, "grid": grid} | row, ratios | seen
        task.bar.write(line(name, rows[name]))
    return rows, ratios


def line(name, row):
    steps, ms = row["timings"].values()
    ended = f"  diverged at step {row['diverged_at']}" if row["diverged_at"] else ""
    return LINE.format(name, f"{row['accuracy']:.2%}", f"{row['lr']:g}", f"{steps:.0f}", f"{ms or 0:.3f}") + ended


def document(args, data, rows, ratios, seconds):
    return {
        "seed": args.seed,
        "threads": args.threads,
        "torch": torch.__version__,
        "images": {split: len(part.y) for split, part in data._asdict().items()},
        "batch": args.batch,
        "steps": args.steps,
        "search_steps": args.search_steps,
        "optimizers": rows,
        "trust_ratios": {SEE_TRUST_RATIOS_OF: ratios} if ratios else {},
        "timings": {"total_s": seconds},
    }


def arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three optimizers, 30 steps: does it run?")
    parser.add_argument("--optimizers", metavar="NAMES", help="comma-separated, of: " + ", ".join(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path(), help="folder of demo.json and the PNGs (default: here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.batch, args.steps, args.search_steps = (512, 30, 10) if args.quick else (512, 200, 100)
    args.names = specs.split(args.optimizers or ",".join(QUICK if args.quick else CONTENDERS))
    unknown = [name for name in args.names if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown optimizers {', '.join(unknown)}; choose from {', '.join(CONTENDERS)}")
    return args


def main(argv=None):
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    data = digits.load(args.seed)
    searches = len({name.replace(":foreach", ":fused") for name in args.names})
    total = args.steps * len(args.names) + len(FACTORS) * args.search_steps * searches
    every = 0.1 if sys.stderr.isatty() else 10  # seconds; a log keeps each state of the bar as a line
    with tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=every, maxinterval=every) as bar:
        task = Task(data, args.seed, args.batch, args.steps, args.search_steps, bar)
        rows, ratios = run_all(task, args.names)
    result = document(args, data, rows, ratios, time.perf_counter() - start)
    (args.out / "demo.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    demo_plots.accuracy(result, args.out / "demo_accuracy.png")
    if ratios:
        demo_plots.trust_ratios(ratios, args.out / "demo_trust_ratios.png", SEE_TRUST_RATIOS_OF)
    print(f"{result['timings']['total_s']:.0f} s; written to {args.out}: demo.json and PNGs")


if __name__ == "__main__":
    main()
