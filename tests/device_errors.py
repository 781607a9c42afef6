"""What an engine refuses, before anything is written."""

from copy import deepcopy

import pytest
import torch
from device_cases import DEVICE, there, written
from engines import parameters, same_bits, starts, tame

import layerfused


class Own(layerfused.LAMB):
    rule = layerfused.Rule(
        "own", layerfused.LAMB.rule.hyper, lambda p, *_: (p, {}), layerfused.LAMB.rule.states, layerwise=False
    )


def gaps():
    return torch.nn.Parameter(torch.ones(4, 6, device=DEVICE)[:, ::2])


UNSERVED = {
    "float64": (lambda: torch.ones(3, device=DEVICE).double(), {}, ["(3,)", "not on torch.float64"]),
    "gaps": (gaps, {}, ["(4, 3)", "strides (6, 2) leave gaps in memory or overlap"]),
    "rows": (lambda: torch.ones(4, 6, device=DEVICE).t(), {"layer": "slices"}, ["strides (1, 6)", "dimension 0"]),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_parameters_that_cannot_be_served(kind, engine):
    value, options, words = UNSERVED[kind]
    with pytest.raises(ValueError) as error:
        layerfused.LAMB([{"params": [value().detach().requires_grad_()], **options}], backend=engine.backend)
    for word in (f"backend={engine.backend!r} cannot serve", "use 'auto'", *words):
        assert word in str(error.value)


@pytest.mark.parametrize("option", [{"differentiable": True}, {"foreach": True}, {"fused": False}], ids=str)
def test_options_that_choose_the_reference_engine(option, engine):
    with pytest.raises(ValueError, match=f"backend={engine.backend!r} cannot serve .*: use 'auto'"):
        layerfused.LAMB(parameters(there(starts((3,)))), backend=engine.backend, **option)


def test_states_of_a_type_that_is_not_served(engine):
    """The reference keeps float64 states; loaded into another engine they are refused, and nothing is changed."""
    opt, params = engine.train("lamb", starts((5,)), tame((5,), 1))
    before, saved = written(opt), deepcopy(opt.state_dict())  # which shares its dicts with the optimizer
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].double()
    with pytest.raises(ValueError, match="state 'exp_avg' has dtype torch.float64: cast it to float32"):
        opt.load_state_dict(saved)
    after = written(opt)
    for found in (before, after):
        found.pop("report 0")  # of the last step, which tables built anew have not
    same_bits(after, before)
