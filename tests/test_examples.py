"""The examples of integrations, each run as a user runs it, hold what they print: who serves, losses, resumed runs.

Left out: GPUs, several processes, other versions of the tools than those in constraints.txt.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(name, *arguments, needs=()):
    """What an example prints; the tensors are few and small, so one thread."""
    for package in needs:
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install '.[integrations]'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, output):
    """The groups of the one place where a pattern with `#` for numbers matches."""
    (found,) = re.findall(re.escape(pattern).replace(r"\#", r"(-?[\d.]+(?:e-?\d+)?)"), output)
    return tuple(map(float, found)) if isinstance(found, tuple) else float(found)


def one_native_call(output, tensors):
    return f"engines {{'cpu': {tensors}}} native calls a step 1" in output


def test_huggingface_trainer():
    output = run("huggingface_trainer", needs=["transformers", "accelerate"])
    first, last = numbers("\nloss # -> #\n", output)
    assert one_native_call(output, 21) and last < first / 2
    assert "the same resumed True" in output


def test_lightning_module():
    output = run("lightning_module", needs=["pytorch_lightning"])
    first, last, by_lightning = numbers("\nloss # -> # clipped by Lightning #\n", output)
    assert one_native_call(output, 4) and last < 0.75 * first
    assert "the same resumed True" in output
    # Lightning's norm is rounded to float32 and has 1e-6 added, far less than an ulp of bf16; unclipped is 4.6 % off
    assert by_lightning == pytest.approx(last, rel=2**-8)
    assert "torch's fused AdamW: The current optimizer, AdamW, does not allow for gradient clipping" in output


def test_accelerate_skipped():
    output = run("accelerate_skipped", needs=["accelerate"])
    saw = re.findall(r"Accelerate saw skipped (.*), steps (\d+), schedule (\d+)", output)
    assert saw == [("[]", "38", "40"), ("[0, 7]", "38", "38"), ("[]", "39", "40")]
    assert one_native_call(output, 2) and "without a scaler LAMB skipped 1\n" in output
    for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)\n", output):
        assert float(last) < float(first) / 10


def test_timm_recipe():
    output = run("timm_recipe")
    first, last = numbers("\nloss # -> #\n", output)
    assert one_native_call(output, 6) and "groups 6" in output and last < 0.75 * first
    assert "the same resumed True" in output


def test_tensorboard_layers(tmp_path):
    output = run("tensorboard_layers", tmp_path, needs=["tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    curve = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    layers = "0.weight 0.bias 2.weight 2.bias 3.weight 3.bias".split()
    assert sorted(curve) == sorted(
        ["loss", "grad_norm"]
        + [f"{name}/{layer}" for name in ("param_norm", "update_norm", "trust_ratio") for layer in layers]
    )
    assert all([step for step, _ in points] == list(range(9, 100, 10)) for points in curve.values())
    assert curve["loss"][-1][1] < curve["loss"][0][1] / 2
    for layer in layers:  # events are float32
        assert curve[f"trust_ratio/{layer}"][-1][1] == pytest.approx(numbers(f"\n{layer} #", output), rel=2**-23)
    assert one_native_call(output, 6)
