"""All that only a GPU can show, in one command: build, tests, timings, sanitizer, counters, within some seconds.

Parts run most important first, each a process with a limit of its own; results.json is written anew after each. A
second call over the same sources and versions goes on with what has not passed yet. Exit status: 0 if everything ran
and passed, 1 if something failed or was left for the next call, 2 if there is no GPU.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import device as devices
from . import gpu_order, gpu_report, machine, step
from .gpu_parts import FAILED, LEFT, PASSED, ROOT, SCRATCH, SKIPPED, STOPPED, Outcome, Tests, Tune, last

RESERVE = 10  # seconds at the end, for the plots
TAIL = 40  # lines of a failed part's output that are kept
SOURCES = ("setup.py", "bench/*.py", "csrc/**/*.*", "kernels/*.py", "layerfused/*.py", "tests/*.py")


def add_arguments(parser):
    add = parser.add_argument
    add("--budget", type=float, default=540, help="seconds of wall time for all parts")
    add("--folder", type=Path, help="for results.json and the plots; by default bench/results/NAME-OF-THE-GPU")
    add("--again", action="store_true", help="anew, even where a part has passed")


def execute(words, limit, env):
    """Runs a command; after the limit it is killed with all that it has started."""
    with tempfile.TemporaryFile() as out:  # a pipe would stay open as long as a grandchild lives
        options = dict(cwd=ROOT, env=os.environ | env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        process = subprocess.Popen(words, **options)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all of them have ended
            process.wait()
        out.seek(0)
        return Outcome(status, out.read().decode(errors="replace"))


def clean(text):
    """Without this machine's folders, which mean nothing elsewhere."""
    places = {sys.executable: "python", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", ROOT: ".", Path.home(): "~"}
    for place, name in places.items():
        text = text.replace(str(place), name) if len(str(place)) > 1 else text
    return text


class Session:
    """Runs parts until the time is over and keeps what they tell.

    Attributes:
        document: what results.json holds.
    """

    def __init__(self, document, folder, budget, runner, clock):
        self.document, self.folder, self.runner, self.clock = document, folder, runner, clock
        self.start = clock()
        self.deadline = self.start + budget - RESERVE

    def passed(self, name):
        return self.document["parts"].get(name, {}).get("state") == PASSED

    def run(self, parts):
        """All parts that have not passed; a failed run of rows is tried again in halves."""
        queue = list(parts)
        while queue:
            part = queue.pop(0)
            if not self.passed(part.name) and self.do(part) in (FAILED, STOPPED):
                behind = Tune if "/" in part.name else Tests | Tune  # the first cut soon, others when tests are done
                place = next((i for i, later in enumerate(queue) if isinstance(later, behind)), len(queue))
                queue[place:place] = part.halves()

    def do(self, part):
        """Runs one part, keeps its record and what it has measured, and tells its state."""
        begin = self.clock()
        record = self.record(part)
        record["seconds"] = round(self.clock() - begin, 1)
        self.document["parts"][part.name] = {key: value for key, value in record.items() if value not in ("", [])}
        self.save()
        told = f"{record['state']} in {record['seconds']:.0f} s: {record['reason']}".removesuffix(": ")
        print(f"[{self.clock() - self.start:4.0f} s] {part.name}: {told}", flush=True)
        return record["state"]

    def record(self, part):
        left = self.deadline - self.clock()
        if part.missing:
            return {"state": SKIPPED, "reason": clean(part.missing)}
        if left < part.seconds:
            return {"state": LEFT, "reason": f"{max(left, 0):.0f} s were left, it takes about {part.seconds:.0f}"}
        limit = min(part.limit, left)
        words = part.words(limit)
        for key in ("rows", "copies", "counters"):  # of an earlier try
            self.document[key] = [line for line in self.document[key] if line["part"] != part.name]
        outcome = self.runner(words, limit, part.env)
        state, reason = part.judge(outcome)
        try:
            part.keep(outcome, self.document, self.folder)
        except (ValueError, KeyError) as error:  # half a file of a killed process, a tool's new format
            state, reason = FAILED, f"its results cannot be read: {type(error).__name__}: {error}"
        told = {"state": state, "reason": clean(reason) or (f"after {limit:.0f} s" if state == STOPPED else "")}
        command = clean(shlex.join([Path(words[0]).name, *words[1:]]))
        tail = [] if state == PASSED else clean(outcome.output).splitlines()[-TAIL:]
        return told | {"command": command, "tail": tail}

    def save(self):
        beside = self.folder / "results.part"
        beside.write_text(json.dumps(self.document, indent=1) + "\n")
        beside.replace(self.folder / "results.json")  # whoever ends the run finds all of the last part or none


def output_of(*words):
    """The first line a command prints; None where it fails."""
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def sources():
    """What was measured: a digest of the sources, and git's commit where there is one."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    changed = output_of("git", "status", "--porcelain", "--", *(pattern.partition("/")[0] for pattern in SOURCES))
    return {"digest": digest.hexdigest(), "commit": output_of("git", "rev-parse", "HEAD"), "changed": bool(changed)}


def fresh(args, device):
    """A document without results yet."""
    args.command = ["gpu", "--budget", f"{args.budget:g}"]  # not the folder, which is a path of this machine
    texts = [*gpu_order.CORE, *gpu_order.REST, *gpu_order.RIVALS]
    document = machine.origin("gpu", args, device, texts)
    smi = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    document["machine"]["driver"] = output_of(*smi)
    measured = {"parts": {}, "skipped": [], "counters": [], "copies": [], "rows": []}
    told = {"methods": step.METHODS | device.methods, "not_measured": step.NOT_MEASURED + device.not_measured}
    return document | {"sources": sources()} | told | measured


def resumed(document, path):
    """The results of an earlier call, if they are of the same sources, versions and GPU; else the fresh ones."""

    def subject(of):
        return of["sources"]["digest"], of["machine"]["gpu"], of["machine"]["driver"], of["versions"]

    old = json.loads(path.read_text()) if path.exists() else document
    if old is document or subject(old) != subject(document):
        return document
    return old | {"skipped": [], "continued": [*old.get("continued", []), document["date"]]}


def lacking(built):
    """Why each backend is not there, "" if it is; a failed build leaves an older engine lying, which is not asked."""
    lacks = {}
    for backend, module in {"cuda": "layerfused._cuda", "triton": "layerfused.kernels"}.items():
        outcome = execute([sys.executable, "-c", f"import {module}"], 60, {})  # a crash there must not end us
        lacks[backend] = "" if outcome.status == 0 else f"{module} cannot be imported: {clean(last(outcome))}"
    return lacks if built else lacks | {"cuda": "the build failed"}


def close(document, folder):
    """Plots, tables, what failed; the exit status."""
    for note in gpu_report.plots(document, folder):
        print(note)
    print(gpu_report.text(document))
    states = [record["state"] for record in document["parts"].values()]
    return 1 if {FAILED, STOPPED, LEFT} & set(states) else 0


def run(args):
    if devices.Cuda.missing():
        print(f"python -m bench gpu: {devices.Cuda.missing()}", file=sys.stderr)
        sys.exit(2)
    device = devices.on("cuda")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    folder = args.folder or ROOT / "bench" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ROOT / SCRATCH, ignore_errors=True)
    (ROOT / SCRATCH).mkdir(parents=True)
    document = fresh(args, device)
    document = document if args.again else resumed(document, folder / "results.json")
    session = Session(document, folder, args.budget, execute, time.perf_counter)
    build = gpu_order.build(torch.cuda.get_device_capability())
    built = session.do(build) == PASSED  # even if it has passed: what was built may lie on another machine
    lacks = lacking(built)
    session.document["skipped"] += [{"optimizer": key, "reason": why} for key, why in lacks.items() if why]
    session.run(gpu_order.ordered(lacks, folder / "results.json"))
    sys.exit(close(session.document, folder))
