"""A few steps of every optimizer over small tensors, held against the reference engine: short enough for a sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitized --backend cuda

Without that variable all tensors lie in one allocation of torch's, and a read past the end of one goes unnoticed.
"""

import argparse
import dataclasses
import sys

import torch

from . import spec as specs
from .contender import DTYPES

OPTIMIZERS = (
    "LAMB", "LAMB(max_grad_norm=None)", "AdamW", "AdamW(max_grad_norm=1.0)", "LARS", "NovoGrad", "Aida", "SETAdam",
    "SGD", "SGD(momentum=0.9)", "AdaBelief", "AdaM3", "LAdam", "LAdam(processing='post')", "AdamNorm",
)  # fmt: skip
SHAPES = ((5,), (64, 16), (1001,), (), (4096,), (4097,), (0,), (90, 700))  # whole, one chunk, several; odd sizes
STEPS = 3
LR = 0.1  # large, so that bfloat16 shows the steps, too


def misaligned(value, device):
    """A copy on the device whose address is no multiple of 16 bytes, as a view of a flat buffer has it."""
    room = torch.empty(value.numel() + 1, dtype=value.dtype, device=device)
    return room[1:].view(value.shape).copy_(value)


def trained(text, backend, dtype, device):
    """Parameters after the steps, on the CPU in float64; values and gradients are the same for every backend."""
    generator = torch.Generator().manual_seed(0)
    start = [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES]
    places = [misaligned if k % 2 else torch.Tensor.to for k in range(len(SHAPES))]
    params = [torch.nn.Parameter(place(p.to(dtype), device)) for place, p in zip(places, start, strict=True)]
    spec = specs.parse(text)
    opt = specs.build(dataclasses.replace(spec, options={"lr": LR, "backend": backend} | spec.options), params)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(device)
        opt.step()
    return [p.detach().cpu().double() for p in params], [p.to(dtype).double() for p in start]


def differences(text, backend, dtype, device):
    """What is further from the reference than rounding explains: each step rounds a parameter by half an eps, twice.

    The rest, 1e-3 of the way gone, is for sums in another order.
    """
    found, _ = trained(text, backend, dtype, device)
    exact, start = trained(text, "reference", dtype, "cpu")
    for p, q, before in zip(found, exact, start, strict=True):
        bound = 1e-3 * (q - before).norm() + STEPS * torch.finfo(dtype).eps * q.norm()
        if not (p - q).norm() <= bound:  # so written, a NaN is a difference
            yield f"shape {tuple(p.shape)}: {(p - q).norm():.3g} from the reference, at most {bound:.3g} is rounding"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.sanitized", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    failed = 0
    for text in OPTIMIZERS:
        for name, dtype in DTYPES.items():
            wrong = list(differences(text, args.backend, dtype, args.device))
            failed += bool(wrong)
            print(f"{text}, {name}: {'; '.join(wrong) or 'as the reference'}", flush=True)
    print(f"{failed} of {len(OPTIMIZERS) * len(DTYPES)} differ from the reference", flush=True)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
