"""The forms a rule is written in: which of them there are, and what its sweeps need."""

from functools import cache
from typing import NamedTuple

from . import _cpu, reference
from .rule import Rule


class Needs(NamedTuple):
    """What one pass of a rule asks of memory: masks (reads, writes) of its two sweeps, as in csrc/rule.h."""

    sums: int
    minima: int
    first: tuple[int, int]
    second: tuple[int, int]
    couples: bool

    @property
    def terms(self) -> int:
        return self.sums + self.minima


def is_ours(rule: Rule) -> bool:
    """Whether it is this very rule: what is named alike but has another reference is somebody's own."""
    return getattr(reference, rule.name, None) is rule.reference


@cache
def has_native_form(rule: Rule) -> bool:
    """Whether csrc/rules holds the rule."""
    needs = _cpu.rules().get(rule.name)
    if needs is None or not is_ours(rule):
        return False
    return (needs["hyper"], needs["reports"]) == (len(rule.hyper), len(rule.report))


def triton_form(rule: Rule):
    """The rule's `layerfused.kernels.Rule`, or None if nobody has written it.

    Raises:
        ImportError: if Triton is missing or too old.
    """
    if rule.triton is not None:
        return rule.triton
    from .kernels import rules

    return getattr(rules, rule.name, None) if is_ours(rule) else None


def needs_of(rule: Rule) -> Needs | None:
    """What the rule's sweeps need, from whichever form there is; None if there is only the reference."""
    if has_native_form(rule):
        needs = _cpu.rules()[rule.name]
        return Needs(needs["sums"], needs["minima"], needs["reduce"], needs["apply"], needs["couples"])
    form = rule.triton
    if form is None:
        return None
    return Needs(form.sums, form.minima, tuple(form.first), tuple(form.second), "coupled" in form.scalars.split())
