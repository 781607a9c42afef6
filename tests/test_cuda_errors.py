"""Errors of the CUDA engine: what is missing and how to get it, before anything is written (device_errors.py, too)."""

import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch
from cuda_cases import Cuda, _cuda, native_engine, on_host, train
from device_cases import DEVICE, there, written
from device_errors import *  # noqa: F403
from device_errors import Own
from engines import make, parameters, same_bits, starts, step, tame

from layerfused import backends
from layerfused.plan import LayerSpec, Span, make_plan

ENGINE = Cuda

# Without the engine


def refusal(prelude):
    """What a process without it says when it is asked for, and what `auto` says of a GPU."""
    code = f"""
import sys, warnings
{prelude}
import torch, layerfused
from layerfused import backends
from types import SimpleNamespace
p = torch.nn.Parameter(torch.ones(3))
try:
    layerfused.LAMB([p], backend="cuda")
except ValueError as error:
    print(error)
backends.unserved_gpu = lambda device: ""
on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=p.dtype, shape=p.shape, stride=p.stride)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(backends.choose({{**layerfused.LAMB([p]).param_groups[0]}}, layerfused.LAMB.rule, on_gpu))
print(*(w.message for w in caught))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


NOT_BUILT = "the CUDA engine was not built: install layerfused from source where nvcc is found (CUDA_HOME or PATH)"
GONE = 'sys.modules["layerfused._cuda"] = None'
BROKEN = """
class Broken:
    def find_spec(self, name, *_):
        if name == "layerfused._cuda":
            raise ImportError("libx.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""
REASONS = {"not built": (GONE, NOT_BUILT), "broken": (BROKEN, "the CUDA engine does not load: libx.so: cannot open")}


@pytest.mark.skipif(bool(backends.triton_is_missing()), reason=backends.triton_is_missing())
@pytest.mark.parametrize("kind", REASONS)
def test_no_cuda_engine(kind):
    """Who asks for it by name gets an error with the remedy, `auto` falls to Triton without a word."""
    prelude, words = REASONS[kind]
    refused, on_gpu, warned = refusal(prelude)
    assert refused.startswith(f"backend='cuda' cannot serve a parameter of shape (3,): {words}")
    assert refused.endswith("; use 'auto'") and (on_gpu, warned) == ("triton", "")


def test_neither_engine():
    """`auto` goes on with the reference, and says what would be a hundredfold faster."""
    _, on_gpu, warned = refusal(f'{GONE}\nsys.modules["triton"] = None')
    assert on_gpu == "reference" and warned.startswith("parameters on cuda go to the slow reference engine. ")
    assert NOT_BUILT in warned and "Triton is not installed" in warned


BUILT = "80 90 100"
SERVED = {(8, 0): True, (8, 6): True, (8, 9): True, (9, 0): True, (10, 0): True, (10, 3): True, (12, 0): True,
          (7, 5): False, (7, 0): False, (6, 1): False}  # fmt: skip


@pytest.mark.parametrize("capability", SERVED, ids=str)
def test_gpus_that_the_engine_was_built_for(capability, monkeypatch):
    """Machine code of 8.0 serves 8.6, PTX of 10.0 whatever comes later."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_cuda, "ARCHITECTURES", BUILT)
    said = backends.unserved_gpu.__wrapped__(torch.device("cuda"))
    major, minor = capability
    assert said == (
        ""
        if SERVED[capability]
        else f"the GPU has compute capability {major}.{minor}, the engine was built for {BUILT}: "
        f"set LAYERFUSED_CUDA_ARCHS={major}{minor} and install again"
    )


def test_a_gpu_between_what_the_engine_was_built_for(monkeypatch):
    """Code of 8.6 does not run on 8.0, and PTX of 9.0 neither."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(_cuda, "ARCHITECTURES", "86 90")
    assert "set LAYERFUSED_CUDA_ARCHS=80 " in backends.unserved_gpu.__wrapped__(torch.device("cuda"))


# Parameters that cannot be served


def test_a_rule_of_ones_own():
    with pytest.raises(ValueError, match="rule 'own' has no native form; use 'auto'"):
        Own(parameters(there(starts((3,)))), backend="cuda")


def test_a_device_that_the_engine_does_not_serve():
    params = [torch.nn.Parameter(torch.ones(3, device="meta"))]
    with pytest.raises(ValueError, match="the parameter is on meta: it needs a GPU; use 'auto'"):
        make("lamb", params, backend="cuda")


@on_host
def test_auto_stays_on_the_cpu_engine():
    """Even where the host's build could serve."""
    assert make("lamb", parameters(starts((5,)))).engines == {"cpu": 1}


# The native engine's own doors


def packed(sizes=(5, 300), whole=_cuda.WHOLE, chunk=4096):
    specs = [LayerSpec((Span(i, 0, n),), 0, True) for i, n in enumerate(sizes)]
    return make_plan(specs, chunk=chunk, whole=whole, ahead=4096, norm=True).packed()


def test_a_rule_that_nobody_knows():
    with pytest.raises(ValueError, match="the CUDA engine has no rule named 'lamp'"):
        native_engine("lamp", *packed(), 2, 1)


def test_it_has_the_rules_of_the_package():
    from layerfused import _cpu

    assert sorted(_cuda.rules()) == sorted(_cpu.rules())


def test_a_layer_on_chip_that_is_too_large():
    native_engine("lamb", *packed((_cuda.WHOLE,)), 1, 1)
    for sizes, chunk in (((5, _cuda.WHOLE + 1), 2**20), ((2**32 + 5,), 2**40)):
        plan = packed(sizes, whole=2**40, chunk=chunk)
        with pytest.raises(ValueError, match=f"a layer of more than {_cuda.WHOLE} elements does not stay on chip"):
            native_engine("lamb", *plan, len(sizes), 1)


def test_chunks_that_a_launch_cannot_count():
    with pytest.raises(ValueError, match="too many elements for one launch"):
        native_engine("lamb", *packed((2**32 + 5,), chunk=2**31), 1, 1)


def test_tables_that_are_not_rows():
    items, chunks, layers = packed()
    with pytest.raises(ValueError, match="not a whole number of 8-byte rows"):
        native_engine("lamb", items[:-1], chunks, layers, 2, 1)
    with pytest.raises(ValueError, match="not a whole number of 8-byte rows"):
        native_engine("lamb", items, array("i", chunks), layers, 2, 1)
    with pytest.raises(IndexError):  # a chunk of a layer that is not there
        native_engine("lamb", items, chunks, layers[: len(layers) // 2], 2, 1)


COLUMNS = {"addresses": 8, "types": 2, "numbers": 12, "places": 12, "predicted": 2}  # two tensors, one group of LAMB


@pytest.mark.parametrize("short", COLUMNS)
def test_columns_of_another_length(short):
    """Told with what is needed and what came, and before anything is read."""
    native = native_engine("lamb", *packed(), 2, 1)
    columns = [array("d" if name == "numbers" else "q", bytes(8 * n)) for name, n in COLUMNS.items()]
    columns[list(COLUMNS).index(short)].pop()
    needed = COLUMNS[short]
    with pytest.raises(ValueError, match=f"{short} needs {needed} numbers of 8 bytes, got {needed - 1}"):
        native.give(0, *columns)


@pytest.mark.parametrize("short", ["rests", "seeds", "places"])
def test_columns_of_precision_of_another_length(short):
    columns = {name: array("q", bytes(8 * (2 - (name == short)))) for name in ("rests", "seeds", "places")}
    with pytest.raises(ValueError, match=f"{short} needs 2 numbers of 8 bytes, got 1"):
        native_engine("lamb", *packed(), 2, 1).set_precision(*columns.values())


# Memory that is not there


def unreported(opt):
    """What a step has written, but for what it said of its layers: new tables have said nothing yet."""
    return {key: value for key, value in written(opt).items() if "report" not in key}


@pytest.mark.parametrize("kind", ["group", "step"])
def test_a_workspace_that_cannot_be_had(kind, monkeypatch):
    """The optimizer is as it was, and goes on."""
    first, second = tame((5, 300), 2)
    (opt, params), (twin, others) = (train("lamb", starts((5, 300)), [first]) for _ in range(2))
    before = unreported(opt)
    late = torch.nn.Parameter(starts((7,))[0].to(DEVICE))
    zeros = torch.zeros

    def none_left(*shape, **options):
        if options.get("dtype") == torch.uint8:
            raise torch.OutOfMemoryError("no memory for the workspace")
        return zeros(*shape, **options)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="no memory"):
        patch.setattr(torch, "zeros", none_left)
        if kind == "group":
            opt.add_param_group({"params": [late]})
        else:
            opt.state[params[1]]["exp_avg"] = opt.state[params[1]]["exp_avg"].clone()
            step(opt, params, there(second))
    same_bits(unreported(opt), before)
    assert opt.engines == {"cuda": 2} and late not in opt.state
    for one, own in ((opt, params), (twin, others)):
        step(one, own, there(second))
    same_bits(written(opt), written(twin))
