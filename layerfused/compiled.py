"""A step inside of compiled code: one operator, which knows its optimizer by a number.

The graph holds the parameters, their gradients and that number. Hyper-parameters, states and tables stay outside, so
that nothing is compiled again when a schedule changes lr.
"""

from contextlib import contextmanager
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

OPTIMIZERS, NUMBERS = WeakValueDictionary(), count()
SCHEMA = "step(Tensor(a!)[] params, Tensor?[] grads, Tensor? grad_norm, int optimizer) -> ()"
TAGS = [getattr(torch.Tag, tag) for tag in ("cudagraph_unsafe",) if hasattr(torch.Tag, tag)]  # it would freeze numbers
LIBRARY = torch.library.Library("layerfused", "DEF")
LIBRARY.define(SCHEMA, tags=TAGS)

# As a decorator: runs as it is, between two graphs. torch.compiler.disable would import Dynamo along with the package.
outside_of_graphs = torch._disable_dynamo


def number_of(optimizer) -> int:
    """A number by which graphs know an optimizer, as long as it lives."""
    number = next(NUMBERS)
    OPTIMIZERS[number] = optimizer
    return number


def step(optimizer, grad_norm: Tensor | float | None) -> None:
    """What Dynamo traces in the place of a step: one operator, where a graph can hold it."""
    params = optimizer._params
    if optimizer.defaults["differentiable"] or optimizer._spreads:
        step_outside(optimizer, grad_norm)
    elif params:
        norm = None if grad_norm is None else torch.as_tensor(grad_norm, dtype=torch.float64)
        with torch.no_grad():
            torch.ops.layerfused.step(params, [p.grad for p in params], norm, optimizer._number)


@outside_of_graphs
def step_outside(optimizer, grad_norm: Tensor | float | None) -> None:
    optimizer._step(grad_norm)


@torch.library.impl(LIBRARY, "step", "CompositeExplicitAutograd")
def run(params: list[Tensor], grads: list[Tensor | None], grad_norm: Tensor | None, number: int) -> None:
    """The operator, on real tensors."""
    optimizer = OPTIMIZERS[number]
    with lent(optimizer._params, params, grads):
        optimizer._step(grad_norm)


@torch.library.register_fake("layerfused::step", lib=LIBRARY)
def _(params, grads, grad_norm, optimizer):
    """It returns nothing."""


@contextmanager
def lent(own: list[Tensor], params: list[Tensor], grads: list[Tensor | None]):
    """Lends parameters the memory and the gradients that a graph has for them.

    They are not always what the parameters hold: a graph without side effects steps in copies and writes them back at
    its end, and it can have changed weights and gradients before.
    """
    kept = []
    try:
        for p, memory, g in zip(own, params, grads, strict=True):
            moved = memory.data_ptr() != p.data_ptr()
            if moved or p.grad is not g:
                kept.append((p, p.data, p.grad))
                p.data = memory if moved else p.data
                p.grad = g
        yield
    finally:
        for p, memory, g in kept:
            p.data, p.grad = memory, g
