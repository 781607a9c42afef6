"""setup.py's build of the CUDA engine, and the module it makes where there is no GPU."""

import json
import re
import resource
import subprocess
import sys

import pytest
from native_build import ROOT, cuda_engine, device_build, make, setup_py
from setuptools.errors import CompileError

from layerfused import _cpu

LOADS = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("layerfused._cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["layerfused._cuda"] = module
print(json.dumps([module.rules(), module.ARCHITECTURES, "libcuda.so" in open("/proc/self/maps").read()]))
"""
ASKS = """
import torch, layerfused
try:
    layerfused.LAMB([torch.nn.Parameter(torch.ones(3))], backend="cuda")
except ValueError as error:
    print(error)
"""


HIDES = """
sys.modules["layerfused._cuda"] = None
layerfused.backends.cuda_is_missing.cache_clear()
"""


def python(program, *arguments):
    """What a process of its own prints that sees no GPU."""
    command = ["env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_the_module_loads_without_a_driver():
    _, engine, path = device_build()
    rules, architectures, driver = json.loads(python(LOADS, path))
    assert sorted(rules) == sorted(_cpu.rules()) and not driver
    assert architectures.split() == engine.variant.split("-")[1:]


def test_what_is_missing_is_said():
    said = python(LOADS + ASKS + HIDES + ASKS, device_build()[2])
    assert "the parameter is on cpu: it needs a GPU; use 'auto'" in said
    assert "the CUDA engine was not built: install layerfused from source where nvcc is found" in said


def described(architectures):
    """The description of the engine for these architectures; skips where there is no nvcc."""
    device_build()
    return cuda_engine(setup_py(LAYERFUSED_CUDA_ARCHS=architectures))


def test_architectures_are_chosen():
    assert described("none") is None
    assert described("90").variant == described("sm_90").variant == described("9.0").variant == "-90"
    flags = described("100, 80").units[0].flags
    assert re.findall(r",code=(\w+)", flags) == ["sm_80", "sm_100", "compute_100"]  # PTX for what comes after


def test_an_unknown_architecture_is_refused():
    device_build()
    with pytest.raises(CompileError, match=r"does not know '1', it knows .*\b80\b.*\b90\b"):
        setup_py(LAYERFUSED_CUDA_ARCHS="90 1")
    with pytest.raises(CompileError, match="CUDA_HOME=/nowhere has no bin/nvcc: set it to a CUDA toolkit, or unset it"):
        setup_py(CUDA_HOME="/nowhere", LAYERFUSED_CUDA_ARCHS="")


@pytest.mark.all
def test_compile_time(tmp_path):
    """Of two cores, for the architectures of a default build."""
    device_build()
    setup = setup_py(LAYERFUSED_CUDA_ARCHS="")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    make(setup, cuda_engine(setup), tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / 2
    print(f"CUDA engine: {seconds:.0f} s of two cores")
    assert seconds < 300
