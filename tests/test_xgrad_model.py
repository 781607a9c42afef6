"""The model beside XGrad: its own saving and loading, averages of it, copies of both.

Left out: checkpoints of the optimizer (test_xgrad_resume.py).
"""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from test_xgrad_weights import each_base, models, same, trained
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from xgrad_oracle import (
    Net,
    Oracle,
    assert_leads,
    assert_near,
    assert_same,
    snapshot,
    train,
    true_weights,
    values,
)

import layerfused as lf

# The model's own saving and loading


def saved_through_a_file(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return list(torch.load(file).values())


@each_base
def test_saving_a_model_gives_true_weights_and_warns_once(made):
    net, xg = trained(made, with_model=True)
    true = true_weights(xg)
    with pytest.warns(UserWarning, match="true_weights"):
        assert same(saved_through_a_file(net), true)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, xg, [3])
        true = true_weights(xg)
        assert same(saved_through_a_file(net), true)


def test_no_warning_where_nothing_is_wrong():
    net, xg = trained(with_model=True, steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.state_dict()
        train(net, xg, range(2))
        with xg.true_weights():
            net.state_dict()
        xg.eval()
        net.state_dict()
        xg.train()
        xg.state_dict()
    with pytest.warns(UserWarning, match="true_weights"):
        net.state_dict()


@each_base
@pytest.mark.filterwarnings("ignore:.*true_weights")
def test_saving_anywhere_changes_no_bits(made):
    """Also as part of a larger module, and between backward and step."""
    found = []
    for saves in (True, False):
        net, xg = trained(made, with_model=True)
        parent = torch.nn.ModuleDict({"net": net})
        for t in range(3, 6):
            xg.zero_grad()
            loss = net(t)
            loss.backward()
            if saves:
                true = true_weights(xg)
                assert same(saved_through_a_file(parent if t % 2 else net), true)
            xg.step()
            if saves:
                net.state_dict()
        net(6)
        found.append(snapshot(xg))
    assert_same(*found)


@each_base
@pytest.mark.parametrize("inside", [True, False])
def test_weights_loaded_by_the_model_are_true_weights(made, inside):
    """With model= anywhere. The states stay, so that training goes on from there with their momentum."""
    net, xg = trained(made, with_model=not inside)
    twin_net, twin = trained(made)
    other = Net()
    with torch.no_grad():
        other.w1 *= 2
    if inside:
        with xg.true_weights():
            net.load_state_dict(other.state_dict())
    else:
        net.load_state_dict(other.state_dict())
    assert same(true_weights(xg), other.parameters())
    twin.eval()
    with torch.no_grad():
        for p, q in zip(twin_net.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    twin.train()
    for each in ((net, xg), (twin_net, twin)):
        train(*each, range(3, 5))
    assert_same(xg, twin)


def test_loading_before_the_first_step():
    net, xg = trained(with_model=True, steps=0)
    other = Net()
    with torch.no_grad():
        other.w1 *= 2
    net.load_state_dict(other.state_dict())
    train(net, xg, range(2))
    start = values(other.parameters())
    oracle = Oracle("lamb", start, 1, max_norm=1.0, lr=0.02)
    oracle.train(range(2))
    assert_near(net.parameters(), oracle.predicted(), start)


# Averages and copies


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.75)], ids=["swa", "ema"])
@models
def test_averaged_model(average, with_model):
    """Of true weights, if updated where these are."""
    net, xg = trained(with_model=with_model, steps=0)
    averaged = AveragedModel(net, multi_avg_fn=average)
    expected = None
    for t in range(4):
        train(net, xg, [t])
        with xg.true_weights():
            averaged.update_parameters(net)
        true = [p.double() for p in true_weights(xg)]
        weight = 0.25 if average else 1 / (t + 1)
        expected = true if expected is None else [e + weight * (p - e) for e, p in zip(expected, true, strict=True)]
        assert_leads(xg)
    for p, q in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
    twin_net, twin = trained(steps=4)
    assert_same(xg, twin)


def test_a_copy_of_the_model_is_on_its_own():
    """AveragedModel deep-copies the module with its hooks: they must not reach for the original's weights."""
    net, xg = trained(with_model=True)
    with xg.true_weights():
        ema = copy.deepcopy(net)
    live, held = values(net.parameters()), values(ema.parameters())
    xg.param_groups[0]["lr"] = 0.5  # due at the next forward pass, of net alone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema(3)
        saved = ema.state_dict()
        ema.load_state_dict(saved)
    assert same(net.parameters(), live) and same(ema.parameters(), held)
    net(3)
    assert not same(net.parameters(), live)


@each_base
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_of_xgrad_with_its_parameters(made, how):
    net, xg = trained(made)
    before = snapshot(xg)
    if how == "deepcopy":
        pair = copy.deepcopy((net, xg))
    else:
        file = io.BytesIO()
        torch.save((net, xg), file)
        file.seek(0)
        pair = torch.load(file, weights_only=False)
    assert pair[1].param_groups[0]["params"][0] is pair[0].w1
    assert pair[1].steps == xg.steps
    for each in (pair, (net, xg)):
        each[1].zero_grad()
        assert_same(each[1], before)
        train(*each, range(3, 5))
    assert_same(pair[1], xg)


def test_copying_leaves_what_lies_in_the_parameters():
    net, xg = trained()
    live = values(net.parameters())
    copy.deepcopy((net, xg))
    assert same(net.parameters(), live)


def test_a_model_lives_on_without_its_xgrad():
    """Hooks hold XGrad weakly: a second optimizer for the same model does not meet the first one's."""
    net, xg = trained(with_model=True)
    xg.eval()
    gone = weakref.ref(xg)
    del xg
    gc.collect()
    assert gone() is None
    net(3)
    net.load_state_dict(net.state_dict())
    again = lf.XGrad(lf.LAMB(net.parameters(), lr=0.02), model=net)
    train(net, again, range(2))
    assert_leads(again)


def test_a_model_that_xgrad_knows_can_be_pickled():
    """torch.save(model) takes the hooks with it. What is loaded has no XGrad, and does without."""
    net, xg = trained(with_model=True)
    file = io.BytesIO()
    with xg.true_weights():
        true = values(net.parameters())
        torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded(3)
    assert same(loaded.parameters(), true) and same(loaded.state_dict().values(), true)


@pytest.mark.filterwarnings("ignore:.*true_weights")
def test_two_optimizers_for_one_model():
    found = []
    for with_model in (False, True):
        net = Net()
        inner = lf.LAMB([net.w1, net.w2], lr=0.02), lf.AdamW([net.b1, net.gain], lr=0.02)
        both = [lf.XGrad(each, model=net if with_model else None) for each in inner]
        for t in range(4):
            for xg in both:
                xg.zero_grad()
            net(t).backward()
            if with_model:
                net.state_dict()
            for xg in both:
                xg.step()
                xg.param_groups[0]["lr"] *= 0.5
        for xg in both:
            xg.train()
        found.append([snapshot(xg) for xg in both])
    assert_same(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])
