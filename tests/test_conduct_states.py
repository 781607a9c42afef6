"""States: how they begin, how they are saved, loaded, copied and exchanged with torch's own optimizers.

Left out: devices other than the CPU (a GPU's tests do that), sharded checkpoints.
"""

import pickle
from copy import deepcopy

import pytest
import torch
from cases import CASES
from conduct import (
    assert_same,
    copies,
    each_case,
    each_engine,
    give,
    make,
    parameters,
    raw,
    snapshot,
    through_a_file,
    train,
)

import layerfused as lf

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_engine
@each_case
def test_states_are_made_at_construction(case, backend):
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype=dtype)
        opt = make(case, params, backend=backend)
        rule = opt.rule_of(opt.param_groups[0])
        assert list(opt.state) == params
        for p in params:
            entries = opt.state[p]
            assert set(entries) == set(rule.entries)
            assert not any(x.any() or x.requires_grad for x in entries.values())
            assert entries["step"].shape == () and entries["step"].dtype == torch.float32
            for name in rule.states:
                assert entries[name].shape == p.shape and entries[name].dtype == torch.float32
            if rule.scalar:
                assert entries[rule.scalar].shape == () and entries[rule.scalar].dtype == torch.float64
        train(opt, params, range(3))
        assert all(opt.state[p]["step"] == 3 for p in params)


# layer and adapt beside each case are left to the next test.
@every_case
def test_resume_is_bit_exact(case):
    params = parameters()
    opt = make(case, params, max_grad_norm=1.0)
    train(opt, params, range(3))
    saved, resumed = through_a_file(opt.state_dict()), copies(params)
    other = make(case, resumed, lr=77.0)  # what was saved overrides it
    other.defaults["max_grad_norm"] = 1.0
    other.load_state_dict(saved)
    assert_same(snapshot(other, resumed), snapshot(opt, params))
    train(opt, params, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(snapshot(other, resumed), snapshot(opt, params))


@pytest.mark.parametrize("layer", ["slices", "group", 2, (1, 3)])
@pytest.mark.parametrize("cls", ["LAMB", "NovoGrad", "AdamNorm"])
def test_resume_with_other_layers(cls, layer):
    params = parameters((4, 3), (4, 2, 2))
    opt = getattr(lf, cls)([{"params": params, "layer": layer}])
    train(opt, params, range(3))
    resumed = copies(params)
    other = getattr(lf, cls)([{"params": resumed, "layer": layer}])
    other.load_state_dict(through_a_file(opt.state_dict()))
    train(opt, params, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(snapshot(other, resumed), snapshot(opt, params))


@each_case
def test_loaded_states_keep_their_type(case):
    """float32 states of bfloat16 parameters, and bfloat16 states of float32 ones."""
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        params = parameters(dtype=dtype)
        opt = make(case, params)
        train(opt, params, range(2))
        names, saved = opt.rule_of(opt.param_groups[0]).states, deepcopy(opt.state_dict())
        for entries in saved["state"].values():
            entries.update({name: entries[name].to(stored) for name in names})
        resumed = copies(params)
        other = make(case, resumed)
        other.load_state_dict(saved)
        for _ in range(2):
            for i, p in enumerate(resumed):
                for name in names:
                    assert other.state[p][name].dtype == stored and other.state[p][name].device == p.device
                    assert raw(other.state[p][name]) == raw(saved["state"][i][name]) or other.state[p]["step"] == 3
            train(other, resumed, [2])


def test_the_loaded_optimizer_shares_nothing():
    params, others = parameters(), parameters()
    opt, other = lf.AdamW(params, lr=torch.tensor(0.5)), lf.AdamW(others, lr=torch.tensor(0.25))
    saved = opt.state_dict()
    other.load_state_dict(saved)
    other.param_groups[0]["lr"].fill_(0.125)
    train(other, others, [0])
    assert opt.param_groups[0]["lr"] == 0.5
    assert not any(x.any() for entries in opt.state.values() for x in entries.values())
    assert saved["param_groups"][0]["params"] == list(range(len(params)))


@each_case
def test_pickle_and_deepcopy(case):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    opt = make(case, model.named_parameters(), max_grad_norm=1.0)
    train(opt, list(model.parameters()), range(2))
    model[0].weight.grad[0, 0] = float("nan")
    opt.step()
    for model_copy, copy in (deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        assert {k for k in vars(copy) if k[0] != "_"} == {k for k in vars(opt) if k[0] != "_"}
        assert copy.skipped_steps == 1 and copy.grad_norm.isnan() and copy.engines == opt.engines
        assert all(a is b for a, b in zip(copy.param_groups[0]["params"], model_copy.parameters(), strict=True))
        twin = deepcopy((model_copy, copy))
        train(copy, list(model_copy.parameters()), [5])
        train(twin[1], list(twin[0].parameters()), [5])
        assert_same(snapshot(copy, model_copy.parameters()), snapshot(twin[1], twin[0].parameters()))
        assert copy.skipped_steps == 1 and 0 < copy.grad_norm
        assert not any(x is y for x, y in zip(copy.state, opt.state, strict=True))
    before = snapshot(opt, model.parameters())
    train(deepcopy(opt), list(model.parameters()), [6])  # the copy has parameters of its own, without gradients
    assert_same(snapshot(opt, model.parameters()), before)


@each_case
def test_parameters_exchanged_in_a_group(case):
    params, new = parameters(), parameters((2, 3), (6,))
    opt = make(case, params)
    train(opt, params, [0])
    old = opt.param_groups[0]["params"][1]
    opt.param_groups[0]["params"][1] = new[0]
    opt.param_groups[0]["params"].append(new[1])
    now = opt.param_groups[0]["params"]
    give(now, 1)
    opt.step()
    assert old not in opt.state and set(opt.state) == set(now)
    assert [opt.state[p]["step"].item() for p in now] == [2, 1, 2, 2, 1]
    fresh = parameters((2, 3), (6,))
    other = make(case, fresh)
    for p, q in zip(fresh, new, strict=True):
        p.grad = q.grad
    other.step()
    assert_same(snapshot(opt, new), snapshot(other, fresh))


@each_engine
def test_states_exchanged_or_cleared_by_hand(backend):
    params, others = parameters(), parameters()
    opt, other = lf.LAMB(params, backend=backend), lf.LAMB(others, backend=backend)
    train(opt, params, range(2))
    train(other, others, range(2))
    opt.state[params[0]] = {name: x.clone() for name, x in opt.state[params[0]].items()}
    opt.state[params[1]]["exp_avg"] = opt.state[params[1]]["exp_avg"].clone()
    opt.state[params[2]]["step"] = 2  # a number, as old checkpoints have it
    train(opt, params, [2])
    train(other, others, [2])
    assert_same(snapshot(opt, params), snapshot(other, others))
    opt.state.clear()
    fresh = lf.LAMB(begun := copies(params), backend=backend)
    train(opt, params, [3])
    train(fresh, begun, [3])
    assert_same(snapshot(opt, params), snapshot(fresh, begun))


def test_group_keys_after_loading():
    """Ours survive, a scheduler's are kept, foreign ones are dropped."""
    params = parameters()
    opt = lf.AdamW(params)
    saved = torch.optim.AdamW(params, lr=0.5).state_dict()
    saved["param_groups"][0] |= {"initial_lr": 0.25, "nonsense": 1}
    opt.load_state_dict(saved)
    (group,) = opt.param_groups
    assert group["lr"] == 0.5 and group["initial_lr"] == 0.25 and group["layer"] == "tensor" and group["adapt"] is True
    assert not {"nonsense", "amsgrad", "decoupled_weight_decay"} & set(group)
    assert set(opt.state_dict()["param_groups"][0]) - set(group) == {"rule"}


def test_state_dict_hooks():
    params, seen = parameters(), []
    opt = lf.LAMB(params)
    opt.register_state_dict_pre_hook(lambda o: seen.append("save"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(("load", d.pop("note"))))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    opt.load_state_dict(saved)
    assert seen == ["save", ("load", 1), 0.5] and saved["note"] == 1
