"""Our CUDA engine for the simulation: the real plan over a model's shapes, as jobs of one launch."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from layerfused.forms import needs_of
from layerfused.plan import Kind, make_plan
from layerfused.table import Table
from layerfused.traffic import merged, sweeps, traffic

from . import shapes as models
from . import spec as specs
from .contender import DTYPES
from .simulation import Gate, Job, Kernel, sweep_of

FINISH_S = 1e-6  # [estimate] combining partials and `finish` in double: barriers, a root, two divisions, one store
BARRIERS_S = 0.1e-6  # [estimate] of an item, beside what it reads first
TREE_S = 0.2e-6  # [estimate] a block's lanes to one partial: shuffles and barriers in double


class Settings(NamedTuple):
    """The engine's constants: layerfused/cuda.py and csrc/cuda/launch.h have the same, which a test holds them to.

    Attributes:
        resident: layers that are not `whole` and have up to so many elements stay on chip, each chunk with a block of
            its own, as a cluster could hold them; the engine has nothing of the kind.
    """

    chunk: int = 4096
    whole: int = 1024
    ahead: int = 1 << 20
    blocks: int = 4
    threads: int = 256
    resident: int = 0


@dataclass(frozen=True)
class Case:
    """One of our optimizers over one list of shapes; its tensors have no memory."""

    opt: torch.optim.Optimizer

    @classmethod
    def of(cls, shapes, text, dtype):
        """The optimizer of this spec over these shapes.

        Raises:
            ValueError: for shapes or an optimizer that there is no model of.
        """
        spec = specs.parse(text)
        params = [torch.empty(shape, device="meta", dtype=DTYPES[dtype]) for _, shape in models.load(shapes)]
        opt = specs.build(spec, [torch.nn.Parameter(p) for p in params])
        if spec.clip or not hasattr(opt, "rule_of") or needs_of(opt.rule_of(opt.param_groups[0])) is None:
            raise ValueError(f"no model of {text!r}: it must be layerfused's own, without clip+")
        return cls(opt)

    @cached_property
    def table(self):
        (group,) = self.opt.param_groups
        return Table(self.opt.rule_of(group), [group], [group["params"]])

    @cached_property
    def norm(self):
        """Whether the gradients are read once more for their global norm."""
        return self.opt.defaults["max_grad_norm"] is not None

    @cached_property
    def widths(self):
        """Per parameter, bytes an element of p, g, m and v."""
        return self.table.operand_bytes(self.opt.state)

    @cached_property
    def elements(self):
        return sum(p.numel() for p in self.table.params)

    def bytes(self, settings):
        """Compulsory and requested bytes, by the package's own count."""
        return traffic(self.table, self.opt.state, self.norm, min(settings.whole, settings.chunk))


class Work:
    """A case's plan as jobs, for one choice of settings."""

    def __init__(self, case, settings, gpu):
        self.case, self.settings, self.gpu = case, settings, gpu
        table = case.table
        constants = {"chunk": settings.chunk, "whole": settings.whole, "ahead": settings.ahead}
        self.plan = make_plan(table.layers, **constants, norm=case.norm)
        self.needs, self._sweeps = needs_of(table.rule), {}
        # item, chunk and layer rows are reads that wait for each other; the ticket was drawn ahead
        item, arrive = 3 * gpu.l2_s + BARRIERS_S, TREE_S + 2 * gpu.atomic_s  # a fence, then the atomic
        self.kernel = Kernel(4 * settings.threads, settings.blocks, item, arrive)
        self.resident = {k for k, layer in enumerate(self.plan.layers) if self._is_resident(layer)}
        self.tiles = [0]
        for chunk in self.plan.chunks:
            self.tiles.append(self.tiles[-1] - chunk.count // -self.kernel.tile)

    def _is_resident(self, layer):
        return layer.adapt and layer.elements <= self.settings.resident

    def run(self, device):
        """The launch on a simulated device."""
        device.launch(self.kernel, self.jobs(), self.gates())

    def gates(self):
        """One per layer and the last for the global norm."""
        layers = [layer.chunks for layer in self.plan.layers]
        look = 2 * self.gpu.l2_s  # the flag, then the layer's scalars
        gates = [Gate(chunks, self._combining(chunks), look) for chunks in layers]
        return [*gates, Gate(len(self.plan.chunks), self._combining(len(self.plan.chunks)))]

    def _combining(self, chunks):
        return FINISH_S - chunks // -self.settings.threads * self.gpu.l2_s

    def jobs(self):
        return [job for job in map(self._job, self.plan.items) if job is not None]

    def _job(self, item):
        kind = item.kind
        number = self.plan.layers[item.index].first if kind == Kind.WHOLE else item.index
        chunk = self.plan.chunks[number]
        if kind in (Kind.REDUCE, Kind.APPLY) and chunk.layer in self.resident:
            if kind == Kind.APPLY:
                return None  # its `reduce` has done it
            kind = "resident"
        return Job(self.tiles[number], chunk.count, self._sweeps_of(kind, chunk), *self._gates_of(kind, chunk))

    def _gates_of(self, kind, chunk):
        """Numbers of the gates that a job waits for and arrives at, or None."""
        norm = len(self.plan.layers)
        begins = norm if self.case.norm else None
        if kind == Kind.NORM:
            return None, norm
        if kind != Kind.APPLY:
            return begins, chunk.layer
        return (chunk.layer if self.case.table.layers[chunk.layer].stats else begins), None

    def _sweeps_of(self, kind, chunk):
        spec = self.case.table.layers[chunk.layer]
        key = kind, spec.group, spec.stats, self.case.widths[chunk.tensor]
        if key not in self._sweeps:
            self._sweeps[key] = self._made(kind, spec, key[-1])
        return self._sweeps[key]

    def _made(self, kind, spec, widths):
        """What is not read again in this launch is marked as the first to leave L2."""
        masks = sweeps(self.needs, self.case.table.groups[spec.group], spec.stats)
        once = merged(masks)
        if kind == Kind.NORM:
            return (sweep_of((2, 0), widths, kept=2, wide=4),)
        if kind == Kind.REDUCE:
            return (sweep_of(masks[0], widths, masks[1][0] | masks[1][1], wide(masks[0])),)
        if kind == Kind.APPLY:
            return (sweep_of(masks[-1], widths, wide=wide(masks[-1])),)
        if kind == "resident":
            return (sweep_of((once[0], 0), widths), sweep_of((0, once[1]), widths))
        return (sweep_of(once, widths, wide=wide(once)),)


def wide(masks):
    """Tiles that a sweep asks for at once: as csrc/cuda/tile.h, two of a single operand."""
    return 2 if masks[0].bit_count() == 1 else 1
