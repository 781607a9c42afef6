"""Weight prediction: a launch that leads keeps true weights in a copy and writes predicted ones to the parameters.

True weights are those of a launch that does not lead; predicted ones are the same bits whether they come with a step
or from memory later, and the CPU engine's. That the CPU engine is right about them is in test_xgrad.py. Leaves out
grids and misaligned operands, which tests of plain steps have, but for where predictions go.
"""

import numpy as np
import pytest
import torch
from device_bits import displaced
from device_cases import same_numbers, there, written
from engines import ONE_PER_RULE, parameters, same_bits, starts, step, tame, threads
from test_engine_bits import mixed
from test_engine_storage import TYPES, set_gradient

from layerfused.plan import Phase

MORE = ["lars-nesterov", "lars-lr-in-momentum", "lambc-decay", "adabelief-decay"]
RULES = pytest.mark.parametrize("name", [*ONE_PER_RULE, *MORE])
STORED = [
    *((name, torch.float32) for name in (*ONE_PER_RULE, *MORE)),
    *((name, torch.bfloat16) for name in ONE_PER_RULE),
    *((name, torch.float16) for name in ("sgd-dampening", "lamb", "aida-k1")),
]
SIZES = (0, 7, 65, 300, 40, 17, 51)
AHEAD = 2.0


def lead(opt, ahead=AHEAD):
    """Lets the only launch of an optimizer lead; its true weights, in the order of its parameters."""
    (launch,) = opt._current()
    true = [p.detach().clone() for p in launch.table.params]
    launch.lead(true, ahead)
    return launch, true


def refreshed(opt, launch, true, phases=Phase.PREDICT, max_norm=0.0):
    """What a sweep of its own predicts, in memory where nothing is aligned; 7 where it predicts nothing."""
    found = [displaced(torch.full_like(p, 7.0).flatten().cpu(), 1) for p in true]
    launch.lead(true, launch.ahead, found)
    assert launch.read()
    launch.run(phases, opt._rows(launch), max_norm)
    launch.lead(true, launch.ahead)
    return [x.view(p.shape).cpu() for x, p in zip(found, true, strict=True)]


def bits(tensors):
    return {str(i): x.detach().cpu() for i, x in enumerate(tensors)}


def kinds(name):
    """Groups with a layer-wise factor, without one, with one layer for all tensors, and with a layer for each row."""

    def groups(params):
        return [*mixed(name)(params[:-1]), {"params": params[-1:], "layer": "slices"}]

    return groups


def shaped(values):
    return [*values[:-1], values[-1].view(3, -1)]


def rested(grads, t):
    """With tensors that have no gradient, others in every step."""
    return [None if (t + i) % 4 == 1 else g for i, g in enumerate(shaped(grads))]


# One launch: layers of a tile, of a chunk and of several, groups of every kind, some without gradient, clipped.
@RULES
def test_a_step_that_leads(name, engine):
    engine.plans(grid=2)
    own = [parameters(there(shaped(starts(SIZES)))) for _ in range(2)]
    plain, leading = (engine.make(name, kinds(name)(params), max_grad_norm=30.0) for params in own)
    launch, true = lead(leading)
    for t, grads in enumerate(tame(SIZES, 3)):
        grads, before = rested(grads, t), bits(own[1])
        for opt, params in zip((plain, leading), own, strict=True):
            step(opt, params, there(grads))
        assert leading._launches == [launch] and not engine.counters(leading).any()
        same_bits(bits(true), bits(own[0]))
        same_bits(*(beside_p(written(opt)) for opt in (plain, leading)))
        again, after = refreshed(leading, launch, true), bits(own[1])
        for i, g in enumerate(grads):
            same_bits({"p": after[str(i)]}, {"p": before[str(i)] if g is None else again[i]})
    assert (name == "sgd") == torch.equal(after["4"], true[4].cpu())


def beside_p(found):
    return {name: x for name, x in found.items() if not name.endswith(".p")}


def leading_twins(name, engine, dtype=torch.float32, state=torch.float32):
    """Twins that lead, and for either its launch and its true weights."""
    twins = engine.twins(name, [value.to(dtype) for value in shaped(starts(SIZES))], kinds(name))
    for opt in twins.opts:
        for entries in opt.state.values():
            entries |= {key: entries[key].to(state) for key in opt.rule_of(opt.param_groups[0]).states}
        opt._build()
    return twins, [lead(opt) for opt in twins.opts]


def agree(twins, led, phases, predicts=True):
    """Both predict the same; for `predicts` anything at all."""
    one, other = (refreshed(opt, *own, phases) for opt, own in zip(twins.opts, led, strict=True))
    same_numbers(bits(other), bits(one))
    assert any((x != 7).any() for x in one) == predicts
    return one


@pytest.mark.parametrize("name, dtype", STORED)
def test_predictions_are_the_cpu_engines(name, dtype, engine):
    """With a step, from memory, at another lr, in the middle of a step; before the first there are none."""
    engine.plans()
    twins, led = leading_twins(name, engine, dtype)
    grads = next(tame(SIZES, 1))
    agree(twins, led, Phase.PREDICT, predicts=False)
    twins.step([g.to(dtype) for g in shaped(grads)])
    same_bits(bits(led[1][1]), bits(led[0][1]))
    same_bits(bits(agree(twins, led, Phase.PREDICT)), bits(twins.params[0]))
    for group in (group for opt in twins.opts for group in opt.param_groups):
        group["lr"] *= 3.0
    agree(twins, led, Phase.PREDICT)
    grads = [None if g is None else 2 * g.to(dtype) for g in rested(grads, 0)]
    reduced_and_finished(twins, grads)
    found = agree(twins, led, Phase.PREDICT | Phase.UNCOUNTED)
    absent = [g is None or not g.numel() for g in grads]
    assert [bool((x == 7).all()) for x in found] == absent


def reduced_and_finished(twins, grads):
    for params, own in zip(twins.params, (grads, there(grads)), strict=True):
        for p, g in zip(params, own, strict=True):
            set_gradient(p, g)
    (pair,) = zip(*(opt._read() for opt in twins.opts), strict=True)
    with threads(1):
        twins._phase(pair, Phase.REDUCE, "stats")
        twins._phase(pair, Phase.FINISH)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sgd-dampening", "adam-decay", "lamb", "aida-k1", "ladabelief-post"])
def test_predictions_go_by_states_as_they_are_stored(name, state, engine):
    """In one launch, and in phases as the CPU engine. Leaves out other rules, whose sweeps write as one of these."""
    engine.plans()
    twins, led = leading_twins(name, engine, state=state)
    first, second = (shaped(grads) for grads in tame(SIZES, 2))
    twins.step(first)
    same_bits(bits(agree(twins, led, Phase.PREDICT)), bits(twins.params[0]))
    opt, params = twins.opts[1], twins.params[1]
    step(opt, params, there(second))
    same_bits(bits(refreshed(opt, *led[1])), bits(params))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_step_by_hand(dtype, engine):
    """AdamW's direction in NumPy's float32, from the weight as it is stored."""
    params = parameters(there([value.to(dtype) for value in starts((300,))]))
    opt = engine.make("adamw-decay", params)
    _, true = lead(opt, ahead=3.0)
    for grads in tame((300,), 2):
        step(opt, params, there(g.to(dtype) for g in grads))
    keys = opt.rule_of(opt.param_groups[0]).states
    p, m, v = (x.cpu().float().numpy() for x in (*true, *(opt.state[params[0]][key] for key in keys)))
    ic1, ic2, eps, lr, ahead = np.float32([1 / (1 - 0.9**2), 1 / (1 - 0.999**2), 1e-8, 0.01, 3])
    direction = ic1 * m / (np.sqrt(ic2 * v) + eps)
    same_bits(bits(params), bits([torch.from_numpy(p - ahead * lr * direction).to(dtype)]))


@pytest.mark.parametrize("name", ["sgd-dampening", "adam-decay", "lamb"])
def test_none_ahead_is_the_weight_itself(name, engine):
    engine.plans()
    params = parameters(there(shaped(starts(SIZES))))
    opt = engine.make(name, kinds(name)(params))
    _, true = lead(opt, ahead=0.0)
    for grads in tame(SIZES, 2):
        step(opt, params, there(shaped(grads)))
    assert all(torch.equal(p, q) for p, q in zip(params, true, strict=True))


# What is not predicted


@pytest.mark.parametrize("name", ["adam-decay", "lamb"])
def test_steps_that_a_norm_turns_into_nothing(name, engine):
    """Nothing is predicted then, neither with the step nor from memory."""
    engine.plans()
    opt, params = engine.train(name, starts(SIZES[:4]), tame(SIZES[:4], 1), max_grad_norm=5.0)
    launch, true = lead(opt)
    for norm, happens in (("inf", False), ("nan", False), ("9", True)):
        launch.norm.fill_(float(norm))
        found = refreshed(opt, launch, true, max_norm=float("inf"))
        assert [bool((x == 7).all()) for x in found] == [not (happens and x.numel()) for x in found]
    before = {**bits(params), **{f"true {k}": x for k, x in bits(true).items()}}
    params[1].grad[0] = float("nan")
    opt.step()
    assert opt.skipped_steps == 1
    same_bits({**bits(params), **{f"true {k}": x for k, x in bits(true).items()}}, before)


@pytest.mark.parametrize("name", ["lamb", "ladabelief-decay", "ladabelief-post", "setadam-coupled"])
def test_states_without_a_report(name, engine):
    """As they come out of a checkpoint: the rules that need one stay, LAdam's state alone tells its way."""
    engine.plans()
    twins, led = leading_twins(name, engine)
    twins.step(shaped(next(tame(SIZES, 1))))
    for launch, _ in led:
        launch.table.report.zero_()
    found = agree(twins, led, Phase.PREDICT)
    same_bits(bits(found), bits(twins.params[0] if name == "ladabelief-decay" else led[0][1]))


def test_tensors_that_have_taken_no_step(engine):
    engine.plans()
    params = parameters(there(starts((5, 300, 40))))
    opt = engine.make("lamb", params)
    launch, true = lead(opt)
    step(opt, params, [None, *there(next(tame((300, 40), 1)))])
    for p in params:  # predictions from memory look at none
        p.grad = None
    found = refreshed(opt, launch, true)
    assert (found[0] == 7).all()
    same_bits(bits(found[1:]), bits(params[1:]))
    assert torch.equal(params[0], true[0])
