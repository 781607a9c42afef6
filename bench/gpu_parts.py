"""The kinds of parts of `python -m bench gpu`: how each is called, and how its outcome is read."""

import csv
import io
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from . import shapes as models

ROOT = Path(__file__).parent.parent
SCRATCH = Path("build/gpu")  # what the benches write; seen from the root, so that no result holds a longer path
PASSED, FAILED, STOPPED, SKIPPED, LEFT = "passed", "failed", "timed out", "skipped", "left"
RIVALS = ("torch.AdamW:fused", "torch.AdamW:foreach")
METRICS = {
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "seconds": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
}
SECONDS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1, "s": 1}
FORBIDDEN = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Device not supported")  # of the machine, not of what is tested


class Outcome(NamedTuple):
    """How a command ended: its exit status, None where it was stopped, and what it has printed."""

    status: int | None
    output: str


@dataclass(frozen=True)
class Part:
    """One command and how to read its outcome.

    Attributes:
        seconds: about what it takes; with fewer left it is not begun.
        limit: seconds after which it is stopped.
        missing: why it cannot run here; "" if it can.
    """

    name: str
    command: tuple[str, ...] = ()
    seconds: float = 10
    limit: float = 60
    missing: str = ""
    env: dict = field(default_factory=dict)

    def words(self, limit):
        """The command, for a run of at most so many seconds."""
        return self.command

    def judge(self, outcome):
        """State and reason of an outcome."""
        if outcome.status is None:
            return STOPPED, ""
        return (PASSED, "") if outcome.status == 0 else (FAILED, f"exit status {outcome.status}: {last(outcome)}")

    def keep(self, outcome, document, folder):
        """Puts what was measured into the document or the folder."""

    def halves(self):
        """Smaller parts to try where this one failed."""
        return ()


class Tests(Part):
    """What ends with a line that says how much has passed: pytest above all."""

    def judge(self, outcome):
        state, reason = super().judge(outcome)
        told = [line for line in outcome.output.splitlines() if line.startswith(("SKIPPED", "FAILED", "ERROR"))]
        nothing_ran = outcome.status == 5
        return SKIPPED if nothing_ran else state, "; ".join([*told, reason or last(outcome)])


class Sanitizer(Tests):
    def judge(self, outcome):
        reason = forbidden(outcome)
        return (SKIPPED, reason) if reason else super().judge(outcome)


class Counters(Part):
    """One step under ncu; the command ends with the shapes and the optimizer."""

    def judge(self, outcome):
        if forbidden(outcome):
            return SKIPPED, forbidden(outcome)
        if outcome.status == 0 and not counters(outcome.output):
            return FAILED, "ncu has seen no kernel"
        return super().judge(outcome)

    def keep(self, outcome, document, folder):
        shapes, optimizer = self.command[-2:]
        elements = models.elements(models.load(shapes))
        for kernel in counters(outcome.output):
            words = [kernel[key] / 4 / elements for key in ("dram_read_bytes", "dram_written_bytes") if key in kernel]
            row = {"part": self.name, "shapes": shapes, "optimizer": optimizer, "dtype": "fp32"}
            document["counters"].append(row | kernel | {"dram_words_per_element": sum(words)})


@dataclass(frozen=True)
class Rows(Part):
    """A run of `bench step` over one list of shapes."""

    shapes: str = ""
    dtype: str = "fp32"
    optimizers: tuple[str, ...] = ()

    @property
    def json(self):
        return SCRATCH / f"{self.name.replace(' ', '-').replace('/', '-')}.json"

    def words(self, limit):
        where = ("--device", "cuda", "--shapes", self.shapes, "--dtype", self.dtype)
        who = ("--optimizers", ",".join(self.optimizers), "--against", ",".join(RIVALS))
        how = ("--repeats", "10", "--seconds", "0", "--json", str(self.json))
        return (sys.executable, "-m", "bench", "step", *where, *who, *how)

    def keep(self, outcome, document, folder):
        """Rows as `bench step` has them; the part's name in the batch keeps runs apart that were measured apart."""
        if not (ROOT / self.json).exists():
            return
        found = json.loads((ROOT / self.json).read_text())
        for key in ("rows", "copies"):
            for line in found[key]:
                document[key].append(line | {"part": self.name, "batch": f"{self.name}, {line['batch']}"})
        document["skipped"] += [note for note in found["skipped"] if note not in document["skipped"]]

    def halves(self):
        """A rule that fails must not take the others' rows along: cut once between the backends, then on."""
        middle = len(self.optimizers) // 2
        pieces = (self.optimizers[:middle], self.optimizers[middle:]) if middle else ()
        return tuple(replace(self, name=f"{self.name}/{k}", optimizers=piece) for k, piece in enumerate(pieces, 1))


class Tune(Part):
    """The sweep of the constants of one engine, the name's last word."""

    def words(self, limit):
        backend = self.name.split()[-1]
        where = ("--backend", backend, "--seconds", str(int(limit - 30)), "--json", str(SCRATCH / self.file))
        return (sys.executable, "-m", "bench", "tune", *where)

    @property
    def file(self):
        return f"{self.name.replace(' ', '-')}.json"

    def keep(self, outcome, document, folder):
        if (ROOT / SCRATCH / self.file).exists():
            shutil.copy(ROOT / SCRATCH / self.file, folder / self.file)


class Model(Part):
    """The predictions of `bench model` beside the rows that have been measured so far."""

    def keep(self, outcome, document, folder):
        document["model"] = outcome.output.splitlines()


def last(outcome):
    """The last line of what was printed."""
    return (outcome.output.strip().splitlines() or [""])[-1]


def forbidden(outcome):
    """The line that says that this machine does not let such a tool work; "" where none does."""
    lines = outcome.output.splitlines() if outcome.status else []
    return next((line.strip("= ") for line in lines if any(text in line for text in FORBIDDEN)), "")


def counters(output):
    """The metrics of each kernel in ncu's CSV, which stands behind the program's own output."""
    lines = [line for line in output.splitlines() if line.startswith('"') and ',"n/a"' not in line]
    names, kernels = {metric: name for name, metric in METRICS.items()}, {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if row.get("Metric Name") in names:
            value = float(row["Metric Value"].replace(",", "")) * SECONDS.get(row["Metric Unit"], 1)
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:100]})
            kernel[names[row["Metric Name"]]] = value
    return list(kernels.values())
