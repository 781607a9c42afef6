"""What an engine says of its rules, and the traffic that follows from it."""

import re
from pathlib import Path

import pytest
from cases import CASES
from engines import NAMED, make, parameters, starts

import layerfused
from layerfused import _cpu

RULE_HEADERS = Path(__file__).parent.parent / "csrc/rules"
P, G, M, V = 1, 2, 4, 8  # bits of a sweep's masks, as in csrc/rule.h


# design.md, "What it costs": words per element, kept in cache / in two sweeps; a global norm reads g once more.
WORDS = {
    "LAMB(max_grad_norm=None)": (7, 10),
    "LAMB()": (8, 11),
    "LAMBC()": (7, 10),
    "Adam()": (7, 7),
    "Adam(weight_decay=0.1)": (7, 7),
    "AdaBelief()": (7, 7),
    "SGD()": (3, 3),
    "SGD(momentum=0.9)": (5, 5),
    "LARS()": (5, 7),
    "NovoGrad()": (5, 6),
    "Aida()": (7, 9),
    "Aida(weight_decay=0.1)": (7, 10),
    "Aida(weight_decay=0.1, decoupled=True)": (7, 9),
    "SETAdam()": (7, 9),
    "SETAdam(weight_decay=0.1)": (7, 10),
    "SETAdam(weight_decay=0.1, decoupled=True)": (7, 9),
    "AdamNorm()": (7, 8),
}


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("text", WORDS)
def test_traffic(text, backend):
    """In words an element; on Triton a layer of 24 is read and written once."""
    cls, _, arguments = text.partition("(")
    names = {"cls": getattr(layerfused, cls), "params": parameters(starts((5000, 24)))}
    opt = eval(f"cls(params, backend={backend!r}, {arguments}", names)
    once, asked = WORDS[text]
    small = once if backend == "triton" else asked
    requested = 4 * (5000 * asked + 24 * small)
    assert opt.traffic() == {"compulsory": 4 * 5024 * once, "requested": requested, "launches": 1}


def rule_of(name):
    opt = make(name, parameters(starts((1,))))
    return opt.rule_of(opt.param_groups[0])


CURVATURE = (layerfused.CurvatureSGD, layerfused.CurvatureAdamW)
RULES = {case.rule: rule_of(case.name) for case in CASES}
RULES |= {rule.name: rule for cls in CURVATURE for rule in (cls.rule, cls.second)}


def test_the_engine_has_the_rules_of_the_package():
    assert set(_cpu.rules()) == set(RULES) == {path.stem for path in RULE_HEADERS.glob("*.h")}


@pytest.mark.parametrize("name", RULES)
def test_python_and_engine_agree_in_a_rule(name):
    rule, native = RULES[name], _cpu.rules()[name]
    assert rule.name == name
    assert native["hyper"] == len(rule.hyper) and native["reports"] == len(rule.report)
    assert rule.layerwise == (native["sums"] + native["minima"] > 0)
    (reads, writes), (late_reads, late_writes) = native["reduce"], native["apply"]
    states = M * (len(rule.states) > 0) | V * (len(rule.states) > 1)
    if name.startswith("slope"):  # leaves the update to a second launch, which has no moments
        assert late_writes == 0 and (reads, writes, late_reads) == (P | G | states, states, states)
        return
    if name.startswith("curvature"):
        assert (reads, writes, late_reads, late_writes) == (G | states, 0, P | states, P)
        return
    assert (reads | late_reads) & ~(P | G) == states == (writes | late_writes) & ~P
    assert writes & (P | G) == 0 and late_writes & (P | G) == P  # stats are of the old p
    assert writes & ~reads == 0 and late_writes & ~late_reads == 0
    assert writes & late_writes == 0  # each operand is written once


def row_of(name):
    """The fields of a header's Group, in which the curvature rules have a struct that they share."""
    text = (RULE_HEADERS / f"{name}.h").read_text()
    if same := re.search(r"using Group = (\w+)::Group", text):
        return row_of(same[1])
    group = re.search(r"struct Group {(.*?)}", text, re.S)[1]
    shared = (RULE_HEADERS.parent / "curvature.h").read_text()
    settings = re.search(r"struct Settings {(.*?)}", shared, re.S)[1]
    fields = re.sub("//.*", "", group.replace("curvature::Settings settings;", settings))
    return tuple(re.findall(r"\w+", re.sub(r"\bdouble\b", "", fields)))


@pytest.mark.parametrize("name", RULES)
def test_a_row_has_the_order_of_the_header(name):
    assert row_of(name) == RULES[name].hyper


@pytest.mark.parametrize("name", NAMED)
def test_rows_hold_the_hyper_parameters(name):
    """Behind the gradient's sign, as the tests' own table of cases has them."""
    for maximize, sign in ((False, 1.0), (True, -1.0)):
        opt = make(name, parameters(starts((1,))), maximize=maximize)
        ((found, *row),) = opt._rows(opt._current()[0])
        assert found == sign
        assert dict(zip(RULES[NAMED[name].rule].hyper, map(float, row), strict=True)) == NAMED[name].hyper
