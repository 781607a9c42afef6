"""torch's own checks of optimizers, driven through its OptimizerInfo on every class of ours: states, hooks, copies.

See test_torch_optimizer_info.py. Made again here are test_state_dict_deterministic (with
test_can_load_from_to_named_state_dict), test_can_load_older_state_dict (with test_load_nontensor_step),
test_save_load_equality_with_weights_only, test_deepcopy_copies_all_public_attrs and the tests of the hooks of step,
state_dict and load_state_dict.
"""

import io
from copy import deepcopy

import torch
from optimizer_info import STEPPED, all_inputs, closure_of, every_info, named, two_parameters
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import TestCase, parametrize


class TestStates(TestCase):
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


instantiate_device_type_tests(TestStates, globals(), only_for="cpu")
