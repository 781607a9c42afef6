"""Bad input to constructors and to load_state_dict gets an error that names value and remedy, and nothing is lost.

Bad input that shows itself in step() is in test_step_errors.py.
"""

import math
import re
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conduct import EACH, assert_same, each_case, make, parameters, snapshot, train
from torch.nn import Parameter

import layerfused as lf
from layerfused.gradients import check_gradient

NAN, INF = math.nan, math.inf
NOT_NEGATIVE = ((-1.0, NAN, INF, -INF), "[0, inf)")
POSITIVE = ((0.0, -1.0, NAN, INF), "(0, inf)")
FRACTION = ((-0.1, 1.0, NAN, INF), "[0, 1)")
OUT = {  # name -> (values out of range, the range as the message has it)
    "lr": NOT_NEGATIVE, "momentum": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "eps": NOT_NEGATIVE,
    "dampening": ((NAN, INF, -INF), "(-inf, inf)"), "trust_coefficient": POSITIVE, "xi": POSITIVE,
    "tau": FRACTION, "gamma": FRACTION, "max_grad_norm": POSITIVE, "k": ((-1, 1.5, NAN, True, "2"), ">= 0"),
    "processing": (("middle", None), "'pre', 'post'"), "backend": (("gpu", None), "'auto'"),
    "adapt": (("yes", 2), "True, False or None"),
    "layer": (("row", 0, -2, 1.5, (), (2, 0), None, True, ("a",)), "row counts"),
    "trust_clip": ((-1.0, NAN, (2.0, 1.0), (-1.0, 1.0), (NAN, 1.0), (1.0, NAN), (1.0, 2.0, 3.0), "1"), "0 <= lower <= upper"),
}  # fmt: skip
FREE = {"betas", "nesterov", "decoupled", "rectify", "lr_in_momentum", "larc", "bias_correction", "grad_averaging",
        "maximize", "differentiable", "foreach", "fused", "capturable"}  # fmt: skip
IN_GROUPS_ONLY = ("adapt", "layer")


def refused(kind, *words):
    """Raises this error with every word in its message."""
    return pytest.raises(kind, match="".join(f"(?=(?s:.*){re.escape(str(word))})" for word in words))


@each_case
def test_hyper_parameters_out_of_range(case):
    known = make(case, parameters()).defaults
    assert known.keys() <= OUT.keys() | FREE, "a hyper-parameter without a test"
    for name in known.keys() & OUT.keys():
        values, text = OUT[name]
        if name == "eps" and make(case, parameters()).positive_eps:
            values, text = POSITIVE
        for value in values:
            with refused((ValueError, TypeError), name, value, text):
                if name not in IN_GROUPS_ONLY:
                    make(case, parameters(), **{name: value})
                make(case, [{"params": parameters(), name: value}])
        if case.cls != "LAMB" and name == "max_grad_norm":
            assert known[name] is None


@pytest.mark.parametrize("case", [c for c in EACH if "beta1" in c.hyper], ids=lambda case: case.name)
def test_betas_out_of_range(case):
    for value in FRACTION[0]:
        for number in (1, 2):
            betas = (value, 0.9) if number == 1 else (0.9, value)
            with refused(ValueError, f"beta{number}", value, "[0, 1)"):
                make(case, parameters(), betas=betas)
    for betas in (0.9, (0.9,), (0.9, 0.9, 0.9), None):
        with refused(ValueError, "betas", betas, "[0, 1)"):
            make(case, parameters(), betas=betas)


@each_case
def test_what_is_no_number(case):
    for value in ("1e-3", None, True, 1j, [1e-3]):
        with refused(TypeError, "lr", value, "[0, inf)"):
            make(case, parameters(), lr=value)
    with refused(ValueError, "lr", "(2,)"):
        make(case, parameters(), lr=torch.tensor([0.1, 0.2]))
    with refused(ValueError, "lr", "(0,)"):
        make(case, parameters(), lr=torch.tensor([]))
    with refused(ValueError, "lr", "nan"):
        make(case, parameters(), lr=torch.tensor(NAN))
    with refused(TypeError, "speed"):
        make(case, parameters(), speed=1.0)


def test_options_that_exclude_each_other():
    for cls in (lf.SGD, lf.LARS):
        with refused(ValueError, "nesterov", "momentum"):
            cls(parameters(), nesterov=True, momentum=0.0)
    with refused(ValueError, "nesterov", "dampening=0.5"):
        lf.SGD(parameters(), nesterov=True, momentum=0.9, dampening=0.5)
    for cls in (lf.NovoGrad, lf.LAdam, lf.LAdaBelief):
        with refused(ValueError, "adapt=False", cls.__name__):
            cls([{"params": parameters(), "adapt": False}])
    with refused(ValueError, "max_grad_norm", "constructor"):
        lf.LAMB([{"params": parameters(), "max_grad_norm": 1.0}])


@each_case
def test_parameters_that_cannot_be_served(case):
    (p,) = parameters((4, 3))
    with refused(ValueError, "empty parameter list"):
        make(case, [])
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with refused(TypeError, dtype, "floating-point"):
            make(case, [p, torch.zeros(2, dtype=dtype)])
    with refused(ValueError, "sparse", "dense"):
        make(case, [torch.eye(3).to_sparse().requires_grad_()])
    with refused(TypeError, "Tensor"):
        make(case, p)
    with refused(TypeError, "str"):
        make(case, ["weight"])
    with refused(ValueError, "non-leaf"):
        make(case, [p * 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with refused(ValueError, "twice"):
            make(case, [p, p])
    with refused(ValueError, "more than one parameter group"):
        make(case, [{"params": [p]}, {"params": [p]}])


OVERLAPS = {
    "the same storage": lambda p: p,
    "a row": lambda p: p[1],
    "interleaved columns": lambda p: p[:, ::2],
    "the last element": lambda p: p[3, 2],
    "another type": lambda p: p.view(torch.int32).view(torch.float32)[2:],
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parameters_that_overlap(overlap, backend):
    (p, q) = parameters((4, 3), (2,))
    other = Parameter(OVERLAPS[overlap](p.data))
    with refused(ValueError, "share memory", "clone()"):
        lf.LAMB([{"params": [p]}, {"params": [q, other]}], backend=backend)


def test_neighbours_do_not_overlap():
    flat = torch.randn(12)
    opt = lf.LAMB([Parameter(flat[:5]), Parameter(flat[5:5]), Parameter(flat[5:11].view(2, 3)), Parameter(flat[11])])
    train(opt, opt.param_groups[0]["params"], [0])


@each_case
def test_engines_that_cannot_serve(case):
    (double,), params = parameters((3, 2), dtype=torch.float64), parameters()
    meta = Parameter(torch.empty(3, device="meta"))
    gaps = Parameter(torch.randn(3, 4)[:, ::2])
    for p, words in ((double, ["float64"]), (meta, ["meta"]), (gaps, ["(4, 2)"])):
        with refused(ValueError, "backend='cpu'", "use 'auto'", *words):
            make(case, [*params, p], backend="cpu")
    for backend in ("triton", "cuda"):
        with refused(ValueError, backend, "use"):
            make(case, params, backend=backend)
    for plain in ({"differentiable": True}, {"foreach": True}, {"fused": False}):
        with refused(ValueError, "backend='cpu'", "use 'auto'"):
            make(case, params, backend="cpu", **plain)
    make(case, [meta])  # as deferred initialisation makes them


@pytest.mark.parametrize("layer, words", [((2, 3), ["(2, 3)", "5 rows", "(4, 3)", "4"]), (3, ["3", "4 rows"])])
def test_layers_that_do_not_fit(layer, words):
    with refused(ValueError, "layer", *words):
        lf.LAMB([{"params": parameters((4, 3)), "layer": layer}])


def test_a_gradient_on_another_device():
    """torch hinders it for a parameter and its grad, wherever it can; the check is there for where it cannot."""
    p = SimpleNamespace(grad=torch.empty(3, device="meta"), device=torch.device("cpu"), shape=(3,))
    with refused(ValueError, "meta", "cpu", "one device"):
        check_gradient(p)


# State_dicts that load_state_dict refuses: name -> (what spoils one of LAMB's, words of the message)


def spoil(key, value):
    return lambda saved: saved["state"][0].__setitem__(key, value)


def spoil_group(key, value):
    return lambda saved: saved["param_groups"][0].__setitem__(key, value)


SPOILED = {
    "wrong shape": (spoil("exp_avg", torch.zeros(5, 7)), ["exp_avg", "(5, 7)", "(7, 5)"]),
    "wrong type": (spoil("exp_avg", torch.zeros(7, 5, dtype=torch.int64)), ["exp_avg", "int64"]),
    "complex": (spoil("exp_avg_sq", torch.zeros(7, 5, dtype=torch.complex64)), ["exp_avg_sq", "complex64"]),
    "no tensor": (spoil("exp_avg", "nothing"), ["exp_avg"]),
    "a state too many": (spoil("max_exp_avg_sq", torch.zeros(7, 5)), ["another optimizer", "max_exp_avg_sq"]),
    "a state too few": (lambda saved: saved["state"][3].pop("exp_avg"), ["another optimizer"]),
    "step of many": (spoil("step", torch.zeros(3)), ["step"]),
    "lr out of range": (spoil_group("lr", -1.0), ["lr", "-1.0", "[0, inf)"]),
    "bad layer": (spoil_group("layer", "row"), ["layer", "'row'"]),
    "rows that do not fit": (spoil_group("layer", (3,)), ["layer", "(7, 5)"]),
    "engine": (spoil_group("backend", "triton"), ["triton"]),
    "fewer parameters": (spoil_group("params", [0, 1]), ["2", "4"]),
    "another rule": (spoil_group("rule", "lars"), ["'lars'", "'lamb'"]),
    "amsgrad": (spoil_group("amsgrad", True), ["amsgrad"]),
    "more groups": (lambda saved: saved["param_groups"].append({"params": []}), ["groups"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_state_dicts_that_are_refused(name):
    """The optimizer is as it was, in groups, states and in what it does next."""
    spoiling, words = SPOILED[name]
    params, others = parameters(), parameters()
    opt, other = lf.LAMB(params, lr=0.01), lf.LAMB(others, lr=0.01)
    train(opt, params, [0])
    train(other, others, [0])
    saved = deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    spoiling(saved)
    before, groups = snapshot(opt, params), deepcopy([{**g, "params": None} for g in opt.param_groups])
    with refused((ValueError, TypeError), *words):
        opt.load_state_dict(saved)
    assert_same(snapshot(opt, params), before)
    assert [{**g, "params": None} for g in opt.param_groups] == groups
    assert all(p is q for p, q in zip(opt.param_groups[0]["params"], params, strict=True))
    train(opt, params, [1])
    train(other, others, [1])
    assert_same(snapshot(opt, params), snapshot(other, others))


ALIKE = [{"Adam", "AdamW"}, {"LAMB", "LAMBC"}]  # may read each other's states


@pytest.mark.parametrize("steps", [0, 1])
@each_case
def test_a_state_dict_of_another_optimizer(case, steps):
    params = parameters()
    opt = make(case, params)
    train(opt, params, range(steps))
    for other in EACH:
        taker = make(other, parameters())
        same = (other.cls, other.rule) == (case.cls, case.rule) or {other.cls, case.cls} in ALIKE
        if same or {other.cls, case.cls} in ({"SGD"}, {"LAdam"}, {"LAdaBelief"}):  # options choose the variant
            taker.load_state_dict(opt.state_dict())
            continue
        with refused(ValueError, "state_dict is of rule", case.rule):
            taker.load_state_dict(opt.state_dict())


def test_a_state_dict_of_torch_that_has_other_states():
    params = parameters()
    for name, kwargs in (("Adamax", {}), ("RMSprop", {}), ("SGD", {"momentum": 0.9}), ("NAdam", {})):
        theirs = getattr(torch.optim, name)(params, **kwargs)
        train(theirs, params, [0])
        before = snapshot(opt := lf.AdamW(params), params)
        with refused(ValueError, "another optimizer", "exp_avg"):
            opt.load_state_dict(theirs.state_dict())
        assert_same(snapshot(opt, params), before)
