"""Storage types on the Triton engine (device_storage.py), and how many launches they make."""

import pytest
import torch
import triton.language as tl
from device_cases import there, written
from device_storage import *  # noqa: F403
from engines import make, parameters, randn, same_bits, starts, tame
from test_engine_storage import TYPES
from triton_cases import MARKS, Triton, Twins, plans

ENGINE, pytestmark = Triton, MARKS
GRADIENTS = {  # types of three gradients -> what the kernel reads them as
    (torch.float32,) * 3: tl.float32,
    (torch.bfloat16,) * 3: tl.bfloat16,
    (torch.float16, None, torch.float16): tl.float16,
    (torch.bfloat16, torch.float16, torch.bfloat16): tl.float32,
    (torch.float16, torch.float32, None): tl.float32,
    (torch.float64, torch.bfloat16, torch.float32): tl.float32,
}


# "lars" reads gradients in both sweeps, "lamb" in one; leaves out the other rules, whose gradients the engine reads.
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_gradients_of_several_types(name, monkeypatch):
    """One launch has one type for all; it changes from step to step, and copies are exact."""
    plans(monkeypatch)
    twins = Twins(name, starts((5, 100, 300)), max_grad_norm=3.0)
    for types, read_as in GRADIENTS.items():
        grads = next(tame((5, 100, 300), 1))
        twins.step([dtype and g.to(dtype) for dtype, g in zip(types, grads, strict=True)])
        (launch,) = twins.opts[1]._launches
        assert launch._gradients == read_as and launch._copies == []


def test_one_launch_for_an_ordinary_model():
    for dtype in TYPES:
        opt = make("lamb", parameters(there(value.to(dtype) for value in starts((5, 20)))), backend="triton")
        assert opt.traffic()["launches"] == len(opt._current()) == 1


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_one_launch_per_tuple_of_types(name, monkeypatch):
    """Parameters of several types: each as it is alone."""
    types = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    values = there(randn(40, i).to(dtype) for i, dtype in enumerate(types))

    def final(values):
        params = parameters(values)
        opt = make(name, params, backend="triton")
        for t in range(2):
            for p in params:
                p.grad = (0.5 + t) * p.detach()
            opt.step()
        return opt, params

    opt, params = final(values)
    assert opt.traffic()["launches"] == len(opt._current()) == 3
    for p, value in zip(params, values, strict=True):
        same_bits({"p": p.detach()}, {"p": final([value])[1][0].detach()})


def test_a_type_of_state_makes_a_launch():
    """States that were loaded in another type: their parameters get a launch of their own."""
    params = parameters(there(starts((5, 20, 30))))
    opt = make("lamb", params, backend="triton")
    saved = opt.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(20, dtype=torch.bfloat16)
    opt.load_state_dict(saved)
    assert opt.traffic()["launches"] == 2
    assert written(opt)["1.exp_avg"].dtype == torch.bfloat16
