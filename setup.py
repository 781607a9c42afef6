"""Builds the native engines of csrc/ with ninja.

One description per extension module says which object files it is made of; ninja does the rest: parallel compilation,
header dependencies, reuse of what is unchanged. No torch headers are used, so a build neither needs torch nor depends
on its version. The CUDA engine is built where nvcc is found: under CUDA_HOME, on the PATH, or among Python's packages
(nvidia-cuda-nvcc, -cuda-crt, -nvvm and -cuda-runtime, all of one version). Environment variables:

    LAYERFUSED_CUDA_ARCHS  what the CUDA engine is built for, as "80 90 100" (the default, as far as nvcc knows them;
                           the last also as PTX, for what comes after), "none" to leave it out
    CXX                  the compiler, default g++
    LAYERFUSED_CXXFLAGS  for the variants that tests compile (instruction sets, sanitizers): appended to every compile
                         and link command; CXXFLAGS is ignored on purpose, because a distribution's -ffast-math or
                         -ffp-contract would change the bits of a result

    LAYERFUSED_CXXFLAGS=-march=x86-64-v3 python setup.py build_ext --build-lib build/v3
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CXX = os.environ.get("CXX") or "g++"
EXTRA = os.environ.get("LAYERFUSED_CXXFLAGS", "")
CUDA_ARCHS = os.environ.get("LAYERFUSED_CUDA_ARCHS", "").strip()

# -ffp-contract=off and no -ffast-math, no -march: the bits are the same on every machine; the engine asks for wide
# vectors itself. Without errno and traps sqrt vectorises, and neither changes a result.
CPU_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off "
    "-Wall -Wextra -Wno-psabi -Icsrc"
)


class Unit(NamedTuple):
    """One object file. The same source may stand in several units with different flags."""

    name: str
    source: str
    flags: str = ""


class Native(Extension):
    """An extension module as ninja builds it: its units, and the commands that compile and link them.

    `variant` names a folder of its own for objects that other settings than CXX and LAYERFUSED_CXXFLAGS tell apart.
    """

    def __init__(self, name: str, units: list[Unit], *, compile: str, link: str, variant: str = ""):
        super().__init__(name, sources=sorted({unit.source for unit in units}))
        self.units, self.compile, self.link, self.variant = units, compile, link, variant

    def path(self, folder: Path) -> str:
        return f"{folder}/{self.name.rpartition('.')[2]}{self.variant}"


def cpu_engine() -> Native:
    """Objects are linked directly, never through an archive: a rule registers itself from a static initialiser, and
    a linker drops members of an archive that nobody refers to."""
    rules = [Unit(f"rule-{header.stem}", "csrc/cpu/rule.cpp", rule_flags(header)) for header in files("csrc/rules/*.h")]
    # The rules do without these headers: each isolated build has them at another path, a changed command to ninja.
    includes = shlex.join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    others = [Unit(path.stem, str(path), includes) for path in files("csrc/cpu/*.cpp") if path.stem != "rule"]
    return Native(
        "layerfused._cpu",
        others + rules,  # what takes longest begins first
        compile=f"{CXX} {CPU_FLAGS} {EXTRA}",
        link=f"{CXX} -shared -fopenmp {EXTRA}",
    )


def cuda_engine(nvcc: str) -> Native:
    """The kernels are compiled once for every rule and architecture; the static runtime makes the module load anywhere,
    with or without a GPU. -fmad=false: a contracted a*b+c would have other bits than the CPU's."""
    archs = architectures(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    rules = [
        Unit(f"rule-{header.stem}", "csrc/cuda/rule.cu", f"{rule_flags(header)} {shlex.join(targets)}")
        for header in files("csrc/rules/*.h")
    ]
    includes = shlex.join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    define = shlex.quote(f'-DLAYERFUSED_CUDA_ARCHS="{" ".join(archs)}"')
    others = [Unit(path.stem, str(path), f"{includes} {define}") for path in files("csrc/cuda/*.cpp")]
    beside = Path(nvcc).parent.parent / "lib"  # where Python's packages have it, and nvcc itself does not look
    runtime = f" -L{shlex.quote(str(beside))}" if (beside / "libcudart_static.a").exists() else ""
    quiet = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
    return Native(
        "layerfused._cuda",
        rules + others,
        compile=f"{shlex.quote(nvcc)} -std=c++17 -O3 -fmad=false {quiet} -Icsrc",
        link=f"{shlex.quote(nvcc)} -shared -cudart=static{runtime}",
        variant=f"-{'-'.join(archs)}",
    )


def architectures(nvcc: str) -> list[str]:
    """LAYERFUSED_CUDA_ARCHS as nvcc's numbers, in ascending order."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if said.returncode:
        raise CompileError(f"{nvcc} --list-gpu-arch failed: {said.stderr.strip()}")
    known = [line.strip().removeprefix("compute_") for line in said.stdout.split()]
    asked = [arch.removeprefix("sm_").replace(".", "") for arch in CUDA_ARCHS.replace(",", " ").split()]
    lacking = [arch for arch in asked if arch not in known]
    if lacking:
        raise CompileError(f"LAYERFUSED_CUDA_ARCHS: {nvcc} does not know {lacking[0]!r}, it knows {' '.join(known)}")
    found = asked or [arch for arch in ("80", "90", "100") if arch in known] or known[-1:]
    return sorted(found, key=lambda arch: int(arch) if arch.isdigit() else 0)


def find_nvcc() -> str:
    """CUDA's compiler; "" if there is none."""
    if CUDA_ARCHS == "none":
        return ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.exists():
            raise CompileError(f"CUDA_HOME={home} has no bin/nvcc: set it to a CUDA toolkit, or unset it")
        return str(nvcc)
    packages = (path for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/nvcc"))
    return shutil.which("nvcc") or str(next(packages, ""))


def rule_flags(header: Path) -> str:
    return shlex.join([f"-DLAYERFUSED_RULE={header.stem}", f'-DLAYERFUSED_RULE_HEADER="rules/{header.name}"'])


def files(pattern: str) -> list[Path]:
    return sorted(Path().glob(pattern))


def ninja_file(extensions: list[Native], folder: Path) -> str:
    """The text of build.ninja; paths are relative to the repository's root, where ninja runs."""
    lines = [f"builddir = {folder}"]
    for ext in extensions:
        short = ext.name.rpartition(".")[2]
        lines += [
            f"rule compile{short}",
            f"  command = {escape(ext.compile)} $own -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link{short}",
            f"  command = {escape(ext.link)} $in -o $out",
        ]
        objects = {f"{ext.path(folder)}/{unit.name}.o": unit for unit in ext.units}
        for path, unit in objects.items():
            lines += [f"build {path}: compile{short} {unit.source}", f"  own = {escape(unit.flags)}"]
        lines += [f"build {ext.path(folder)}.so: link{short} {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def escape(command: str) -> str:
    return command.replace("$", "$$")


def build_folder() -> Path:
    """Kept between builds, unlike setuptools' own temporary folder; one per interpreter and variant."""
    variant = "" if (CXX, EXTRA) == ("g++", "") else f"-{zlib.crc32(f'{CXX} {EXTRA}'.encode()):08x}"
    return Path("build") / f"native-{sysconfig.get_config_var('SOABI')}{variant}"


def ninja_command() -> str:
    """The pinned one of the build environment, else the system's."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = None
    return shutil.which("ninja", path=BIN_DIR or None) or "ninja"


def check_tools() -> None:
    """A missing tool is reported by name and remedy, not by a page of compiler output."""
    if not shutil.which(shlex.split(CXX)[0]):
        raise CompileError(f"no C++ compiler {CXX!r}: install one (Debian: apt-get install g++) or set CXX")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise CompileError(f"{header} not found: install Python's headers (Debian: apt-get install python3-dev)")


class NinjaBuild(build_ext):
    """All extensions in one ninja run; setuptools only learns where the finished modules lie."""

    def build_extensions(self):
        check_tools()
        folder = build_folder()
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "build.ninja"
        script.write_text(ninja_file(self.extensions, folder))
        if subprocess.run([ninja_command(), "-f", str(script)]).returncode:
            hint = "" if len(self.extensions) == 1 else "; LAYERFUSED_CUDA_ARCHS=none leaves the CUDA engine out"
            raise CompileError(f"the native build failed, see the compiler's messages above{hint}")
        for ext in self.extensions:
            target = self.get_ext_fullpath(ext.name)
            self.mkpath(os.path.dirname(target))
            self.copy_file(f"{ext.path(folder)}.so", target)


setup(
    packages=[*find_packages(include=["layerfused", "layerfused.*"]), "layerfused.kernels"],
    package_dir={"layerfused.kernels": "kernels"},
    ext_modules=[cpu_engine(), *([cuda_engine(nvcc)] if (nvcc := find_nvcc()) else [])],
    cmdclass={"build_ext": NinjaBuild},
)
