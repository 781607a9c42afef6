"""torch.optim's SGD, Adam and AdamW: their state_dicts load into ours and back, and 50 steps are the same numbers.

Left out: amsgrad (which raises), sparse gradients, and gradients that are missing on some steps.
"""

import pytest
import torch
from conduct import assert_exact, assert_near, copies, give, parameters, raw, through_a_file, train
from torch.nn import Parameter

import layerfused as lf

TORCH = [
    ("SGD", {"lr": 0.1}), ("SGD", {"lr": 0.1, "weight_decay": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}), ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}), ("AdamW", {"lr": 0.01, "betas": (0.8, 0.9)}),
]  # fmt: skip
of_torch = pytest.mark.parametrize("name, kwargs", TORCH, ids=lambda x: x if isinstance(x, str) else "-".join(x))


@pytest.mark.parametrize("steps", [0, 1, 3])
@of_torch
def test_states_of_torch_load_and_go_back(name, kwargs, steps):
    start, params = parameters(), parameters()
    theirs = getattr(torch.optim, name)(params, **kwargs)
    train(theirs, params, range(steps))
    mine = copies(params)
    ours = getattr(lf, name)(mine, lr=5.0)  # momentum off: the loaded groups turn it on
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for p, q in zip(params, mine, strict=True):
        for key, value in theirs.state[p].items():
            if value is not None:
                assert raw(value) == raw(ours.state[q][key]), key
    back = copies(params)
    again = getattr(torch.optim, name)(back, lr=7.0)
    again.load_state_dict(through_a_file(ours.state_dict()))  # unchanged on its way through ours
    for opt, own in ((theirs, params), (ours, mine), (again, back)):
        train(opt, own, range(steps, steps + 3))
    third = copies(mine)
    last = getattr(torch.optim, name)(third)
    last.load_state_dict(through_a_file(ours.state_dict()))
    for opt, own in ((theirs, params), (last, third)):
        train(opt, own, range(10, 12))
    train(ours, mine, range(10, 12))
    train(again, back, range(10, 12))
    for p, q, r, s, p0 in zip(params, mine, back, third, start, strict=True):
        assert_near(q, p, p0, steps + 5)
        assert_near(s, p, p0, steps + 5)
        assert raw(r) == raw(p)


@of_torch
def test_our_states_load_into_torch_before_the_first_step(name, kwargs):
    mine, start = parameters(), parameters()
    ours = getattr(lf, name)(mine, **kwargs)
    theirs = getattr(torch.optim, name)(params := copies(mine))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    train(ours, mine, range(3))
    train(theirs, params, range(3))
    for p, q, p0 in zip(params, mine, start, strict=True):
        assert_near(q, p, p0, 3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_raises(name):
    params = parameters()
    theirs = getattr(torch.optim, name)(params, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        getattr(lf, name)(params).load_state_dict(theirs.state_dict())


PARITY = [
    *TORCH, ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}), ("Adam", {"lr": 0.01, "eps": 1e-3}), ("AdamW", {}),
    ("AdamW", {"lr": 1.0, "weight_decay": 0.5}),
]  # fmt: skip



parity = pytest.mark.parametrize("name, kwargs", PARITY, ids=lambda x: x if isinstance(x, str) else "-".join(x))


def run_beside(name, kwargs, backend, dtype=torch.float32, **way):
    """Ours in fp32 and torch's after 50 steps with the same gradients: triples of ours, theirs, start."""
    start = parameters()
    mine, params = copies(start), [Parameter(p.detach().to(dtype)) for p in start]
    ours = getattr(lf, name)(mine, **kwargs, backend=backend)
    theirs = getattr(torch.optim, name)(params, **kwargs, **way)
    for seed in range(50):
        give(mine, seed)
        for p, q in zip(params, mine, strict=True):
            p.grad = q.grad.to(dtype)
        ours.step()
        theirs.step()
    return ours, theirs, list(zip(mine, params, start, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@parity
def test_50_steps_against_torch_in_float64(name, kwargs, backend):
    """A state remembers about 10 steps of a sum that is at most 10 gradients long, each term rounded twice."""
    ours, theirs, triples = run_beside(name, kwargs, backend, torch.float64)
    for q, p, p0 in triples:
        assert_exact(q, p, p0)
        longest = q.numel() ** 0.5 * 4.0  # of a gradient here, and of its square 16
        for key, value in theirs.state[p].items():
            if value is not None and key != "step":
                scale = longest * (4.0 if key == "exp_avg_sq" else 1.0)
                assert (ours.state[q][key].double() - value).norm() <= 200 * 2**-24 * scale, key


@pytest.mark.parametrize("way", [("foreach", False), ("foreach", True), ("fused", True)], ids=["loop", "each", "fused"])
@parity
def test_50_steps_against_torch_in_float32(name, kwargs, way):
    for q, p, p0 in run_beside(name, kwargs, "auto", **dict([way]))[2]:
        assert_near(q, p, p0, 50)
