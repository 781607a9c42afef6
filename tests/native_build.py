"""Builds of the CUDA engine beside the installed one: what setup.py describes, made by ninja under build/.

A build that tests ask for again is found there; ninja compiles what changed since.
"""

import importlib.util
import os
import shlex
import subprocess
import zlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parent.parent
SHIM = "tests/shim"


@contextmanager
def at_root():
    """setup.py's paths are relative to the repository."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)


def setup_py(**environment):
    """setup.py as a module under some environment variables; `given` is what it hands to setuptools, by name."""
    spec = importlib.util.spec_from_file_location("layerfused_setup", ROOT / "setup.py")
    module, given = importlib.util.module_from_spec(spec), {}
    with at_root(), patch.dict(os.environ, environment), patch("setuptools.setup", lambda **words: given.update(words)):
        spec.loader.exec_module(module)
    module.given = given
    return module


def cuda_engine(setup):
    """Its description, or None where setup.py leaves it out."""
    found = [extension for extension in setup.given["ext_modules"] if extension.name == "layerfused._cuda"]
    return found[0] if found else None


@cache
def device_build():
    """setup.py, its description of the engine for GPUs, and the path of the module, brought up to date."""
    setup = setup_py()
    engine = cuda_engine(setup)
    if engine is None:
        pytest.skip("no nvcc, or LAYERFUSED_CUDA_ARCHS=none")
    return setup, engine, make(setup, engine, setup.build_folder())


def make(setup, extension, folder, **environment):
    """Compiles and links in a folder below the repository; the module's path."""
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    script = Path(folder, f"build{extension.variant}.ninja")  # setup.py has another for all extensions
    (ROOT / script).write_text(setup.ninja_file([extension], folder))
    command = [setup.ninja_command(), "-f", str(script)]
    run(command, environment)
    return ROOT / f"{extension.path(folder)}.so"


def run(command, environment):
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def checksum(paths, *more):
    """Of files and words, as a part of a path."""
    texts = [*more, *(path.read_text() for path in sorted(paths) if path.is_file())]
    return f"{zlib.crc32(repr(texts).encode()):08x}"


class HostBuild:
    """The engine for this processor. tests/shim is no dependency ninja knows: its checksum is in the folder's name."""

    def __init__(self, flags, rules=()):
        """`rules`: the only ones it has; none named, all."""
        self.environment = {"LAYERFUSED_CXXFLAGS": flags}
        self.setup = setup_py(CUDA_HOME=SHIM, LAYERFUSED_CUDA_ARCHS="host", **self.environment)
        self.extension = cuda_engine(self.setup)
        wanted = {f"rule-{rule}" for rule in rules}
        left_out = [x for x in self.extension.units if wanted and x.name.startswith("rule-") and x.name not in wanted]
        self.extension.units = [unit for unit in self.extension.units if unit not in left_out]
        self.folder = Path("build", f"host-{checksum((ROOT / SHIM).rglob('*'), flags, *sorted(rules))}")

    def module(self):
        return make(self.setup, self.extension, self.folder, **self.environment)

    def defective(self, rule, right, wrong):
        """The module with one rule alone and one text of csrc/cuda replaced; everything else is the clean build's."""
        texts = {path: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu")}
        found = [path for path, text in texts.items() if "/cuda/" in str(path) for _ in range(text.count(right))]
        assert len(found) == 1, f"{right} is in {found}"
        text = texts[found[0]].replace(right, wrong)
        overlay = self.folder / f"{rule}-{checksum(texts, text)}"
        module = overlay / "_cuda.so"
        if not (ROOT / module).exists():
            (ROOT / overlay / "cuda").mkdir(parents=True, exist_ok=True)
            (ROOT / overlay / "cuda" / found[0].name).write_text(text)
            self._compile(rule, overlay, module)
        return ROOT / module

    def _compile(self, rule, overlay, module):
        compile, link = (shlex.split(x) for x in (self.extension.compile, self.extension.link))
        compile.insert(compile.index("-Icsrc"), f"-I{overlay}")  # first found, first taken
        units, folder = self.extension.units, self.extension.path(self.folder)
        (unit,) = [x for x in units if x.name == f"rule-{rule}"]
        own, others = f"{overlay}/{unit.name}.o", [f"{folder}/{x.name}.o" for x in units if x.source != unit.source]
        run([*compile, *shlex.split(unit.flags), "-c", unit.source, "-o", own], self.environment)
        run([*link, own, *others, "-o", str(module)], self.environment)
