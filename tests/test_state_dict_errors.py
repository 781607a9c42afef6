"""Bad state_dicts get an error that names what is wrong, and the optimizer stays as it was."""

from copy import deepcopy

import pytest
import torch
from conduct import EACH, assert_same, each_case, make, parameters, refused, snapshot, train

import layerfused as lf


def spoil(key, value):
    return lambda saved: saved["state"][0].__setitem__(key, value)


def spoil_group(key, value):
    return lambda saved: saved["param_groups"][0].__setitem__(key, value)


SPOILED = {  # name -> (what spoils a state_dict of LAMB's, words of the message)
    "wrong shape": (spoil("exp_avg", torch.zeros(5, 7)), ["exp_avg", "(5, 7)", "(7, 5)"]),
    "wrong type": (spoil("exp_avg", torch.zeros(7, 5, dtype=torch.int64)), ["exp_avg", "int64"]),
    "complex": (spoil("exp_avg_sq", torch.zeros(7, 5, dtype=torch.complex64)), ["exp_avg_sq", "complex64"]),
    "no tensor": (spoil("exp_avg", "nothing"), ["exp_avg"]),
    "a state too many": (spoil("max_exp_avg_sq", torch.zeros(7, 5)), ["another optimizer", "max_exp_avg_sq"]),
    "a state too few": (lambda saved: saved["state"][3].pop("exp_avg"), ["another optimizer"]),
    "step of many": (spoil("step", torch.zeros(3)), ["step"]),
    "lr out of range": (spoil_group("lr", -1.0), ["lr", "-1.0", "[0, inf)"]),
    "bad layer": (spoil_group("layer", "row"), ["layer", "'row'"]),
    "rows that do not fit": (spoil_group("layer", (3,)), ["layer", "(7, 5)"]),
    "engine": (spoil_group("backend", "tpu"), ["tpu"]),
    "fewer parameters": (spoil_group("params", [0, 1]), ["2", "4"]),
    "another rule": (spoil_group("rule", "lars"), ["'lars'", "'lamb'"]),
    "amsgrad": (spoil_group("amsgrad", True), ["amsgrad"]),
    "more groups": (lambda saved: saved["param_groups"].append({"params": []}), ["groups"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_state_dicts_that_are_refused(name):
    """The optimizer is as it was, in groups, states and in what it does next."""
    spoiling, words = SPOILED[name]
    params, others = parameters(), parameters()
    opt, other = lf.LAMB(params, lr=0.01), lf.LAMB(others, lr=0.01)
    train(opt, params, [0])
    train(other, others, [0])
    saved = deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    spoiling(saved)
    before, groups = snapshot(opt, params), deepcopy([{**g, "params": None} for g in opt.param_groups])
    with refused((ValueError, TypeError), *words):
        opt.load_state_dict(saved)
    assert_same(snapshot(opt, params), before)
    assert [{**g, "params": None} for g in opt.param_groups] == groups
    assert all(p is q for p, q in zip(opt.param_groups[0]["params"], params, strict=True))
    train(opt, params, [1])
    train(other, others, [1])
    assert_same(snapshot(opt, params), snapshot(other, others))


ALIKE = [{"LAMB", "LAMBC"}]  # may read each other's states


@pytest.mark.parametrize("steps", [0, 1])
@each_case
def test_a_state_dict_of_another_optimizer(case, steps):
    params = parameters()
    opt = make(case, params)
    train(opt, params, range(steps))
    for other in EACH:
        taker = make(other, parameters())
        same = (other.cls, other.rule) == (case.cls, case.rule) or {other.cls, case.cls} in ALIKE
        if same or {other.cls, case.cls} in ({"SGD"}, {"LAdam"}, {"LAdaBelief"}):  # options choose the variant
            taker.load_state_dict(opt.state_dict())
            continue
        with refused(ValueError, "state_dict is of rule", case.rule):
            taker.load_state_dict(opt.state_dict())


def test_a_state_dict_of_torch_that_has_other_states():
    params = parameters()
    for name, kwargs in (("Adamax", {}), ("RMSprop", {}), ("SGD", {"momentum": 0.9}), ("NAdam", {})):
        theirs = getattr(torch.optim, name)(params, **kwargs)
        train(theirs, params, [0])
        before = snapshot(opt := lf.AdamW(params), params)
        with refused(ValueError, "the state_dict is of", "adam"):
            opt.load_state_dict(theirs.state_dict())
        assert_same(snapshot(opt, params), before)
