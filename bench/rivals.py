"""Others' optimizers for the simulation, as the launches that they make.

Facts from their sources: PyTorch, aten/src/ATen/native/cuda/MultiTensorApply.cuh (how tensors are packed into
launches, both limits), fused_adam_utils.cuh (what a block reads and writes) and torch/optim/adam.py (the addition to
the steps); NVIDIA apex, csrc/multi_tensor_apply.cuh (limits), csrc/multi_tensor_lamb.cu, csrc/
multi_tensor_l2norm_kernel.cu and apex/optimizers/fused_lamb.py (the stages, what fills and cleans up around them).
"""

import math
from typing import NamedTuple

from . import shapes as models
from .contender import DTYPES
from .simulation import Job, Kernel, sweep_of

CHUNK = 65536  # elements of a block, in both projects
TILE = 4 * 512  # elements that 512 threads read at once
BLOCK_S = 0.3e-6  # [estimate] a block's start: reading its place in the kernel's arguments, powers of beta
FULL = Kernel(TILE, blocks=4, item_s=BLOCK_S)  # 4 × 512 threads fill a multiprocessor
HEAVY = Kernel(TILE, blocks=3, item_s=BLOCK_S)  # [estimate] what the registers of four operands leave
P, G, M, V = 1, 2, 4, 8


class Limits(NamedTuple):
    """Of one launch: tensors by the number of lists, and blocks."""

    tensors: dict
    blocks: int


SMALL = Limits({1: 110, 2: 64, 4: 36}, 320)  # kernel arguments of 4 KB
LARGE = Limits({1: 770, 2: 448, 4: 252}, 2240)  # of 32 KB: torch built with CUDA 13 or newer


def packed(sizes, limits, lists):
    """Blocks (tensor, start, count) of each launch: a launch is full when its blocks or its tensors are."""
    launch, tensors = [], 0
    for tensor, size in enumerate(sizes):
        tensors += size > 0
        for start in range(0, size, CHUNK):
            launch.append((tensor, start, min(CHUNK, size - start)))
            ends = start + CHUNK >= size
            if len(launch) == limits.blocks or (ends and tensors == limits.tensors[lists]):
                yield launch
                launch, tensors = [], int(not ends)
    if launch:
        yield launch


class Rival:
    """A rival over one list of shapes; all tensors have the parameters' type.

    Attributes:
        compulsory: bytes it must move if everything stays in cache between its passes.
    """

    words = 7

    def __init__(self, shapes, dtype, limits):
        self.sizes = [math.prod(shape) for _, shape in models.load(shapes)]
        self.elements, self.width, self.limits = sum(self.sizes), DTYPES[dtype].itemsize, limits
        self.compulsory = self.words * self.width * self.elements
        self._tiles = [0]
        for size in self.sizes:
            self._tiles.append(self._tiles[-1] - size // -TILE)

    def stage(self, device, kernel, lists, masks):
        """One pass over all tensors, in as many launches as it takes."""
        sweep = sweep_of(masks, (self.width,) * 4, kept=P | G | M | V)  # nobody tells L2 what is used again
        for blocks in packed(self.sizes, self.limits, lists):
            device.launch(kernel, [Job(self._tiles[t] + start // TILE, n, (sweep,)) for t, start, n in blocks])

    def trifles(self, device, number):
        """Launches over a few numbers: each costs its start and one miss."""
        for _ in range(number):
            device.launch(FULL, [])
            device.now += device.gpu.dram_s


class TorchAdamW(Rival):
    """torch.optim.AdamW(fused=True), on device steps."""

    def run(self, device):
        self.trifles(device, len(list(packed([1] * len(self.sizes), self.limits, 1))))  # step += 1
        self.stage(device, HEAVY, 4, (P | G | M | V, P | M | V))


class ApexLamb(Rival):
    """apex.optimizers.FusedLAMB, which leaves the update in the gradient's place."""

    words = 8  # the global norm's pass over g is part of what it is asked for

    def __init__(self, shapes, dtype, limits):
        if dtype != "fp32":
            raise ValueError(f"no model of apex's FusedLAMB in {dtype}: it takes fp32 (and fp16, not modelled)")
        super().__init__(shapes, dtype, SMALL)  # whatever CUDA it is built with

    def _norm(self, device, operand, per_tensor):
        self.trifles(device, 1 + per_tensor)  # zeros for the sums
        self.stage(device, FULL, 1, (operand, 0))
        self.trifles(device, 1)  # combines the blocks' sums

    def run(self, device):
        self.trifles(device, 2)
        self._norm(device, G, False)
        self.trifles(device, 3)  # the norm of both types' norms
        self._norm(device, P, True)
        self.stage(device, HEAVY, 4, (P | G | M | V, G | M | V))
        self._norm(device, G, True)
        self.stage(device, FULL, 2, (P | G, P))


RIVALS = {"torch.AdamW:fused": TorchAdamW, "apex.optimizers.FusedLAMB": ApexLamb}


def limits_of(cuda):
    """What one launch of torch holds, by the CUDA version torch was built with."""
    return LARGE if int(cuda.partition(".")[0]) >= 13 else SMALL
