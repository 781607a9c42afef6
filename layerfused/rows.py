"""What parameter groups say to a launch, as rows of numbers: looked at every step, checked where it has changed."""

from functools import cache
from itertools import chain
from operator import itemgetter

import torch

from ._cpu import same
from .checks import ANY, RANGES, TOGETHER, check_group, check_range, check_together, check_value, trust_bounds
from .rule import Rule
from .table import Table

PARTS = {  # what a rule's row takes out of a pair
    "beta1": ("betas", itemgetter(0)),
    "beta2": ("betas", itemgetter(1)),
    "lower": ("trust_clip", lambda clip: trust_bounds(clip)[0]),
    "upper": ("trust_clip", lambda clip: trust_bounds(clip)[1]),
}
LASTING = {float, int, bool, type(None), tuple}  # the same object is the same value; lists and tensors can be written


def key_of(name: str) -> str:
    """The key of a group that one number of a row is made from."""
    return PARTS[name][0] if name in PARTS else name


@cache
def keys_of(rule: Rule) -> tuple[str, ...]:
    """The keys of a group that a rule's row is made from."""
    return tuple(dict.fromkeys(map(key_of, rule.hyper)))


class Rows:
    """The rows of a table's groups, column by column: of hundreds of groups only what has changed costs time.

    Args:
        table: whose groups, and whose rule's hyper-parameters.
        device: where a tensor stays one because the engine's kernel reads it there; None: nowhere.
    """

    def __init__(self, table: Table, device: torch.device | None):
        self._groups, self._hyper, self._device = table.groups, table.rule.hyper, device
        self._keys = ("maximize", *keys_of(table.rule))
        self._seen, self._lasting, self._numbers, self._rows = {}, {}, {}, []

    def read(self, optimizer) -> list[tuple]:
        """A row per group: the gradient's sign, then what the rule's row holds.

        Raises:
            ValueError, TypeError: for a hyper-parameter out of range.
        """
        found = {key: self._column(optimizer, key) for key in self._keys}
        changed = {key for key in self._keys if not (self._lasting.get(key) and same(found[key], self._seen[key]))}
        if changed:
            self._check(found, changed, optimizer.positive_eps)
            numbers = {name: self._read(name, found[key_of(name)]) for name in self._hyper if key_of(name) in changed}
            self._numbers |= numbers
            signs = [-1.0 if ascending else 1.0 for ascending in found["maximize"]]
            self._rows = list(zip(signs, *map(self._numbers.get, self._hyper), strict=True))
            self._seen |= found
            self._lasting |= {key: is_lasting(found[key]) for key in changed}
        return self._rows

    def _column(self, optimizer, key: str) -> list:
        """A value of each group, or what is the whole optimizer's."""
        if key in self._groups[0]:
            return [group[key] for group in self._groups]
        return [getattr(optimizer, key)] * len(self._groups)

    def _check(self, found: dict, changed: set, positive_eps: bool) -> None:
        if not self._seen:  # of the first look nothing is known
            for group in self._groups:
                check_group(group, positive_eps)
            return
        for key in changed:
            for value in found[key]:
                check_value(key, value, positive_eps)
        if changed & TOGETHER:
            for group in self._groups:
                check_together(group)

    def _read(self, name: str, column: list) -> list:
        """One number of every row."""
        if name in PARTS:
            column = map(PARTS[name][1], column)
        return [x if type(x) is float else self._number(name, x, g) for x, g in zip(column, self._groups, strict=True)]

    def _number(self, name: str, value, group: dict):
        """A number; a tensor stays one where autograd, or the kernel on `device`, is to see it."""
        if not isinstance(value, torch.Tensor):
            return value
        if not group["differentiable"] and value.device != self._device:
            if name not in RANGES:  # nobody has looked whether it is one number
                check_range(name, value, *ANY)
            return float(value)
        if self._device and value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} on the device must be float32 or float64, got {value.dtype}")
        return value


def is_lasting(column: list) -> bool:
    """Whether the same objects will always be the same values."""
    pairs = (value for value in column if type(value) is tuple)
    return set(map(type, chain(column, *pairs))) <= LASTING
