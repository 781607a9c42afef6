"""Errors of the Triton engine: what is missing and how to get it, before anything is written; launches that fail."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device_cases import there, written
from device_errors import *  # noqa: F403
from device_errors import Own
from engines import make, parameters, same_bits, starts, step, tame
from triton_cases import MARKS, Triton, counters, exchange, needs_interpreter, plans, train

import layerfused
from layerfused import backends

ENGINE, pytestmark = Triton, MARKS

# Without Triton


def refusal(prelude, asked="triton"):
    """What a process without interpreter and CUDA engine says when an engine is asked for, and of a GPU."""
    code = f"""
import sys, warnings
sys.modules["layerfused._cuda"] = None
{prelude}
import torch, layerfused
from layerfused import backends
from types import SimpleNamespace
p = torch.nn.Parameter(torch.ones(3))
try:
    print(layerfused.LAMB([p], backend={asked!r}).engines)
except Exception as error:
    print(type(error).__name__, error)
print("layerfused.kernels" in sys.modules)
on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=p.dtype, shape=p.shape, stride=p.stride)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    served = backends.choose({{**layerfused.LAMB([p]).param_groups[0]}}, layerfused.LAMB.rule, on_gpu)
print(served, *(w.message for w in caught))
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


GET = "torch >= 2.10 for CUDA brings it along, without it pip install 'triton>=3.6,<3.10'"
MISSING = {  # what stands in for Triton -> words of the message
    'sys.modules["triton"] = None': f"Triton is not installed: {GET}",
    'import triton; triton.__version__ = "3.5.1"': f"Triton 3.5.1 is too old, 3.6 or newer is needed: {GET}",
}


@pytest.mark.parametrize("prelude, words", MISSING.items(), ids=["none", "old"])
def test_no_triton(prelude, words):
    """Who asks for it by name gets an error, who does not gets a slower engine and is told."""
    refused, _, warned = refusal(prelude)
    assert refused == f"ValueError backend='triton' cannot serve a parameter of shape (3,): {words}; use 'auto'"
    assert warned.startswith("reference parameters on cuda go to the slow reference engine.") and words in warned


def test_no_interpreter_and_no_gpu():
    refused, _, on_gpu = refusal("")
    assert on_gpu == "triton"  # what `auto` says of a GPU, without a warning
    assert "ValueError backend='triton' cannot serve a parameter of shape (3,): the parameter is on cpu" in refused
    assert "it needs a GPU, or TRITON_INTERPRET=1 in the environment" in refused


def test_auto_on_the_cpu_needs_no_triton():
    """And does not wait for the import of our kernels (torch may have imported Triton itself)."""
    served, imported, _ = refusal("", "auto")
    assert (served, imported) == ("{'cpu': 1}", "False")


@needs_interpreter
def test_auto_stays_on_the_cpu_engine():
    """Even where the interpreter could serve."""
    assert make("lamb", parameters(starts((5,)))).engines == {"cpu": 1}


def test_a_group_of_several_types():
    params = parameters(there([torch.ones(3), torch.ones(4).bfloat16()]))
    with pytest.raises(ValueError, match="layer='group' over parameters of several types; use 'auto'"):
        layerfused.LAMB([{"params": params, "layer": "group"}], backend="triton")
    opt = layerfused.Adam([{"params": params, "layer": "group"}], backend="triton")  # has no layers
    assert opt.traffic()["launches"] == 2


def test_a_rule_without_triton_form():
    with pytest.raises(ValueError, match=r"rule 'own' has no Triton form: give its Rule one \(triton=\); use 'auto'"):
        Own(parameters(there(starts((3,)))), backend="triton")


@needs_interpreter
def test_a_device_that_triton_does_not_serve():
    p = SimpleNamespace(device=torch.device("meta"), dtype=torch.float32, shape=(3,))
    assert backends.triton_lacks({"layer": "tensor"}, layerfused.LAMB.rule, p) == (
        "the parameter is on meta: it needs a GPU"
    )


# Launches that fail


class Failure(Exception):
    pass


def fail_in(monkeypatch, where, left):
    """Lets a function of the kernel raise the next time it is called after `left` calls that succeed."""
    calls = iter(range(left, -1, -1))

    def fail(*arguments, **named):
        if next(calls) == 0:
            raise Failure(where)
        return original(*arguments, **named)

    original = exchange(monkeypatch, where, fail)


# In the middle of the norm, after some chunks were reduced, when a layer is finished, and in the middle of applying.
FAILURES = {  # the kernel's function, calls of it that succeed
    "norm": ("norm_chunk", 2), "reduce": ("keep_stats", 0), "finish": ("finish", 0), "apply": ("apply_chunk", 3),
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("name", ["lars", "lamb", "novograd-decay", "setadam-coupled"])
def test_a_launch_that_fails(name, where, monkeypatch):
    """It raises; p and states put back, the next step is as if it had not been."""
    plans(monkeypatch)
    sizes = (300, 140)
    first, second = tame(sizes, 2)
    opt, params = train(name, starts(sizes), [first], max_grad_norm=5.0)
    twin, others = train(name, starts(sizes), [first], max_grad_norm=5.0)
    before, keys = written(opt), opt.rule_of(opt.param_groups[0]).states
    with monkeypatch.context() as patch:
        fail_in(patch, *FAILURES[where])
        with pytest.raises(Exception, match="Failure"):
            step(opt, params, second)
    assert not counters(opt).any() and opt.skipped_steps == 0
    after = written(opt)
    if where == "norm":  # then nothing has been written at all
        same_bits(after, before)
    assert [after[f"{i}.step"] for i in range(2)] == [1, 1]
    put_back(opt, params, before, keys)
    step(opt, params, second)
    step(twin, others, second)
    same_bits(written(opt), written(twin))


def put_back(opt, params, before, keys):
    scalar = opt.rule_of(opt.param_groups[0]).scalar
    with torch.no_grad():
        for i, p in enumerate(params):
            p.copy_(before[f"{i}.p"])
            for key in (*keys, *((scalar,) if scalar else ())):
                opt.state[p][key].copy_(before[f"{i}.{key}"])


@needs_interpreter
@pytest.mark.parametrize("name", ["novograd-decay", "adabeliefnorm", "lars"])
def test_a_failure_in_the_first_sweep_of_a_rule_that_only_reads_there(name, monkeypatch):
    """Nothing is written, so nothing has to be put back."""
    plans(monkeypatch)
    first, second = tame((300,), 2)
    (opt, params), (twin, others) = (train(name, starts((300,)), [first]) for _ in range(2))
    before = written(opt)
    with monkeypatch.context() as patch:
        fail_in(patch, "keep_stats", 0)
        with pytest.raises(Exception, match="Failure"):
            step(opt, params, second)
    same_bits(written(opt), before)
    for one, own in ((opt, params), (twin, others)):
        step(one, own, second)
    same_bits(written(opt), written(twin))


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_a_copy_to_the_device_that_fails(name, monkeypatch):
    """What the host says is sent again by the next step, though it is what was sent last."""
    plans(monkeypatch)
    first, second = tame((5, 300), 2)
    (opt, params), (twin, others) = (train(name, starts((5, 300)), [first]) for _ in range(2))
    launch = opt._launches[0]
    before, device = written(opt), launch._device

    class Broken:
        def copy_(self, *_, **__):
            device.fill_(-1)
            raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_device", Broken())
        with pytest.raises(Failure):
            step(opt, params, there(second))
    same_bits(written(opt), before)
    for one, own in ((opt, params), (twin, others)):
        step(one, own, there(second))
    same_bits(written(opt), written(twin))
