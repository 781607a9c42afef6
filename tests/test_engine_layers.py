"""What a group says a layer is, against the same computation with separate parameters."""

import pytest
import torch
from engines import (
    LAYERWISE,
    NAMED,
    all_within,
    make,
    parameters,
    raw,
    same_bits,
    small_chunks,
    starts,
    step,
    tame,
    threads,
    train,
    within,
)

from layerfused.table import rows_outermost

RULES = pytest.mark.parametrize("name", LAYERWISE)
ENGINES = pytest.mark.parametrize("backend", ["cpu", "reference"])
CUTS = {"slices": (1,) * 6, "two": (3, 3), "rows": (1, 2, 3), "one": (6,)}  # rows of dimension 0 per layer
LAYER = {"slices": "slices", "two": 2, "rows": (1, 2, 3), "one": 1}


def layer_group(layer, **more):
    return lambda params: [{"params": params, "layer": layer, **more}]


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def states_of(opt, p):
    return {name: opt.state[p][name] for name in opt.rule_of(opt.param_groups[0]).entries if name != "step"}


def compare_with_parts(opt, p, parts_opt, parts, cut):
    """A cut parameter against one parameter per layer, bit for bit: states, layer scalars and reports too."""
    states = [states_of(parts_opt, q) for q in parts]
    joined = {"p": torch.cat([q.detach() for q in parts])}
    for name in states[0]:
        join = torch.cat if name in opt.rule_of(opt.param_groups[0]).states else torch.stack
        joined[name] = join([own[name] for own in states])
    own = {"p": p.detach(), **{name: value.reshape(joined[name].shape) for name, value in states_of(opt, p).items()}}
    same_bits(own, joined)
    (stats,), parts_stats = opt.layer_stats().values(), parts_opt.layer_stats().values()
    for key, values in stats.items():
        assert values == ([one[key] for one in parts_stats] if len(cut) > 1 else next(iter(parts_stats))[key])


# 1-D, 2-D and 4-D, rows below and above what is one item; leaves out production chunks.
@pytest.mark.parametrize("shape", [(6,), (6, 7), (6, 40), (6, 5, 3, 11)], ids=str)
@pytest.mark.parametrize("kind", CUTS)
@RULES
def test_a_cut_parameter_equals_its_parts(name, kind, shape, monkeypatch):
    value, cut = starts((torch.Size(shape).numel(),))[0].view(shape), CUTS[kind]
    gradients = [grads[0].view(shape) for grads in tame((value.numel(),), 4)]
    with small_chunks(monkeypatch):
        opt, (p,) = train(name, [value], [[g] for g in gradients], layer_group(LAYER[kind]), backend="cpu")
        parts_opt, parts = train(name, value.split(cut), [g.split(cut) for g in gradients], backend="cpu")
        compare_with_parts(opt, p, parts_opt, parts, cut)


@RULES
def test_a_cut_parameter_on_the_reference_engine(name):
    value, cut = starts((240,))[0].view(6, 40), CUTS["rows"]
    gradients = [grads[0].view(6, 40) for grads in tame((240,), 4)]
    opt, (p,) = train(name, [value], [[g] for g in gradients], layer_group((1, 2, 3)), backend="reference")
    parts_opt, parts = train(name, value.split(cut), [g.split(cut) for g in gradients], backend="reference")
    compare_with_parts(opt, p, parts_opt, parts, cut)


@RULES
def test_rows_that_are_stretches_of_memory_in_any_order(name):
    """channels_last: the rows of dimension 0 are still stretches, their elements lie in another order."""
    value = starts((6 * 4 * 3 * 5,))[0].view(6, 4, 3, 5)
    gradients = [grads[0].view(6, 4, 3, 5) for grads in tame((value.numel(),), 3)]

    def final(layout):
        p = torch.nn.Parameter(value.clone(memory_format=layout))
        assert rows_outermost(p)
        opt = make(name, [{"params": [p], "layer": "slices"}], backend="cpu")
        for g in gradients:
            p.grad = g
            opt.step()
        return p

    # sums in another order: doubles, of which float32 scalars seldom see anything
    all_within([final(torch.channels_last)], [final(torch.contiguous_format).double()], [value])


def concatenated(values, gradients, name, **more):
    """One float64 parameter in the place of many."""
    whole = [torch.cat([value.flatten().double() for value in values])]
    joined = [[torch.cat([g.flatten() for g in grads])] for grads in gradients]
    _, (p,) = train(name, whole, joined, **more)
    return p.detach().split([value.numel() for value in values])


@ENGINES
@RULES
def test_a_group_equals_the_concatenated_tensor(name, backend, monkeypatch):
    sizes = (40, 1, 0, 300)
    gradients = list(tame(sizes, 8))
    with small_chunks(monkeypatch):
        opt, params = train(name, starts(sizes), gradients, layer_group("group"), backend=backend)
    all_within(params, concatenated(starts(sizes), gradients, name), starts(sizes))
    scalar = opt.rule_of(opt.param_groups[0]).scalar
    if scalar:  # kept alike in every member
        assert len({opt.state[p][scalar].item() for p in params}) == 1
    reports = list(opt.layer_stats().values())
    assert len(reports) == 4 and all(report == reports[0] for report in reports)


@ENGINES
@RULES
def test_a_member_without_gradient_adds_nothing(name, backend):
    """It rests, but counts the steps of its layer."""
    sizes = (40, 17, 300)
    gradients = [[g[0], None, g[2]] for g in tame(sizes, 5)]
    opt, params = train(name, starts(sizes), gradients, layer_group("group"), backend=backend)
    others = [starts(sizes)[0], starts(sizes)[2]]
    all_within(params[::2], concatenated(others, [g[::2] for g in gradients], name), others)
    assert torch.equal(params[1], starts(sizes)[1])
    assert [opt.state[p]["step"].item() for p in params] == [5, 5, 5]


@RULES
def test_a_group_without_any_gradient_rests(name):
    opt, params = train(name, starts((40, 17)), tame((40, 17), 2), layer_group("group"))
    before = [p.detach().clone() for p in params], {k: v.clone() for k, v in states_of(opt, params[0]).items()}
    other = torch.nn.Parameter(starts((5,))[0])
    opt.add_param_group({"params": [other], "layer": "slices"})
    step(opt, [*params, other], [None, None, starts((5,))[0]])
    assert all(torch.equal(raw(p.detach()), raw(q)) for p, q in zip(params, before[0], strict=True))
    same_bits(states_of(opt, params[0]), before[1])
    assert [opt.state[p]["step"].item() for p in (*params, other)] == [2, 2, 1]


@RULES
def test_storage_types_of_a_group_may_differ(name):
    """A bf16 weight with its fp32 bias, one step: half an ulp of bf16, 2^-8 at most, over the float32 result."""
    weight, bias = starts((300, 20))
    weight = weight.bfloat16()
    (grads,) = tame((300, 20), 1)
    _, params = train(name, [weight, bias], [[grads[0].bfloat16(), grads[1]]], layer_group("group"), backend="cpu")
    exact = concatenated([weight, bias], [[grads[0].bfloat16().double(), grads[1].double()]], name)
    all_within(params[1:], exact[1:], [bias])
    excess = ((params[0].double() - exact[0]).abs() - 2**-8 * exact[0].abs()).clamp(min=0)
    within(excess + exact[0], exact[0], weight)


@pytest.mark.parametrize("layer", ["tensor", "slices", 2, (1, 5), "group"], ids=str)
@pytest.mark.parametrize("name", ["sgd", "sgd-dampening", "adam", "adabelief", "adam3"])
def test_rules_without_layerwise_factor_do_not_look(name, layer):
    gradients = [[g.view(6, 10) for g in grads] for grads in tame((60, 60), 3)]
    values = [value.view(6, 10) for value in starts((60, 60))]
    _, params = train(name, values, gradients, layer_group(layer))
    _, plain = train(name, values, gradients)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@pytest.mark.parametrize("name", [name for name in LAYERWISE if NAMED[name].rule in ("lamb", "aida", "adanorm")])
def test_groups_of_all_kinds_in_one_launch(name):
    """As in one model: each group as it is alone; leaves out a global norm, which is there to mix them."""
    sizes = (60, 60, 120, 17, 33)
    shapes = ((6, 10), (6, 10), (6, 20), (17,), (33,))
    cuts = [{"layer": "slices"}, {"layer": 3, "lr": 0.1}, {"layer": (1, 5)}, {"layer": "group"}, {"adapt": False}]
    values = [value.view(shape) for value, shape in zip(starts(sizes), shapes, strict=True)]
    gradients = [[g.view(shape) for g, shape in zip(grads, shapes, strict=True)] for grads in tame(sizes, 3)]

    def groups(params):
        return [{"params": [p], **cut} for p, cut in zip(params, cuts, strict=True)]

    opt, params = train(name, values, gradients, groups)
    assert opt.traffic()["launches"] == 1
    for i, cut in enumerate(cuts):
        alone = parameters([values[i]])
        single = make(name, [{"params": alone, **cut}])
        for grads in gradients:
            step(single, alone, [grads[i]])
        assert torch.equal(params[i], alone[0])
