"""A program of its own: drives the Triton engine without a GPU and without the interpreter, compiled for real.

`python triton_codegen.py TARGET` compiles every rule for cuda:80, cuda:90, cuda:100 or hip:gfx942 and prints what the
machine code is like, a JSON line per kernel. `python triton_codegen.py launches` runs steps against a driver that
compiles but does not launch, and prints what would have been launched.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from engines import ONE_PER_RULE, make, parameters, starts, step, tame
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layerfused import kernels, triton_engine
from layerfused.kernels import engine, tables

FP32, PLAIN = (torch.float32,) * 4, (0,) * 4
BF16 = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
FP16 = (torch.float16, torch.float16, torch.float32, torch.float32)
ALL_BF16 = (torch.bfloat16,) * 4
WITH_P32 = (torch.float32, torch.bfloat16, torch.float32, torch.float32)
EXAMPLE = Path(__file__).parent.parent / "examples" / "trust_lion.py"
STEP, WITHOUT_NORM, PIECES = 15, 14, (1, 2, 4, 6, 8)
PREDICT, UNCOUNTED = 16, 32
MASTER, REMAINDER, KAHAN, STOCHASTIC = 1, 2, 3, 4  # as in csrc/storage.h
REST = ("weight_decay", "ema", "damping", "max_step", "self_concordant", "signed_average", "reach", "base")
ROWS = {"sgd": ("lr", "momentum", *REST), "adam": ("lr", "beta1", "beta2", "eps", *REST)}


def signature():
    i, f, d, n = "*i64", "*fp32", "*fp64", "*i32"
    plan, given = tables.Plan(i, i, i, i), tables.Given(i, i, i, d, i, i, i, i)
    return tables.Table(plan, given, tables.Kept(f, d, d, d, d, i), tables.Work(n, d, f))


def rule_of(name):
    part, _, flavour = name.partition("_")
    if part in ("slope", "curvature"):
        return SimpleNamespace(name=name, hyper=ROWS[flavour], scalar="e", triton=getattr(kernels.rules, name))
    opt = make(name, parameters(starts((1,))))
    return opt.rule_of(opt.param_groups[0])


def ways():
    """Ways of storing p and v: each with a rule of two states, and of those with stats two that fill the registers."""
    for storage, kinds in {BF16: (MASTER, REMAINDER, KAHAN, STOCHASTIC), FP16: (KAHAN, STOCHASTIC)}.items():
        for kind in kinds:
            yield "adam-decay", {"phases": WITHOUT_NORM, "storage": storage, "ways": (kind, 0, 0, 0)}
    yield "lamb", {"phases": WITHOUT_NORM, "storage": ALL_BF16, "ways": (STOCHASTIC, 0, 0, STOCHASTIC)}
    yield "setadam-coupled", {"phases": WITHOUT_NORM, "storage": ALL_BF16, "ways": (REMAINDER, 0, 0, STOCHASTIC)}


def variants(target):
    """(rule's case, fields of the Spec): every rule as an ordinary step, and one of each kind in every other way."""
    for name in ONE_PER_RULE:
        rule = rule_of(name)
        mixed = rule.layerwise and not rule.needs_adapt
        yield name, {"phases": STEP, "clip": True, "mixed": mixed}
        yield name, {"phases": WITHOUT_NORM}
    for flavour in ROWS:
        yield f"slope_{flavour}", {"phases": 7, "clip": True, "live": True}
        yield f"curvature_{flavour}", {"phases": WITHOUT_NORM, "clip": True, "live": True, "leads": True}
    if target != "cuda:90":
        return
    yield from ways()
    yield "lamb", {"phases": STEP, "clip": True, "mixed": True, "leads": True}
    for flavour in ROWS:
        yield f"slope_{flavour}", {"phases": PREDICT | UNCOUNTED, "clip": True, "live": True, "leads": True}
    for name in ("lamb", "aida-k1", "adam-decay"):
        for storage in (BF16, FP16, WITH_P32):
            yield name, {"phases": WITHOUT_NORM, "storage": storage}
    for name in ("sgd", "adam-decay", "lamb"):
        yield name, {"phases": PREDICT, "leads": True}
    for name in ("sgd", "adam-decay", "aida-k1"):
        yield name, {"phases": WITHOUT_NORM, "leads": True}
    yield "setadam-coupled", {"phases": WITHOUT_NORM, "storage": BF16, "leads": True}
    yield "setadam-coupled", {"phases": PREDICT, "storage": FP16, "leads": True}
    yield "lamb", {"phases": WITHOUT_NORM, "live": True}
    for phases in PIECES:
        yield "lamb", {"phases": phases, "clip": phases == 1, "mixed": True}


def compiled(name, target, phases, clip=False, mixed=False, live=False, leads=False, storage=FP32, ways=PLAIN):
    rule = rule_of(name)
    types = tuple(triton_engine.TYPES[dtype] for dtype in storage)
    form, rest = triton_engine.triton_form(rule), (clip, live, bool(rule.scalar), mixed, leads, ways)
    spec = kernels.Spec(form, rule.hyper, types, triton_engine.TILE, phases, *rest)
    source = ASTSource(engine.run, {"t": signature(), "spec": "constexpr"}, {(1,): spec}, {})
    backend, arch = target.split(":")
    options = triton_engine.options()
    if backend == "hip":
        options.pop("maxnreg")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    return triton.compile(source, target=gpu, options=options)


def resources(kernel):
    """Registers and bytes of local memory a thread, as the machine code says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "local": int(usage["STACK"]) + int(usage["LOCAL"])}


def nvidia(kernel):
    text = kernel.asm["ptx"]
    pattern = r"^\s*(?:@!?%p\d+ )?((?:ld|st|atom|fence|div|sqrt|fma|mul|add|sub|bar)\.[\w.:]+)\s*([^;]*)"
    found = re.findall(pattern, text, re.M)
    words = Counter(word for word, _ in found)
    return {**resources(kernel), "words": words, "flushes": text.count(".ftz"), "hazards": hazards(found)}


def hazards(lines):
    """What a barrier should stand between, and does not, in the order of the text.

    release: stores of many threads, and one thread's release that speaks for them;
    acquire: one thread's acquire, and loads of many that rely on it;
    state: loads by all threads of a layer's float64 state, and the store of one that overwrites it.
    """
    found, stored, acquired, loaded = Counter(), False, False, set()
    for word, operands in lines:
        place = "".join(re.findall(r"\[(.*?)\]", operands))
        weak = "acquire" not in word and "acq_rel" not in word
        if word.startswith("bar"):
            stored, acquired, loaded = False, False, set()
        elif word.startswith("atom") and ("release" in word or "acq_rel" in word):
            found["release"] += stored
        elif word.startswith("st.global"):
            stored = True
            found["state"] += word.endswith("b64") and place in loaded
        elif word.startswith("ld.global") and weak:
            found["acquire"] += acquired
            loaded.add(place)
        acquired |= not weak
    return {kind: count for kind, count in found.items() if count}


def amd(kernel):
    text = kernel.asm["amdgcn"]
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", text))
    local = int(numbers["vgpr_spill_count"]) + int(numbers["private_segment_fixed_size"])
    words = Counter(re.findall(r"^\s*((?:global|flat|buffer|scratch|s_barrier|v_fma)\w*)", text, re.M))
    return {"registers": int(numbers["vgpr_count"]), "local": local, "words": words, "flushes": 0}


def compile_all(target):
    for name, fields in variants(target):
        began = time.perf_counter()
        kernel = compiled(name, target, **fields)
        seconds = time.perf_counter() - began
        found = nvidia(kernel) if target.startswith("cuda") else amd(kernel)
        shown = {**fields, "storage": [str(dtype) for dtype in fields.get("storage", ())]}
        line = {"rule": rule_of(name).name, "fields": shown, "seconds": round(seconds, 2), **found}
        print(json.dumps(line), flush=True)


class Driver:
    """Compiles for a target, loads nothing, and writes down what would have been launched."""

    def __init__(self, target):
        self.target, self.launched, self.utils, self.launcher_cls = target, [], self, self._launcher
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")
        self.get_device_properties = lambda device: {"max_shared_mem": 1 << 20, "multiprocessor_count": 1}

    def load_binary(self, name, binary, shared, device):
        return object(), object(), 0, 0, 1024

    def unload_module(self, module):
        pass

    def _launcher(self, source, metadata):
        return lambda *args, **kwargs: self.launched.append((args[:3], metadata.name))


def launches():
    """A step, then steps with other numbers: lr, weight decay, step and clip; other sizes; a tensor lr; a seed."""
    driver = Driver(GPUTarget("cuda", 90, 32))
    triton.runtime.driver.set_active(driver)
    kernels.INTERPRETED = True  # CPU tensors stand for a GPU's
    sizes, lines = (3, 1024, 1025, 9000), []
    params = parameters(starts(sizes))
    groups = [{"params": params[:2], "adapt": False}, {"params": params[2:]}]
    opt = make("lamb", groups, backend="triton", max_grad_norm=1.0)

    def take(label):  # a step of what `opt` is now
        before, launched, began = compilations(), len(driver.launched), time.perf_counter()
        step(opt, params, next(tame(sizes, 1)))
        seconds = time.perf_counter() - began
        lines.append({"what": label, "compiled": compilations() - before, "seconds": seconds})
        lines[-1]["launches"] = len(driver.launched) - launched

    take("first")
    take("again")
    for group in opt.param_groups:
        group["lr"] *= 0.5
        group["weight_decay"], group["betas"] = 0.3, (0.8, 0.95)
    take("other numbers")
    opt.defaults["max_grad_norm"] = 2.0
    opt.param_groups[0]["lr"] = 1.0
    take("other clip")
    params[0].grad = None
    take("gradients elsewhere")
    opt.param_groups[1]["lr"] = torch.tensor(1e-3)
    take("lr on the device")
    opt.param_groups[1]["lr"].fill_(2e-3)
    take("another lr on the device")
    opt.add_param_group({"params": parameters(starts((77,)))})
    params += opt.param_groups[-1]["params"]
    sizes = (*sizes, 77)
    take("one more group")
    lion = runpy.run_path(str(EXAMPLE))["TrustLion"]
    opt = lion(params, backend="triton")
    take("a rule of one's own")
    opt = edited_lion()(params, backend="triton")
    take("another rule whose functions have the same names")
    params = parameters(x.bfloat16() for x in starts(sizes))
    for p in params:
        p.grad_dtype = None
    opt = make("sgd", params, backend="triton", precision="stochastic")
    take("stochastic rounding")
    opt.param_groups[0]["seed"] = 1
    take("another seed")
    print(json.dumps(lines))


def edited_lion():
    """The example with another sign, as a notebook's cell that was edited and run again; names stay the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / EXAMPLE.name
        path.write_text(EXAMPLE.read_text().replace("x.p - c.step", "x.p + c.step"))
        return runpy.run_path(str(path))["TrustLion"]


def compilations():
    return sum(len(cache[0]) for cache in engine.run.device_caches.values())


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    launches() if sys.argv[1] == "launches" else compile_all(sys.argv[1])
