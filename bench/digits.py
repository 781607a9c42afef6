"""Real data small enough for two cores: scikit-learn's 8 x 8 digits, a convolutional network, a training loop."""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

CLASSES = 10


class Split(NamedTuple):
    """Images [n, 1, 8, 8] in [-1, 1] and their labels [n]."""

    x: torch.Tensor
    y: torch.Tensor


class Digits(NamedTuple):
    train: Split
    validation: Split
    test: Split


def load(seed=0):
    """The 1,797 digits in 1,077 / 360 / 360, each class in the same proportion everywhere."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)
    return Digits(*(_split(*part) for part in ((x, y), (x_val, y_val), (x_test, y_test))))


def _split(x, y):
    return Split(torch.tensor(x, dtype=torch.float32).div_(8).sub_(1).view(-1, 1, 8, 8), torch.tensor(y))  # 0 to 16


def network(seed=0, width=8):
    """Four convolutions with GroupNorm and a classifier, 17 thousand parameters in 14 tensors; same seed, same weights.

    GroupNorm has no running means, so what is evaluated is what was trained, from the first step on. Pooling rather
    than strides: the backward of one strided convolution took 3 ms of the step's 12 (one thread, batch 512).
    """
    torch.manual_seed(seed)
    channels = [1, width, 2 * width, 4 * width, 4 * width]
    layers = OrderedDict()
    for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False), 1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{i}"] = nn.GroupNorm(4, after)
        layers[f"relu{i}"] = nn.ReLU()
        if i <= 2:  # 8 x 8 images end as 2 x 2
            layers[f"pool{i}"] = nn.AvgPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(4 * channels[-1], CLASSES)
    return nn.Sequential(layers)


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
def score(model, split):
    """Mean loss and accuracy on a split."""
    model.eval()
    logits = model(split.x)
    model.train()
    return nn.functional.cross_entropy(logits, split.y).item(), (logits.argmax(1) == split.y).double().mean().item()


@dataclass
class Run:
    """What a training left: a loss per step, and seconds per step, of the whole step and of `opt.step()` alone."""

    losses: list = field(default_factory=list)
    step_seconds: list = field(default_factory=list)
    optimizer_seconds: list = field(default_factory=list)
    diverged_at: int | None = None  # the step (from 1) whose loss was NaN or Inf; the training ends there


def train(model, opt, data, after_step=None):
    """One pass over the (x, y) pairs of `data`; `after_step(step)` is called after each step, outside the timing."""
    run = Run()
    for step, (x, y) in enumerate(data, 1):
        start = time.perf_counter()
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        run.losses.append(loss.item())
        if not math.isfinite(run.losses[-1]):
            run.diverged_at = step
            break
        loss.backward()
        before = time.perf_counter()
        opt.step()
        end = time.perf_counter()
        run.optimizer_seconds.append(end - before)
        run.step_seconds.append(end - start)
        if after_step:
            after_step(step)
    return run
