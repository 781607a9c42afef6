"""One step between cudaProfilerStart and cudaProfilerStop, for ncu to count.

    ncu --profile-from-start off --metrics dram__bytes_read.sum python -m bench.profiled bert-large AdamW

The parameters are float32.
"""

import sys

import torch

from . import shapes as models
from . import spec as specs
from .contender import Contender, parameters


def main(name, text):
    params = parameters([shape for _, shape in models.load(name)], torch.float32, "cuda")
    contender = Contender.build(specs.parse(text), params)  # states are there and kernels compiled: two steps
    torch.cuda.profiler.start()
    contender.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
