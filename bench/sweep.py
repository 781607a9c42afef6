"""Trains each optimizer of a study at each of its learning rates from each seed, and chooses the best rate."""

import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import training
from .studies import Contender, Setting, task

RECORDS = 30  # at how many steps of a training, evenly spread, its loss and what is watched are recorded
# cpu_s: processor seconds of the training alone, without looking at it; the time that passes would count what others do
RESULTS = ("train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy", "cpu_s")


class Job(NamedTuple):
    """One training."""

    setting: Setting
    contender: Contender
    lr: float
    seed: int
    watch: Callable | None
    quick: bool


def train(job):
    """What one training came to: its results, its curve of training losses, and what was watched."""
    what = task(job.setting.task, job.quick)
    size = len(what.data.train.y)
    batch = min(job.setting.batch, size)
    steps = job.setting.epochs * (size // batch)
    every = max(1, steps // (3 if job.quick else RECORDS))
    model = what.network(job.seed)
    opt = job.contender.build(model, job.lr)
    curve, seen, spent = {"steps": [], "loss": []}, {}, [time.process_time()]

    def after_step(step):
        if step % every == 0:
            before = time.process_time()
            curve["steps"].append(step)
            curve["loss"].append(losses(what, model, opt, {"train": what.sample})["train_loss"])
            record(job.watch(opt) if job.watch else {}, seen)
            spent.append(time.process_time() - before)

    data = training.batches(what.data.train, batch, steps, job.seed)
    step_by = training.by_closure if job.contender.by_closure else training.ordinary
    run = training.train(model, opt, data, after_step, what.loss, step_by)
    seconds = time.process_time() - sum(spent)
    splits = {"train": what.sample, "validation": what.data.validation, "test": what.data.test}
    found = {"seed": job.seed, "diverged_at": run.diverged_at, "cpu_s": seconds}
    return found | losses(what, model, opt, splits) | {"curve": curve, "seen": seen}


def record(now, seen):
    """Puts what an optimizer shows of each layer behind what it has shown before."""
    for layer, numbers in now.items():
        for name, value in numbers.items():
            seen.setdefault(layer, {}).setdefault(name, []).append(training.finite(value))


def losses(what, model, opt, splits):
    """Loss and accuracy on each split with the true weights."""
    found = {}
    with training.true_weights(opt):
        for name, split in splits.items():
            loss, accuracy = training.score(model, split, what.loss) if split else (None, None)
            found |= {f"{name}_loss": training.finite(loss), f"{name}_accuracy": accuracy}
    return found


def point(lr, runs):
    """Mean and standard deviation over the seeds; None where a training diverged or there is nothing to judge."""
    found = {"lr": lr, "runs": runs, "mean": {}, "std": {}}
    for name in RESULTS:
        values = [None if run["diverged_at"] else run[name] for run in runs]
        whole = None not in values
        found["mean"][name] = statistics.mean(values) if whole else None
        found["std"][name] = statistics.stdev(values) if whole and len(values) > 1 else None
    return found


def merit(found, criterion):
    """By what a rate is chosen; of equal accuracies the one with the lower loss."""
    mean = found["mean"]
    loss = mean["train_loss" if criterion == "training" else "validation_loss"]
    accuracy = mean["validation_accuracy"] if criterion == "accuracy" else 0
    return (-math.inf, -math.inf) if loss is None or accuracy is None else (accuracy, -loss)


def row(setting, contender, points, criterion):
    """The best point with all that was recorded, and the whole grid with its results."""
    best = max(points, key=lambda found: merit(found, criterion))
    rates = [found["lr"] for found in points]
    at_edge = len(points) > 1 and best["lr"] in (rates[0], rates[-1])
    results = ("seed", "diverged_at", *RESULTS)
    grid = [found | {"runs": [{name: run[name] for name in results} for run in found["runs"]]} for found in points]
    labels = {"setting": setting.name, "optimizer": contender.label, "bare": contender.text, "rivals": contender.rivals}
    return labels | {"criterion": criterion, "at_edge": at_edge} | best | {"grid": grid}


def rates(setting, contender, rows):
    """The learning rates to try: a contender's own, or the one that another setting's row has chosen."""
    taken = {(found["setting"], found["optimizer"]): found["lr"] for found in rows}
    return (taken[setting.rates_from, contender.label],) if setting.rates_from else contender.rates


def criterion(study, setting, quick):
    """By what a setting's rates are chosen: "accuracy" or "loss" on held-out data, or the loss in "training"."""
    return "training" if study.choice == "training" or setting.rates_from else task(setting.task, quick).criterion


def study_rows(study, quick, train_all):
    """Rows of a whole study; `train_all(jobs)` gives what `train` returns for each, in order."""
    rows = []
    for late in (False, True):  # settings that take over what others have chosen come last
        settings = [setting for setting in study.settings if bool(setting.rates_from) == late]
        cells = [(s, c, rates(s, c, rows)) for s, c in itertools.product(settings, study.contenders)]
        jobs = [Job(s, c, lr, seed, study.watch, quick) for s, c, lrs in cells for lr in lrs for seed in study.seeds]
        results = iter(train_all(jobs))
        for setting, contender, lrs in cells:
            points = [point(lr, [next(results) for _ in study.seeds]) for lr in lrs]
            rows.append(row(setting, contender, points, criterion(study, setting, quick)))
    return rows


def one_thread():
    torch.set_num_threads(1)  # so that results do not depend on how many processes there are


def train_all(jobs, processes, bar):
    """Results of all jobs in their order, from so many processes; with one, in this one."""
    if processes == 1:
        one_thread()
        for job in jobs:
            yield train(job)
            bar.update()
        return
    with multiprocessing.get_context("spawn").Pool(processes, one_thread) as pool:
        for found in pool.imap(train, jobs):
            yield found
            bar.update()
