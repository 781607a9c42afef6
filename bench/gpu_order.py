"""The order of the parts of `python -m bench gpu`, most important first, and what keeps one from being run."""

import ast
import os
import shutil
import sys
from importlib.util import find_spec

from .gpu_parts import METRICS, RIVALS, ROOT, Counters, Model, Part, Rows, Sanitizer, Tests, Tune

BACKENDS = ("cuda", "triton")
CORE = ("LAMB(max_grad_norm=None)", "AdamW", "LARS", "NovoGrad")
REST = (
    "LAMB", "Aida", "SETAdam", "SGD(momentum=0.9)", "AdaBelief", "AdaM3", "LAdam", "LAdam(processing='post')",
    "AdamNorm",
)  # fmt: skip
FIRST = (("bert-large", "fp32"), ("resnet50", "fp32"))
LATER = tuple((shapes, "fp32") for shapes in ("gpt2", "many-small", "llama-8b-slice")) + tuple(
    (shapes, "bf16") for shapes in ("bert-large", "resnet50", "gpt2", "many-small", "llama-8b-slice")
)
LATER_TESTS = ("triton_gpu", "triton_*", "own_rule", "bench_device", "bench_tune")


def absent(path):
    """Packages that a test file imports, itself or through the tests' own modules, and that are not installed."""
    todo, seen, lacking = [path], {path}, set()
    while todo:
        for name in imported(ast.parse(todo.pop().read_text())):
            own = path.parent / f"{name}.py"
            if own.exists():
                todo += {own} - seen
                seen.add(own)
            elif find_spec(name) is None:
                lacking.add(name)
    return sorted(lacking)


def imported(tree):
    """Top names of a module's unconditional imports."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def tool(name):
    """A command of the CUDA toolkit, and why it cannot be called."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(f"{place}/bin" for place in places))
    return found or name, "" if found else f"{name} was not found"


def build(capability):
    env = {"LAYERFUSED_CUDA_ARCHS": "".join(map(str, capability))}
    return Part("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 20, 240, env=env)


def steps(backend, missing):
    command = (sys.executable, "-m", "bench.sanitized", "--backend", backend)
    return Tests(f"steps {backend}", command, 10, 150, missing)


def tests(pattern, missing=""):
    """One part per file, so that one which hangs or crashes takes no other along."""
    found = sorted((ROOT / "tests").glob(pattern))
    for path in found:
        lacking = ", ".join(absent(path))
        reason = missing or (f"it needs {lacking}, not installed" if lacking else "")
        command = (sys.executable, "-m", "pytest", "-q", f"tests/{path.name}")
        yield Tests(f"tests/{path.name}", command, 15, 150, reason)
    if not found:
        yield Tests(f"tests/{pattern}", missing="there is no such file")


def rows(where, texts, group, lacks):
    """Every optimizer with every backend that is there, and torch's beside them."""
    backends = [backend for backend in BACKENDS if not lacks[backend]]
    missing = "" if backends else "; ".join(lacks.values())
    own = tuple(on_backend(text, backend) for backend in backends for text in texts)
    for shapes, dtype in where:
        name, size = f"rows {shapes} {dtype} {group}", len(own) + len(RIVALS)
        yield Rows(name, (), 8 + size, 60 + 6 * size, missing, shapes=shapes, dtype=dtype, optimizers=own)


def on_backend(text, backend):
    """The spec of an optimizer with its backend as the last option."""
    name, _, options = text.rstrip(")").partition("(")
    return f"{name}({options}, backend='{backend}')" if options else f"{name}(backend='{backend}')"


def sanitizers(missing):
    command, absent = tool("compute-sanitizer")
    for name in ("memcheck", "racecheck"):
        words = (command, "--tool", name, "--error-exitcode", "9", *steps("cuda", "").command)
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # see bench/sanitized.py
        yield Sanitizer(name, words, 30, 120, missing or absent, env)


def counted(lacks):
    """ncu on one step. Clocks stay as they are; it empties the caches before each of its passes over the kernel."""
    command, absent = tool("ncu")
    flags = ("--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off")
    for text in ("LAMB(max_grad_norm=None)", "AdamW"):
        for backend in BACKENDS:
            program = (sys.executable, "-m", "bench.profiled", "bert-large", on_backend(text, backend))
            words = (command, *flags, "--metrics", ",".join(METRICS.values()), *program)
            yield Counters(f"ncu {text} {backend}", words, 20, 90, lacks[backend] or absent)


def ordered(lacks, results):
    """All parts behind the build, most important first.

    Args:
        lacks: why a backend is not there, "" where it is; by name.
        results: the file that the parts before have filled.
    """
    model = (sys.executable, "-m", "bench", "model", "--measured", str(results))
    every_file = [part for name in LATER_TESTS for part in tests(f"test_{name}.py", lacks["triton"])]
    return [
        steps("cuda", lacks["cuda"]),
        *tests("test_cuda_*.py", lacks["cuda"]),
        *rows(FIRST, CORE, "core", lacks),
        steps("triton", lacks["triton"]),  # here because it compiles every rule, about a minute
        *sanitizers(lacks["cuda"]),
        *counted(lacks),
        *rows(LATER, CORE, "core", lacks),
        *rows(FIRST + LATER, REST, "rest", lacks),
        *{part.name: part for part in every_file}.values(),
        Tune("tune cuda", (), 60, 120, lacks["cuda"]),
        Tune("tune triton", (), 60, 600, lacks["triton"]),
        Model("model", model, 120, 600),  # last: it needs no GPU, and can be called later as well
    ]
