"""Bad input to XGrad: errors that name value and remedy, with nothing written."""

import math

import pytest
import torch
from conduct import parameters, refused
from torch.nn import Parameter
from xgrad_oracle import Net, assert_leads, assert_same, snapshot, train, true_weights, values

import layerfused as lf

LAMB = [lambda net: lf.LAMB(net.named_parameters(), lr=0.02), lambda net: torch.optim.AdamW(net.named_parameters())]
each_base = pytest.mark.parametrize("made", LAMB, ids=["LAMB", "torch.AdamW"])


def trained(made=LAMB[0], with_model=False, steps=3):
    net = Net()
    xg = lf.XGrad(made(net), model=net if with_model else None)
    train(net, xg, range(steps))
    return net, xg


# What cannot be wrapped


@pytest.mark.parametrize("steps", [0, -1, 1.5, "1", None, True, math.nan, torch.tensor(1)], ids=repr)
def test_steps_out_of_range(steps):
    with refused((ValueError, TypeError), "steps", ">= 1", steps):
        lf.XGrad(lf.Adam(parameters()), steps=steps)


def test_a_wrapper_in_a_wrapper():
    with refused((ValueError, TypeError), "XGrad", ".optimizer"):
        lf.XGrad(lf.XGrad(lf.Adam(parameters())))


@each_base
def test_an_optimizer_that_somebody_wraps_already(made):
    """As in a notebook's cell that is run twice: predicted weights would be taken for true ones."""
    net, xg = trained(made)
    before = snapshot(xg)
    with refused((ValueError, TypeError, RuntimeError), "XGrad"):
        lf.XGrad(xg.optimizer)
    assert_same(xg, before)


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Rprop", "ASGD", "LBFGS"])
def test_other_optimizers_of_torch(name):
    with refused((ValueError, TypeError), name, "SGD", "Adam", "AdamW"):
        lf.XGrad(getattr(torch.optim, name)(parameters((3,))))


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.SGD, lf.Adam])
def test_somebodys_own_step(base):
    """A subclass of torch's may do anything in step(); one of ours has a rule, and that says what it does."""

    class Mine(base):
        def __init__(self, params):
            super().__init__(params, **({"momentum": 0.9} if base is torch.optim.SGD else {}))

    if base is lf.Adam:
        lf.XGrad(Mine(parameters()))
    else:
        with refused((ValueError, TypeError), "Mine", "SGD", "AdamW"):
            lf.XGrad(Mine(parameters()))


@pytest.mark.parametrize("what", [None, 0.1, "Adam", [Parameter(torch.ones(2))], lf.Adam, Net()], ids=lambda x: type(x))
def test_what_is_no_optimizer(what):
    with refused((ValueError, TypeError), type(what).__name__):
        lf.XGrad(what)


@pytest.mark.parametrize("cls", [lf.SGD, torch.optim.SGD])
def test_sgd_without_momentum(cls):
    with refused(ValueError, "SGD", "momentum"):
        lf.XGrad(cls(parameters()))
    params = parameters()
    with refused(ValueError, "SGD", "momentum"):  # in one group of two
        lf.XGrad(cls([{"params": params[:2]}, {"params": params[2:], "momentum": 0.0}], momentum=0.9))


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_options_that_cannot_be_served(option):
    with refused(ValueError, option):
        lf.XGrad(torch.optim.Adam(parameters(), **{option: True}))
    params = parameters()
    with refused(ValueError, option):
        lf.XGrad(torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], option: True}]))
    if option == "differentiable":
        with refused(ValueError, option):
            lf.XGrad(lf.LAMB(parameters(), differentiable=True))


def test_a_rule_without_direction():
    class Mine(lf.Optimizer):
        rule = lf.Rule(name="mine", hyper=("lr",), reference=lambda p, g, s, h, t, adapt: (p - h.lr * g, {}))

    with refused((ValueError, TypeError), "Mine", "direction"):
        lf.XGrad(Mine(parameters(), {"lr": 0.1}))


@pytest.mark.parametrize("name", [name for name in ("CurvatureSGD", "CurvatureAdamW") if hasattr(lf, name)])
def test_optimizers_that_look_ahead_themselves(name):
    with refused((ValueError, TypeError), name):
        lf.XGrad(getattr(lf, name)(parameters()))


@pytest.mark.parametrize("what", [1, "net", lambda x: x], ids=lambda x: type(x).__name__)
def test_a_model_that_is_none(what):
    with refused(TypeError, "model", type(what).__name__):
        lf.XGrad(lf.Adam(parameters()), model=what)


def test_nothing_of_a_refused_optimizer_is_changed():
    """No hook stays on the model, none on the optimizer: both go on alone."""
    net, other = Net(), Net()
    for inner in (torch.optim.SGD(net.parameters(), lr=0.1), lf.SGD(net.parameters(), lr=0.1)):
        with pytest.raises(ValueError):
            lf.XGrad(inner, model=net)
        with pytest.raises(ValueError):
            lf.XGrad(lf.Adam(net.parameters()), steps=0, model=net)
    train(net, inner, range(3))
    train(other, lf.SGD(other.parameters(), lr=0.1), range(3))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert not net._forward_pre_hooks and not net._state_dict_pre_hooks and not net._load_state_dict_pre_hooks


# Parameters changed by hand while predicted weights are live

CHANGES = {
    "in place": lambda p: p.add_(1.0),
    "through an alias": lambda p: p.view(-1)[0].zero_(),
    "another storage": lambda p: setattr(p, "data", p.data.clone()),
}
NEXT = {
    "step": lambda net, xg: (net(5).backward(), xg.step()),
    "eval": lambda net, xg: xg.eval(),
    "true_weights": lambda net, xg: true_weights(xg),
    "refresh": lambda net, xg: (xg.param_groups[0].update(lr=0.5), xg.zero_grad()),
    "refresh by train": lambda net, xg: (xg.param_groups[0].update(lr=0.5), xg.train()),
}


@each_base
@pytest.mark.parametrize("then", NEXT)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_while_predicted(made, then, change):
    net, xg = trained(made)
    with torch.no_grad():
        CHANGES[change](net.w2)
    live = values(net.parameters())
    states = [{key: value.clone() for key, value in xg.state[p].items()} for p in net.parameters()]
    for _ in range(2):
        with refused(RuntimeError, "w2", "true_weights()"):
            NEXT[then](net, xg)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), live, strict=True))
    for p, before in zip(net.parameters(), states, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in xg.state[p].items())


@pytest.mark.parametrize("then", ["forward", "saving"])
def test_weights_changed_while_predicted_of_a_model(then):
    net, xg = trained(with_model=True)
    with torch.no_grad():
        net.w2 += 1
    xg.param_groups[0]["lr"] = 0.5
    with refused(RuntimeError, "w2", "true_weights()"):
        net(3) if then == "forward" else net.state_dict()


def test_without_names_a_parameter_goes_by_its_place():
    params = parameters((2,), (3,), (4,))
    xg = lf.XGrad(lf.Adam([{"params": params[:1]}, {"params": params[1:]}]))
    for p in params:
        p.grad = torch.ones_like(p)
    xg.step()
    with torch.no_grad():
        params[2] += 1
    with refused(RuntimeError, "1.1", "(4,)", "true_weights()"):
        xg.eval()


@each_base
def test_weights_loaded_without_true_weights(made):
    """Without model= nobody tells XGrad that these are true ones."""
    net, xg = trained(made)
    net.load_state_dict(Net().state_dict())
    with refused(RuntimeError, "w1", "true_weights()"):
        xg.eval()


@each_base
def test_what_is_no_change(made):
    """Reading, gradients, requires_grad, and writing before the first step."""
    net, xg = trained(made, steps=0)
    with torch.no_grad():
        net.w1 += 1.0
    train(net, xg, range(2))
    assert_leads(xg)
    net.w1.requires_grad_(False).requires_grad_(True)
    net.w1.detach().clone().zero_()
    values(net.parameters())
    xg.eval()
