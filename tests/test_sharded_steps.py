"""Sharded parameters: groups, types, gradients that are missing or not finite, states that are loaded, noise.

Left out: the rules one by one (test_sharded.py), gradients placed otherwise (test_sharded_collectives.py).
"""

import pytest
import torch
from ranks import run
from sharding import (
    LAYOUTS,
    SHAPES,
    assert_whole,
    over,
    parameters,
    plain,
    ranks_agree,
    steps_of,
    tensors,
    told,
    train,
)

import layerfused as lf

LATE = ((3, 3),)  # of a group that comes later


def groups(laid):
    """Matrices and, without ratio and decay, the rest; a third group after the first step."""
    params = parameters(laid, tensors())
    matrices, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    opt = lf.LAMB([{"params": matrices}, {"params": rest, "adapt": False, "weight_decay": 0.0}], lr=0.01)
    train(opt, params, steps_of()[:1], laid)
    params += parameters(laid, tensors(9, LATE))
    opt.add_param_group({"params": params[-1:], "lr": 0.1})
    train(opt, params, steps_of((*SHAPES, *LATE))[1:], laid)
    return told(opt, params)


def bf16(laid):
    params = parameters(laid, tensors(dtype=torch.bfloat16))
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, steps_of(dtype=torch.bfloat16), laid)
    return told(opt, params)


def gaps(laid):
    """A frozen parameter, one with a gradient at times, a step without any, and one that is not finite on a rank."""
    params, steps = parameters(laid, tensors()), steps_of()
    params[3].requires_grad_(False)
    for t, step in enumerate(steps):
        step[3] = None
        step[0] = step[0] if t % 2 else None
    steps[2] = [None] * len(params)
    steps[3][4][-1, -1] = float("nan")
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, steps, laid)
    return told(opt, params)


def reloaded(laid):
    """A state_dict goes into another optimizer, which then steps like the first; and hyper-parameters change."""
    params = parameters(laid, tensors())
    opt = lf.NovoGrad(params, lr=0.1)
    train(opt, params, steps_of()[:2], laid)
    other = lf.NovoGrad(params, lr=1.0)
    other.load_state_dict(opt.state_dict())
    other.param_groups[0]["lr"] = 0.05
    train(other, params, steps_of()[2:], laid)
    return told(other, params)


SCENARIOS = {"groups": groups, "bf16": bf16, "gaps": gaps, "reloaded": reloaded}
STARTS = {"groups": [*tensors(), *tensors(9, LATE)], "bf16": tensors(dtype=torch.bfloat16)}


def on_ranks():
    return {(name, layout): scenario(over(layout)) for name, scenario in SCENARIOS.items() for layout in LAYOUTS}


@pytest.fixture(scope="module")
def four():
    return run(on_ranks, 4)


@pytest.mark.filterwarnings("ignore:the gradient norm is nan")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(four, name, layout):
    ranks_agree([rank[name, layout] for rank in four])
    want = SCENARIOS[name](plain)
    assert_whole(four[0][name, layout], want, STARTS.get(name, tensors()))
    assert want["skipped"] == (name == "gaps")


def rounded():
    """A step whose noise shows: the same gradient everywhere in a tensor of equal numbers."""
    found = {}
    for layout in LAYOUTS:
        laid, ones = over(layout), [torch.ones(8, 64, dtype=torch.bfloat16)] * 2
        params = parameters(laid, ones)
        opt = lf.AdamW(params, lr=1e-3, precision=("stochastic", "bf16-states"))
        train(opt, params, [ones], laid)
        found[layout] = told(opt, params)
    return found


def test_noise_of_copies():
    """Copies of a shard are rounded alike, different shards by noise of their own."""
    found = run(rounded, 4)
    for layout in LAYOUTS:
        ranks_agree([rank[layout] for rank in found])
        one, other = found[0][layout]["params"]
        blocks = [block for rows in (*one.split(2), *other.split(2)) for block in rows.split(16, dim=1)]
        assert one.unique().numel() == 2 and len({tuple(block.flatten().tolist()) for block in blocks}) == len(blocks)
