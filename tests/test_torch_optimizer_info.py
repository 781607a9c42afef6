"""torch's own checks of optimizers, driven through its OptimizerInfo on every class of ours: steps and groups.

torch's test/test_optim.py is not in the wheel, so its checks of the public contract are made again here, under their
names there and on the same machinery: OptimizerInfo and OptimizerInput, every option crossed with foreach, fused and
differentiable by `_get_optim_inputs_including_global_cliquey_kwargs`, tests instantiated by `optims`. Made again are
  test_optim_infos_do_not_specify_global_cliquey_kwargs, test_errors, test_forloop_goes_right_direction,
  test_param_group_with_lrscheduler_goes_right_direction, test_tensor_lr, test_foreach_matches_forloop,
  test_fused_matches_forloop, test_mixed_device_dtype, test_param_groups_weight_decay, test_param_groups_lr,
  test_step_is_noop_when_params_have_no_grad, test_step_is_noop_for_zero_grads, test_optimizer_can_be_printed,
  test_non_empty_state; and in test_torch_optimizer_info_states.py what saves, loads, hooks and copies.
Left out: sparse and complex parameters, which raise here, LBFGS's closures, and what needs a GPU or torch.compile.
"""

import warnings
from copy import deepcopy

import torch
from optimizer_info import STEPPED, all_inputs, closure_of, every_info, two_parameters
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import TensorTracker
from torch.testing._internal.common_utils import TestCase, parametrize


class TestSteps(TestCase):
    def check_direction(self, opt, closure, schedulers=(), maximize=False):
        initial = closure().item()
        for _ in range(20):
            loss = closure()
            opt.step()
            for scheduler in schedulers:
                scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        (self.assertGreater if maximize else self.assertLess)(closure().item(), initial)

    @every_info
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device):
            self.assertFalse({"foreach", "fused", "differentiable"} & optim_input.kwargs.keys())

    @every_info
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device, dtype):
            optim_input = error.optimizer_error_input
            with warnings.catch_warnings(), self.assertRaisesRegex(error.error_type, error.error_regex):
                warnings.simplefilter("ignore")  # torch warns of duplicates, where we raise
                optim_info.optim_cls(optim_input.params, **optim_input.kwargs)

    @parametrize("contiguous, with_lrsched", [(True, True), (False, False)])
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

    @every_info
    def test_non_empty_state(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device):
            params = two_parameters(device, dtype)
            opt = optim_info.optim_cls(params, **optim_input.kwargs)
            opt.step(closure_of(opt, *params, torch.ones(5)))
            self.assertTrue(opt.state and all(opt.state.values()))


instantiate_device_type_tests(TestSteps, globals(), only_for="cpu")
