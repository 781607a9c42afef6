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


RULES = {case.rule: rule_of(case.name) for case in CASES}


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
    assert (reads | late_reads) & ~(P | G) == states == (writes | late_writes) & ~P
    assert writes & (P | G) == 0 and late_writes & (P | G) == P  # stats are of the old p
    assert writes & ~reads == 0 and late_writes & ~late_reads == 0
    assert writes & late_writes == 0  # each operand is written once


@pytest.mark.parametrize("name", RULES)
def test_a_row_has_the_order_of_the_header(name):
    group = re.search(r"struct Group {\s*double (.*?);\s*}", (RULE_HEADERS / f"{name}.h").read_text(), re.S)[1]
    assert tuple(re.findall(r"\w+", group)) == RULES[name].hyper


@pytest.mark.parametrize("name", NAMED)
def test_rows_hold_the_hyper_parameters(name):
    """Behind the gradient's sign, as the tests' own table of cases has them."""
    for maximize, sign in ((False, 1.0), (True, -1.0)):
        opt = make(name, parameters(starts((1,))), maximize=maximize)
        ((found, *row),) = opt._rows(opt._current()[0])
        assert found == sign
        assert dict(zip(RULES[NAMED[name].rule].hyper, map(float, row), strict=True)) == NAMED[name].hyper
