"""Checkpoints of sharded training by torch.distributed.checkpoint: saved on 4 ranks, loaded on any number of them.

Left out: asynchronous saving, GPUs, ranks that die within a save again and again.
"""

import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, run
from sharded_nets import Net, built, descend, joint, on_batch, sharded
from sharding import assert_whole, mesh, ranks_agree, told

import layerfused as lf

STEPS = 4
RULES = {
    "LAMB": lambda net: lf.LAMB(lf.param_groups(net), lr=0.1, max_grad_norm=0.1),
    "NovoGrad": lambda net: lf.NovoGrad([{**group, "layer": "slices"} for group in lf.param_groups(net)], lr=0.1),
    "SGD": lambda net: lf.SGD(net.parameters(), lr=0.1, momentum=0.9),
}


def started(way, rule):
    """A model that is laid over ranks (or "alone"), its optimizer and its backward pass."""
    if way == "alone":
        net = Net()
        return net, RULES[rule](net), joint(net)
    net, part = built(way)
    return net, RULES[rule](net), on_batch(net, part)


def save(folder, net, opt):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, states = get_state_dict(net, opt)
    checkpoint.save({"model": model, "optim": states}, checkpoint_id=folder)


def load(folder, net, opt):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, states = get_state_dict(net, opt)
    saved = {"model": model, "optim": states}
    checkpoint.load(saved, checkpoint_id=folder)
    set_state_dict(net, opt, model_state_dict=saved["model"], optim_state_dict=saved["optim"])


def save_whole(file, net, opt):
    """All in one file, by rank 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    saved = get_state_dict(net, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(saved, file)


def load_whole(file, net, opt):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    model, states = torch.load(file, weights_only=False)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(net, opt, model_state_dict=model, optim_state_dict=states, options=options)


# Saved half way, finished by other numbers of ranks

HALVES = [("tp-fsdp", "LAMB"), *(("fsdp", rule) for rule in RULES)]
FINISHED = {4: ("hsdp", "tp-fsdp"), 2: ("fsdp",), 1: ("fsdp", "alone")}  # ranks -> ways


def half_way(folder):
    for way, rule in HALVES:
        net, opt, backward = started(way, rule)
        descend(opt, backward, range(STEPS // 2))
        save(f"{folder}/{way}-{rule}", net, opt)
        save_whole(f"{folder}/{way}-{rule}.pt", net, opt)


def finished(folder, ways):
    found = {}
    for way in ways:
        for source, rule in HALVES:
            for end, loader in (("", load), (".pt", load_whole)):
                if loader is load_whole and way == "tp-fsdp":
                    continue  # torch cannot: distribute_tensor has no _StridedShard
                net, opt, backward = started(way, rule)
                loader(f"{folder}/{source}-{rule}{end}", net, opt)
                descend(opt, backward, range(STEPS // 2, STEPS))
                found[way, rule, source + end] = told(opt, list(net.parameters()))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    run(half_way, 4, folder)
    return folder


@pytest.fixture(scope="module")
def wanted():
    found = {}
    for rule in RULES:
        net, opt, backward = started("alone", rule)
        descend(opt, backward, range(STEPS))
        found[rule] = told(opt, list(net.parameters()))
    return found


@pytest.mark.parametrize("world", FINISHED)
def test_saved_on_four_ranks_and_finished_on(world, saved, wanted):
    found, start = run(finished, world, saved, FINISHED[world]), list(Net().parameters())
    for way, rule, name in found[0]:
        ranks_agree([rank[way, rule, name] for rank in found])
        assert_whole(found[0][way, rule, name], wanted[rule], start)


# What touches an optimizer before its first step


def looked_at(rule, look):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net, opt, backward = started("fsdp", rule)
    if look:
        get_optimizer_state_dict(net, opt)
    descend(opt, backward, range(STEPS))
    return told(opt, list(net.parameters()))


def exchanged(rule, through_dummies):
    """An optimizer of the whole model, whose parameters are exchanged for shards, as Accelerate does it."""
    net = Net()
    opt = RULES[rule](net)
    names = {p: name for name, p in net.named_parameters()}
    names = [[names[p] for p in group["params"]] for group in opt.param_groups]
    if through_dummies:
        for group in opt.param_groups:
            group["params"] = [torch.empty(0) for _ in group["params"]]
    sharded(net, mesh(2))
    shards = dict(net.named_parameters())
    for group, own in zip(opt.param_groups, names, strict=True):
        group["params"] = [shards[name] for name in own]
    descend(opt, on_batch(net, slice(dist.get_rank(), None, 2)), range(STEPS))
    found = told(opt, list(net.parameters()))
    return found, {id(p) for p in opt.state} == {id(p) for p in net.parameters()}


def touched():
    looks = {(rule, look): looked_at(rule, look) for rule in RULES for look in (False, True)}
    return looks, {(rule, dummies): exchanged(rule, dummies) for rule in RULES for dummies in (False, True)}


@pytest.fixture(scope="module")
def before_the_first_step():
    return run(touched, 2)


def test_looking_at_the_states_changes_nothing(before_the_first_step):
    for looks, _ in before_the_first_step:
        for rule in RULES:
            ranks_agree([looks[rule, False], looks[rule, True]])


def test_parameters_may_be_exchanged(before_the_first_step, wanted):
    start = list(Net().parameters())
    for rule in RULES:
        for dummies in (False, True):
            answers = [exchanges[rule, dummies] for _, exchanges in before_the_first_step]
            ranks_agree([found for found, _ in answers])
            assert all(complete for _, complete in answers)  # nothing is kept for parameters that left
            assert_whole(answers[0][0], wanted[rule], start)


# A rank dies in the middle of a run

LONG, EVERY = 12, 3  # steps; steps from one save to the next


def resumable(folder, steps=LONG):
    """Trains to the end from the last checkpoint before it that is complete: torch writes .metadata last.

    A step is always left: what it saw of its layers is compared, too, and no checkpoint holds that.
    """
    net, opt, backward = started("fsdp", "LAMB")
    saved = [int(path.parent.name) for path in Path(folder).glob("*/.metadata")]
    done = max((t for t in saved if t < steps), default=0)
    if done:
        load(f"{folder}/{done}", net, opt)
    start = time.monotonic()
    Path(f"{folder}/begun").touch()
    for t in range(done, steps):
        descend(opt, backward, [t])
        if (t + 1) % EVERY == 0:
            save(f"{folder}/{t + 1}", net, opt)
    return told(opt, list(net.parameters())), time.monotonic() - start


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    found = run(resumable, 4, str(tmp_path_factory.mktemp("uninterrupted")))
    return [answer for answer, *_ in found], found[0][1]


@pytest.mark.parametrize("trial", [*range(3), *(pytest.param(n, marks=pytest.mark.all) for n in range(3, 20))])
def test_killed_and_resumed(trial, uninterrupted, tmp_path):
    want, seconds = uninterrupted
    chance = random.Random(trial)
    ranks = Ranks(resumable, 4, str(tmp_path), 100 * LONG)  # would go on and on
    while not (tmp_path / "begun").exists() and all(process.is_alive() for process in ranks.processes):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.9) * seconds)
    ranks.kill(chance.randrange(4))
    assert not any(ranks.join(timeout=1))
    for (answer, _), uncut in zip(run(resumable, 4, str(tmp_path)), want, strict=True):
        ranks_agree([answer, uncut])
