"""The CUDA engine's sources under sanitizers: built for the host with a system thread for every CUDA thread.

Random plans of every rule, without torch in the process: sanitizers and torch's own threads do not go together. Leaves
out races within a warp: its exchanges order memory here, as they do not on a GPU.
"""

import json
import platform
import sys
from pathlib import Path

import host_cuda
import pytest
import sanitizers
from cases import FIXED
from engines import NAMED, ONE_PER_RULE
from native_build import HostBuild

from layerfused import _cpu, plan

DRIVER = Path(__file__).parent / "cuda_driver.py"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the host's CUDA and preloads are x86-64's")

# -O0: half the time to compile, and nothing is optimised away before it is watched. Blocks of 64 threads: time grows
# faster than the threads of a launch.
SMALL = "-O0 -g1 -DLAYERFUSED_THREADS=64"
ADDRESS = f"{SMALL} -DSHIM_THREADS -fsanitize=address"
UNDEFINED = f"{ADDRESS},undefined -fno-sanitize-recover=all"
THREAD = f"{SMALL} -DSHIM_THREADS -fsanitize=thread"
PRODUCTION = "-O0 -g1 -DSHIM_THREADS -fsanitize=thread"
FEW, SEEDS = 2, 12  # plans of each rule
SOME = ["adam-decay", "lars", "lamb", "aida-k1", "setadam-coupled"]  # without and with stats, minima, coupled decay
RELAXED = "std::atomic_ref<uint32_t>(*{}).store(1, std::memory_order_relaxed);"
BARRIERS = [  # what they publish. The first of `leave` is not seen: on every way there one has just been passed
    "publishes every warp's number",
    "publishes this turn's item",
    "everybody of the block learns of it",
    "publishes scalars and moments to the block",
    "publishes the layer's scalars to the block",
    "publishes them to the block",
]
DEFECTS = {  # what stands in csrc/cuda, and what takes its place
    "scalars published without release": ("device::publish(ready(next));", RELAXED.format("ready(next)")),
    "norm published without release": (
        "device::publish(at.counters + NORM_READY);",
        RELAXED.format("(at.counters + NORM_READY)"),
    ),
    "partials combined without acquire": ("int(device::arrive(counter))", "int(device::take(counter))"),
    "left without release": ("device::arrive(at.counters + LEFT)", "device::take(at.counters + LEFT)"),
    "waits without acquire": (
        "!device::published(flag)",
        "!std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(flag)).load(std::memory_order_relaxed)",
    ),
    "apply does not wait": ("if (launch.phases & REDUCE) wait(ready(next));", ""),
    "nobody waits for the norm": ("(launch.phases & NORM)) wait(at.counters + NORM_READY);", "false) {}"),
    "the last one to leave tells nobody": ("device::barrier();\n    if (!shared.last)", "if (!shared.last)"),
    "the next item over this one": ("look_up(shared.next[turn ^ 1], next)", "look_up(shared.next[turn], next)"),
}


def first_of(choices):
    """Each costs a build: `make test` takes the first, `make test-all` all."""
    first, *others = choices
    return [first, *(pytest.param(other, marks=pytest.mark.all) for other in others)]


def case(name):
    rule = NAMED[name].rule
    needs = _cpu.rules()[rule]
    masks = needs["reduce"][0] | needs["apply"][0] | needs["reduce"][1] | needs["apply"][1]
    found = {"rule": rule, "row": list(NAMED[name].hyper.values()), "fixed": rule in FIXED, "masks": masks}
    return found | {"stats": needs["sums"] + needs["minima"], "reports": needs["reports"]}


def drive(module, seeds, names=ONE_PER_RULE, library="", **more):
    """The driver's lines, name and seed -> hash, and the process."""
    job = {"module": str(module), "plan": plan.__file__, "cases": {name: case(name) for name in names}}
    job |= {"seeds": seeds, "steps": 2, "withheld": more.pop("withheld", 0)}
    done = sanitizers.run([sys.executable, str(DRIVER), json.dumps(job)], library, **more)
    return {(name, seed): hashed for name, seed, hashed in map(str.split, done.stdout.splitlines())}, done


def only(found, names=ONE_PER_RULE, seeds=SEEDS):
    return {(name, str(seed)): found[name, str(seed)] for name in names for seed in range(seeds)}


def clean(module, seeds, names=ONE_PER_RULE, library=""):
    found, done = drive(module, seeds, names, library, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(found) == len(names) * seeds
    return found


@pytest.fixture(scope="module")
def fibers():
    """What a build without sanitizer or system threads answers; other tests compare such a one with float64."""
    found = clean(HostBuild(SMALL).module(), SEEDS)
    assert len(set(found.values())) == len(found)  # the hash sees every rule and plan
    return found


def test_a_plan_has_one_answer(fibers):
    """Whatever the interleaving: fibers take turns as a generator says, of which every launch uses more."""
    module = HostBuild(SMALL).module()
    assert all(clean(module, SEEDS, [name]) == only(fibers, [name]) for name in ONE_PER_RULE[::3])


def rules_of(names):
    return [NAMED[name].rule for name in names]


# Five rules in the default run, for a build of all takes half a minute of two cores.
@pytest.mark.parametrize("way", first_of([(ADDRESS, SOME), (UNDEFINED, ONE_PER_RULE)]), ids=["address", "undefined"])
def test_address_sanitizer(fibers, way):
    flags, names = way
    module = HostBuild(flags, rules_of(names)).module()
    assert clean(module, FEW, names, "libasan.so") == only(fibers, names, FEW)
    _, done = drive(module, FEW, ["lamb"], "libasan.so", withheld=1)  # it would have told
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def watched():
    build = HostBuild(THREAD, rules_of(SOME))
    return build, build.module()


def test_thread_sanitizer(fibers, watched):
    assert clean(watched[1], FEW, SOME, "libtsan.so") == only(fibers, SOME, FEW)


@pytest.mark.all
def test_thread_sanitizer_on_every_rule(fibers):
    module = HostBuild(THREAD).module()
    assert clean(module, SEEDS, library="libtsan.so") == only(fibers)


@pytest.mark.all
def test_thread_sanitizer_with_as_many_threads_as_on_a_gpu():
    found = clean(HostBuild(PRODUCTION).module(), 1, ["lamb"], "libtsan.so")
    assert found == clean(host_cuda.build("build/host-cuda"), 1, ["lamb"])


def seen(build, right, wrong):
    """Whether ThreadSanitizer's first word on a defect is a race; it may take a few plans."""
    module = build.defective("lamb", right, wrong)
    options = {"timeout": 300, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}
    _, done = drive(module, 2 * SEEDS, ["lamb"], "libtsan.so", **options)
    assert done.returncode == 66 and "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr


@pytest.mark.parametrize("barrier", first_of(BARRIERS))
def test_a_missing_barrier_is_seen(watched, barrier):
    """Else the silence would say nothing."""
    seen(watched[0], f"device::barrier();  // {barrier}", f"// {barrier}")


@pytest.mark.parametrize("defect", first_of(DEFECTS))
def test_a_defect_is_seen(watched, defect):
    seen(watched[0], *DEFECTS[defect])
