"""Sweep of an engine's constants on a GPU: measures only, writes nothing into the package.

Coordinate descent from the constants as they stand, or --grid. A point is one choice of all constants; it is measured
as `step` measures, every optimizer over every list of shapes in turns with the copy, and its score is the geometric
mean of the medians.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from . import device as devices
from . import machine, report, step, timing
from . import shapes as models
from . import spec as specs
from .constants import AXES, applied, axis, defaults, descend, kernels, named, registers, scan
from .contender import DTYPES, Contender, parameters

NOT_MEASURED = [
    "whether two scores differ by more than noise: measure the best and the default again with `step`",
    "whether results are right at a point: that is the tests' matter",
]


class Stopped(Exception):
    """The sweep ends before its last point; the text says why."""


class Case(NamedTuple):
    """What every point is measured on."""

    shapes: str
    spec: specs.Spec
    params: list


def add_arguments(parser):
    add = parser.add_argument
    add("--shapes", default="bert-large,resnet50", help=f"list of {', '.join(models.MODELS)} or FILE.json")
    add("--optimizers", default="LAMB(max_grad_norm=None),AdamW", help='list of NAME or "NAME(key=value,…)", ours')
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters and gradients")
    add("--backend", choices=AXES, default="cuda", help="whose constants")
    add("--axis", type=axis, action="append", default=[], metavar="NAME=V,…", help="other values of one constant")
    add("--grid", action="store_true", help="all combinations in a shuffled order, instead of coordinate descent")
    add("--repeats", type=int, default=15, help="rounds of each measurement")
    add("--seconds", type=float, default=300.0, help="wall time after which no further point begins")
    add("--json", type=Path, metavar="OUT.json", help="written anew after each point")


class Sweep:
    """Measures points, each once, and keeps them on disk.

    Attributes:
        points: what has been measured: constants, score in ms (None where a row failed), and a row per case.
        stopped: why the sweep ended early; None while it has not.
    """

    def __init__(self, args, device):
        self.args, self.device, self.points, self.scores, self.stopped = args, device, [], {}, None
        lists = {name: models.load(name) for name in specs.split(args.shapes)}
        self.copy = timing.Copy(0, device)
        self.cases = []
        for name, shapes in lists.items():
            params = parameters([shape for _, shape in shapes], DTYPES[args.dtype], device.name)
            for text in specs.split(args.optimizers):
                spec = specs.parse(text)
                spec = dataclasses.replace(spec, options=spec.options | {"backend": args.backend})
                self.cases.append(Case(Path(name).stem, spec, params))
        self.deadline = time.perf_counter() + args.seconds

    def run(self):
        axes = AXES[self.args.backend] | dict(self.args.axis)
        start = defaults(self.args.backend) | {name: values[0] for name, values in axes.items() if len(values) == 1}
        try:
            (scan if self.args.grid else descend)(axes, start, self.score)
        except Stopped as reason:
            self.stopped = str(reason)
        self.save()

    def score(self, point):
        key = tuple(point.items())
        if key not in self.scores:
            if self.points and time.perf_counter() > self.deadline:
                raise Stopped(f"--seconds {self.args.seconds:g} were over before all points were measured")
            rows = [self.row(point, case) for case in self.cases]
            measured = [row["median_ms"] for row in rows if "median_ms" in row]
            score = statistics.geometric_mean(measured) if len(measured) == len(rows) else None
            self.scores[key] = float("inf") if score is None else score
            self.points.append({"constants": point, "score": score, "rows": rows})
            self.save()
            reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
            print(f"{named(point)}: {report.number(score)} ms {'; '.join(reasons)}", file=sys.stderr)
        return self.scores[key]

    def row(self, point, case):
        """One case at one point, or the reason why it cannot run there."""
        common = {"shapes": case.shapes, "optimizer": case.spec.text, "dtype": self.args.dtype}
        for compiled in kernels(self.args.backend):
            compiled.clear()  # so that what is there afterwards is this row's
        try:
            with applied(self.args.backend, point):
                measured = self.measured(case)
        except Exception as error:  # whatever Triton, its compiler or the driver raises is a result here
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            reason = " … ".join(dict.fromkeys((lines[0], lines[-1])))  # compilers say where, then much, then what
            self.still_works(reason)
            return common | registers(self.args.backend) | {"reason": reason}
        found = registers(self.args.backend)
        spills = f"spills {found['n_spills']} words a thread" if found["n_spills"] else None
        return common | measured | found | {"reason": spills}

    def measured(self, case):
        contender = Contender.build(case.spec, case.params)
        calls = [self.copy.step, contender.step]
        copied, samples = timing.interleave(calls, self.args.repeats, 0, self.device.timed)
        yardstick = self.copy.row(copied)
        return step.speed(contender, samples, yardstick) | {"copy_gb_per_s": yardstick["gb_per_s"]}

    def still_works(self, reason):
        """An error inside of a kernel leaves a GPU on which everything fails."""
        try:
            self.device.synchronize()
        except Exception as error:
            raise Stopped(f"the device does not go on after {reason}") from error

    def save(self):
        if self.args.json:
            beside = self.args.json.with_suffix(".part")
            beside.write_text(json.dumps(self.document(), indent=1) + "\n")
            beside.replace(self.args.json)  # whoever ends the sweep finds all of the last point or none

    def document(self):
        return machine.origin("tune", self.args, self.device, specs.split(self.args.optimizers)) | {
            "repeats": self.args.repeats,
            "seconds": self.args.seconds,
            "methods": step.METHODS | self.device.methods | {"score": "geometric mean of all rows' median_ms"},
            "not_measured": NOT_MEASURED + self.device.not_measured,
            "stopped": self.stopped,
            "points": self.points,
        }


def check(args):
    """Every complaint comes before the measuring."""
    missing = devices.Cuda.missing()
    if missing:
        args.error(missing)
    from layerfused.backends import cuda_is_missing, triton_is_missing

    lacks = {"cuda": cuda_is_missing, "triton": triton_is_missing}[args.backend]()
    if lacks:
        args.error(lacks)
    foreign = [name for name, _ in args.axis if name not in AXES[args.backend]]
    if foreign:
        args.error(f"--axis {foreign[0]}: the {args.backend} engine's constants are {', '.join(AXES[args.backend])}")
    if args.repeats < 1 or not specs.split(args.optimizers) or not specs.split(args.shapes):
        args.error("--optimizers and --shapes must name at least one each, and --repeats must be >= 1")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)


def run(args):
    check(args)
    sweep = Sweep(args, devices.on("cuda"))
    sweep.run()
    print(report.sweep(sweep.document()))
