"""A rule: what the engines need to know of one optimizer's mathematics."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One optimizer's mathematics, by name and by what it needs.

    Args:
        name: the rule's word on every engine: `csrc/rules/<name>.h` holds its C++ form.
        hyper: what a group's row holds, in order: keys of the parameter group, where `beta1`, `beta2` stand for the
            two halves of `betas` and `lower`, `upper` for those of `trust_clip`, or attributes of the optimizer class.
        states: names in `state` of the elementwise states that a rule calls m and v, at most two.
        scalar: name in `state` of the layer's float64 scalar, "" if there is none.
        report: names of what `layer_stats()` tells of a layer, in the order of the rule's `finish`.
        layerwise: whether the rule takes stats over a layer (and so whether `adapt` and `layer` mean anything).
        needs_adapt: whether nothing of the rule would be left with `adapt=False`.
        reference: the same mathematics in torch, `reference(p, g, s, h, t, adapt) -> (p, report)`
            (see `layerfused.reference`). A rule without another form runs on it anywhere.
        direction: where a step went beside the decay, from the states that it left, and what it was multiplied with:
            `lr, delta = direction(s, h, t, report)`; weight prediction (`XGrad`) needs it. None: it cannot be told.
        triton: the same mathematics in Triton, a `layerfused.kernels.Rule`, for a rule of one's own; the rules of this
            package have theirs in `kernels/rules.py`.
    """

    name: str
    hyper: tuple[str, ...]
    reference: Callable
    direction: Callable | None = None
    states: tuple[str, ...] = ()
    scalar: str = ""
    report: tuple[str, ...] = ()
    layerwise: bool = True
    needs_adapt: bool = False
    triton: object = None

    def __post_init__(self):
        if len(self.states) > 2:
            raise ValueError(f"a rule has at most two elementwise states (m, v), {self.name} names {self.states}")

    @property
    def entries(self) -> tuple[str, ...]:
        """The keys of a parameter's `state`."""
        return ("step", *((self.scalar,) if self.scalar else ()), *self.states)
