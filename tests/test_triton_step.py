"""What a step of the Triton engine does (device_step.py), and how it fails."""

import pytest
import torch
from device_cases import there, written
from device_step import *  # noqa: F403
from engines import make, parameters, same_bits, starts, step, tame
from triton_cases import MARKS, Triton

from layerfused import triton_engine

ENGINE, pytestmark = Triton, MARKS


def test_the_second_of_two_launches_that_cannot_be_made(monkeypatch):
    """It is found before the first has written anything."""
    values = starts((5, 300))
    params = parameters(there([values[0], values[1].bfloat16()]))
    opt = make("lamb", params, backend="triton", max_grad_norm=1.0)
    step(opt, params, there(next(tame((5, 300), 1))[:1]) + [torch.ones_like(params[1])])
    before, upload = written(opt), triton_engine.TritonLaunch._upload

    def refused(self):
        if self is opt._launches[1]:
            raise RuntimeError("no memory")
        upload(self)

    opt.param_groups[0]["lr"] *= 2
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(triton_engine.TritonLaunch, "_upload", refused)
        opt.defaults["max_grad_norm"] = None  # a global norm would have sent it before
        opt.step()
    same_bits(written(opt), before)
