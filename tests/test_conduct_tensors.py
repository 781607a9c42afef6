"""Parameters and gradients as they lie in memory, and parameters whose memory is exchanged between two steps.

Elementwise rules give the same bits however a parameter lies. Layer-wise rules may add a layer's sums in another order
and are compared within the accuracy that every engine keeps.
Left out: misaligned addresses and mixtures of types beyond one each (test_engine.py has them).
"""

import pytest
import torch
from cases import ADAPT, FIXED
from conduct import (
    assert_near,
    assert_same,
    copies,
    each_case,
    each_engine,
    give,
    make,
    parameters,
    same_bits,
    snapshot,
    train,
)
from torch.nn import Parameter

import layerfused as lf


def transposed(p):
    return p.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(p):
    return p.contiguous(memory_format=torch.channels_last)


def gappy(p):
    return torch.stack([p, p], -1)[..., 0]


LAYOUTS = {"transposed": (transposed, (6, 7)), "channels_last": (channels_last, (4, 3, 2, 5)), "gappy": (gappy, (6, 7))}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def in_layout(p, layout):
    return Parameter(LAYOUTS[layout][0](p.detach()))


@each_layout
@each_engine
@each_case
def test_dense_parameters_in_any_order(case, backend, layout):
    (plain,) = parameters(LAYOUTS[layout][1])
    start, other = plain.detach().clone(), in_layout(plain, layout)
    strides = other.stride()
    opt, twin = make(case, [plain], backend=backend), make(case, [other], backend=backend)
    assert twin.engines == {"reference" if backend == "reference" or layout == "gappy" else "cpu": 1}
    for seed in range(3):
        give([plain], seed)
        give([other], seed)
        opt.step()
        twin.step()
    assert other.stride() == strides
    if case.rule in (*ADAPT, *FIXED) or opt.engines != twin.engines:
        assert_near(other, plain, start, 3)
    else:
        assert_same(snapshot(twin, [other]), snapshot(opt, [plain]))


GRADIENTS = {
    "transposed": transposed,
    "gappy": gappy,
    "expanded": lambda g: g[:1, :1].expand(g.shape),
    "reversed view": lambda g: g.t().contiguous().t(),
    "misaligned": lambda g: torch.cat([torch.zeros(1), g.reshape(-1)])[1:].view(g.shape),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@each_engine
@each_case
def test_gradients_with_strides_of_their_own(case, backend, kind):
    params, others = parameters((6, 7), (3,)), parameters((6, 7), (3,))
    opt, other = make(case, params, backend=backend), make(case, others, backend=backend)
    for seed in range(2):
        give(params, seed)
        give(others, seed)
        g = params[0].grad = GRADIENTS[kind](params[0].grad)
        values = g.clone()
        others[0].grad = g.clone(memory_format=torch.contiguous_format)
        opt.step()
        other.step()
        assert params[0].grad is g and same_bits(g, values)
    assert_same(snapshot(opt, params), snapshot(other, others))


@each_layout
@each_engine
def test_contiguous_gradients_of_other_layouts(backend, layout):
    (p,), (q,) = parameters(LAYOUTS[layout][1]), parameters(LAYOUTS[layout][1])
    p, q = in_layout(p, layout), in_layout(q, layout)
    opt, other = lf.LAMB([p], backend=backend), lf.LAMB([q], backend=backend)
    give([q], 0)
    p.grad = q.grad.clone(memory_format=torch.contiguous_format)
    opt.step()
    other.step()
    assert_same(snapshot(opt, [p]), snapshot(other, [q]))


@each_engine
@each_case
def test_new_storage_of_the_same_shape(case, backend):
    params, others = parameters(), parameters()
    opt, other = make(case, params, backend=backend), make(case, others, backend=backend)
    for seed in range(3):
        old = [p.data for p in params]
        for p in params:
            p.data = p.data.clone()
        values = [x.clone() for x in old]
        train(opt, params, [seed])
        train(other, others, [seed])
        assert all(same_bits(x, v) for x, v in zip(old, values, strict=True))  # the old memory is not ours any more
    assert_same(snapshot(opt, params), snapshot(other, others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_case
def test_model_to_another_type(case, dtype):
    """Goes on as an optimizer made for the converted model that was given the states; back in float32, too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    opt = make(case, model.parameters())
    train(opt, list(model.parameters()), range(2))
    for turn in (dtype, torch.float32):
        opt.zero_grad()
        model.to(turn)
        twins = copies(model.parameters())
        other = make(case, twins)
        other.load_state_dict(opt.state_dict())
        train(opt, list(model.parameters()), [5])
        train(other, twins, [5])
        assert_same(snapshot(opt, model.parameters()), snapshot(other, twins))
        assert opt.engines == {"reference" if turn == torch.float64 else "cpu": 4}
        names = opt.rule_of(opt.param_groups[0]).states
        assert all(opt.state[p][name].dtype == torch.float32 for p in model.parameters() for name in names)


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
@each_engine
@each_case
def test_storage_in_another_order(case, backend, layout):
    """The states follow: they are of the same values, and lie as the parameter does now."""
    (p,), (q,) = parameters(LAYOUTS[layout][1]), parameters(LAYOUTS[layout][1])
    start = p.detach().clone()
    opt, other = make(case, [p], backend=backend), make(case, [q], backend=backend)
    train(opt, [p], range(2))
    train(other, [q], range(2))
    p.data, p.grad = LAYOUTS[layout][0](p.data), None
    train(opt, [p], [2])
    train(other, [q], [2])
    if case.rule in (*ADAPT, *FIXED):
        assert_near(p, q, start, 3)
    else:
        assert_same(snapshot(opt, [p]), snapshot(other, [q]))
    states = opt.rule_of(opt.param_groups[0]).states
    assert all(opt.state[p][name].stride() == p.stride() for name in states)


@each_engine
@each_case
def test_storage_of_another_shape(case, backend):
    """Raises where states no longer fit, and goes on when the shape is back; without states there is nothing to fit."""
    params, others = parameters(), parameters()
    opt, other = make(case, params, backend=backend), make(case, others, backend=backend)
    train(opt, params, [0])
    train(other, others, [0])
    opt.zero_grad()
    old = params[3].data
    params[3].data = torch.ones(2, 3)
    give(params, 1)
    before = snapshot(opt, params)
    if opt.rule_of(opt.param_groups[0]).states:
        with pytest.raises(ValueError, match=r"shape \(4, 3, 2, 2\), its parameter has \(2, 3\)"):
            opt.step()
        assert_same(snapshot(opt, params), before)
    else:
        opt.step()
        assert opt.state[params[3]]["step"] == 2
        return
    params[3].grad, params[3].data = None, old
    train(opt, params, [1])
    train(other, others, [1])
    assert_same(snapshot(opt, params), snapshot(other, others))


def test_model_to_channels_last_while_training():
    """What `model.to(memory_format=…)` does, with gradients as convolutions give them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    opt, x = lf.LAMB(model.parameters(), lr=0.01), torch.randn(4, 3, 8, 8)
    start = model(x).pow(2).mean().item()
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        for _ in range(10):
            opt.zero_grad()
            loss = model(x.to(memory_format=layout)).pow(2).mean()
            loss.backward()
            opt.step()
    assert loss < 0.8 * start
    assert opt.engines == {"cpu": 4}
    assert opt.state[model[0].weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
