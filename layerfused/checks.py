"""Checks of hyper-parameters: every error names the value and the range."""

import math
from numbers import Real

import torch

from .precision import words_of

# name -> (lowest, highest, lowest allowed, highest allowed); beta stands for both halves of `betas`
RANGES = {
    "lr": (0, math.inf, True, False),
    "beta": (0, 1, True, False),
    "eps": (0, math.inf, True, False),
    "weight_decay": (0, math.inf, True, False),
    "momentum": (0, math.inf, True, False),
    "dampening": (-math.inf, math.inf, False, False),
    "trust_coefficient": (0, math.inf, False, False),
    "tau": (0, 1 - 2**-24, True, True),  # the float32 below 1: with 1 a denominator would be 0
    "gamma": (0, 1, True, False),
    "xi": (0, math.inf, False, False),
    "max_grad_norm": (0, math.inf, False, False),
    "ema": (0, 1, True, False),
    "damping": (0, math.inf, True, False),
    "max_step": (0, math.inf, False, False),
}
ANY = (-math.inf, math.inf, True, True)
CHOICES = {
    "processing": ("pre", "post"),
    "step_rule": ("quadratic", "self-concordant"),
    "estimator": ("joint", "signs", "exact"),
    "product": ("finite-difference", "double-backward"),
    "backend": ("auto", "cpu", "triton", "cuda", "reference"),
}
TOGETHER = {"nesterov", "momentum", "dampening"}  # what `check_together` looks at


def check_range(name: str, value, low, high, low_in: bool, high_in: bool) -> None:
    if type(value) is float and low < value < high:
        return  # schedules change hundreds of values a step, and the rest takes five times as long
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor with one element, got shape {tuple(value.shape)}")
        if not value.is_cpu:
            return  # reading it would synchronise
        return check_range(name, value.item(), low, high, low_in, high_in)
    text = f"{'[' if low_in else '('}{low}, {high}{']' if high_in else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {text}, got {value!r}")
    inside = (low <= value if low_in else low < value) and (value <= high if high_in else value < high)
    if not inside:  # a NaN is in no range
        raise ValueError(f"{name} must be in {text}, got {value}")


def check_group(group: dict, positive_eps: bool) -> None:
    """Checks every hyper-parameter of a parameter group.

    Args:
        group: the group, defaults filled in.
        positive_eps: the rule divides by a root with nothing but eps in it, so that float32 must hold eps.

    Raises:
        ValueError, TypeError: naming the hyper-parameter, its value and its range.
    """
    for name, value in group.items():
        check_value(name, value, positive_eps)
    check_together(group)


def check_value(name: str, value, positive_eps: bool) -> None:
    """Checks one hyper-parameter, as `check_group` does all of them."""
    if name == "eps" and positive_eps:
        check_range(name, value, torch.finfo(torch.float32).tiny, math.inf, True, False)
    elif name in RANGES:
        check_range(name, value, *RANGES[name])
    elif name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")
    elif name in CHECKS:
        CHECKS[name](value)


def check_together(group: dict) -> None:
    """Checks those hyper-parameters of a group that depend on each other."""
    if group.get("nesterov") and group["momentum"] == 0:
        raise ValueError("nesterov needs momentum > 0, got momentum=0")
    if group.get("nesterov") and group.get("dampening", 0) != 0:
        raise ValueError(f"nesterov needs dampening=0, got dampening={group['dampening']}")


def _check_adapt(adapt) -> None:
    if adapt not in (True, False, None):
        raise ValueError(f"adapt must be True, False or None, got {adapt!r}")


def _check_k(k) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise ValueError(f"k must be an integer >= 0, got {k!r}")


def _check_seed(seed) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**53:
        raise ValueError(f"seed must be an integer in [0, 2**53), got {seed!r}")


def _check_betas(betas) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    for number, beta in enumerate(betas, 1):
        check_range(f"beta{number}", beta, *RANGES["beta"])


def trust_bounds(clip) -> tuple[float, float]:
    """`trust_clip` as (lower, upper): None is no bound, a number the upper one.

    Raises:
        ValueError: if the bounds are not numbers with 0 <= lower <= upper.
    """
    if clip is None:
        return 0.0, math.inf
    lower, upper = clip if isinstance(clip, (tuple, list)) and len(clip) == 2 else (0.0, clip)
    if not isinstance(lower, Real) or not isinstance(upper, Real) or not 0 <= lower <= upper:
        raise ValueError(
            f"trust_clip must be None, an upper bound >= 0, or (lower, upper) with 0 <= lower <= upper, got {clip!r}"
        )
    return float(lower), float(upper)


def check_layer(layer) -> None:
    """Raises ValueError unless `layer` is one of the ways to cut parameters into layers."""
    if layer in ("tensor", "slices", "group"):
        return
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 1:
        return
    if isinstance(layer, (tuple, list)) and layer and all(type(n) is int and n >= 1 for n in layer):
        return
    raise ValueError(
        "layer must be 'tensor', 'slices', 'group', a number of equal blocks >= 1 or a tuple of row counts >= 1, "
        f"got {layer!r}"
    )


CHECKS = {
    "adapt": _check_adapt,
    "betas": _check_betas,
    "k": _check_k,
    "layer": check_layer,
    "precision": words_of,
    "seed": _check_seed,
    "trust_clip": trust_bounds,
}
