"""A rule of somebody's own, as examples/trust_lion.py writes it: one launch in Triton, the reference anywhere."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from device_cases import DEVICE, there
from engines import all_within, parameters, starts, step, tame
from triton_cases import MARKS, counters, plans

pytestmark = MARKS
EXAMPLE = Path(__file__).parent.parent / "examples" / "trust_lion.py"
SIZES = (0, 1, 17, 64, 300)


@pytest.fixture(scope="module")
def rule():
    return runpy.run_path(str(EXAMPLE))


def run(example, values, to=lambda x: x, **more):
    params = parameters([to(value) for value in values])
    groups = [{"params": params[:3]}, {"params": params[3:4], "adapt": False}, {"params": params[4:]}]
    opt = example["TrustLion"](groups, lr=0.01, **more)
    for grads in tame(SIZES, 10):
        step(opt, params, [to(g) for g in grads])
    return opt, params


@pytest.mark.parametrize("grid", [1, 3])
def test_one_launch_and_the_reference_agree(rule, monkeypatch, grid):
    """The bound of algorithms.md, section 6, against the rule's own torch form in float64."""
    plans(monkeypatch, grid=grid)
    values = starts(SIZES)
    opt, params = run(rule, values, lambda x: there([x])[0], backend="triton")
    exact, twins = run(rule, values, lambda x: x.double())
    assert opt.engines == {"triton": len(SIZES)} and exact.engines == {"reference": len(SIZES)}
    assert opt.traffic()["launches"] == 1 and not counters(opt).any()
    all_within([p.detach().cpu() for p in params], twins, values)
    for one, other in zip(opt.layer_stats().values(), exact.layer_stats().values(), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_other_engines_say_what_is_missing(rule):
    with pytest.raises(ValueError, match="rule 'trust_lion' has no native form"):
        rule["TrustLion"](parameters(starts((3,))), backend="cpu")
    bare = rule["lf"].Rule(**{**vars(rule["TrustLion"].rule), "triton": None})
    bare_class = type("Bare", (rule["TrustLion"],), {"rule": bare})
    with pytest.raises(ValueError, match=r"rule 'trust_lion' has no Triton form: give its Rule one \(triton=\)"):
        bare_class(parameters(there(starts((3,)))), backend="triton")


def test_weight_prediction_needs_a_direction_in_each_form(rule):
    cls, params = rule["TrustLion"], there(starts((3,)))
    with pytest.raises(ValueError, match="TrustLion has nothing to predict weights from: give its lf.Rule a `dir"):
        rule["lf"].XGrad(cls(parameters(params), backend="triton"))
    half = rule["lf"].Rule(**{**vars(cls.rule), "direction": lambda s, h, t, report: (h.lr, s["exp_avg"])})
    half_class = type("Half", (cls,), {"rule": half})
    with pytest.raises(ValueError, match="the Triton form of rule 'trust_lion' has no `direction`"):
        rule["lf"].XGrad(half_class(parameters(params), backend="triton"))
    rule["lf"].XGrad(half_class(parameters(params), backend="reference"))


def test_the_example_runs():
    """As a user runs it, without the interpreter; the loss falls."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5
    assert str({"triton" if DEVICE == "cuda" else "reference": 4}) in done.stdout
