"""The CUDA engine built for this processor (tests/shim), for machines without a GPU, and what steers it."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(folder, flags="", root=ROOT):
    """The path of the module. Objects are kept under `root`, so that a second run of the tests compiles nothing."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
    newest = max(path.stat().st_mtime for path in Path(root, "tests/shim").rglob("*"))
    for linked in Path(root, "build").glob("native-*/_cuda-host.so"):
        if linked.stat().st_mtime < newest:  # ninja does not know what the stand-in for nvcc links into it
            linked.unlink()
    chosen = {"CUDA_HOME": "tests/shim", "LAYERFUSED_CUDA_ARCHS": "host", "LAYERFUSED_CXXFLAGS": flags}
    made = subprocess.run(command, cwd=root, env={**os.environ, **chosen}, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (module,) = Path(root, folder).glob("layerfused/_cuda*.so")
    return module


def install():
    """Puts the host's build in the place of `layerfused._cuda`, before anybody imports that."""
    path = build("build/host-cuda")
    spec = importlib.util.spec_from_file_location("layerfused._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["layerfused._cuda"] = module


def shim():
    """The functions of tests/shim/runtime.cpp and counting.cpp that steer the module in use."""
    return ctypes.CDLL(sys.modules["layerfused._cuda"].__file__)


def counts():
    """How many launches, copies, allocations and waits there have been."""
    found = (ctypes.c_int64 * 4)()
    shim().shim_counts(found)
    return dict(zip(("launches", "copies", "allocations", "waits"), found, strict=True))


@contextmanager
def deferred():
    """A stream that runs only when somebody waits for it, and at the end."""
    shim().shim_defer(1)
    try:
        yield
    finally:
        shim().shim_defer(0)


@contextmanager
def capture():
    """A stream in capture: the engine must not copy, nor leave anything for eager steps. What is launched does not run;
    `replay()` runs it."""
    shim().shim_capture(1)
    try:
        yield
    finally:
        shim().shim_capture(0)


def replay():
    shim().shim_replay()


class Watched:
    """Bytes that the kernels read and write of some tensors, as the compiler's own instrumentation reports them."""

    def __init__(self, tensors):
        self.begins = [x.data_ptr() for x in tensors if x.nbytes]
        for x in tensors:
            if x.nbytes:
                shim().shim_watch(ctypes.c_uint64(x.data_ptr()), ctypes.c_int64(x.nbytes))

    def seen(self):
        """Per tensor, bytes read and bytes written."""
        found = []
        for begin in self.begins:
            pair = (ctypes.c_int64 * 2)()
            shim().shim_seen(ctypes.c_uint64(begin), pair)
            found.append(tuple(pair))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *error):
        shim().shim_forget()
