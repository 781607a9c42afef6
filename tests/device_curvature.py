"""Curvature step sizes launch by launch: the CPU engine's bits where sums are equal, and the same bits in pieces.

That the CPU engine is right about them, and that the optimizers take these launches, is in test_curvature.py.
"""

import math

import pytest
import torch
from device_cases import same_numbers, there, written
from device_predict import SIZES, bits, rested, shaped
from engines import parameters, same_bits, starts, tame, threads, wild
from test_engine_storage import set_gradient

import layerfused
from layerfused.plan import Phase

CLASSES = {"CurvatureSGD": {"momentum": 0.8}, "CurvatureAdamW": {"betas": (0.8, 0.95)}}
QUADRATIC = {"step_rule": "quadratic", "estimator": "joint", "weight_decay": 0.1}
CONCORDANT = {"step_rule": "self-concordant", "estimator": "signs", "damping": 0.0}
KINDS = [(QUADRATIC, torch.float32), (CONCORDANT, torch.bfloat16), (CONCORDANT, torch.float16)]
EVERY = pytest.mark.parametrize("cls", CLASSES)
SIGN = 4  # its column


class Launches:
    """An optimizer whose two launches are run by hand.

    Attributes:
        pair: the launches of the slope and of the curvature.
    """

    def __init__(self, cls, values, backend, **options):
        self.params = parameters(values)
        third = len(values) // 3
        groups = [{"params": self.params[:third], "lr": 0.5}, {"params": self.params[third : 2 * third]}]
        groups += [{"params": self.params[2 * third : -1], "layer": "group"}]
        groups += [{"params": self.params[-1:], "layer": "slices", "max_step": 0.01}]
        self.opt = getattr(layerfused, cls)(groups, backend=backend, **CLASSES[cls], **options)
        self.pair = (*self.opt._launches, *self.opt._seconds)
        self.opt._reach.fill_(0.01)

    def set(self, grads, number):
        for p, g in zip(self.params, grads, strict=True):
            set_gradient(p, None if g is None else g.to(p.device, p.dtype))
        assert self.pair[number].read()

    def run(self, number, *phases):
        for phase in phases:
            self.pair[number].run(phase, self.opt._rows(self.pair[number]), math.inf)

    def sign(self):
        """Some forth, some back."""
        column = self.pair[0].table.report[:, SIGN]
        column.copy_(1.0 - 2.0 * (torch.arange(len(column)) % 2))
        self.opt._hold()

    def written(self):
        true = {f"true {k}": x for k, x in bits(self.opt._copies.of(p) for p in self.params).items()}
        return {**written(self.opt), **true}


def both_gradients(kind, steps):
    """Of each step: with tensors that rest, and a second one nearby."""
    for t, grads in enumerate(kind(SIZES, steps)):
        yield rested(grads, t), [None if g is None else g + 0.1 * g.sin() for g in rested(grads, t)]


@pytest.mark.parametrize("options, dtype", KINDS, ids=["fp32", "bf16", "fp16"])
@EVERY
def test_bits_are_the_cpu_engines(cls, options, dtype, engine):
    """Two steps, and one of gradients beyond all measure. Leaves out some pairs of an option and a storage type."""
    engine.plans()
    values = [value.to(dtype) for value in shaped(starts(SIZES))]
    twins = Launches(cls, values, "cpu", **options), Launches(cls, there(values), engine.backend, **options)
    for first, second in (*both_gradients(tame, 2), *both_gradients(wild, 1)):
        for number, grads, after in ((0, first, Phase.PREDICT | Phase.UNCOUNTED), (1, second, Phase.APPLY)):
            for one in twins:
                one.set(grads, number)
                one.pair[number].norm.fill_(1.0)
            with threads(1):
                side_by_side(twins, number, after)
            same_numbers(twins[1].written(), twins[0].written())


def side_by_side(twins, number, after):
    for one in twins:
        one.run(number, Phase.REDUCE)
    stats, others = (one.pair[number].stats for one in twins)
    torch.testing.assert_close(others.cpu(), stats, rtol=1e-6, atol=0, equal_nan=True)
    others.copy_(stats)
    for one in twins:
        one.run(number, Phase.FINISH)
        if number == 0:
            one.sign()
        one.run(number, after)


@EVERY
def test_phases_together_are_the_step(cls, engine):
    """In two launches and a prediction, by several blocks, and in pieces."""
    engine.plans(grid=2)
    whole, cut = (Launches(cls, there(shaped(starts(SIZES))), engine.backend) for _ in range(2))
    for first, second in both_gradients(tame, 2):
        for one in (whole, cut):
            one.set(first, 0)
            one.run(0, *((Phase.NORM | Phase.REDUCE | Phase.FINISH,) if one is whole else (1, 2, 4)))
            one.sign()
            one.run(0, Phase.PREDICT | Phase.UNCOUNTED)
        same_bits(cut.written(), whole.written())
        for one in (whole, cut):
            one.set(second, 1)
            one.pair[1].norm.copy_(one.pair[0].norm)
            one.run(1, *((Phase.STEP & ~Phase.NORM,) if one is whole else (2, 4, 8)))
            assert not engine.counters(one.opt).any()
        same_bits(cut.written(), whole.written())
