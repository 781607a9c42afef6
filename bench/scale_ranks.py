"""What `scale` measures: one step of sharded parameters on a few ranks of this machine, over gloo.

Every process has one thread. Contenders take turns, and a barrier stands before each turn.
"""

import json
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing

import layerfused as lf
from layerfused.exchange import gathered

from . import machine, timing
from . import shapes as models
from .contender import with_gradient

STEP, LOCAL, GATHER, NORMS = "step", "local step", "all-gather", "norms one by one (re-creation)"


class Case(NamedTuple):
    """What one row is of.

    Attributes:
        shapes: of the whole parameters; dimension 0 is divided over the ranks.
        grouped: each tensor in a param_group of its own.
        norms: let the re-creation of what others do take part.
    """

    name: str
    shapes: list[tuple]
    grouped: bool = False
    norms: bool = True


def spread(shape, mesh, generator):
    """A DTensor as FSDP cuts it, of random numbers, with a random gradient."""
    from torch.distributed.tensor import DTensor, Shard

    rows = -(-shape[0] // mesh.size())
    here = max(0, min(rows, shape[0] - rows * mesh.get_local_rank()))
    stride = torch.empty(shape, device="meta").stride()
    local = (torch.randn(here, *shape[1:], generator=generator) for _ in range(2))
    whole = (DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride) for x in local)
    return with_gradient(*whole)


def optimizer(params, case):
    groups = [{"params": [p]} for p in params] if case.grouped else params
    return lf.LAMB(groups, max_grad_norm=None)


@torch.no_grad()
def norms_one_by_one(pairs):
    """Two norms of each tensor as DTensor takes them: an all-reduce of one number for each.

    A re-creation of the least that an optimizer does which is written tensor by tensor and knows nothing of ranks.
    """
    for pair in pairs:
        for x in pair:
            torch.linalg.vector_norm(x).full_tensor()


def contenders(case, mesh):
    """Calls by name, and the bytes of the packed block on each rank."""
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    params = [spread(shape, mesh, generator) for shape in case.shapes]
    opt = optimizer(params, case)
    (exchange,) = opt._exchanges
    block = torch.zeros(exchange.size, dtype=torch.float64)
    here = [with_gradient(p.detach().to_local(), p.grad.to_local()) for p in params]
    calls = {STEP: opt.step, LOCAL: optimizer(here, case).step, GATHER: partial(gathered, block, exchange.group)}
    if case.norms:
        calls[NORMS] = partial(norms_one_by_one, [(p.detach(), p.grad) for p in params])
    return calls, block.nbytes


def collectives(call):
    """How many collectives one call makes, as torch sees them."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as seen:
        call()
    return seen.get_total_counts()


def clock(call):
    """Seconds of one call: on the wall, and of this thread on a processor."""
    dist.barrier()
    wall, host = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - wall, time.thread_time() - host


def agreed_rounds(calls, repeats, seconds):
    """As many rounds on all ranks: `repeats` at least, more where rank 0 finds them short."""
    start = time.perf_counter()
    for call in calls:
        clock(call)
    took = torch.tensor(time.perf_counter() - start)
    dist.broadcast(took, 0)
    return max(repeats, int(seconds / float(took)))


def from_all(value):
    """Everybody's value, in the order of ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measured(case, mesh, repeats, seconds):
    """One case's row; the same on all ranks."""
    calls, block = contenders(case, mesh)
    counts = [collectives(call) for call in calls.values()]  # it warms them up, too
    rounds = agreed_rounds(calls.values(), repeats, seconds)
    load = machine.OtherLoad()
    taken = timing.interleave(list(calls.values()), rounds, 0, clock)  # no deadline: each rank has a clock of its own
    busy, own = load.cpus(), (time.process_time() - load.own) / (time.perf_counter() - load.wall)
    wall, host = torch.tensor(from_all(taken), dtype=torch.float64).unbind(-1)  # ranks, contenders, rounds
    ours = sum(from_all(own)) - own
    lines = [
        {"contender": name, "collectives": count}
        | timing.summary(slowest.tolist())
        | {"host_ms": 1e3 * float(times.median(-1).values.max())}
        for name, count, slowest, times in zip(calls, counts, wall.amax(0), host.unbind(1), strict=True)
    ]
    facts = {"case": case.name, "ranks": mesh.size(), "tensors": len(case.shapes)}
    facts |= {"groups": len(case.shapes) if case.grouped else 1, "elements": models.elements(named(case.shapes))}
    facts |= {"block_bytes": block, "others_cpus": None if busy is None else max(0.0, busy - ours)}
    medians = {line["contender"]: line["median_ms"] for line in lines}
    return facts | {"ratio": (medians[STEP] - medians[GATHER]) / medians[LOCAL], "contenders": lines}


def named(shapes):
    return [("", shape) for shape in shapes]


def work(rank, ranks, folder, cases, repeats, seconds, limit):
    """One rank's life; rank 0 writes each row down when it has it."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    place, wait = f"file://{folder}/store", timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks, timeout=wait)
    mesh, rows = init_device_mesh("cpu", (ranks,)), []
    for case in cases:
        rows.append(measured(case, mesh, repeats, seconds))
        if rank == 0:
            Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def launched(ranks, cases, repeats, seconds, limit):
    """Rows of all cases on so many ranks, and why some are missing, or "".

    Args:
        limit: seconds after which all processes are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ranks, folder, cases, repeats, seconds, limit
        started = multiprocessing.start_processes(work, arguments, ranks, join=False, start_method="spawn")
        reason = waited(started, limit)
        path = Path(folder, "rows.json")
        rows = json.loads(path.read_text()) if path.exists() else []
    return rows, reason


def waited(started, limit):
    """Waits for processes, at most `limit` seconds; none is left alive. Returns what went wrong, or ""."""
    deadline = time.monotonic() + limit
    try:
        while not started.join(max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                return f"not done after {limit:g} s; raise --limit"
        return ""
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        return str(error).strip().splitlines()[-1]
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
            process.join()
