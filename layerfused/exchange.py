"""What ranks tell each other: stats of layers that lie on several of them, norms, and what their optimizers hold."""

import hashlib
from itertools import accumulate, zip_longest

import torch
import torch.distributed as dist

from .forms import needs_of

MANY = 64  # ranks; with more, gathering everybody's rows costs more than reducing them by an order of the library's own
_groups = {}  # world, ranks -> process group, of those that no mesh has


def group_over(mesh, dims: tuple[int, ...]):
    """The process group of the ranks that differ from this one along `dims` of a mesh alone."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    place = tuple(slice(None) if k in dims else at for k, at in enumerate(mesh.get_coordinate()))
    ranks = tuple(mesh.mesh[place].flatten().tolist())
    if sorted(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    key = dist.group.WORLD, ranks  # a world that was destroyed and made anew has other groups
    if key not in _groups:
        _groups[key] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _groups[key]


def group_device(group) -> torch.device:
    """Where tensors for a group's collectives lie."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def gathered(values: torch.Tensor, group) -> torch.Tensor:
    """Everybody's values, a row for each rank in the order of the group."""
    ranks = dist.get_world_size(group)
    rows = values.new_empty(ranks * values.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(rows, values, group=group)
    return rows.view(ranks, -1)


def added(rows: torch.Tensor) -> torch.Tensor:
    """The sum of rows by halves: the same bits on every rank, whatever computes it."""
    while len(rows) > 1:
        half = (len(rows) + 1) // 2
        rows = torch.cat([rows[: len(rows) - half] + rows[half:], rows[len(rows) - half : half]])
    return rows[0]


def summed(values: torch.Tensor, group) -> torch.Tensor:
    """The sum of everybody's values, the same bits on every rank."""
    if dist.get_world_size(group) <= MANY:
        return added(gathered(values, group))
    dist.all_reduce(values, group=group)
    return values


class Exchange:
    """One collective a step for all layers that are spread over one mesh, and one for their share of a norm.

    Args:
        mesh, dims: along which dimensions of which mesh some parameter is cut.
        shares: (launch, whether its stats count on this rank) for each launch of these parameters.
        order: the optimizer's number of each tensor that engines see: ranks may have different launches, not orders.
    """

    def __init__(self, mesh, dims: tuple[int, ...], shares: list[tuple], order: dict):
        self.mesh, self.dims, self.launches = mesh, dims, [launch for launch, _ in shares]
        self.group, self.device = group_over(mesh, dims), torch.device(mesh.device_type)
        self._speaking = [launch for launch, speaks in shares if speaks]
        self._places = self._find_places(order)

    def _find_places(self, order: dict) -> list[tuple]:
        """Of each launch, where its stats stand in its own memory, and where in the block: sums, then minima."""
        rows = []
        for launch in self.launches:
            for number, spec in enumerate(launch.table.layers):
                if spec.stats:
                    rows.append((order[launch.table.params[spec.spans[0].tensor]], number, launch))
        rows.sort(key=lambda row: row[:2])
        needs = [needs_of(launch.table.rule) for *_, launch in rows]
        sums = list(accumulate((n.sums for n in needs), initial=0))
        minima = list(accumulate((n.minima for n in needs), initial=sums[-1]))
        self.sums, self.size = sums[-1], minima[-1]
        found = {id(launch): ([], []) for launch in self.launches}
        for (_, number, launch), need, sum_at, least_at in zip(rows, needs, sums, minima, strict=False):
            own, block = found[id(launch)]
            own += range(number * need.terms, (number + 1) * need.terms)
            block += [*range(sum_at, sum_at + need.sums), *range(least_at, least_at + need.minima)]
        return [self._indices(launch, *found[id(launch)]) for launch in self.launches]

    def _indices(self, launch, own: list[int], block: list[int]) -> tuple:
        indices = ((own, launch.table.step.device), (block, self.device))  # int64 where there are none, too
        return launch, *(torch.tensor(numbers, dtype=torch.int64, device=device) for numbers, device in indices)

    def run(self) -> None:
        """Puts the stats over all ranks in the place of those over this rank's elements."""
        block = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        block[self.sums :] = float("inf")  # nobody's minimum
        for launch, own, at in self._places:
            if launch in self._speaking:
                block[at] = launch.stats.view(-1)[own].to(self.device)
        total = self._combined(block)
        for launch, own, at in self._places:
            launch.stats.view(-1)[own] = total[at].to(launch.stats.device)

    def _combined(self, block: torch.Tensor) -> torch.Tensor:
        if dist.get_world_size(self.group) <= MANY:
            rows = gathered(block, self.group)
            return torch.cat([added(rows[:, : self.sums]), rows[:, self.sums :].amin(0)])
        dist.all_reduce(block[: self.sums], group=self.group)
        if self.size > self.sums:
            dist.all_reduce(block[self.sums :], dist.ReduceOp.MIN, group=self.group)
        return block

    def squared_norm(self) -> torch.Tensor:
        """The square of the norm of all gradients that are spread over the mesh, from the launches' norms here."""
        own = torch.zeros(1, dtype=torch.float64, device=self.device)
        for launch in self._speaking:
            own += launch.norm.to(self.device) ** 2
        return summed(own, self.group)[0]


def agree(mesh, told: list[str]) -> None:
    """Ranks compare what their optimizers hold on a mesh, by a hash; two small collectives per dimension at worst.

    Args:
        told: a line for each parameter, of all in which ranks have to agree.

    Raises:
        ValueError: on all ranks of the mesh, naming the first difference, two ranks and the remedy.
    """
    digest = int.from_bytes(hashlib.sha256("\n".join(told).encode()).digest()[:8], "little", signed=True)
    differ = False
    for k in range(mesh.ndim):  # along each dimension in turn, so that at the end all have heard of all
        rows = gathered(torch.tensor([digest, differ], device=mesh.device_type), mesh.get_group(k))
        differ = bool((rows != torch.tensor([digest, 0], device=rows.device)).any())
    if not differ:
        return
    everybody = [(dist.get_rank(), told)]
    for k in range(mesh.ndim):
        lists = [None] * mesh.size(k)
        dist.all_gather_object(lists, everybody, group=mesh.get_group(k))
        everybody = [one for part in lists for one in part]
    (first, lines), (other, others) = next(
        (everybody[0], one) for one in everybody if one[1] != everybody[0][1]
    )  # fmt: skip
    mine, theirs = next(pair for pair in zip_longest(lines, others, fillvalue="nothing") if pair[0] != pair[1])
    raise ValueError(
        f"ranks differ in what their optimizers hold: rank {first} has {mine} where rank {other} has {theirs}; "
        "build the optimizer from the same parameters in the same order and groups on all ranks"
    )
