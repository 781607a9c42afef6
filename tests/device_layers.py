"""What a group says a layer is: bit for bit what the CPU engine makes of it where sums are equal.

That the CPU engine is right about it is in test_engine_layers.py.
"""

import pytest
import torch
from cases import FIXED
from device_cases import there, train, written
from engines import LAYERWISE, NAMED, ONE_PER_RULE, all_within, parameters, same_bits, starts, step, tame

RULES = pytest.mark.parametrize("name", ONE_PER_RULE)
# Rows below a tile of 16, of one chunk of 32, and above it; parameters that are empty and that have no dimension.
SHAPES = ((3, 7), (2, 40), (4, 3, 4), (5, 9), (40,), (), (0,), (17,), (6, 9), (0, 4))
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
CUTS = [{"layer": "slices"}, {"layer": 2}, {"layer": (1, 3)}, {"layer": (5,)}, {"layer": "group"}, {"adapt": False}]
SHARES = ((0, 9), (1,), (2,), (3,), (4, 5, 6, 7), (8,))  # parameters of each of these groups


def all_kinds(name):
    def groups(params):
        cuts = [{**cut, "adapt": NAMED[name].rule in FIXED or cut.get("adapt", True)} for cut in CUTS]
        return [{"params": [params[i] for i in own], **cut} for own, cut in zip(SHARES, cuts, strict=True)]

    return groups


def shaped(tensors, shapes=SHAPES):
    return [x.view(shape) for x, shape in zip(tensors, shapes, strict=True)]


def gradients(steps, absent=()):
    """`absent`: (step, tensor) without gradient."""
    for t, grads in enumerate(tame(SIZES, steps)):
        yield [None if (t, i) in absent else g for i, g in enumerate(shaped(grads))]


KINDS = [*LAYERWISE, "sgd", "adam-decay"]  # rules without layers do not look, and are alike in that

# At t = 1 a whole layer, members of a group and a tensor of every other kind rest; at t = 2 a whole group.
ABSENT = {(1, i) for i in (0, 2, 4, 7, 8)} | {(2, i) for i in (4, 5, 6, 7)}


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_all_kinds(name, engine):
    """With tensors that rest: steps, layer scalars and reports are compared, too."""
    engine.plans(tile=16, grid=2)
    twins = engine.twins(name, shaped(starts(SIZES)), all_kinds(name))
    for grads in gradients(3, ABSENT):
        twins.step(grads)
    order = [i for own in SHARES for i in own]
    taken = dict(zip(order, (written(twins.opts[1])[f"{k}.step"].item() for k in range(len(order))), strict=True))
    assert [taken[i] for i in (0, 1, 3)] == [2, 3, 3]
    # members of one layer count together, but where the rule has no layers
    assert [taken[i] for i in (4, 5, 6, 7)] == ([2] * 4 if name in LAYERWISE else [1, 2, 2, 1])


@pytest.mark.parametrize("name", ["adam-decay", "lars", "lamb", "novograd-decay", "aida-k1"])
def test_steps_with_layers_of_all_kinds(name, engine):
    """In one launch and with its own sums: within the bound that both engines keep. Leaves out some rules."""
    engine.plans(tile=16, grid=3)
    values = shaped(starts(SIZES))
    opt, params = engine.train(name, values, gradients(2, ABSENT), all_kinds(name))
    assert opt.traffic()["launches"] == 1
    _, exact = train(name, [value.double() for value in values], gradients(2, ABSENT), all_kinds(name))
    all_within([p.cpu() for p in params], [p.cpu() for p in exact], values)


# Layers as one parameter each; leaves out rules without layers, which do not look, and what the CPU engine's bits
# (above) show already.
@pytest.mark.parametrize("kind, cut", [(2, (3, 3)), ((1, 2, 3), (1, 2, 3))], ids=str)
@pytest.mark.parametrize("name", ["lamb", "novograd-decay", "setadam-coupled"])
def test_a_cut_parameter_equals_its_parts(name, kind, cut, engine):
    engine.plans(tile=16)
    value = starts((240,))[0].view(6, 40)
    grads = [g.view(6, 40) for (g,) in tame((240,), 2)]
    opt, (p,) = engine.train(name, [value], [[g] for g in grads], lambda params: [{"params": params, "layer": kind}])
    parts_opt, parts = engine.train(name, value.split(cut), [g.split(cut) for g in grads])
    same_bits({"p": p.detach()}, {"p": torch.cat([q.detach() for q in parts])})
    (stats,), parts_stats = opt.layer_stats().values(), list(parts_opt.layer_stats().values())
    for key, found in stats.items():
        assert found == ([one[key] for one in parts_stats] if len(cut) > 1 else parts_stats[0][key])


@pytest.mark.parametrize("name", LAYERWISE)
def test_a_group_without_any_gradient_rests(name, engine):
    """The layer's scalars and its report stay, its members count no step."""
    engine.plans(tile=16)
    params = parameters(there(starts((40, 17, 5))))
    groups = [{"params": params[:2], "layer": "group"}, {"params": params[2:]}]
    opt = engine.make(name, groups)
    grads = there(next(tame((40, 17, 5), 1)))
    step(opt, params, grads)
    before, stats = written(opt), opt.layer_stats()
    step(opt, params, [None, None, grads[2]])
    after = written(opt)
    resting = [key for key in before if key.startswith(("0.", "1."))]
    same_bits({key: after[key] for key in resting}, {key: before[key] for key in resting})
    assert after["2.step"] == 2 and opt.layer_stats()["0.0"] == stats["0.0"]


def test_a_step_without_any_gradient(engine):
    engine.plans()
    opt, params = engine.train("lamb", starts((40, 17)), tame((40, 17), 1))
    before = written(opt)
    step(opt, params, [None, None])
    same_bits(written(opt), before)


def test_nothing_but_empty_tensors(engine):
    engine.plans()
    for name in ONE_PER_RULE:
        opt, (p,) = engine.train(name, [torch.zeros(0, 3)], [[torch.zeros(0, 3)]] * 2, max_grad_norm=1.0)
        assert opt.state[p]["step"] == 2 and opt.grad_norm == 0 and opt.skipped_steps == 0


# channels_last and transposed: elements in another order than their indices, for parameters, states and gradients.
@pytest.mark.parametrize("name", ONE_PER_RULE)
def test_dense_tensors_in_any_order(name, engine):
    engine.plans()
    one, other = (value.view(6, 5, 4, 3) for value in starts((360, 360)))
    twins = engine.twins(name, [one.to(memory_format=torch.channels_last), other.transpose(0, 3)])
    for grads in tame((360, 360), 2):
        grads = shaped(grads, ((6, 5, 4, 3), (3, 5, 4, 6)))
        twins.step(grads)  # not in the order of their parameters: copied
        assert not any(launch._copies for launch in twins.opts[1]._launches)
    assert not twins.params[1][0].is_contiguous()
