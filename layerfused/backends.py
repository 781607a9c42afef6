"""Which engine serves which parameter: one explicit table, and errors that say what is missing."""

import warnings
from functools import cache
from importlib import import_module

import torch

from .forms import has_native_form, triton_form
from .launch import STORAGE
from .rule import Rule
from .table import is_dense, rows_outermost

# By the parameter's device, in order; last of all the reference engine.
AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def layout_lacks(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """Why an engine that works on addresses cannot serve a parameter; "" if it can."""
    if p.dtype not in STORAGE:
        return f"it works on float32, bfloat16 and float16, not on {p.dtype}"
    if not is_dense(p):
        return f"strides {p.stride()} leave gaps in memory or overlap"
    if rule.layerwise and group["layer"] not in ("tensor", "group") and not rows_outermost(p):
        return f"with strides {p.stride()} the rows of dimension 0 are no stretches of memory"
    return ""


def cpu_lacks(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """Why the CPU engine cannot serve a parameter, with the remedy; "" if it can."""
    if not has_native_form(rule):
        return f"rule {rule.name!r} has no native form"
    if p.device.type != "cpu":
        return f"the parameter is on {p.device}"
    return layout_lacks(group, rule, p)


@cache
def cuda_is_missing() -> str:
    """Why there is no CUDA engine to use, with the remedy; "" if there is."""
    try:
        import_module("._cuda", __package__)
    except ModuleNotFoundError:
        return "the CUDA engine was not built: install layerfused from source where nvcc is found (CUDA_HOME or PATH)"
    except ImportError as error:
        return f"the CUDA engine does not load: {error}"
    return ""


@cache
def unserved_gpu(device: torch.device) -> str:
    """Why the CUDA engine has no code for a device, with the remedy; "" if it has."""
    from ._cuda import ARCHITECTURES

    if device.type != ("cpu" if ARCHITECTURES == "host" else "cuda"):  # "host" is the tests' build
        return f"the parameter is on {device}: it needs a GPU"
    if device.type == "cpu":
        return ""
    built = [divmod(int(arch), 10) for arch in ARCHITECTURES.split()]
    major, minor = found = torch.cuda.get_device_capability(device)
    if found >= built[-1] or any(arch[0] == major and arch[1] <= minor for arch in built):
        return ""  # machine code serves later minor numbers, and PTX of the last one whatever comes after it
    remedy = f"set LAYERFUSED_CUDA_ARCHS={major}{minor} and install again"
    return f"the GPU has compute capability {major}.{minor}, the engine was built for {ARCHITECTURES}: {remedy}"


def cuda_lacks(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """Why the CUDA engine cannot serve a parameter, with the remedy; "" if it can."""
    if cuda_is_missing():
        return cuda_is_missing()
    if not has_native_form(rule):
        return f"rule {rule.name!r} has no native form"
    return unserved_gpu(p.device) or layout_lacks(group, rule, p)


@cache
def triton_is_missing() -> str:
    """Why there is no Triton to use, with the remedy; "" if there is. A failed import is not tried again."""
    try:
        from . import kernels  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def triton_lacks(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """Why the Triton engine cannot serve a parameter, with the remedy; "" if it can."""
    if triton_is_missing():
        return triton_is_missing()
    from .kernels import INTERPRETED

    if p.device.type != "cuda" and not (INTERPRETED and p.device.type == "cpu"):
        interpreter = ", or TRITON_INTERPRET=1 in the environment" if p.device.type == "cpu" else ""
        return f"the parameter is on {p.device}: it needs a GPU{interpreter}"
    if triton_form(rule) is None:
        return f"rule {rule.name!r} has no Triton form: give its Rule one (triton=)"
    if group["layer"] == "group" and rule.layerwise and len({q.dtype for q in group["params"]}) > 1:
        return "layer='group' over parameters of several types"
    return layout_lacks(group, rule, p)


LACKS = {"cpu": cpu_lacks, "cuda": cuda_lacks, "triton": triton_lacks}


def choose(group: dict, rule: Rule, p: torch.Tensor) -> str:
    """The engine for a parameter: the one its group asks for, or the first that can serve it.

    Raises:
        ValueError: if an engine is asked for by name that cannot serve.
    """
    asked = group["backend"]
    plain = group["differentiable"] or group["foreach"] or group["fused"] is False
    if plain and asked not in ("auto", "reference"):
        raise ValueError(f"backend={asked!r} cannot serve differentiable=True, foreach=True or fused=False: use 'auto'")
    if plain or asked == "reference":
        return "reference"
    if asked == "auto":
        return _automatic(group, rule, p)
    if asked not in LACKS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *LACKS, 'reference')))}, got {asked!r}")
    lacks = LACKS[asked](group, rule, p)
    if lacks:
        raise ValueError(f"backend={asked!r} cannot serve a parameter of shape {tuple(p.shape)}: {lacks}; use 'auto'")
    return asked


def _automatic(group: dict, rule: Rule, p: torch.Tensor) -> str:
    engines = AUTO.get(p.device.type, ())
    reasons = [_missing(engine, p.device) for engine in engines]
    if engines and all(reasons):  # a hundredfold slower than with either
        text = f"parameters on {p.device} go to the slow reference engine. {'; '.join(reasons)}"
        warnings.warn(text, stacklevel=2)
    return next((engine for engine in engines if not LACKS[engine](group, rule, p)), "reference")


def _missing(engine: str, device: torch.device) -> str:
    """Why an engine serves nothing at all on a device, with the remedy; "" if it can."""
    if engine == "cuda":
        return cuda_is_missing() or unserved_gpu(device)
    return triton_is_missing() if engine == "triton" else ""


def engines_of(group: dict, rule: Rule) -> list[str]:
    """The engine of each parameter of a group; one for all where they are one layer."""
    engines = [choose(group, rule, p) for p in group["params"]]
    if group["layer"] != "group" or not rule.layerwise:
        return engines
    devices = {p.device for p in group["params"]}
    if len(devices) > 1:
        raise ValueError(f"layer='group' needs all tensors of the group on one device, got {sorted(map(str, devices))}")
    return ["reference"] * len(engines) if "reference" in engines else engines


def launch_of(engine: str):
    """The class that runs an engine. Triton's takes a second to import, so only who uses it waits."""
    if engine == "triton":
        from .triton_engine import TritonLaunch as chosen
    elif engine == "cuda":
        from .cuda import CudaLaunch as chosen
    elif engine == "cpu":
        from .cpu import CpuLaunch as chosen
    else:
        from .reference_engine import ReferenceLaunch as chosen
    return chosen
