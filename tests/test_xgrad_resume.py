"""Checkpoints: training that is interrupted anywhere goes on with the same bits.

Left out: distributed checkpoints.
"""

import io
import warnings

import pytest
import torch
from engines import make
from torch.optim import lr_scheduler as lrs
from xgrad_oracle import Net, Oracle, assert_leads, assert_near, assert_same, snapshot, train, true_weights, values

import layerfused as lf

pytestmark = pytest.mark.filterwarnings("ignore:.*true_weights")
NAMES = ["lamb", "setadam", "ladam-post", "ladabelief", "adam-decay", "lars", "adamnorm", "torch.Adam", "torch.SGD"]
MODES = ["after eval", "in true_weights", "by the model", "while predicted"]


def new_plain(name, lr=0.05, backend="auto"):
    net = Net()
    if name.startswith("torch"):
        cls = getattr(torch.optim, name.split(".")[1])
        inner = cls(net.parameters(), lr=lr, **({"momentum": 0.9} if "SGD" in name else {}))
    else:
        inner = make(name, net.parameters(), lr=lr, backend=backend)
    return net, inner


def new(name, with_model=False, **options):
    net, inner = new_plain(name, **options)
    return net, lf.XGrad(inner, steps=2, model=net if with_model else None), lrs.StepLR(inner, 2)


def through_a_file(*state_dicts):
    file = io.BytesIO()
    torch.save(state_dicts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # tensors, numbers and names only


def saved(net, xg, scheduler, mode):
    if mode == "in true_weights":
        with xg.true_weights():
            return through_a_file(net.state_dict(), xg.state_dict(), scheduler.state_dict())
    if mode == "after eval":
        xg.eval()
    if mode == "while predicted":  # the model's by itself, the optimizer's with predictions live
        own = through_a_file(xg.state_dict())
        with xg.true_weights():
            return *through_a_file(net.state_dict()), *own, *through_a_file(scheduler.state_dict())
    return through_a_file(net.state_dict(), xg.state_dict(), scheduler.state_dict())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_resume(name, mode):
    """lr moves at the very moment of saving."""
    with_model = mode == "by the model"
    net, xg, scheduler = new(name, with_model=with_model)
    train(net, xg, range(4), after=scheduler.step)
    states = saved(net, xg, scheduler, mode)
    again, resumed, follower = new(name, lr=7.0, with_model=with_model)
    parts = [(again, states[0]), (resumed, states[1]), (follower, states[2])]
    for part, state in parts:
        part.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(true_weights(resumed), true_weights(xg), strict=True))
    if mode == "after eval":
        xg.train()
        resumed.train()
    train(net, xg, range(4, 7), after=scheduler.step)
    train(again, resumed, range(4, 7), after=follower.step)
    assert_same(resumed, xg)
    straight_net, straight, its = new(name)
    train(straight_net, straight, range(7), after=its.step)
    if with_model:
        net(8)  # predicts with the lr that the scheduler has just set; without model= it is zero_grad()
    for each in (xg, straight):
        each.train()
    assert_same(straight, xg)


@pytest.mark.parametrize("name", ["lamb", "torch.Adam"])
def test_loading_into_one_that_is_predicting(name):
    """Back to a checkpoint in the same process; whichever of model and optimizer is loaded first."""
    for order in (0, 1):
        net, xg, scheduler = new(name, with_model=True)
        train(net, xg, range(3))
        states = saved(net, xg, scheduler, "in true_weights")
        train(net, xg, range(3, 5))
        exact = snapshot(xg)
        for part, state in ((net, states[0]), (xg, states[1]))[:: 1 - 2 * order]:
            part.load_state_dict(state)
        train(net, xg, range(3, 5))
        assert_same(xg, exact)


@pytest.mark.parametrize("name", ["lamb", "torch.Adam"])
def test_steps_are_those_of_the_checkpoint_or_ones_own(name):
    """`steps` is a hyper-parameter like lr: the checkpoint's."""
    net, xg, _ = new(name)
    train(net, xg, range(3))
    again = Net()
    inner = type(xg.optimizer)(again.parameters())
    other = lf.XGrad(inner, steps=1)
    with xg.true_weights():
        again.load_state_dict(net.state_dict())
    other.load_state_dict(through_a_file(xg.state_dict())[0])
    assert other.steps == 2
    other.zero_grad()
    assert_same(other, xg)


@pytest.mark.parametrize("name", ["lamb", "setadam", "torch.Adam"])
def test_the_inner_optimizers_checkpoint_is_a_plain_one(name):
    """A run without XGrad takes it over: states and true weights are all there is to it."""
    net, xg, _ = new(name)
    train(net, xg, range(3))
    plain_net, plain = new_plain(name, lr=7.0)
    with xg.true_weights():
        plain_net.load_state_dict(net.state_dict())
    plain.load_state_dict(through_a_file(xg.optimizer.state_dict())[0])
    for _ in range(2):  # at true weights, both
        xg.eval()
        for each in ((plain_net, plain), (net, xg)):
            train(*each, [3])
    assert all(torch.equal(p, q) for p, q in zip(plain_net.parameters(), true_weights(xg), strict=True))


@pytest.mark.parametrize("name", ["adam-decay", "sgd-momentum", "torch.Adam"])
@pytest.mark.parametrize("with_model", [False, True])
def test_checkpoints_of_the_inner_optimizer(name, with_model):
    """For rules whose direction is in the states alone, its state_dict is enough to go on with the same bits."""
    net, xg, _ = new(name)
    train(net, xg, range(3))
    again, resumed, _ = new(name, lr=7.0, with_model=with_model)
    with xg.true_weights():
        again.load_state_dict(net.state_dict())
    resumed.optimizer.load_state_dict(through_a_file(xg.optimizer.state_dict())[0])
    for each in ((net, xg), (again, resumed)):
        train(*each, range(3, 5))
    assert_same(resumed, xg)


@pytest.mark.parametrize("name", ["lamb", "setadam", "ladam-post", "ladam", "adam-decay", "lars", "aida", "torch.Adam"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("into", ["inner, then wrapped", "wrapped"])
def test_a_plain_checkpoint_goes_on_under_xgrad(name, into, backend):
    """What predictions need beside the states is not in it: they begin at the latest after the next step.

    Until then each tensor holds its true weights, or the very prediction that the uninterrupted run would make."""
    plain_net, plain = new_plain(name, backend=backend)
    train(plain_net, plain, range(3))
    exact = lf.XGrad(plain, steps=2)
    own = plain.state_dict()
    own.pop("xgrad", None)
    net, xg, _ = new(name, lr=7.0, backend=backend)
    net.load_state_dict(plain_net.state_dict())
    (state,) = through_a_file(own)
    if into == "wrapped":
        xg.load_state_dict(state)
    else:
        inner = xg.optimizer
        inner.load_state_dict(state)
        xg = lf.XGrad(inner, steps=2)
    for each in (exact, xg):
        each.train()
    for p, q, true in zip(net.parameters(), plain_net.parameters(), true_weights(exact), strict=True):
        fine = torch.equal(p, q) or torch.equal(p, true)
        assert fine, f"{(p - true).norm():.3g} ahead, exact is {(q - true).norm():.3g}"
    train(net, xg, range(3, 5))
    assert_leads(xg)


def test_a_checkpoint_before_the_first_step():
    net, xg, scheduler = new("lamb")
    states = saved(net, xg, scheduler, "while predicted")
    again, resumed, _ = new("lamb", lr=7.0)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for each in ((net, xg), (again, resumed)):
        train(*each, range(2))
    assert_same(resumed, xg)


@pytest.mark.parametrize("name", ["lamb", "torch.Adam"])
def test_saving_does_not_disturb(name):
    """xg.state_dict() in the middle of everything leaves the parameters alone, and warns nobody."""
    net, xg, _ = new(name, with_model=True)
    train(net, xg, range(3))
    live = values(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xg.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), live, strict=True))
    twin_net, twin, _ = new(name)
    train(twin_net, twin, range(3))
    for each in ((net, xg), (twin_net, twin)):
        train(*each, [3])
    assert_same(twin, xg)


def test_hooks_of_state_dicts():
    net, xg, _ = new("lamb")
    seen = []
    xg.register_state_dict_post_hook(lambda opt, state: seen.append("saved"))
    xg.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    xg.load_state_dict(xg.state_dict())
    assert seen == ["saved", "loaded"]


def test_a_state_dict_that_does_not_fit_leaves_all_as_it_was():
    net, xg, _ = new("lamb")
    train(net, xg, range(3))
    before, own = snapshot(xg), xg.state_dict()
    _, other, _ = new("setadam")
    short = {**own, "param_groups": []}
    for bad in (other.state_dict(), short):
        with pytest.raises(ValueError):
            xg.load_state_dict(bad)
        assert_same(xg, before)
    train(net, xg, [3])
    oracle = Oracle("lamb", Net().parameters(), 2, lr=0.05)
    oracle.train(range(4))
    assert_near(net.parameters(), oracle.predicted(), Net().parameters())
