"""Functions on several ranks: `run(function, 4, *args)` is the list of what `function(*args)` answered on each.

    def work(scale):                      # importable by name; inside, a gloo group of 4 is the default group
        return dist.get_rank() * scale
    assert run(work, 4, 2) == [0, 2, 4, 6]

Each call forks its processes from a server that has imported torch already: 0.3 s instead of 6, and nothing of one
test is left for the next. Nobody waits for ever: when a rank fails, or the time is over, the others are killed and
AssertionError says which rank raised what and where the hanging ones stood.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

IMPORTED = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.optim", "torch._dynamo",
            "torch._inductor", "torch._numpy", "torch.onnx", "layerfused", "conduct")  # fmt: skip
GRACE = 10  # seconds for the others to notice that a rank is gone


@cache
def context():
    """The fork server. It computes nothing: what is forked from it must find no threads but one."""
    found = torch.multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*IMPORTED])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return found


class Ranks:
    """Processes that run `function(*args)` as ranks 0 to world - 1 of one gloo group."""

    def __init__(self, function, world: int, *args):
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.processes = [
            context().Process(target=work, args=(rank, world, str(self.folder), function, args), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def join(self, timeout: float) -> list[bool]:
        """Waits for all, kills those that are left; whether each came to its end."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                self._kill_all()
            time.sleep(0.01)
        return [process.exitcode == 0 for process in self.processes]

    def _kill_all(self) -> None:
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            os.kill(process.pid, signal.SIGUSR1)  # leaves its stack
        time.sleep(0.5)
        for process in alive:
            process.kill()
            process.join()

    def results(self, timeout: float) -> list:
        ended = self.join(timeout)
        try:
            assert all(ended), self._stories([rank for rank in range(len(ended)) if not ended[rank]])
            return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(len(ended))]
        finally:
            self._folder.cleanup()

    def _stories(self, ranks: list[int]) -> str:
        """What became of ranks, the first to fail first: others only lost their connection to it."""
        files = sorted((self.folder / f"{rank}.txt" for rank in ranks), key=lambda file: file.stat().st_mtime)
        codes = [self.processes[int(file.stem)].exitcode for file in files]
        how = ["hung" if code == -signal.SIGKILL else f"ended with {code}" for code in codes]
        return "\n".join(f"rank {f.stem} {end}:\n{f.read_text()[-3000:]}" for f, end in zip(files, how, strict=True))


def run(function, world: int, *args, timeout: float = 60) -> list:
    """What `function(*args)` answered on each rank.

    Raises:
        AssertionError: if a rank raised or all were not done after `timeout` seconds.
    """
    return Ranks(function, world, *args).results(timeout)


def work(rank: int, world: int, folder: str, function, args: tuple) -> None:
    """One rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # they would bury the reason of a failure
    with open(f"{folder}/{rank}.txt", "w") as story:
        faulthandler.register(signal.SIGUSR1, file=story)
        try:
            store = dist.FileStore(f"{folder}/store", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
            torch.save(function(*args), f"{folder}/{rank}.pt")
            dist.barrier()  # who leaves early takes down the connections of those that still work
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=story)
            story.flush()
            os._exit(1)


def error_of(call) -> str:
    """What a call raises, as "ValueError: text"; "" if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Collectives(TorchDispatchMode):
    """Lists the collectives that start inside of it, under torch's own names."""

    NAMES = {"_allgather_base_": "all_gather", "allgather_": "all_gather", "allreduce_": "all_reduce",
             "all_gather_into_tensor": "all_gather", "all_gather_into_tensor_out": "all_gather"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")
        if name[0] in ("c10d", "_c10d_functional") and name[1] not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.seen.append(self.NAMES.get(name[1], name[1]))
        return func(*args, **(kwargs or {}))
