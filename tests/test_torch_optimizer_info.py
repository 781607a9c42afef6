"""torch's own checks of optimizers, driven through its OptimizerInfo on every class of ours.

torch's test/test_optim.py is not in the wheel, so its checks of the public contract are made again here, under their
names there and on the same machinery: OptimizerInfo and OptimizerInput, every option crossed with foreach, fused and
differentiable by `_get_optim_inputs_including_global_cliquey_kwargs`, tests instantiated by `optims`. Made again are
  test_optim_infos_do_not_specify_global_cliquey_kwargs, test_errors, test_forloop_goes_right_direction (contiguous or
  not, with schedulers or without), test_param_group_with_lrscheduler_goes_right_direction, test_tensor_lr,
  test_foreach_matches_forloop, test_fused_matches_forloop, test_mixed_device_dtype,
  test_param_groups_weight_decay, test_param_groups_lr, test_step_is_noop_when_params_have_no_grad,
  test_step_is_noop_for_zero_grads, test_optimizer_can_be_printed, test_state_dict_deterministic,
  test_can_load_older_state_dict, test_can_load_from_to_named_state_dict, test_save_load_equality_with_weights_only,
  test_load_nontensor_step, the hooks of step, state_dict and load_state_dict,
  test_deepcopy_copies_all_public_attrs, test_non_empty_state.
Left out: sparse and complex parameters, which raise here, LBFGS's closures, and what needs a GPU or torch.compile.
SGD and Adam have the options of torch's own list, the others all their cases.
"""

import functools
import io
import unittest
from copy import deepcopy

import pytest
import torch
from cases import CASES
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import layerfused as lf

pytest.importorskip("expecttest", reason="torch.testing's common_utils imports it")
from torch.testing._internal.common_device_type import instantiate_device_type_tests  # noqa: E402
from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_inputs_func_adam,
    optim_inputs_func_sgd,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize  # noqa: E402

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


class TestContract(TestCase):
    def check_direction(self, opt, closure, schedulers=(), maximize=False):
        initial = closure().item()
        for _ in range(20):
            loss = closure()
            opt.step()
            for scheduler in schedulers:
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
        (self.assertGreater if maximize else self.assertLess)(closure().item(), initial)

    @every_info
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device):
            self.assertFalse({"foreach", "fused", "differentiable"} & optim_input.kwargs.keys())

    @every_info
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device, dtype):
            optim_input = error.optimizer_error_input
            with self.assertRaisesRegex(error.error_type, error.error_regex):
                optim_info.optim_cls(optim_input.params, **optim_input.kwargs)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @every_info
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        for constructors in optim_info.scheduler_inputs if with_lrsched else [()]:
            for optim_input in optim_info.optim_inputs_func(device):
                params, x = two_parameters(device, dtype, contiguous), torch.randn(5, device=device, dtype=dtype)
                opt = optim_info.optim_cls(params, **optim_input.kwargs)
                schedulers = [make(opt) for make in constructors]
                maximize = optim_input.kwargs.get("maximize", False)
                self.check_direction(opt, closure_of(opt, *params, x), schedulers, maximize)

    @every_info
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for constructors in optim_info.scheduler_inputs:
            weight, bias = params = two_parameters(device, dtype)
            opt = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
            closure = closure_of(opt, *params, torch.randn(5, device=device, dtype=dtype))
            self.check_direction(opt, closure, [make(opt) for make in constructors])

    @every_info
    def test_tensor_lr(self, device, dtype, optim_info):
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            params, x = two_parameters(device, dtype), torch.randn(5, device=device, dtype=dtype)
            clones = deepcopy(params)
            opt = optim_info.optim_cls(params, **{**optim_input.kwargs, "lr": 1e-3})
            other = optim_info.optim_cls(clones, **{**optim_input.kwargs, "lr": torch.tensor(1e-3)})
            for _ in range(5):
                closure_of(opt, *params, x)()
                closure_of(other, *clones, x)()
                opt.step()
                other.step()
                self.assertEqual(params, clones)

    def check_matches(self, optim_info, device, dtype, flag):
        """Parameters and states of two runs, one of them with the flag, compared and made equal after each step."""
        for optim_input in optim_info.optim_inputs_func(device):
            params, x = two_parameters(device, dtype), torch.randn(5, device=device, dtype=dtype)
            tracker = TensorTracker()
            for flagged, own in ((False, params), (True, deepcopy(params))):
                opt = optim_info.optim_cls(own, **optim_input.kwargs, **{flag: flagged})
                for _ in range(7):
                    closure_of(opt, *own, x)()
                    opt.step()
                    for p in own:
                        for tensor in (p, *opt.state[p].values()):
                            tracker.pop_check_set(tensor, self) if flagged else tracker.add(tensor)
            self.assertTrue(tracker.all_popped())

    @every_info
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self.check_matches(optim_info, device, dtype, "foreach")

    @every_info
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        self.check_matches(optim_info, device, dtype, "fused")

    @every_info
    def test_mixed_device_dtype(self, device, dtype, optim_info):
        """Each parameter of a mixture steps as it does alone."""
        types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for optim_input in optim_info.optim_inputs_func(device):
            if "max_grad_norm" in optim_input.kwargs or optim_info.name == "LAMB":
                optim_input.kwargs["max_grad_norm"] = None
            params = [Parameter(torch.randn(5, 3, device=device).to(t)) for t in types]
            clones = deepcopy(params)
            opts = [optim_info.optim_cls(own, **optim_input.kwargs) for own in (params, *([p] for p in clones))]
            for _ in range(3):
                for p, q in zip(params, clones, strict=True):
                    q.grad = p.grad = torch.randn_like(p)
                for opt in opts:
                    opt.step()
            self.assertEqual(params, clones, rtol=0, atol=0)

    @every_info
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            weight, bias = params = two_parameters(device, dtype)
            kwargs = optim_input.kwargs
            whole = {"max_grad_norm": kwargs.pop("max_grad_norm")} if "max_grad_norm" in kwargs else {}
            opt = optim_info.optim_cls(
                [{"params": [weight], **kwargs}, {"params": [bias], **kwargs, "weight_decay": 0.0}], **whole
            )
            closure = closure_of(opt, *params, torch.randn(5, device=device, dtype=dtype))
            self.check_direction(opt, closure, maximize=kwargs.get("maximize", False))

    @every_info
    def test_param_groups_lr(self, device, dtype, optim_info):
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            params, other = two_parameters(device, dtype), Parameter(torch.randn(2, device=device, dtype=dtype))
            kwargs, before = {"lr": 1e-3, **optim_input.kwargs}, other.detach().clone()
            whole = {"max_grad_norm": kwargs.pop("max_grad_norm")} if "max_grad_norm" in kwargs else {}
            opt = optim_info.optim_cls([{"params": params, **kwargs}, {"params": [other]}], lr=1e-28, **whole)
            closure = closure_of(opt, *params, torch.randn(5, device=device, dtype=dtype))

            def both(closure=closure, other=other):
                loss = closure()
                other.grad = torch.rand_like(other)
                return loss

            self.check_direction(opt, both, maximize=kwargs.get("maximize", False))
            self.assertEqual(other, before)

    @every_info
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
        before = deepcopy(params)
        for optim_input in all_inputs(optim_info, device, dtype):
            optim_info.optim_cls(params, **optim_input.kwargs).step(lambda: torch.tensor([1.0]))
            self.assertEqual(params, before, rtol=0, atol=0)

    @every_info
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        before = torch.randn((5, 1), device=device, dtype=dtype)
        for optim_input in all_inputs(optim_info, device, dtype):
            p = before.clone() if optim_input.kwargs["differentiable"] else Parameter(before.clone())
            opt = optim_info.optim_cls([p], **{**optim_input.kwargs, "weight_decay": 0.0})
            p.grad = torch.zeros_like(p)
            opt.step()
            self.assertEqual(p, before, rtol=0, atol=0)

    @every_info
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for optim_input in all_inputs(optim_info, device, dtype):
            self.assertIn("lr", repr(optim_info.optim_cls(two_parameters(device, dtype), **optim_input.kwargs)))

    @parametrize("named0, named1", [(True, False), (False, True)])
    @every_info
    def test_state_dict_deterministic(self, device, dtype, optim_info, named0, named1):
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            params, x = two_parameters(device, dtype), torch.randn(5, device=device, dtype=dtype)
            opt = optim_info.optim_cls(named(params, named0), **optim_input.kwargs)
            for _ in range(3):
                opt.step(closure_of(opt, *params, x))
            clones = [Parameter(p.detach().clone()) for p in params]
            other = optim_info.optim_cls(named(clones, named1), **optim_input.kwargs)
            saved = deepcopy(opt.state_dict())
            other.load_state_dict(saved)
            self.assertEqual(saved, opt.state_dict())
            for _ in range(3):
                opt.step(closure_of(opt, *params, x))
                other.step(closure_of(other, *clones, x))
                self.assertEqual(params, clones, rtol=0, atol=0)
            without = [deepcopy(o.state_dict()) for o in (opt, other)]
            for group in (g for saved in without for g in saved["param_groups"]):
                group.pop("param_names", None)
            self.assertEqual(*without, rtol=0, atol=0)
            if named0 or named1:
                self.assertEqual(other.state_dict()["param_groups"][0]["param_names"], ["name0", "name1"])

    @every_info
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """Of a version that did not have the flags yet, and with steps that are numbers (test_load_nontensor_step)."""
        params, x = two_parameters(device, dtype), torch.randn(5, device=device, dtype=dtype)
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            opt = optim_info.optim_cls(named(params, True), **optim_input.kwargs)
            for old in (False, True):
                for _ in range(2):
                    opt.step(closure_of(opt, *params, x))
                saved = deepcopy(opt.state_dict())
                for flag in optim_info.not_og_supported_flags if old else ():
                    del saved["param_groups"][0][flag]
                for own in saved["state"].values():
                    own["step"] = own["step"].item()
                opt.load_state_dict(saved)
            self.assertEqual({own["step"].item() for own in opt.state.values()}, {4})

    @parametrize("is_named", [True, False])
    @every_info
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named):
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            params, x = two_parameters(device, dtype), torch.randn(5, device=device, dtype=dtype)
            opt = optim_info.optim_cls(named(params, is_named), **optim_input.kwargs)
            for _ in range(3):
                opt.step(closure_of(opt, *params, x))
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            self.assertEqual(torch.load(file, weights_only=True), opt.state_dict(), rtol=0, atol=0)

    def one(self, optim_info, device, dtype):
        for optim_input in all_inputs(optim_info, device, dtype):
            param = torch.rand(2, 3, device=device, dtype=dtype, requires_grad=True)
            yield optim_info.optim_cls([param], **optim_input.kwargs)

    @every_info
    def test_state_dict_hooks(self, device, dtype, optim_info):
        def post(opt, saved):
            return {**saved, "ran_pre_hook": saved["state"].pop("test", 0) == 1}

        for opt in self.one(optim_info, device, dtype):
            handle = opt.register_state_dict_post_hook(post)
            self.assertFalse(opt.state_dict()["ran_pre_hook"])
            handle.remove()
            opt.register_state_dict_pre_hook(lambda o: o.state.__setitem__("test", 1))
            self.assertEqual(opt.state_dict()["state"]["test"], 1)
            opt.register_state_dict_post_hook(post)
            saved = opt.state_dict()
            self.assertTrue(saved["ran_pre_hook"])
            self.assertNotIn("test", saved["state"])

    @every_info
    def test_load_state_dict_hooks(self, device, dtype, optim_info):
        def first(opt, saved):
            saved["param_groups"][0]["lr"] = 0.002

        def second(opt, saved):
            mine = deepcopy(saved)
            mine["param_groups"][0]["lr"] = 0.003
            return mine

        def after(opt):
            opt.state["lr_seen"] = opt.param_groups[0]["lr"]

        for opt in self.one(optim_info, device, dtype):
            saved = opt.state_dict()
            opt.register_load_state_dict_pre_hook(first)
            opt.load_state_dict(saved)
            self.assertEqual(opt.param_groups[0]["lr"], 0.002)
            handle = opt.register_load_state_dict_pre_hook(second, prepend=True)
            opt.load_state_dict(saved)
            self.assertEqual(opt.param_groups[0]["lr"], 0.002)
            handle.remove()
            opt.register_load_state_dict_pre_hook(second)
            opt.register_load_state_dict_post_hook(after)
            opt.load_state_dict(opt.state_dict())
            self.assertEqual(opt.state["lr_seen"], 0.003)

    @every_info
    def test_step_all_hooks(self, device, dtype, optim_info):
        for optim_input in all_inputs(optim_info, device, dtype):
            params, data = [torch.ones(2, device=device, dtype=dtype)], []
            opts = [optim_info.optim_cls(params, **optim_input.kwargs), SGD(params)]
            handles = [
                register_optimizer_step_pre_hook(lambda *_, data=data: data.append(0)),
                register_optimizer_step_post_hook(lambda *_, data=data: data.append(5)),
            ]
            for opt in opts:
                handles.append(opt.register_step_pre_hook(lambda *_, data=data: data.append(1)))
                handles.append(opt.register_step_post_hook(lambda *_, data=data: data.append(2)))
            for number, opt in enumerate((*opts, opts[0]), 1):
                opt.step()
                self.assertEqual(data, [0, 1, 2, 5] * number)
            for handle in handles:
                handle.remove()
            for opt in opts:
                opt.step()
            self.assertEqual(len(data), 12)

    @every_info
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        for optim_input in all_inputs(optim_info, device, dtype, STEPPED):
            params = two_parameters(device, dtype)
            opt = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(3):
                opt.step(closure_of(opt, *params, torch.ones(5)))
            attributes, copied = ({k for k in vars(o) if k[0] != "_"} for o in (opt, deepcopy(opt)))
            self.assertEqual(attributes, copied)

    @every_info
    def test_non_empty_state(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device):
            params = two_parameters(device, dtype)
            opt = optim_info.optim_cls(params, **optim_input.kwargs)
            opt.step(closure_of(opt, *params, torch.ones(5)))
            self.assertTrue(opt.state and all(opt.state.values()))


instantiate_device_type_tests(TestContract, globals(), only_for="cpu")

if __name__ == "__main__":
    unittest.main()
