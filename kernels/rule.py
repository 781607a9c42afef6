"""The vocabulary of a rule in Triton: what one optimizer's mathematics may see and say, as csrc/rule.h does in C++.

A rule is a `Rule` of `@triton.jit` functions without pointers or indices. `h` is the group's row in double, by name;
`c` are float32 scalars, by name; `x` holds tiles of float32.

    start(h, t)         the scalars that do not depend on the layer's sums, in the order of `Rule.scalars`
    moments(c, x)       elementwise, before the sums are taken: the new `x`
    stats(c, x)         the layer's terms: what is summed (see `product`, `widen`), then what is minimised
    finish(h, layer)    once per layer, in double: the scalars of `Rule.finished`, the layer's new state, the report
                        (None in it: what was reported last stays)
    direction(c, x)     elementwise: where `apply` goes beside the decay, as of m and v; `c.lr` is how far
    apply(c, x)         elementwise, with the scalars of `start` and `finish`: the new `x`
    recall(h, layer)    where `direction` needs scalars of `finish`: again, from h and the layer's report, state and t

The engine hands in x.g with sign, clip factor and coupled decay applied. What a rule does not need it leaves out.
"""

from typing import NamedTuple

import triton
import triton.language as tl

P, G, M, V = 1, 2, 4, 8  # bits of a sweep's operands


class Element(NamedTuple):
    p: tl.tensor
    g: tl.tensor
    m: tl.tensor
    v: tl.tensor


class Sweep(NamedTuple):
    """Which operands one pass over memory reads and writes: sums of P, G, M, V."""

    reads: int
    writes: int


class Total(NamedTuple):
    """What `finish` knows of its layer, in double."""

    stats: tuple  # the sums, then the minima
    elements: tl.tensor  # of all its tensors that have a gradient
    t: tl.tensor  # this step's number, from 1; for `recall` that of the step whose scalars they are
    adapt: tl.constexpr  # False: no layer-wise factor, and no stats
    state: tl.tensor  # the layer's float64 state; 0 where the rule has none
    report: tuple  # what was reported last; not there where `adapt` is False


@triton.jit
def as_left(layer, state, report):
    """The layer as `finish` leaves it and `recall` will see it, so that both give the same bits."""
    return Total((), layer.elements, layer.t, layer.adapt, state, report)


@triton.jit
def no_moments(c, x):
    return x


@triton.jit
def no_stats(c, x):
    return ()


@triton.jit
def no_finish(h, layer):
    return (), layer.state, ()


class Rule(NamedTuple):
    """One optimizer's mathematics for the Triton engine.

    Attributes:
        start, moments, stats, finish, apply, direction, recall: `@triton.jit` functions, see above. Without a direction
            no weight can be predicted.
        scalars, finished: names of what `start` and `finish` give, as `c` has them; one word each, blanks between.
            A scalar named `coupled` is the factor of p that the engine adds to g; `lr` goes with `direction`.
        first, second: the operands of the sweep that takes the stats, and of the one that applies. A rule without
            stats has only the second. Of m and v `direction` may look at what the second reads.
        sums, minima: how many terms `stats` gives.
        reports: how many numbers `finish` reports.
    """

    start: triton.JITFunction
    apply: triton.JITFunction
    second: Sweep
    scalars: str
    moments: triton.JITFunction = no_moments
    stats: triton.JITFunction = no_stats
    finish: triton.JITFunction = no_finish
    first: Sweep = Sweep(0, 0)
    finished: str = ""
    sums: int = 0
    minima: int = 0
    reports: int = 0
    direction: triton.JITFunction | None = None
    recall: triton.JITFunction | None = None


@triton.jit
def f32(x):
    """Rounded once, to nearest."""
    return x.to(tl.float32)


@triton.jit
def double(x: tl.constexpr):
    """A constant: a bare one would be rounded to float32 where nothing says otherwise."""
    return tl.full((), x, tl.float64)


@triton.jit
def power(base, t):
    """A binary power: the same multiplications, and so the same bits, as on the CPU."""
    result = double(1.0)
    n = t.to(tl.int64)
    while n > 0:
        result = tl.where(n & 1 == 1, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def correction(beta, t):
    """1 / (1 - beta^t): makes an average that started at 0 unbiased."""
    return 1.0 / (1.0 - power(beta, t))


@triton.jit
def average(v, c, q):
    """An average moves by c = 1 - beta, rounded once from double: beta*v + (1 - beta)*q with both rounded drifts."""
    return v + c * (q - v)


@triton.jit
def root(x):
    """IEEE's square root of float32; tl.sqrt would be an approximation there."""
    return tl.sqrt_rn(x)


@triton.jit
def divide(a, b):
    """IEEE's quotient of float32; a / b would be an approximation there."""
    return tl.div_rn(a, b)


@triton.jit
def widen(a):
    return a.to(tl.float64)


@triton.jit
def product(a, b):
    """A term of a sum: exact in double, so that no range of gradients overflows or vanishes."""
    return a.to(tl.float64) * b.to(tl.float64)
