"""What only a GPU can show of the Triton engine (device_gpu.py, device_graphs.py, too)."""

import pytest
import torch
from device_gpu import *  # noqa: F403
from device_gpu import built, needs_gpu
from device_graphs import *  # noqa: F403
from triton_cases import Triton

ENGINE, pytestmark = Triton, needs_gpu


def test_a_capture_that_would_have_to_send_says_so(engine):
    opt, _ = built(engine, "lamb")
    with pytest.raises(RuntimeError, match="take one step with these gradients and groups before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()
