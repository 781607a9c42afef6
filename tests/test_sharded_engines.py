"""Sharded parameters on the engines for GPUs, as built for the host and interpreted: the CPU engine's bits.

Left out: GPUs and NCCL.
"""

import os

import pytest
import torch
from ranks import run
from sharding import over, parameters, ranks_agree, same_bits, steps_of, tensors, told, train

import layerfused as lf

BACKENDS = ("cpu", "cuda", "triton")
NAMES = ("LAMB", "SETAdam", "NovoGrad")


def work():
    import host_cuda

    os.environ.setdefault("TRITON_INTERPRET", "1")
    host_cuda.install()
    found = {}
    for name in NAMES:
        for backend in BACKENDS:
            laid = over("mixed")
            params = parameters(laid, tensors())
            opt = getattr(lf, name)(params, lr=0.1, max_grad_norm=1.0, backend=backend)
            train(opt, params, steps_of()[:2], laid)
            found[name, backend] = told(opt, params)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs: the engines' host builds are not installed")
def test_engines_agree():
    """Of few elements even the sums are the same bits: each engine adds them in double."""
    found = run(work, 2, timeout=240)
    for name in NAMES:
        for backend in BACKENDS:
            answers = [rank[name, backend] for rank in found]
            ranks_agree(answers)
            own, cpu = answers[0], found[0][name, "cpu"]
            assert all(same_bits(p, q) for p, q in zip(own["params"], cpu["params"], strict=True)), backend
            assert own["laid"]
