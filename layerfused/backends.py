"""Which engine serves which parameter: one explicit table, and errors that say what is missing."""

from functools import cache

import torch

from . import _cpu, reference
from .cpu import STORAGE
from .rule import Rule
from .table import is_dense, rows_outermost


@cache
def has_native_form(rule: Rule) -> bool:
    """Whether csrc/rules holds this very rule: what is named alike but has another reference is somebody's own."""
    needs = _cpu.rules().get(rule.name)
    if needs is None or getattr(reference, rule.name, None) is not rule.reference:
        return False
    return (needs["hyper"], needs["reports"]) == (len(rule.hyper), len(rule.report))


def cpu_lacks(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """Why the CPU engine cannot serve a parameter, with the remedy; "" if it can."""
    if not has_native_form(rule):
        return f"rule {rule.name!r} has no native form"
    if p.device.type != "cpu":
        return f"the parameter is on {p.device}"
    if p.dtype not in STORAGE:
        return f"it works on float32, bfloat16 and float16, not on {p.dtype}"
    if not is_dense(p):
        return f"strides {p.stride()} leave gaps in memory or overlap"
    if rule.layerwise and group["layer"] not in ("tensor", "group") and not rows_outermost(p):
        return f"with strides {p.stride()} the rows of dimension 0 are no stretches of memory"
    return ""


def choose(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """The engine for a parameter: the one its group asks for, or the first that can serve it.

    Raises:
        ValueError: if an engine is asked for by name that cannot serve.
    """
    asked = group["backend"]
    plain = group["differentiable"] or group["foreach"] or group["fused"] is False
    if plain and asked not in ("auto", "reference"):
        raise ValueError(f"backend={asked!r} cannot serve differentiable=True, foreach=True or fused=False: use 'auto'")
    if plain or asked == "reference":
        return "reference"
    if asked in ("cuda", "triton"):
        raise ValueError(
            f"backend={asked!r} is not part of this version of layerfused: use 'auto', 'cpu' or 'reference'"
        )
    lacks = cpu_lacks(group, rule, p)
    if lacks and asked == "cpu":
        raise ValueError(f"backend='cpu' cannot serve a parameter of shape {tuple(p.shape)}: {lacks}; use 'auto'")
    return "reference" if lacks else "cpu"


def engines_of(group: dict, rule: Rule) -> list[str]:
    """The engine of each parameter of a group; one for all where they are one layer."""
    engines = [choose(group, rule, p) for p in group["params"]]
    if group["layer"] != "group" or not rule.layerwise:
        return engines
    devices = {p.device for p in group["params"]}
    if len(devices) > 1:
        raise ValueError(f"layer='group' needs all tensors of the group on one device, got {sorted(map(str, devices))}")
    return ["reference"] * len(engines) if "reference" in engines else engines
