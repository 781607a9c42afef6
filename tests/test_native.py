"""The native engine under other builds: instruction sets, AddressSanitizer, ThreadSanitizer; and its libgomp.

Builds go through setup.py. Without torch in the process: sanitizers and torch's own threads do not go together.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers
from cases import FIXED
from engines import NAMED, ONE_PER_RULE

from layerfused import _cpu, plan

ROOT = Path(__file__).parent.parent
DRIVER = Path(__file__).parent / "native_driver.py"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets and preloads are x86-64's")

# What /proc/cpuinfo calls the instructions of each level.
LEVELS = {
    "x86-64": "",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe",
    "x86-64-v4": "avx avx2 bmi1 bmi2 f16c fma abm movbe avx512f avx512bw avx512cd avx512dq avx512vl",
}
# -O0: half the time to compile, and nothing is optimised away before it is watched. OpenMP's fork and join are
# invisible to ThreadSanitizer, so that build has a team of std::thread.
ADDRESS = ["-O0 -g1 -fsanitize=address", "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"]
THREAD = "-O0 -g1 -fsanitize=thread -DLAYERFUSED_STD_THREADS"
DEFECTS = {  # what stands in engine.cpp, and what takes its place
    "scalars published without release": ("ready.store(true, std::memory_order_release)", "ready.store(true, RELAXED)"),
    "partials combined without acquire": ("fetch_add(1, std::memory_order_acq_rel)", "fetch_add(1, RELAXED)"),
    "apply does not wait": ("if (phases_ & REDUCE) wait_until", "if (false) wait_until"),
}


def first_of(choices):
    """Each costs a build: `make test` takes the first, `make test-all` all."""
    first, *others = choices
    return [first, *(pytest.param(other, marks=pytest.mark.all) for other in others)]


def build(flags, folder, root=ROOT):
    """The path of the module. Objects are kept under `root`, so that a second run of the tests compiles nothing."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
    only_cpu = {"LAYERFUSED_CUDA_ARCHS": "none"}  # nvcc would take minutes for what nobody looks at here
    made = subprocess.run(
        command, cwd=root, env=os.environ | only_cpu | {"LAYERFUSED_CXXFLAGS": flags}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (module,) = Path(folder).glob("layerfused/_cpu*.so")
    return module


def sources(folder):
    """A copy to put defects into."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def drive(module, names=ONE_PER_RULE, preload="", repeat=1, **more):
    """The driver's lines, name and way -> hashes, and the process."""
    cases = {
        name: {"rule": NAMED[name].rule, "row": list(NAMED[name].hyper.values()), "fixed": NAMED[name].rule in FIXED}
        for name in names
    }
    job = {"module": str(module), "plan": plan.__file__, "cases": cases, "repeat": repeat}
    job |= {"chunk": 64, "whole": 64, "ahead": 128, "threads": 4, "steps": 3, "withheld": 0, **more}
    command = [sys.executable, str(DRIVER), json.dumps(job)]
    done = sanitizers.run(command, preload, OMP_WAIT_POLICY="passive")  # spinning workers crawl on a busy machine
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(name, way): hashes for name, way, *hashes in lines}, done


@pytest.fixture(scope="module")
def installed():
    """What the module in use answers; each case gives the same bits from run to run, and phases those of a step."""
    found, done = drive(_cpu.__file__, repeat=5)
    assert done.returncode == 0, done.stderr
    assert all(len(hashes) == 1 for hashes in found.values())
    assert all(found[name, "phases"] == found[name, "clipped"] for name in ONE_PER_RULE)
    assert len({*map(tuple, found.values())}) == 3 * len(ONE_PER_RULE)  # the hash sees rules, clip and what is kept
    return found


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads(installed, threads):
    assert drive(_cpu.__file__, threads=threads)[0] == installed


# Every rule, tails and storage types included; leaves out production chunks (the loops are the same). The module in
# use takes the highest level that the machine has, so that the lowest is the one to compare with.
@pytest.mark.parametrize("level", first_of(LEVELS))
def test_instruction_sets_give_the_same_bits(installed, level, tmp_path):
    has = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    lacks = set(LEVELS[level].split()) - has
    if lacks:
        pytest.skip(f"this machine lacks {' '.join(sorted(lacks))}")
    found, done = drive(build(f"-DLAYERFUSED_NO_CLONES -march={level}", tmp_path))
    assert done.returncode == 0, done.stderr
    assert found == installed


@pytest.mark.parametrize("flags", first_of(ADDRESS), ids=["address", "undefined"])
def test_address_sanitizer(installed, flags, tmp_path):
    module = build(flags, tmp_path)
    found, done = drive(module, preload="libasan.so")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert found == installed
    _, done = drive(module, ["lamb"], "libasan.so", withheld=1)  # it would have told
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A copy of the sources built for ThreadSanitizer; a defect in it compiles one file anew."""
    folder = sources(tmp_path_factory.mktemp("watched"))
    return folder, build(THREAD, folder / "clean", folder)


def test_thread_sanitizer(installed, watched):
    found, done = drive(watched[1], preload="libtsan.so", repeat=2)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert found == installed


@pytest.mark.parametrize("defect", first_of(DEFECTS))
def test_thread_sanitizer_sees_a_defect(watched, defect):
    """Else its silence would say nothing."""
    folder, _ = watched
    engine = folder / "csrc/cpu/engine.cpp"
    text = engine.read_text()
    right, wrong = DEFECTS[defect]
    assert right in text
    try:
        engine.write_text("#define RELAXED std::memory_order_relaxed\n" + text.replace(right, wrong))
        module = build(THREAD, folder / defect.replace(" ", "-"), folder)
    finally:
        engine.write_text(text)
    _, done = drive(module, ["lamb"], "libtsan.so", repeat=20)
    assert done.returncode == 66 and "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr


def test_one_libgomp_in_the_process():
    """Two would bring two teams, and torch.set_num_threads would reach one of them."""
    program = """
import layerfused, torch
p = torch.nn.Parameter(torch.ones(10**6))
p.grad = torch.ones(10**6)
torch.set_num_threads(2)
opt = layerfused.LAMB([p])
opt.step()
assert opt.engines == {"cpu": 1}
names = ("libgomp", "libomp", "libiomp")
print(*{line.split()[-1] for line in open("/proc/self/maps") if any(name in line for name in names)})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, f"more than one OpenMP runtime: {done.stdout}"
