"""Bytes that an engine really loads and stores, against what `traffic()` says it asks for."""

import pytest
from cases import ADAPT
from device_cases import operands
from engines import NAMED, ONE_PER_RULE, starts, tame

# One option each that changes what is read or written: coupled decay, no decay, decoupled decay, belief.
COUNTED = ["sgd", "sgd-decay", "sgd-momentum", "sgd-dampening", "adam", "adam-decay", "adamw", "adabelief",
           "adabelief-coupled", "adam3", "adam3-coupled", "lars", "lars-no-decay", "lamb", "lamb-no-decay", "novograd",
           "novograd-decay", "aida", "aida-k1", "aida-k3", "ladam", "ladam-decay", "ladabelief", "ladabelief-decay",
           "ladam-post", "ladam-post-decay", "ladabelief-post", "setadam", "setadam-coupled", "setadam-decoupled",
           "adamnorm", "adamnorm-coupled", "adabeliefnorm"]  # fmt: skip
CLIPPED = [*((name, None) for name in COUNTED), *((name, 2.0) for name in (*ONE_PER_RULE, "aida", "ladam", "setadam"))]
SIZES = (0, 5, 64, 65, 300)  # whole layers up to a tile of 64, one chunk of two tiles, several


def counted(engine, opt, params):
    """Bytes of a step with gradients like the parameters."""
    for p in params:
        p.grad = p.detach().clone()
    return sum(map(sum, engine.moved(opt, operands(opt, params))))


# Whole layers and layers of several chunks; leaves out storage types and other layers (next tests).
@pytest.mark.parametrize("name, clip", CLIPPED)
def test_requested_bytes_are_what_is_moved(name, clip, engine):
    engine.plans()
    opt, params = engine.train(name, starts(SIZES), [], max_grad_norm=clip)
    assert counted(engine, opt, params) == opt.traffic()["requested"]


def test_every_rule_and_both_kinds_of_decay_are_counted():
    assert {NAMED[name].rule for name in COUNTED} == {case.rule for case in NAMED.values()}
    decays = {(NAMED[name].rule, NAMED[name].hyper["weight_decay"] != 0) for name in COUNTED}
    assert decays >= {(case.rule, case.hyper["weight_decay"] != 0) for case in NAMED.values()}


@pytest.mark.parametrize("name", [name for name in COUNTED if NAMED[name].rule in ADAPT])
def test_layers_without_adaptation_are_one_sweep(name, engine):
    engine.plans()

    def groups(params):
        return [{"params": params[:3]}, {"params": params[3:], "adapt": False}]

    opt, params = engine.train(name, starts(SIZES), [], groups)
    assert counted(engine, opt, params) == opt.traffic()["requested"]


# bf16 parameters and gradients; leaves out states in 16 bits.
@pytest.mark.parametrize("name", ["sgd-decay", "adam", "lamb", "aida-k1", "setadam-coupled"])
def test_bytes_of_16_bits(name, engine):
    engine.plans()
    opt, params = engine.train(name, [x.bfloat16() for x in starts(SIZES)], [])
    assert counted(engine, opt, params) == opt.traffic()["requested"]


@pytest.mark.parametrize("name", ["lars", "lamb", "aida-k1"])
def test_bytes_of_cut_and_joined_layers(name, engine):
    """Slices above and below a tile; all tensors one layer, which is two sweeps though its tensors are small."""
    engine.plans()
    values = [x.view(6, -1) for x in starts((6 * 10, 6 * 100))] + starts((10, 100))

    def groups(params):
        return [{"params": params[:2], "layer": "slices"}, {"params": params[2:], "layer": "group"}]

    opt, params = engine.train(name, values, [], groups)
    assert counted(engine, opt, params) == opt.traffic()["requested"]


@pytest.mark.parametrize("name", ["lamb", "aida-k1"])
def test_nothing_is_moved_for_tensors_that_rest(name, engine):
    engine.plans()
    opt, params = engine.train(name, starts((5, 300)), tame((5, 300), 1), max_grad_norm=1.0)
    params[1].grad = None
    resting = [params[1], *(opt.state[params[1]][key] for key in opt.rule_of(opt.param_groups[0]).states)]
    assert engine.moved(opt, resting) == [(0, 0)] * len(resting)


@pytest.mark.parametrize("name", ["lamb", "aida-k1", "sgd-decay"])
def test_every_element_is_stored_once(name, engine):
    """Of p; of g never."""
    engine.plans()
    opt, params = engine.train(name, starts(SIZES), tame(SIZES, 1))
    moved = engine.moved(opt, operands(opt, params))
    assert [stored for _, stored in moved[: 2 * len(SIZES)]] == [4 * n for n in SIZES] + [0] * len(SIZES)
