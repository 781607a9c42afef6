"""The table of optimizers that the tests walk: every rule at its defaults and under its options.

RULES     rule -> the row of hyper-parameters at the class's defaults, in the order of the group's row
STATES    rule -> (elementwise states, float64 layer scalars)
REPORTS   rule -> names in `layer_stats()`
CASES     one Case per option worth a run: `cls(params, **kwargs)` has `hyper` as its row
ADAPT     rules that run with adapt=False; FIXED those that refuse it; the others have no layer-wise factor

LAMB's kwargs turn its global clip off: it is no part of the rule's row. `adapt` and `layer` are no part of it either;
a test that wants them crosses CASES with them.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

RULES = {
    "sgd": {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": 0.0},
    "sgd_plain": {"lr": 1e-3, "weight_decay": 0.0},
    "adam": {**ADAM, "decoupled": 0.0},
    "adabelief": {**ADAM, "eps": 1e-16, "decoupled": 1.0, "rectify": 0.0},
    "adam3": {**ADAM, "eps": 1e-16, "decoupled": 1.0},
    "lars": {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 1e-3, "eps": 1e-8,
             "nesterov": 0.0, "lr_in_momentum": 0.0, "larc": 0.0},
    "lamb": {**ADAM, "eps": 1e-6, "weight_decay": 0.01, "bias_correction": 1.0, "grad_averaging": 1.0,
             "lower": 0.0, "upper": math.inf},
    "novograd": {**ADAM, "beta1": 0.95, "beta2": 0.98, "grad_averaging": 0.0},
    "aida": {**ADAM, "k": 2.0, "xi": 1e-20, "decoupled": 0.0},
    "ladam_pre": {**ADAM, "belief": 0.0, "decoupled": 0.0},
    "ladam_post": {**ADAM, "belief": 0.0, "decoupled": 0.0},
    "setadam": {**ADAM, "eps": 1e-16, "tau": 0.5, "decoupled": 0.0},
    "adanorm": {**ADAM, "gamma": 0.95, "belief": 0.0, "decoupled": 0.0},
}

M, MV = ("exp_avg",), ("exp_avg", "exp_avg_sq")
STATES = {
    "sgd": (("momentum_buffer",), ()), "sgd_plain": ((), ()), "adam": (MV, ()),
    "adabelief": (("exp_avg", "exp_avg_var"), ()), "adam3": (MV, ()), "lars": (("momentum_buffer",), ()),
    "lamb": (MV, ()), "novograd": (M, ("exp_avg_sq",)), "aida": (("exp_avg", "exp_avg_var"), ()),
    "ladam_pre": (M, ("exp_avg_sq",)), "ladam_post": (MV, ()), "setadam": (MV, ()),
    "adanorm": (MV, ("exp_grad_norm",)),
}

REPORTS = {
    "sgd": (), "sgd_plain": (), "adam": (), "adabelief": (), "adam3": (),
    "lars": ("param_norm", "grad_norm", "trust_ratio"), "lamb": ("param_norm", "update_norm", "trust_ratio"),
    "novograd": ("grad_norm", "second_moment"), "aida": ("grad_norm", "exp_avg_norm", "cos"),
    "ladam_pre": ("second_moment",), "ladam_post": ("denominator",), "setadam": ("cos", "minimum"),
    "adanorm": ("grad_norm", "norm_ema", "scale"),
}

ADAPT = ("lars", "lamb", "aida", "setadam", "adanorm")
FIXED = ("novograd", "ladam_pre", "ladam_post")


@dataclass(frozen=True)
class Case:
    name: str
    rule: str
    hyper: dict  # the whole row
    cls: str  # the name in layerfused
    kwargs: dict  # what its constructor needs to have that row


def case(name, rule, cls, kwargs=None, **row):
    """A Case whose row is the rule's default but for `row`; kwargs default to the same words."""
    assert row.keys() <= RULES[rule].keys(), f"{name}: {row.keys() - RULES[rule].keys()} not in the row of {rule}"
    hyper = {key: float(row.get(key, value)) for key, value in RULES[rule].items()}
    return Case(name, rule, hyper, cls, row if kwargs is None else kwargs)


def betas(beta1, beta2, **kwargs):
    return {"betas": (beta1, beta2), **kwargs}


POST, NO_CLIP = {"processing": "post"}, {"max_grad_norm": None}
C = {"lower": 0.0, "upper": 1.0, "weight_decay": 0.0, "bias_correction": False}  # LAMBC's defaults as a row

CASES = [
    case("sgd", "sgd_plain", "SGD", {}),
    case("sgd-decay", "sgd_plain", "SGD", lr=0.1, weight_decay=0.05),
    case("sgd-momentum", "sgd", "SGD", lr=0.1, momentum=0.9),
    case("sgd-dampening", "sgd", "SGD", lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.05),
    case("sgd-nesterov", "sgd", "SGD", lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    case("adam", "adam", "Adam"),
    case("adam-decay", "adam", "Adam", betas(0.8, 0.95, weight_decay=0.1), beta1=0.8, beta2=0.95, weight_decay=0.1),
    case("adam-memoryless", "adam", "Adam", betas(0.0, 0.9), beta1=0.0, beta2=0.9),
    case("adamw", "adam", "AdamW", {}, weight_decay=1e-2, decoupled=True),
    case("adamw-decay", "adam", "AdamW", {"lr": 0.01, "weight_decay": 0.1}, lr=0.01, weight_decay=0.1, decoupled=True),
    case("adabelief", "adabelief", "AdaBelief"),
    case("adabelief-decay", "adabelief", "AdaBelief", weight_decay=0.1),
    case("adabelief-coupled", "adabelief", "AdaBelief", weight_decay=0.1, eps=1e-8, decoupled=False),
    case("adabelief-rectify", "adabelief", "AdaBelief", rectify=True),
    case("adam3", "adam3", "AdaM3"),
    case("adam3-decay", "adam3", "AdaM3", weight_decay=0.1),
    case("adam3-coupled", "adam3", "AdaM3", weight_decay=0.1, decoupled=False),
    case("lars", "lars", "LARS"),
    case("lars-nesterov", "lars", "LARS", nesterov=True, weight_decay=0.05),
    case("lars-lr-in-momentum", "lars", "LARS", lr=0.5, lr_in_momentum=True),
    case("lars-lr-in-momentum-nesterov", "lars", "LARS", lr=0.5, lr_in_momentum=True, nesterov=True),
    case("larc", "lars", "LARS", lr=0.01, larc=True, trust_coefficient=0.02),
    case("lars-no-decay", "lars", "LARS", momentum=0.0, weight_decay=0.0),
    case("lamb", "lamb", "LAMB", NO_CLIP),
    case("lamb-clip", "lamb", "LAMB", {"trust_clip": (0.5, 2.0), **NO_CLIP}, lower=0.5, upper=2.0),
    case("lamb-no-averaging", "lamb", "LAMB", {"grad_averaging": False, **NO_CLIP}, grad_averaging=False),
    case("lamb-no-correction", "lamb", "LAMB", {"bias_correction": False, **NO_CLIP}, bias_correction=False),
    case("lamb-no-decay", "lamb", "LAMB", {"weight_decay": 0.0, **NO_CLIP}, weight_decay=0.0),
    case("lambc", "lamb", "LAMBC", {}, **C),
    case("lambc-decay", "lamb", "LAMBC", {"weight_decay": 0.1, "trust_clip": 10.0}, **{**C, "weight_decay": 0.1,
                                                                                    "upper": 10.0}),
    case("novograd", "novograd", "NovoGrad"),
    case("novograd-averaging", "novograd", "NovoGrad", weight_decay=0.1, grad_averaging=True),
    case("novograd-decay", "novograd", "NovoGrad", betas(0.9, 0.25, weight_decay=0.1), beta1=0.9, beta2=0.25,
         weight_decay=0.1),
    case("aida", "aida", "Aida"),
    case("aida-k0", "aida", "Aida", k=0),
    case("aida-k1", "aida", "Aida", k=1, weight_decay=0.1),
    case("aida-k3", "aida", "Aida", k=3, weight_decay=0.1, decoupled=True),
    case("ladam", "ladam_pre", "LAdam"),
    case("ladam-decay", "ladam_pre", "LAdam", weight_decay=0.1, decoupled=True),
    case("ladabelief", "ladam_pre", "LAdaBelief", {}, belief=True),
    case("ladabelief-decay", "ladam_pre", "LAdaBelief", {"weight_decay": 0.1}, weight_decay=0.1, belief=True),
    case("ladam-post", "ladam_post", "LAdam", POST),
    case("ladam-post-decay", "ladam_post", "LAdam", {"weight_decay": 0.1, **POST}, weight_decay=0.1),
    case("ladabelief-post", "ladam_post", "LAdaBelief", POST, belief=True),
    case("ladabelief-post-decay", "ladam_post", "LAdaBelief", {"weight_decay": 0.1, "decoupled": True, **POST},
         weight_decay=0.1, decoupled=True, belief=True),
    case("setadam", "setadam", "SETAdam"),
    case("setadam-tau0", "setadam", "SETAdam", tau=0.0, eps=1e-8),
    case("setadam-coupled", "setadam", "SETAdam", tau=0.9, weight_decay=0.1),
    case("setadam-decoupled", "setadam", "SETAdam", weight_decay=0.1, decoupled=True),
    case("adamnorm", "adanorm", "AdamNorm"),
    case("adamnorm-coupled", "adanorm", "AdamNorm", gamma=0.8, weight_decay=0.1),
    case("adabeliefnorm", "adanorm", "AdaBeliefNorm", {}, belief=True),
    case("adabeliefnorm-decoupled", "adanorm", "AdaBeliefNorm", {"weight_decay": 0.1, "decoupled": True},
         weight_decay=0.1, decoupled=True, belief=True),
]


def zero_state(rule, p):
    """The states of a layer p before its first step."""
    elementwise, scalars = STATES[rule]
    state = {name: torch.zeros_like(p) for name in elementwise}
    return state | {name: torch.zeros((), dtype=torch.float64, device=p.device) for name in scalars}


def run(function, row, p, gradients, adapt=True):
    """p, states and last report after one step per gradient."""
    state, report = zero_state(function.__name__, p), {}
    for t, g in enumerate(gradients, 1):
        p, report = function(p, g, state, SimpleNamespace(**row), t, adapt)
    return p, state, report
