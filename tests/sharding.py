"""What the tests of sharded parameters share: ways to lay tensors over ranks, and what is compared.

A test is a scenario(laid): it makes parameters and gradients of `laid(whole tensors)`, steps, and answers `told(...)`.
On ranks `laid` is `over(layout)`; in one process, where it says what is right, it is `plain`.

LAYOUTS  names of ways in which 4 ranks share a tensor; FLAT those that serve any number of ranks
"""

from functools import cache

import torch
from conduct import same_bits
from torch import nn

import layerfused as lf

SHAPES = ((7, 5), (5,), (), (4, 3, 2, 2), (2, 3), (0, 3), (1,))  # over 4 ranks: uneven, empty on some or on all
FLAT = ("rows", "columns", "copied", "mixed")
LAYOUTS = (*FLAT, "hybrid", "row-parallel", "nested", "column-parallel")


@cache
def mesh(*shape):
    return torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[2 - len(shape) :])


def place(tensor, device_mesh, *dims):
    """A DTensor, sharded in one dimension per dimension of the mesh; None, or one that it has not: replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate() if dim is None or dim >= tensor.ndim else Shard(dim) for dim in dims]
    return distribute_tensor(tensor, device_mesh, placements, src_data_rank=None)  # every rank has it already


@cache
def column_parallel_rows(rows):
    """The numbers of the rows that lie here, as ColwiseParallel and then FSDP leave it, and their placements."""
    from torch.distributed.fsdp import fully_shard

    holder = nn.Module()
    holder.p = nn.Parameter(place(torch.arange(float(rows)), mesh(2, 2)["inner"], 0))
    numbers = fully_shard(holder, mesh=mesh(2, 2)["outer"]).p.detach()
    return numbers.to_local().long(), numbers.placements


def column_parallel(tensor):
    """Rows that are neighbours on a rank are none in the whole."""
    from torch.distributed.tensor import DTensor

    if tensor.ndim == 0:
        return place(tensor, mesh(2, 2), None, None)
    rows, placements = column_parallel_rows(tensor.shape[0])
    size = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(tensor[rows], mesh(2, 2), placements, run_check=False, **size)


def lay(tensor, layout, number):
    if layout == "mixed":
        layout = ("rows", "plain", "copied", "columns")[number % 4]
    if tensor is None or layout == "plain":
        return tensor
    if layout == "column-parallel":
        return column_parallel(tensor)
    if layout in FLAT:
        dim = {"rows": 0, "columns": min(1, max(tensor.ndim - 1, 0)), "copied": None}[layout]
        return place(tensor, mesh(torch.distributed.get_world_size()), dim)
    return place(tensor, mesh(2, 2), *{"hybrid": (None, 0), "row-parallel": (0, 1), "nested": (0, 0)}[layout])


def over(layout):
    return lambda tensors: [lay(tensor, layout, number) for number, tensor in enumerate(tensors)]


def plain(tensors):
    return list(tensors)


def whole(x):
    """A copy of the full tensor, as every rank sees it."""
    x = x.int() if x.dtype == torch.int16 else x  # which gloo and NCCL do not gather
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def tensors(seed=0, shapes=SHAPES, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def steps_of(shapes=SHAPES, steps=5, dtype=torch.float32):
    """Whole gradients, step by step."""
    return [tensors(seed, shapes, dtype) for seed in range(1, 1 + steps)]


def parameters(laid, given):
    return [nn.Parameter(p) for p in laid([p.clone() for p in given])]


def train(opt, params, gradients, laid):
    """A step per list of whole gradients; None is a missing one."""
    for step in gradients:
        for p, g in zip(params, laid(step), strict=True):
            p.grad = g
        opt.step()


def make(case, params, **more):
    return getattr(lf, case.cls)(params, **{**case.kwargs, **more})


def told(opt, params):
    """What a test compares."""
    return {
        "params": [whole(p) for p in params],
        "states": [{name: whole(x) for name, x in opt.state.get(p, {}).items()} for p in params],
        "stats": opt.layer_stats(),
        "grad_norm": float(opt.grad_norm),
        "skipped": int(opt.skipped_steps),
        "laid": all(laid_like(p, opt.state.get(p, {})) for p in params),
    }


def laid_like(p, state):
    """Elementwise states are spread like their parameter; steps and layer scalars lie on every rank."""
    if not hasattr(p, "placements"):
        return not any(hasattr(x, "placements") for x in state.values())
    spread = {name: x for name, x in state.items() if hasattr(x, "placements")}
    alike = all((x.device_mesh, x.placements) == (p.device_mesh, p.placements) for x in spread.values())
    return alike and all(x.dtype == torch.float64 for name, x in state.items() if name not in {*spread, "step"})


def ranks_agree(found):
    """Every rank answered the same bits. Copies of a shard in several places are seen as different wholes."""
    own = found[0]
    for other in found[1:]:
        for p, q in zip(own["params"], other["params"], strict=True):
            assert same_bits(p, q)
        for mine, theirs in zip(own["states"], other["states"], strict=True):
            assert mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)
        for name in ("stats", "grad_norm", "skipped"):
            assert repr(own[name]) == repr(other[name])  # as texts, which are exact: NaN is not itself


def assert_whole(found, want, start, way=1e-6):
    """1e-6 of the way gone, given the same gradients: sums are taken in another order, in double, so that a float32
    that comes of them moves by one ulp at most, 6e-8, and most often not at all. States and stats as closely."""
    assert found["laid"]
    for p, q, before in zip(found["params"], want["params"], start, strict=True):
        assert p.dtype == q.dtype and (p.double() - q.double()).norm() <= way * (q.double() - before.double()).norm()
    for own, wanted in zip(found["states"], want["states"], strict=True):
        assert own.keys() == wanted.keys()
        for name in own:
            x, y = own[name].double(), wanted[name].double()
            assert x.shape == y.shape and (x - y).norm() <= way * y.norm(), name
    assert found["stats"].keys() == want["stats"].keys() and found["skipped"] == want["skipped"]
    torch.testing.assert_close(found["stats"], want["stats"], rtol=way, atol=1e-12)
    torch.testing.assert_close(found["grad_norm"], want["grad_norm"], rtol=way, atol=0, equal_nan=True)
