"""Where there is no GPU, kernels are tested all the same: Triton's in its interpreter, CUDA's built for the host.

Triton looks at the environment when it is imported, and layerfused imports its CUDA engine once, so this comes before
any test module. Where there is a GPU the same tests run the compiled kernels.
"""

import os
from pathlib import Path

import host_cuda
import pytest
import torch

pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("device_*.py")))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    host_cuda.install()


@pytest.fixture
def engine(request, monkeypatch):
    """The engine that a file of tests is about, by its ENGINE."""
    return request.module.ENGINE(monkeypatch)


@pytest.fixture
def quick_interpreter(monkeypatch):
    """Patches Triton's language once per launch: the interpreter does it at every call of a device function anew.

    That is two thirds of its time. On a GPU there is nothing to do.
    """
    from layerfused.kernels import INTERPRETED

    if INTERPRETED:
        from triton_cases import patch_once

        patch_once(monkeypatch)
