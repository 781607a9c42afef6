"""Bad input to constructors gets an error that names value and remedy.

Bad state_dicts are in test_state_dict_errors.py, what shows itself in step() in test_step_errors.py.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conduct import EACH, each_case, make, parameters, refused, train
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
    "tau": ((-0.1, 1.0, 1 - 1e-9, NAN, INF), "[0, 0.99999994"),  # what float32 holds below 1
    "gamma": FRACTION, "max_grad_norm": POSITIVE, "k": ((-1, 1.5, NAN, True, "2"), ">= 0"),
    "processing": (("middle", None), "'pre', 'post'"), "backend": (("gpu", None), "'auto'"),
    "adapt": (("yes", 2), "True, False or None"),
    "layer": (("row", 0, -2, 1.5, (), (2, 0), None, True, ("a",)), "row counts"),
    "trust_clip": (
        (-1.0, NAN, (2.0, 1.0), (-1.0, 1.0), (NAN, 1.0), (1.0, NAN), (1.0, 2.0, 3.0), "1"), "0 <= lower <= upper"
    ),
    "precision": (("fp32", ("master", "kahan"), ("master", "master"), 1, ("bf16-states", None)), "'remainder'"),
    "seed": ((-1, 2**53, 1.0, True, None), "[0, 2**53)"),
}  # fmt: skip
FREE = {"betas", "nesterov", "decoupled", "rectify", "lr_in_momentum", "larc", "bias_correction", "grad_averaging",
        "maximize", "differentiable", "foreach", "fused", "capturable", "amp_scaling"}  # fmt: skip
IN_GROUPS_ONLY = ("adapt", "layer")


@each_case
def test_hyper_parameters_out_of_range(case):
    known = make(case, parameters()).defaults
    assert known.keys() <= OUT.keys() | FREE, "a hyper-parameter without a test"
    for name in known.keys() & OUT.keys():
        values, text = OUT[name]
        if name == "eps" and make(case, parameters()).positive_eps:
            values, text = (0.0, -1.0, 1e-50, NAN, INF), "[1.1754943508222875e-38, inf)"  # float32 holds no less
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
