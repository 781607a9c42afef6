"""`precision` in training: every rule, over several steps, layers and kinds of tensors, against float32 training.

What is trained on masters or remainders is float32 training bit for bit; of the other words each step is float32's
from what was stored before it, stored by definition (precision_oracle.py).

Left out: every option of each rule, which does not know how its numbers are stored.
"""

import pytest
import torch
from cases import ADAPT
from engines import NAMED, ONE_PER_RULE, make, small_chunks, threads
from precision_oracle import joined, noise, stored
from test_engine_storage import same_numbers
from test_precision import RESTS
from torch.nn import Parameter

SHAPES = ((37, 5), (5,), (), (0,), (131,), (6, 7), (33,), (9,))
MISALIGNED, BAD = 4, 7  # places in SHAPES: a view behind an odd number of elements, gradients that are not finite
BF16, FP16 = torch.bfloat16, torch.float16
# Rules whose second sweep reads on the CPU engine what the first has stored (test_engine_storage.py): there p, and
# Aida's second state, are not those of float32 states.
READ_AGAIN = {"lamb", "setadam", "ladam_pre", "ladam_post", "aida"}
# The reference knows nothing of how numbers are stored while it runs a rule, so that one of each shape is enough.
ENOUGH = ("sgd", "lamb", "novograd-decay")

every_rule = pytest.mark.parametrize(
    "name, backend",
    [(name, "cpu") for name in ONE_PER_RULE]
    + [pytest.param(name, "reference", marks=[] if name in ENOUGH else pytest.mark.all) for name in ONE_PER_RULE],
)


def lying(x, i):
    """A tensor in memory of its own, misaligned if it is that one's turn."""
    offset = int(i == MISALIGNED)
    return torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape).copy_(x)


def values(dtype):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]


def gradients(dtype, t, bad):
    """Of the third step the second parameter has none."""
    random = torch.Generator().manual_seed(100 + t)
    found = [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]
    if bad:
        found[BAD][:3] = torch.tensor([float("nan"), float("inf"), float("-inf")]).to(dtype)
    return [None if (t, i) == (2, 1) else g for i, g in enumerate(found)]


def groups(name, params):
    rule = NAMED[name].rule
    return [
        {"params": params[:5]},
        {"params": params[5:6], "layer": "slices", "seed": 2**52 + 1},
        {"params": params[6:7], "adapt": rule not in ADAPT},
        {"params": params[7:]},
    ]


def optimizer(name, starts, **more):
    params = [Parameter(lying(x, i)) for i, x in enumerate(starts)]
    return make(name, groups(name, params), **more), params


def step(opt, params, grads):
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        p.grad = None if g is None else lying(g.to(p.dtype), i)
    opt.step()


def elementwise(opt):
    return opt.rule_of(opt.param_groups[0]).states


def same_states(opt, params, twin, others):
    rule = opt.rule_of(opt.param_groups[0])
    for p, q in zip(params, others, strict=True):
        assert all(same_numbers_of(opt.state[p][key], twin.state[q][key]) for key in rule.entries)


def same_numbers_of(a, b):
    return torch.equal(a, b) or (a.dtype == torch.float64 and a.isnan().any()) or same_numbers(a, b)


@pytest.mark.parametrize("word, dtype", [("master", BF16), ("master", FP16), ("remainder", BF16)], ids=str)
@every_rule
def test_it_is_float32_training(name, word, dtype, backend, monkeypatch):
    for bad in (True, False):
        clip = {} if bad else {"max_grad_norm": 2.0}  # a norm that is not finite would skip every step
        with small_chunks(monkeypatch), threads(2):
            opt, params = optimizer(name, values(dtype), backend=backend, precision=word, **clip)
            twin, others = optimizer(name, [x.float() for x in values(dtype)], backend=backend, **clip)
            for t in range(4):
                step(opt, params, gradients(dtype, t, bad))
                step(twin, others, gradients(dtype, t, bad))
        assert opt.skipped_steps == 0
        same_states(opt, params, twin, others)
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            expected, rest = stored(word, q.detach(), dtype)
            assert same_numbers(p.detach(), expected) and same_numbers(opt.state[p][RESTS[word]], rest)
            assert bool(q.isfinite().all()) == (i != BAD or not bad)


def moments_of(place, x, seed, t, stream):
    """A state in bfloat16: the second is drawn."""
    if not stream:
        return x.to(BF16)
    return stored("stochastic", x, BF16, noise(x.numel(), seed, place | 1, t).reshape(x.shape))[0]


def check_step(opt, params, others, twin, words, again):
    """What opt stored after a step against twin, which took the same from the same numbers.

    `again`: the rule, if it read states again that it had stored.
    """
    word = next((word for word in words if word != "bf16-states"), None)
    seeds = [group["seed"] for group in opt.param_groups for _ in group["params"]]
    for i, (p, q, seed) in enumerate(zip(params, others, seeds, strict=True)):
        step = int(opt.state[p]["step"])
        if p.grad is None:
            continue
        for stream, key in enumerate(elementwise(opt)):
            x = twin.state[q][key]
            expected = moments_of(2 * i, x, seed, step, stream) if "bf16-states" in words else x
            assert same_numbers(opt.state[p][key], expected) or (again == "aida" and stream), key
        if again:
            continue
        if p.dtype == torch.float32:
            assert same_numbers(p.detach(), q.detach())
            continue
        drawn = noise(p.numel(), seed, 2 * i, step).reshape(p.shape) if word == "stochastic" else None
        expected, rest = stored(word, q.detach(), p.dtype, drawn)
        assert same_numbers(p.detach(), expected)
        assert rest is None or same_numbers(opt.state[p][RESTS[word]], rest)


def follow(twin, others, opt, params, word):
    """Puts the numbers that opt has stored into its twin in float32."""
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(joined(word, p.detach(), opt.state[p].get(RESTS.get(word))) if p.dtype != torch.float32 else p)
            for key in opt.rule_of(opt.param_groups[0]).entries:
                twin.state[q][key].copy_(opt.state[p][key])


WORDS = [("kahan", BF16), ("kahan", FP16), ("stochastic", BF16), ("stochastic", FP16), ("bf16-states", torch.float32),
         (("bf16-states", "kahan"), BF16), (("stochastic", "bf16-states"), FP16)]  # fmt: skip


@pytest.mark.parametrize("precision, dtype", WORDS, ids=str)
@every_rule
def test_each_step_is_float32s_and_stored(name, precision, dtype, backend, monkeypatch):
    words = (precision,) if isinstance(precision, str) else precision
    word = next((word for word in words if word != "bf16-states"), None)
    again = NAMED[name].rule if (backend, "bf16-states" in words) == ("cpu", True) else ""
    again = again if again in READ_AGAIN else ""
    with small_chunks(monkeypatch), threads(2):
        opt, params = optimizer(name, values(dtype), backend=backend, precision=precision)
        twin, others = optimizer(name, [x.float() for x in values(dtype)], backend=backend)
        for t in range(3):
            follow(twin, others, opt, params, word)
            step(opt, params, gradients(dtype, t, bad=True))
            step(twin, others, gradients(dtype, t, bad=True))
            check_step(opt, params, others, twin, words, again)
