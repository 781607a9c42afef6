"""XGrad's one launch is its three phases, bit for bit.

Left out: what the engines make of PREDICT by itself (test_*_predict.py).
"""

import pytest
import torch
from conduct import EACH
from device_cases import DEVICE
from engines import NAMED, make, parameters, randn, small_chunks, starts
from test_engine_bits import mixed
from test_engine_storage import TYPES
from xgrad_oracle import assert_leads, assert_same, snapshot, tensors, true_weights

import layerfused as lf

MOVING = [case.name for case in EACH if case.rule != "sgd_plain"]
# So that predicted weights differ from true ones in 16 bits, too.
LARGE_STEPS = {"lars": {"lr": 0.5, "trust_coefficient": 0.1}}
SIZES = (5, 300, 0, 130, 1, 40, 65, 64, 90)


def give(params, t):
    """Gradients that depend on what is in the parameters."""
    for i, p in enumerate(params):
        p.grad = (randn(p.numel(), 100 * t + i).view(p.shape).to(p.device) + 0.5 * p.detach().float()).to(p.dtype)


def optimizer(name, backend="auto"):
    """Three groups (adapt, adapt=False where it may be, layer="group") of all storage types and sizes."""
    params = parameters(x.to(TYPES[i % 3]).to(DEVICE) for i, x in enumerate(starts(SIZES)))
    groups = mixed(name)(params)
    return make(name, groups, backend=backend, **LARGE_STEPS.get(NAMED[name].rule, {"lr": 0.05}))


def one_launch(xg, t):
    xg.step()


def toggled(xg, t):
    xg.step()
    xg.eval()
    xg.train()


def by_hand(xg, t):
    xg.eval()
    xg.step()  # of true weights, which stay
    xg.train()


def run(name, how, backend, steps=4):
    xg = lf.XGrad(optimizer(name, backend), steps=2)
    for t in range(steps):
        give(tensors(xg), t)
        how(xg, t)
    assert_leads(xg)
    return snapshot(xg)


@pytest.mark.parametrize("name", MOVING)
def test_one_launch_is_three_phases(name, monkeypatch):
    with small_chunks(monkeypatch):
        once = run(name, one_launch, "auto")
        assert_same(run(name, toggled, "auto"), once)
        assert_same(run(name, by_hand, "auto"), once)


@pytest.mark.parametrize("name, backend", [("lamb", "reference"), ("ladam-post", "reference"), ("sgd-momentum", "cuda"),
                                           ("setadam", "cuda"), ("novograd", "cuda")])  # fmt: skip
def test_one_launch_is_three_phases_elsewhere(name, backend):
    if backend == "cuda":
        pytest.importorskip("layerfused._cuda")
    once = run(name, one_launch, backend, steps=2)
    assert_same(run(name, toggled, backend, steps=2), once)
    assert_same(run(name, by_hand, backend, steps=2), once)


@pytest.mark.parametrize("name", MOVING)
def test_true_weights_are_the_plain_optimizers(name, monkeypatch):
    """The same gradients take a plain optimizer to the same bits: nothing of a prediction stays."""
    with small_chunks(monkeypatch):
        plain, xg = optimizer(name), lf.XGrad(optimizer(name), steps=3)
        for t in range(4):
            give(tensors(xg), t)
            for p, q in zip(tensors(plain), tensors(xg), strict=True):
                p.grad = q.grad
            xg.step()
            plain.step()
        xg.eval()
        for p, q in zip(tensors(plain), tensors(xg), strict=True):
            assert torch.equal(p, q)
            assert plain.state[p].keys() == xg.state[q].keys()
            assert all(torch.equal(value, xg.state[q][key]) for key, value in plain.state[p].items())


@pytest.mark.parametrize("made", [lf.LAMB, lf.Adam, torch.optim.AdamW])
def test_after_eval_the_inner_optimizer_is_a_plain_one(made):
    """True weights are in the parameters, and whoever steps from there steps as without XGrad."""
    params, others = parameters(starts((300, 5))), parameters(starts((300, 5)))
    xg, plain = lf.XGrad(made(params, lr=0.1), steps=2), made(others, lr=0.1)
    for t in range(3):
        give(params, t)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad
        xg.eval()
        with torch.no_grad():
            for p in (*params, *others):
                p += 0.25
        xg.optimizer.step()
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        xg.train()
        assert_leads(xg)


def test_a_parameter_with_gaps():
    """Its copy cannot lie like it."""
    columns, packed = randn(24, 1).view(4, 6)[:, ::2], randn(24, 1).view(4, 6)[:, ::2].contiguous()
    xg, plain = lf.XGrad(lf.LAMB([torch.nn.Parameter(columns)], lr=0.1)), lf.LAMB([torch.nn.Parameter(packed)], lr=0.1)
    for t in range(3):
        give(tensors(xg), t)
        tensors(plain)[0].grad = tensors(xg)[0].grad.contiguous()
        xg.step()
        plain.step()
        assert_leads(xg)
        torch.testing.assert_close(true_weights(xg), [tensors(plain)[0].detach()], rtol=1e-6, atol=1e-6)


def test_several_launches_with_a_clip_and_a_skipped_step():
    found = []
    for how in (one_launch, toggled):
        params = parameters(randn(40, 3).to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16))
        xg = lf.XGrad(lf.LAMB(params, lr=0.05, max_grad_norm=0.5), steps=2)
        for t in range(4):
            give(params, t)
            if t == 2:
                params[0].grad[0] = float("nan")
            how(xg, t)
        assert xg.optimizer.engines == {"cpu": 2, "reference": 1} and xg.optimizer.skipped_steps == 1
        found.append(snapshot(xg))
    assert_same(*found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_layer_of_several_tensors_one_without_gradient(backend):
    """They have one ratio and count steps together, so that the prediction of the one left out moves, too."""
    found = []
    for how in (one_launch, toggled):
        params = parameters(starts((20, 30, 40)))
        xg = lf.XGrad(lf.LAMB([{"params": params, "layer": "group"}], lr=0.1, backend=backend))
        for t in range(3):
            give(params, t)
            params[t].grad = None
            how(xg, t)
            xg.zero_grad()
        found.append(snapshot(xg))
    assert_same(*found)


@pytest.mark.parametrize("layer", ["slices", 2, (1, 3)])
def test_layers_that_are_cut(layer):
    """Each layer has a ratio of its own; and a parameter in another order of memory."""
    found = []
    for how in (one_launch, toggled):
        params = parameters([randn(60, 1).view(4, 15), randn(72, 2).view(4, 3, 2, 3)])
        params[1].data = params[1].data.to(memory_format=torch.channels_last)
        xg = lf.XGrad(lf.LAMB([{"params": params, "layer": layer}], lr=0.1))
        for t in range(3):
            give(params, t)
            how(xg, t)
        found.append(snapshot(xg))
    assert_same(*found)


def test_a_rule_of_ones_own():
    """`direction` is all that XGrad needs of it."""

    def heavy(p, g, s, h, t, adapt):
        s["momentum_buffer"] = 0.9 * s["momentum_buffer"] + g
        scale = 1 / s["momentum_buffer"].norm()
        return p - h.lr * scale * s["momentum_buffer"], {"scale": scale}

    def way(s, h, t, report):
        return h.lr, report["scale"] * s["momentum_buffer"]

    class Heavy(lf.Optimizer):
        rule = lf.Rule(name="heavy", hyper=("lr",), states=("momentum_buffer",), report=("scale",), reference=heavy,
                       direction=way)  # fmt: skip

    p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    xg = lf.XGrad(Heavy([p], {"lr": 0.5}), steps=2)
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    xg.step()
    torch.testing.assert_close(p.detach(), torch.tensor([3 - 0.3 - 0.6, 4 - 0.4 - 0.8], dtype=torch.float64))
    xg.eval()
    torch.testing.assert_close(p.detach(), torch.tensor([2.7, 3.6], dtype=torch.float64))
