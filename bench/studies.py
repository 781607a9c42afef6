"""What each study compares: tasks, optimizers, learning rates.

All keep their defaults but for what their names say and the learning rate, of which those of one study have equally
many to choose from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import layerfused as lf

from . import claims, digits, text, watch
from . import spec as specs


class Contender(NamedTuple):
    """An optimizer, as `bench/spec.py` names it, and the learning rates among which it has its choice.

    Attributes:
        ahead: how many steps the `lf.XGrad` around it predicts; 0: there is none.
        by_closure: it takes its gradients itself, see `bench.training.by_closure`.
        decay: None, or the weight decay of the matrices alone; all else is then neither decayed nor adapted.
        rivals: labels of those that the claims compare it with.
    """

    text: str
    rates: tuple[float, ...]
    ahead: int = 0
    by_closure: bool = False
    decay: float | None = None
    rivals: tuple[str, ...] = ()

    @property
    def label(self):
        return f"XGrad({self.text}, steps={self.ahead})" if self.ahead else self.text

    def build(self, model, lr):
        spec, grouped = specs.parse(self.text), self.decay is not None
        params = lf.param_groups(model, weight_decay=self.decay) if grouped else model.named_parameters()
        opt = specs.build(replace(spec, options=spec.options | {"lr": lr}), params)
        return lf.XGrad(opt, steps=self.ahead) if self.ahead else opt


class Setting(NamedTuple):
    """A task and how long it is trained; `rates_from` is the setting whose learning rates are taken over, where no
    data is held out by which to choose any."""

    name: str
    task: str
    batch: int
    epochs: int
    rates_from: str = ""


@dataclass(frozen=True)
class Study:
    """A question and what it takes to answer it.

    Attributes:
        answer: setting, row and a rival's row to a list of claims, see `bench/claims.py`.
        watch: what of `bench/watch.py` is recorded during each training.
        choice: "held-out" or "training": by which result a learning rate is chosen.
    """

    question: str
    settings: tuple[Setting, ...]
    contenders: tuple[Contender, ...]
    answer: Callable
    watch: Callable | None = None
    choice: str = "held-out"
    seeds: tuple[int, ...] = (0, 1, 2)


TASKS = {
    "digits": lambda quick: digits.classification(),
    "all digits": lambda quick: digits.classification(everything=True),
    "autoencoder": lambda quick: digits.reconstruction(),
    "digits in bfloat16": lambda quick: digits.in_bfloat16(digits.classification()),
    "autoencoder in bfloat16": lambda quick: digits.in_bfloat16(digits.reconstruction()),
    "text": lambda quick: text.modelling(128 if quick else 1),
}


@cache
def task(name, quick=False):
    """A task by its name; quick: with less text."""
    return TASKS[name](quick)


def half_decades(first, points):
    """1e-4, 3e-4, 1e-3, …"""
    start = round(2 * math.log10(first))
    return tuple(float(f"{10 ** (k / 2):.0e}") for k in range(start, start + points))


DIGITS, TEXT = Setting("digits", "digits", 128, 30), Setting("text", "text", 32, 1)
ADAPTIVE = half_decades(1e-4, 7)


def narrower(title, rivals):
    """A study of step sizes, of each optimizer and its rivals.

    What eps adds to a root bounds the step size, so that a larger default alone makes the range narrower: hence rivals
    whose eps is as large.
    """
    contenders = [Contender(name, ADAPTIVE, rivals=found) for name, found in rivals.items()]
    contenders += [Contender(name, ADAPTIVE) for found in rivals.values() for name in found]
    question = f"Is the range of {title}'s step sizes narrower than Adam's and AdaBelief's, and what comes of it?"
    return Study(question, (DIGITS, TEXT), tuple(contenders), claims.narrower, watch.ranges)


def bounded():
    settings = [Setting(f"batch {batch:,}", "digits", batch, 40) for batch in (128, 256, 512, 1077)]
    settings.append(Setting("batch 1,797", "all digits", 1797, 40, rates_from="batch 1,077"))
    rates, unbounded = half_decades(1e-3, 7), "LAMBC(trust_clip=None)"
    contenders = [Contender("LAMB", rates, decay=0.01), Contender(unbounded, rates, decay=0.0)]  # their defaults
    for bound in (1, 3, 10):
        name = f"LAMBC(trust_clip={bound})"
        contenders.append(Contender(name, rates, decay=0.0, rivals=("LAMB", unbounded)))
    question = "Does a bound on LAMB's trust ratio help where batches are large?"
    return Study(question, tuple(settings), tuple(contenders), claims.better, watch.trust_ratios)


def predicted():
    bare = {"SGD(momentum=0.9)": half_decades(1e-2, 5), "Adam": half_decades(1e-3, 5), "AdamW": half_decades(1e-3, 5)}
    contenders = tuple(
        Contender(name, rates, ahead, rivals=(name,) if ahead else ())
        for name, rates in bare.items()
        for ahead in range(3)
    )
    question = "Are gradients at predicted weights worth more than those at the present ones?"
    return Study(question, (DIGITS, TEXT), contenders, claims.better)


def tuned():
    sweeps = {"torch.SGD(momentum=0.9)": half_decades(3e-3, 8), "torch.AdamW": half_decades(1e-4, 8)}
    contenders = []
    for name, (rival, rates) in zip(("CurvatureSGD", "CurvatureAdamW"), sweeps.items(), strict=True):
        contenders += [Contender(name, (1.0,), by_closure=True, rivals=(rival,)), Contender(rival, rates)]
    question = "Are step sizes from the curvature as good as the best of eight learning rates?"
    settings = (DIGITS, Setting("autoencoder", "autoencoder", 128, 30))
    return Study(question, settings, tuple(contenders), claims.tuned, watch.chosen_steps, choice="training")


def stored():
    """At one learning rate: the larger it is, the less is lost where numbers are rounded to nearest."""
    plain, master, rates = "AdamW", "AdamW(precision='master')", (3e-4,)
    contenders = [Contender(plain, rates), Contender(master, rates, rivals=(plain,))]
    for words in ("'kahan'", "'stochastic'", "('stochastic', 'bf16-states')"):
        contenders.append(Contender(f"AdamW(precision={words})", rates, rivals=(plain, master)))
    settings = [Setting(f"{name}, bfloat16", f"{name} in bfloat16", 128, 30) for name in ("digits", "autoencoder")]
    question = "Do bfloat16 weights learn as float32 ones do?"
    return Study(question, tuple(settings), tuple(contenders), claims.as_float32, seeds=(0, 1, 2, 3, 4))


def quick(study):
    """One epoch, one seed and the two middle rates: does it run?"""
    contenders = tuple(c._replace(rates=c.rates[(len(c.rates) - 1) // 2 :][:2]) for c in study.contenders)
    settings = tuple(setting._replace(epochs=1) for setting in study.settings)
    return replace(study, contenders=contenders, settings=settings, seeds=study.seeds[:1])


STUDIES = {
    "set-adam": narrower("SET-Adam", {"SETAdam": ("Adam", "AdaBelief")}),
    "aida": narrower("Aida", {"Aida": ("Adam", "AdaBelief", "AdaBelief(eps=1e-8)")}),
    "lambc": bounded(),
    "xgrad": predicted(),
    "curvature": tuned(),
    "precision": stored(),
}
