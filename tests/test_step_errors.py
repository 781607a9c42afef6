"""Errors that step() raises: each comes before anything is written, and a step after the remedy is as any other.

The bad tensor is the last one, so that an engine which checks as it goes would have written the others.
Left out: gradients on another device, which torch itself hinders (test_errors.py asks the check).
"""

import pytest
import torch
from conduct import EACH, assert_same, each_case, each_engine, give, make, parameters, raw, refused, snapshot, train
from torch.nn import Parameter

import layerfused as lf


def bad_data(p, data):
    """Puts what torch would not take as a gradient: .data is unchecked."""
    p.grad.data = data


BAD = {  # name -> (what spoils the gradient of a parameter of shape (4, 3, 2, 2), the error, words of its message)
    "sparse": (lambda p: setattr(p, "grad", p.grad.to_sparse()), ValueError, ["sparse", "to_dense()"]),
    "another shape": (lambda p: bad_data(p, torch.ones(4, 3)), ValueError, ["(4, 3)", "(4, 3, 2, 2)"]),
    "broadcastable": (lambda p: bad_data(p, torch.ones(1)), ValueError, ["(1,)", "(4, 3, 2, 2)"]),
    "complex": (lambda p: bad_data(p, torch.ones(p.shape, dtype=torch.complex64)), TypeError, ["complex64"]),
    "integer": (lambda p: bad_data(p, torch.ones(p.shape, dtype=torch.int32)), TypeError, ["int32"]),
    "boolean": (lambda p: bad_data(p, torch.ones(p.shape, dtype=torch.bool)), TypeError, ["bool"]),
}


def whole(opt, params):
    """Everything that an error must leave alone."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return groups, raw(opt.skipped_steps), [id(p) for p in opt.state]


def assert_untouched(opt, params, before, own):
    assert_same(snapshot(opt, params), before)
    assert whole(opt, params) == own


def pair(case, backend, mixed=False, **options):
    """An optimizer and its twin after two steps; mixed: with parameters of the reference engine before the last."""

    def one():
        params = parameters()
        if mixed:
            params[1:1] = parameters((3,), dtype=torch.float64)
        opt = make(case, params, backend=backend, **options)
        train(opt, params, range(2))
        return opt, params

    return one(), one()


@pytest.mark.parametrize("name", BAD)
@each_engine
@each_case
def test_gradients_that_cannot_be_used(case, backend, name):
    spoil, kind, words = BAD[name]
    (opt, params), (twin, others) = pair(case, backend, mixed=True, max_grad_norm=1.0)
    give(params, 2)
    spoil(params[-1])
    before, own = snapshot(opt, params), whole(opt, params)
    versions = [p._version for p in params]
    with refused(kind, *words):
        opt.step()
    assert_untouched(opt, params, before, own)
    assert versions == [p._version for p in params]
    opt.zero_grad()
    train(opt, params, [2])
    train(twin, others, [2])
    assert_same(snapshot(opt, params), snapshot(twin, others))


@each_engine
@each_case
def test_parameters_that_come_to_overlap(case, backend):
    (opt, params), (twin, others) = pair(case, backend)
    old = params[1].data
    params[1].data = params[0].data[2]
    give(params, 2)
    before, own = snapshot(opt, params), whole(opt, params)
    with refused(ValueError, "share memory", "clone()"):
        opt.step()
    assert_untouched(opt, params, before, own)
    params[1].data = old
    train(opt, params, [2])
    train(twin, others, [2])
    assert_same(snapshot(opt, params), snapshot(twin, others))


@each_case
def test_an_engine_that_can_no_longer_serve(case):
    (opt, params), _ = pair(case, "cpu")
    params[-1].grad, params[-1].data = None, params[-1].data.double()
    give(params, 2)
    before, own = snapshot(opt, params), whole(opt, params)
    with refused(ValueError, "backend='cpu'", "float64", "use 'auto'"):
        opt.step()
    assert_untouched(opt, params, before, own)
    opt.param_groups[0]["backend"] = "auto"
    opt.step()
    assert opt.engines == {"cpu": 3, "reference": 1}


@each_engine
def test_states_that_do_not_fit(backend):
    """States that somebody put into `state`, and a parameter exchanged for one that cannot be served."""
    lamb = next(case for case in EACH if case.cls == "LAMB")
    for name, bad, words in (
        ("exp_avg", torch.zeros(2), ["exp_avg", "(2,)", "(4, 3, 2, 2)"]),
        ("exp_avg_sq", torch.zeros(4, 3, 2, 2, dtype=torch.int32), ["exp_avg_sq", "int32"]),
        ("step", torch.zeros(2), ["step", "2"]),
    ):
        (opt, params), (twin, others) = pair(lamb, backend)
        give(params, 2)
        good, opt.state[params[-1]][name] = opt.state[params[-1]][name], bad
        before, own = snapshot(opt, params), whole(opt, params)
        with refused(ValueError, *words):
            opt.step()
        assert_untouched(opt, params, before, own)
        opt.state[params[-1]][name] = good
        opt.step()
        train(twin, others, [2])
        assert_same(snapshot(opt, params), snapshot(twin, others))


@each_engine
@pytest.mark.parametrize("norm, words", [(-1.0, [">= 0", "-1.0"]), (torch.ones(2), ["one element", "(2,)"])])
def test_norms_that_cannot_be_used(backend, norm, words):
    params = parameters()
    opt = lf.LAMB(params, backend=backend)
    give(params, 0)
    before, own = snapshot(opt, params), whole(opt, params)
    with refused(ValueError, "grad_norm", *words):
        opt.step(grad_norm=norm)
    assert_untouched(opt, params, before, own)
    with refused(ValueError, "grad_norm", "max_grad_norm"):
        lf.AdamW(params, backend=backend).step(grad_norm=1.0)
    assert_untouched(opt, params, before, own)


@each_engine
@pytest.mark.parametrize(
    "key, value",
    [("layer", "row"), ("layer", (2, 3)), ("backend", "tpu"), ("lr", torch.ones(2)), ("trust_clip", (2, 1))],
)
def test_group_keys_spoiled_between_steps(backend, key, value):
    params = parameters((7, 5), (4, 3))
    opt = lf.LAMB(params, backend=backend)
    train(opt, params, [0])
    before = snapshot(opt, params)
    good, opt.param_groups[0][key] = opt.param_groups[0][key], value
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        opt.step()
    assert_same(snapshot(opt, params), before)
    opt.param_groups[0][key] = good
    opt.step()
    assert opt.state[params[0]]["step"] == 2


@each_engine
def test_members_of_one_layer_that_disagree_in_step(backend):
    params = parameters((7, 5), (7,))
    opt = lf.LAMB([{"params": params, "layer": "group"}], backend=backend)
    train(opt, params, [0])
    before = snapshot(opt, params)
    opt.param_groups[0]["params"].append(Parameter(torch.ones(3)))
    with refused(ValueError, "layer='group'", "step"):
        opt.step()
    opt.param_groups[0]["params"].pop()
    assert_same(snapshot(opt, params), before)


@each_engine
def test_an_error_in_the_closure_leaves_everything(backend):
    params = parameters()
    opt = lf.LAMB(params, backend=backend)
    give(params, 0)
    before, own = snapshot(opt, params), whole(opt, params)

    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert_untouched(opt, params, before, own)
