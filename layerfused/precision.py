"""The words of `precision`: how numbers of 16 bits keep what their type cannot hold."""

import torch

# The ways of parameters, numbered as in csrc/storage.h; a parameter may have one of them.
WAYS = {"master": 1, "remainder": 2, "kahan": 3, "stochastic": 4}
STATES = "bf16-states"  # m and v in bfloat16, v rounded stochastically
NEAREST, STOCHASTIC = 0, WAYS["stochastic"]
HALVES = (torch.bfloat16, torch.float16)
RESTS = {"master": "master", "remainder": "remainder", "kahan": "compensation"}  # name in `state` of the second half


def words_of(precision) -> tuple[str, ...]:
    """A group's `precision` as a tuple of words, the parameters' way first.

    Raises:
        ValueError: for what is no word, or more than one way.
    """
    words = () if precision is None else (precision,) if isinstance(precision, str) else precision
    known = isinstance(words, (tuple, list)) and all(word in (*WAYS, STATES) for word in words)
    if not known or len(set(words)) < len(words) or len(set(words) - {STATES}) > 1:
        choices = ", ".join(map(repr, WAYS))
        raise ValueError(f"precision must be None, one of {choices}, {STATES!r}, or one with it, got {precision!r}")
    return tuple(sorted(words, key=STATES.__eq__))


def check_parameter(words: tuple[str, ...], p: torch.Tensor) -> None:
    """Raises ValueError unless a parameter can be kept as the words say."""
    if words and p.dtype not in (torch.float32, *HALVES):
        raise ValueError(f"precision={words} is for float32, bfloat16 and float16, not for a parameter of {p.dtype}")
    if "remainder" in words and p.dtype == torch.float16:
        raise ValueError("precision='remainder' is for bfloat16: a float16 parameter needs 'kahan' (or 'master')")


def way_of(words: tuple[str, ...], dtype: torch.dtype) -> str | None:
    """By which way parameters of a type are stored; None: rounded to nearest."""
    return next((word for word in words if word in WAYS and dtype in HALVES), None)


def ways_of(words: tuple[str, ...], p: torch.dtype, v: torch.dtype | None) -> tuple[int, int]:
    """The ways of p and v by their types (None: the rule has no v), as engines number them."""
    drawn = STATES in words and v == torch.bfloat16
    return WAYS.get(way_of(words, p), NEAREST), STOCHASTIC if drawn else NEAREST


def rest_of(words: tuple[str, ...], dtype: torch.dtype) -> str | None:
    """The name in `state` of what is kept beside a parameter of a type."""
    return RESTS.get(way_of(words, dtype))


def rest_dtype(name: str, p: torch.Tensor) -> torch.dtype:
    return {"master": torch.float32, "remainder": torch.int16}.get(name, p.dtype)


def place_of(number: int, shard: int = 0) -> int:
    """Where the noise for a parameter comes from; the lowest bit is for v.

    Args:
        number: the parameter's own in the optimizer.
        shard: which part of it lies here, so that no two parts draw the same noise.
    """
    return shard << 32 | 2 * number
