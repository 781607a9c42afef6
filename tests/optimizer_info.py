"""torch's OptimizerInfo for every class of ours, and what the tests that walk it share.

SGD and Adam have the options of torch's own list (amsgrad left out), the others all their cases and what is common.
"""

import functools

import pytest
import torch
from cases import CASES
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

import layerfused as lf

pytest.importorskip("expecttest", reason="torch.testing's common_utils imports it")
from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_inputs_func_adam,
    optim_inputs_func_sgd,
    optims,
)

OURS = ("a param group cannot have duplicate parameters", "Tensor lr must be 1-element")  # with messages of our own
TORCH_INPUTS = {"SGD": optim_inputs_func_sgd, "Adam": optim_inputs_func_adam, "AdamW": optim_inputs_func_adam}


def inputs(name, device, dtype=None):
    if name in TORCH_INPUTS:
        return [i for i in TORCH_INPUTS[name](device, dtype) if not i.kwargs.get("amsgrad")]
    own = [OptimizerInput(None, {**case.kwargs}, case.name) for case in CASES if case.cls == name]
    common = {"tensor lr": {"lr": torch.tensor(0.001)}, "maximize": {"weight_decay": 0.1, "maximize": True},
              "clip": {"max_grad_norm": 1.0}, "capturable": {"capturable": True}}  # fmt: skip
    return own + [OptimizerInput(None, kwargs, desc) for desc, kwargs in common.items()]


def error_inputs(device, dtype):
    one = Parameter(torch.randn(1, 1, device=device, dtype=dtype))
    theirs = [e for e in get_error_inputs_for_all_optims(device, dtype) if e.optimizer_error_input.desc not in OURS]
    mine = [([one, one], {}, "occurs twice"), ([one], {"lr": torch.tensor([0.1, 0.2])}, "one element"),
            ([one], {"weight_decay": -1.0}, r"weight_decay must be in \[0, inf\), got -1.0")]  # fmt: skip
    return theirs + [
        ErrorOptimizerInput(OptimizerInput(params, kwargs), error_type=ValueError, error_regex=regex)
        for params, kwargs, regex in mine
    ]


def info(name):
    return OptimizerInfo(
        getattr(lf, name),
        optim_inputs_func=functools.partial(inputs, name),
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: ExponentialLR(opt, gamma=0.9), lambda opt: ReduceLROnPlateau(opt)],
        ),
        supported_impls=("foreach", "differentiable", "fused"),
        supports_fused_on=("cpu",),
        has_capturable_arg=True,
        supports_complex=False,
    )


INFOS = [info(name) for name in sorted({case.cls for case in CASES})]
STEPPED = ("differentiable",)  # left out where a leaf is stepped, as torch does
every_info = optims(INFOS, dtypes=[torch.float32])


def all_inputs(info, device, dtype, skip=()):
    return _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info, skip=skip)


def two_parameters(device, dtype, contiguous=True):
    sizes = [(10, 5), (10,)]
    if contiguous:
        return [Parameter(torch.randn(size, device=device, dtype=dtype)) for size in sizes]
    return [Parameter(torch.randn((*size, 2), device=device, dtype=dtype)[..., 0]) for size in sizes]


def named(params, with_names):
    return [(f"name{i}", p) for i, p in enumerate(params)] if with_names else params


def closure_of(opt, weight, bias, x):
    def closure():
        opt.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure
