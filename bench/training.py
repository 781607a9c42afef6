"""A training by which optimizers can be compared: data in three splits, a loop, and what it leaves."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn


class Split(NamedTuple):
    """Examples [n, …] and what the network should make of them: labels [n, …], or numbers."""

    x: torch.Tensor
    y: torch.Tensor


class Data(NamedTuple):
    train: Split
    validation: Split | None
    test: Split | None


def entropy(logits, labels):
    """Cross entropy, of one label per example or of one per position."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Task(NamedTuple):
    """What is learnt.

    Attributes:
        data: three splits; validation and test are None where all data is trained on.
        network: a seed to a network, the same weights each time.
        loss: of the network's output and `Split.y`.
        sample: the part of the training split whose loss is the training loss.
        criterion: "accuracy" or "loss", by which networks of this task are judged on held-out data.
        facts: where the data come from, for the JSON.
    """

    data: Data
    network: Callable
    loss: Callable
    sample: Split
    criterion: str
    facts: dict


def batches(split, size, steps, seed=0):
    """`steps` random batches in an order fixed by the seed, full ones only: each epoch drops what is left over."""
    size = min(size, len(split.y))
    generator = torch.Generator().manual_seed(seed)
    order = ()
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(split.y), generator=generator)
        chosen, order = order[:size], order[size:]
        yield split.x[chosen], split.y[chosen]


@torch.no_grad()
def score(model, split, loss=entropy):
    """Mean loss and accuracy on a split; accuracy is None where there are no labels."""
    model.eval()
    found = model(split.x)
    model.train()
    labels = not split.y.is_floating_point()
    accuracy = (found.argmax(-1) == split.y).double().mean().item() if labels else None
    return loss(found, split.y).item(), accuracy


def finite(value):
    """JSON has no NaN and no Inf: None stands for both."""
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Run:
    """What a training left: a loss per step, and seconds per step, of the whole step and of `opt.step()` alone."""

    losses: list = field(default_factory=list)
    step_seconds: list = field(default_factory=list)
    optimizer_seconds: list = field(default_factory=list)
    diverged_at: int | None = None  # the step (from 1) whose loss was NaN or Inf; the training ends there


def ordinary(opt, closure):
    """Forward, backward, step: the loss, and the seconds of `opt.step()`; None where the loss stopped it."""
    opt.zero_grad()
    loss = closure()
    if not math.isfinite(loss.item()):
        return loss.item(), None
    loss.backward()
    before = time.perf_counter()
    opt.step()
    return loss.item(), time.perf_counter() - before


def by_closure(opt, closure):
    """As `ordinary`, for an optimizer that takes its gradients itself: its seconds are those of the whole step."""
    before = time.perf_counter()
    loss = opt.step(closure).item()
    return loss, time.perf_counter() - before if math.isfinite(loss) else None


def train(model, opt, data, after_step=None, loss=entropy, step_by=ordinary):
    """One pass over the (x, y) pairs of `data`; `after_step(step)` is called after each step, outside the timing."""
    run = Run()
    for step, (x, y) in enumerate(data, 1):
        start = time.perf_counter()
        value, seconds = step_by(opt, lambda x=x, y=y: loss(model(x), y))
        run.losses.append(value)
        if seconds is None:
            run.diverged_at = step
            break
        run.optimizer_seconds.append(seconds)
        run.step_seconds.append(time.perf_counter() - start)
        if after_step:
            after_step(step)
    return run


def true_weights(opt):
    """A block in which the parameters are what was learnt: an `lf.XGrad` leaves predicted ones in them."""
    return opt.true_weights() if hasattr(opt, "true_weights") else contextlib.nullcontext()
