"""Parameters that are spread over ranks (DTensor): what of them lies here, and what that stands for."""

from collections import defaultdict
from functools import cache
from itertools import groupby

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._cpu import same
from .plan import Span, cut_rows
from .precision import place_of
from .table import whole_spans


def is_spread(tensor) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor is not imported for anybody who has none."""
    return is_traceable_wrapper_subclass(tensor) and isinstance(tensor, dtensor())


@cache
def dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


class Part:
    """What of a DTensor lies on this rank, as a plain tensor for the engines.

    Args:
        param: a parameter whose mesh this process is in.
        name: for errors.

    Attributes:
        number: of this part, among all different ones.
        here: a tensor over the parameter's own local memory, whose `grad` is set for the time of a step.
        states: the names of its elementwise states, which are spread as it is; the others are alike on all ranks.
        layers: the rule and how its group cuts and adapts layers, for comparing ranks.
        dims: the dimensions of the mesh over which the parameter is cut; `_StridedShard` cuts, though it is no `Shard`.

    Raises:
        ValueError: if this process is not in the mesh, or the parameter is a sum that is still to be taken.
    """

    def __init__(self, param: torch.Tensor, name: str):
        self.param, self.name = param, name
        self.mesh, self.placements = param.device_mesh, param.placements
        self.coordinate = self.mesh.get_coordinate()
        if self.coordinate is None:
            raise ValueError(
                f"rank {rank()}: parameter {name} lies on {self.mesh}, which this process is not in: "
                "give each rank's optimizer only parameters of its own meshes"
            )
        if any(placement.is_partial() for placement in self.placements):
            raise ValueError(f"rank {rank()}: parameter {name} is placed {self.placements}: redistribute it first")
        self.dims = tuple(k for k, placement in enumerate(self.placements) if not placement.is_replicate())
        self.local = param._local_tensor
        self.here, self.states, self.layers = self.local.detach(), (), ""
        self.number = 0  # among the parts of the parameter
        for k in self.dims:
            self.number = self.number * self.mesh.size(k) + self.coordinate[k]
        if hasattr(self.here, "grad_dtype"):  # gradients may be of another type than parameters
            self.here.grad_dtype = None

    def speaks(self, dims: tuple[int, ...]) -> bool:
        """Whether this rank's part counts among ranks along `dims`: of several that hold the same, the first."""
        return all(self.coordinate[k] == 0 for k in dims if k not in self.dims)

    def spans(self, number: int, layer) -> list[list[Span]]:
        """Per layer, the spans that lie here; a layer of which nothing does still has one, so that ranks agree."""
        sizes = cut_rows(self.param.shape, layer)
        if len(sizes) == 1:
            return [[Span(number, 0, self.here.numel(), sizes[0])]]
        ids = self._rows()
        row, found, last = self.here.numel() // max(len(ids), 1), [[] for _ in sizes], 0
        ends = torch.tensor(sizes).cumsum(0) // (self.param.numel() // self.param.shape[0] or 1)
        owners = torch.searchsorted(ends, torch.tensor(ids), right=True).tolist()
        for owner, run in groupby(enumerate(owners), key=lambda pair: pair[1]):
            first, *_ = run = [index for index, _ in run]
            found[owner].append(Span(number, first * row, len(run) * row, len(run) * row))
        for spans, size in zip(found, sizes, strict=True):
            spans[:1] = [self._standing(spans, number, last, size)]
            last = spans[-1].start + spans[-1].count
        return found

    @staticmethod
    def _standing(spans: list[Span], number: int, last: int, size: int) -> Span:
        """The first span, which stands for what of its layer is elsewhere."""
        first = spans[0] if spans else Span(number, last, 0, 0)
        return first._replace(elements=size - sum(span.count for span in spans[1:]))

    def _rows(self) -> list[int]:
        """The numbers, in the whole parameter, of the rows of dimension 0 that lie here."""
        ids = torch.arange(self.param.shape[0])
        for k in self.dims:
            placement = self.placements[k]
            if placement.dim == 0:
                pieces, _ = placement._split_tensor(ids, self.mesh.size(k), with_padding=False, contiguous=True)
                ids = pieces[self.coordinate[k]]
        if len(ids) != self.here.shape[0]:
            raise ValueError(
                f"rank {rank()}: parameter {self.name} has {self.here.shape[0]} rows here where {self.placements} "
                f"gives {len(ids)}: use layer='tensor' for it"
            )
        return ids.tolist()

    # States

    def take(self, state: torch.Tensor) -> torch.Tensor:
        """What of an elementwise state lies here.

        Args:
            state: a DTensor of the same mesh, or a plain tensor of the whole parameter's shape, alike on all ranks.
        """
        if not is_spread(state):
            from torch.distributed.tensor import distribute_tensor

            state = distribute_tensor(state, self.mesh, self.placements, src_data_rank=None)
        if state.device_mesh != self.mesh:
            raise ValueError(
                f"rank {rank()}: a state of parameter {self.name} lies on {state.device_mesh}, the parameter on "
                f"{self.mesh}: load it with torch.distributed.checkpoint"
            )
        if state.placements != self.placements:
            state = state.redistribute(placements=self.placements)
        return state._local_tensor

    def spread(self, here: torch.Tensor) -> torch.Tensor:
        """A DTensor of which `here` is this rank's part, placed as the parameter is."""
        shape, stride = self.param.shape, self.param.stride()
        return dtensor().from_local(here, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)


class Parts:
    """All parameters of an optimizer, with a `Part` for each that is spread.

    Args:
        params: in the optimizer's order.
        names: of the parameters.
    """

    def __init__(self, params: list[torch.Tensor], names: list[str]):
        spread = [(p, name) for p, name in zip(params, names, strict=True) if is_spread(p)]
        self.of = {p: Part(p, name) for p, name in spread}
        self.owner = {part.here: p for p, part in self.of.items()}
        self.numbers = {self.here(p): number for number, p in enumerate(params)}
        self._watched, self._known = [], []
        self.meshes = {}  # mesh -> its dimensions along which some parameter is cut
        for part in self.of.values():
            self.meshes[part.mesh] = tuple(sorted({*self.meshes.get(part.mesh, ()), *part.dims}))

    def here(self, p: torch.Tensor) -> torch.Tensor:
        """The tensor that engines see."""
        return self.of[p].here if p in self.of else p

    def param(self, here: torch.Tensor) -> torch.Tensor:
        """The parameter behind what engines see."""
        return self.owner.get(here, here)

    def share(self, p: torch.Tensor) -> tuple | None:
        """What is alike in one launch: the mesh, and whether this rank's part counts there; None for a whole one."""
        part = self.of.get(p)
        return (part.mesh, part.speaks(self.meshes[part.mesh])) if part and part.dims else None

    def differ(self, params: list[torch.Tensor]) -> bool:
        """Whether parameters are cut along other dimensions or meshes; every rank answers the same."""
        parts = [self.of.get(p) for p in params]
        return len({(part.mesh, part.dims) if part and part.dims else None for part in parts}) > 1

    def spans(self, number: int, here: torch.Tensor, layer) -> list[list[Span]]:
        """As `whole_spans`, of what lies here."""
        part = self.of.get(self.owner.get(here))
        return part.spans(number, layer) if part else whole_spans(number, here, layer)

    def place(self, here: torch.Tensor) -> int:
        """Where the noise for what lies here comes from: replicas of a part draw the same."""
        part = self.of.get(self.owner.get(here))
        return place_of(self.numbers[here], part.number if part else 0)

    def told(self, mesh) -> list[str]:
        """A line for each parameter on a mesh, of all in which ranks have to agree."""
        return [
            f"{part.name} of shape {tuple(p.shape)}, {p.dtype}, {part.placements}, {part.layers}"
            for p, part in self.of.items()
            if part.mesh == mesh
        ]

    def taken(self, entries: dict) -> dict:
        """States by what engines see; of a spread parameter those that lie here, in a dict of their own."""
        found = {}
        for p, own in entries.items():
            part = self.of.get(p)
            here = {} if part is None else {name: part.take(own[name]) for name in part.states if name in own}
            found[self.here(p)] = own if part is None else {**own, **here}
        return found

    def put(self, taken: dict, entries: dict) -> None:
        """Brings what `taken` gave, and what has been added to it, back into the entries of spread parameters."""
        for p, part in self.of.items():
            own = entries[p]
            for name, value in taken[part.here].items():
                old = own.get(name)
                if name not in part.states:
                    own[name] = value
                elif not is_spread(old) or old._local_tensor is not value:
                    own[name] = part.spread(value)

    def watch(self, state: dict) -> None:
        """Remembers the states of spread parameters, of which engines see their own dicts only."""
        self._watched = [(state[p], name) for p in self.of for name in state[p]]
        self._known = [own[name] for own, name in self._watched]

    def read(self) -> None:
        """Shows engines the gradients, placed as their parameters are.

        Raises:
            TypeError, ValueError: for a gradient that is a plain tensor, or lies on another mesh.
        """
        waiting = []
        for p, part in self.of.items():
            g = p.grad
            if g is None:
                part.here.grad = None
            elif not isinstance(g, dtensor()):
                raise TypeError(
                    f"rank {rank()}: the gradient of parameter {part.name} is a plain tensor, the parameter a DTensor: "
                    "give it a DTensor of the same mesh and placements"
                )
            elif g._spec.mesh is not part.mesh and g._spec.mesh != part.mesh:
                raise ValueError(
                    f"rank {rank()}: the gradient of parameter {part.name} lies on {g._spec.mesh}, the parameter on "
                    f"{part.mesh}: give it a DTensor of the same mesh"
                )
            elif g._spec.placements == part.placements:
                part.here.grad = plain(g._local_tensor)
            else:
                waiting.append((part, g))
        for (part, _), local in zip(waiting, settled(waiting), strict=True):
            part.here.grad = local

    def versions(self, written: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors whose versions are to be counted: the parameters themselves, too, for autograd keeps those."""
        return written if not self.of else [*written, *(self.owner[here] for here in written if here in self.owner)]

    def release(self) -> None:
        """Lets go of the gradients."""
        for part in self.of.values():
            part.here.grad = None

    def changed(self) -> bool:
        """Whether a spread parameter's memory or states are not what they were."""
        if not self.of:
            return False
        locals_ = [p._local_tensor for p in self.of]
        return (
            not same([own.get(name) for own, name in self._watched], self._known)
            or not same(locals_, [part.local for part in self.of.values()])
            or list(map(torch.Tensor.data_ptr, locals_)) != list(map(torch.Tensor.data_ptr, self.owner))
        )


def plain(local: torch.Tensor) -> torch.Tensor:
    """The tensor itself, where a collective that makes it may still be under way."""
    return local if type(local) is torch.Tensor else local.wait()


def settled(waiting: list[tuple]) -> list[torch.Tensor]:
    """What lies here of gradients when they are placed as their parameters are.

    Sums and means that are still to be taken, over a dimension of the mesh along which the parameter is whole, are
    taken together: a collective for each dimension, kind and type. Other changes of place are torch's own, one by one.
    """
    found, packed = [None] * len(waiting), defaultdict(list)
    for number, (part, g) in enumerate(waiting):
        changes = [k for k, (a, b) in enumerate(zip(g.placements, part.placements, strict=True)) if a != b]
        if not all(sums_up(g.placements[k]) and part.placements[k].is_replicate() for k in changes):
            found[number] = plain(g.redistribute(part.mesh, part.placements)._local_tensor)
            continue
        found[number] = plain(g._local_tensor)
        for k in changes:
            packed[part.mesh, k, g.placements[k].is_partial("avg"), g.dtype].append(number)
    for (mesh, k, mean, _), numbers in packed.items():
        flat = torch.cat([found[number].reshape(-1) for number in numbers])
        dist.all_reduce(flat, group=mesh.get_group(k))
        if mean:
            flat /= mesh.size(k)
        for number, total in zip(numbers, flat.split([found[number].numel() for number in numbers]), strict=True):
            found[number] = total.view(found[number].shape)
    return found


def sums_up(placement) -> bool:
    """Whether a gradient placed so is a sum, or a mean, over what lies on the ranks."""
    return placement.is_partial("sum") or placement.is_partial("avg")


def rank() -> int:
    return dist.get_rank()
