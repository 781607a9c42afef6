"""What an optimizer tells, and what can be asked of a step: layer_stats, engines, norms, param_groups, derivatives."""

import re

import pytest
import torch
from cases import REPORTS
from conduct import (
    EACH,
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
from torch.autograd import gradcheck
from torch.nn import Parameter

import layerfused as lf


@each_engine
@each_case
def test_layer_stats(case, backend):
    params = parameters()
    opt = make(case, [{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    train(opt, params, range(2))
    stats = opt.layer_stats()
    assert list(stats) == ["0.0", "1.0", "1.1", "1.2"]
    for own in stats.values():
        assert tuple(own) == REPORTS[case.rule]
        assert all(isinstance(x, float) and x == x for x in own.values())


@each_engine
def test_layer_stats_tell_the_norms(backend):
    params = parameters((4, 6), (4,))
    named = [("weight", params[0]), ("bias", params[1])]
    opt = lf.LARS([{"params": named[:1], "layer": "slices"}, {"params": named[1:]}], backend=backend)
    norms = params[0].detach().double().norm(dim=1)
    train(opt, params, [0])
    stats = opt.layer_stats()
    assert list(stats) == ["weight", "bias"]
    # float64 sums of fp32 squares over 6 elements: a few ulps of float32 at most
    torch.testing.assert_close(torch.tensor(stats["weight"]["param_norm"]).double(), norms, rtol=1e-6, atol=0)
    rows = params[0].grad.double().norm(dim=1)
    torch.testing.assert_close(torch.tensor(stats["weight"]["grad_norm"]).double(), rows, rtol=1e-6, atol=0)
    assert len(stats["weight"]["trust_ratio"]) == 4 and isinstance(stats["bias"]["trust_ratio"], float)


@each_engine
@pytest.mark.parametrize("layer, count", [("tensor", None), ("slices", 4), (2, 2), ((1, 3), 2), ("group", None)])
def test_layer_stats_of_cut_parameters_are_lists(backend, layer, count):
    params = parameters((4, 3), (4, 2, 2))
    opt = lf.LAMB([{"params": params, "layer": layer}], backend=backend)
    train(opt, params, [0])
    ratios = [own["trust_ratio"] for own in opt.layer_stats().values()]
    assert [len(r) if isinstance(r, list) else None for r in ratios] == [count, count]
    assert layer != "group" or ratios[0] == ratios[1]


def test_names():
    """Names stay with their groups; one that two models share is told apart by its place."""
    models = [torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)]
    opt = lf.LAMB([{"params": model.named_parameters()} for model in models])
    params = [p for model in models for p in model.parameters()]
    train(opt, params, [0])
    assert [group["param_names"] for group in opt.param_groups] == [["weight", "bias"]] * 2
    assert list(opt.layer_stats()) == ["weight", "bias", "1.0", "1.1"]
    assert opt.state_dict()["param_groups"][1]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="with/without names"):
        lf.LAMB([("weight", params[0]), params[1]])
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": parameters((2,))})


def test_engines():
    params = [*parameters(), *parameters((2,), dtype=torch.float64), *parameters((2,), dtype=torch.bfloat16)]
    assert lf.LAMB(params).engines == {"cpu": 5, "reference": 1}
    assert lf.LAMB(params[:4], backend="cpu").engines == {"cpu": 4}
    for plain in ({"backend": "reference"}, {"foreach": True}, {"fused": False}, {"differentiable": True}):
        assert lf.LAMB(params, **plain).engines == {"reference": 6}
    assert lf.LAMB(params[:4], fused=True, foreach=False, capturable=True).engines == {"cpu": 4}
    opt = lf.LAMB([{"params": params[:2], "backend": "reference"}, {"params": params[2:4]}])
    assert opt.engines == {"reference": 2, "cpu": 2}
    opt.param_groups[0]["backend"] = "auto"
    train(opt, params[:4], [0])
    assert opt.engines == {"cpu": 4}


@each_engine
@pytest.mark.parametrize("mixed", [False, True])
def test_grad_norm_is_that_of_all_groups(backend, mixed):
    params = parameters()
    params += parameters((3, 3), dtype=torch.float64 if mixed else torch.float32)
    opt = lf.Adam([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=0.5, backend=backend)
    give(params, 0)
    params[1].grad = None
    exact = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None]).norm()
    clipped = copies(params)
    for p, q in zip(params, clipped, strict=True):
        q.grad = None if p.grad is None else p.grad * (0.5 / exact).to(p.dtype)
    opt.step()
    torch.testing.assert_close(opt.grad_norm, exact, rtol=1e-6, atol=0)
    other = lf.Adam(clipped, backend=backend)
    other.step()
    for p, q in zip(params, clipped, strict=True):
        # one rounding of g, magnified by no more than 1 in m / sqrt(v) of a first step; p is of order 1
        torch.testing.assert_close(p, q, rtol=2e-7, atol=1e-3 * 1e-6)
    opt.zero_grad()
    opt.step()
    assert opt.grad_norm == 0 and opt.skipped_steps == 0


@each_engine
@pytest.mark.parametrize("norm", [3.0, 0.25, 0.0, torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)])
def test_a_norm_given_to_the_step(backend, norm):
    """It replaces the norm at hand: factor 0.5 / 3 for one above the limit, 1 below."""
    params, others = parameters(), parameters()
    opt = lf.LAMB(params, max_grad_norm=0.5, backend=backend)
    other = lf.LAMB(others, max_grad_norm=None, backend=backend)
    for seed in range(2):
        give(params, seed)
        give(others, seed)
        opt.step(grad_norm=norm)
        for q in others:
            q.grad = q.grad * (0.5 / 3) if norm == 3 else q.grad
        other.step()
    assert opt.grad_norm == norm
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-7, atol=1e-3 * 1e-6)


def test_a_norm_given_that_is_not_finite_skips():
    params = parameters()
    opt = lf.LAMB(params)
    give(params, 0)
    before = snapshot(opt, params)
    opt.step(grad_norm=float("inf"))
    opt.step(grad_norm=torch.tensor(float("nan")))
    assert opt.skipped_steps == 2
    assert_same(snapshot(opt, params), before)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.head = torch.nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.scale = Parameter(torch.ones(()))


@each_case
def test_param_groups_serve_every_class(case):
    model = Tied()
    matrices, rest = groups = lf.param_groups(model, 0.25)
    assert [name for name, _ in matrices["params"]] == ["embed.weight"]
    assert [name for name, _ in rest["params"]] == ["scale", "norm.weight", "norm.bias", "head.bias"]
    opt = make(case, groups)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.25, 0.0]
    needs = opt.rule_of(opt.param_groups[0]).needs_adapt
    assert [group["adapt"] for group in opt.param_groups] == [True, needs]
    params = [p for group in opt.param_groups for p in group["params"]]
    train(opt, params, range(2))
    assert all(opt.state[p]["step"] == 2 for p in params)
    assert set(opt.layer_stats()) == {"embed.weight", "scale", "norm.weight", "norm.bias", "head.bias"}


def test_param_groups_skip_and_refuse():
    matrices, rest = lf.param_groups(Tied(), skip=["embed"])
    assert not matrices["params"] and rest["params"][1][0] == "embed.weight"
    lf.LAMB([matrices, rest]).step()
    with pytest.raises(ValueError, match="Tied has no parameter that requires a gradient"):
        lf.param_groups(Tied().requires_grad_(False))


def differentiable(case, steps, **options):
    """A function of p, lr and gradients: parameters after so many steps."""

    def run(p, lr, *gradients):
        p = p.clone()
        opt = make(case, [p], differentiable=True, lr=lr, **options)
        for g in gradients:
            p.grad = g
            opt.step()
        return p

    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, generator=random, dtype=torch.float64, requires_grad=True) for _ in range(steps + 1)]
    return run, (inputs[0], torch.tensor(0.1, dtype=torch.float64, requires_grad=True), *inputs[1:])


# Three steps: from the second on derivatives pass through states and layer scalars.
@each_case
def test_derivatives_of_steps(case):
    assert gradcheck(*differentiable(case, 3))


@pytest.mark.parametrize("case", [c for c in EACH if c.cls in ("SGD", "LAMB", "NovoGrad")], ids=lambda c: c.rule)
def test_derivatives_through_the_clip(case):
    assert gradcheck(*differentiable(case, 2, max_grad_norm=0.5, weight_decay=0.1))


@pytest.mark.parametrize("case", [c for c in EACH if c.cls in ("AdamW", "LAMB", "NovoGrad")], ids=lambda c: c.rule)
def test_derivatives_by_states(case):
    """As torch's own checks do it: states that require gradients are put into `state` before the step."""
    run, (p, lr, g) = differentiable(case, 1)
    names = make(case, copies([p])).rule.entries[1:]
    random = torch.Generator().manual_seed(1)
    scalar = make(case, copies([p])).rule.scalar
    states = [torch.rand([] if n == scalar else [4], generator=random, dtype=torch.float64) for n in names]

    def step(p, g, *states):
        p = p.clone()
        opt = make(case, [p], differentiable=True, lr=0.1)
        opt.state[p].update({n: x.clone() for n, x in zip(names, states, strict=True)}, step=torch.tensor(7.0))
        p.grad = g
        opt.step()
        return p, *(opt.state[p][n] for n in names)

    assert gradcheck(step, (p, g, *(x.requires_grad_() for x in states)))


def test_a_differentiable_step_equals_an_ordinary_one():
    params, others = parameters(), parameters()
    opt, other = lf.LAMB([p.clone() for p in params], differentiable=True), lf.LAMB(others, backend="reference")
    for seed in range(3):
        train(opt, opt.param_groups[0]["params"], [seed])
        train(other, others, [seed])
    assert all(same_bits(p, q) for p, q in zip(opt.param_groups[0]["params"], others, strict=True))


def test_repr_names_the_class_and_its_groups():
    text = repr(lf.LAMB(parameters(), lr=0.125))
    assert re.match(r"LAMB \(\nParameter Group 0\n", text) and "lr: 0.125" in text and "max_grad_norm" not in text
