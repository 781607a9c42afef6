"""Launches as parts of an optimizer: devices, versions, saving, copying."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from device_cases import DEVICE, there, within_twins, written
from engines import ONE_PER_RULE, make, same_bits, starts, step, tame

from layerfused import build, launch, optimizer
from layerfused.backends import launch_of
from layerfused.plan import Phase

RULES = pytest.mark.parametrize("name", ONE_PER_RULE)


# Devices: there is one at most, so the launches are real, but for their reading and running.


def one_of_many(launch_class):
    class OneOfMany(launch_class):
        """On any device, without memory: only the kernel is left out."""

        ran = []

        def read(self):
            self.moved = self.absent = 0
            return True

        def prepare(self, *_):
            pass

        def run(self, phases, rows, max_norm, skipped=None):
            self.ran.append((self, phases))
            return True

    return OneOfMany


@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clip"])
def test_a_launch_for_each_device(clip, engine, monkeypatch):
    """Each with a plan of its own tensors; one norm over all."""
    of_engine = one_of_many(launch_of(engine.backend))
    monkeypatch.setattr(build, "engines_of", lambda group, rule: [engine.backend] * len(group["params"]))
    for module in (build, optimizer):
        monkeypatch.setattr(module, "launch_of", lambda engine: of_engine)
    monkeypatch.setattr(launch, "_cpu", SimpleNamespace(Reader=lambda *_: None))  # meta tensors have no addresses
    params = [torch.nn.Parameter(torch.ones(n, device=d)) for n, d in ((5, DEVICE), (70, "meta"), (300, DEVICE))]
    opt = make("lamb", params, max_grad_norm=clip)
    one, other = opt._current()
    assert [p.device.type for p in one.table.params] == [DEVICE] * 2 and other.table.params == [params[1]]
    assert [spec.spans[0].count for spec in one.table.layers] == [5, 300] and len(other.table.layers) == 1
    for own, device in ((one, DEVICE), (other, "meta")):
        assert {x.device.type for x in (*engine.memory(own), own.table.step)} == {device}
    if clip is None:
        opt.step()
        assert of_engine.ran == [(one, Phase.STEP & ~Phase.NORM), (other, Phase.STEP & ~Phase.NORM)]


# Versions, saving and copying


def test_versions_of_what_a_step_writes(engine):
    engine.plans()
    opt, params = engine.train("lamb", starts((5, 300)), tame((5, 300), 1))
    before = [p._version for p in params]
    params[1].grad = None
    opt.step()
    assert [p._version for p in params] == [before[0] + 1, before[1]]
    w = params[0]
    loss = (w * w).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


FIRST = [*((name, "own") for name in ONE_PER_RULE), *((name, "cpu") for name in ("sgd", "lamb", "novograd-decay"))]


@pytest.mark.parametrize("name, first", FIRST)
def test_state_dicts_go_from_engine_to_engine(name, first, engine):
    """The same keys, types and values; what was saved by one engine goes on bit for bit on the other."""
    engine.plans()
    sizes = (5, 70, 300)
    saving, goes_on = (0, 1) if first == "cpu" else (1, 0)
    twins, others = engine.twins(name, starts(sizes)), engine.twins(name, starts(sizes))
    early, late = list(tame(sizes, 2))
    twins.step(early)
    saved = [opt.state_dict() for opt in twins.opts]
    assert [saved[0]["state"][i].keys() for i in range(3)] == [saved[1]["state"][i].keys() for i in range(3)]
    groups = [[{**group, "backend": ""} for group in one["param_groups"]] for one in saved]
    assert groups[0] == groups[1]
    for opt, params in zip(others.opts, others.params, strict=True):
        backend = opt.param_groups[0]["backend"]
        opt.load_state_dict(pickle.loads(pickle.dumps(saved[saving])))
        opt.param_groups[0]["backend"] = backend  # it is saved with the group
        with torch.no_grad():
            for p, q in zip(params, twins.params[saving], strict=True):
                p.copy_(q)
    others.step(late)
    twins.step(late)
    assert others.opts[goes_on].engines == {("cpu", engine.backend)[goes_on]: 3}
    same_bits(written(others.opts[goes_on]), written(twins.opts[saving]))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("name", ["sgd-dampening", "lamb", "novograd-decay", "setadam-coupled"])
def test_copies(name, kind, engine):
    """A copy goes on as the original does, and neither touches the other."""
    engine.plans()
    sizes = (5, 300)
    early, late = list(tame(sizes, 2))
    opt, params = engine.train(name, starts(sizes), [early], max_grad_norm=3.0)
    other, others = COPIES[kind]((opt, params))
    assert other.engines == {engine.backend: 2}
    step(opt, params, there(late))
    between = written(opt)
    step(other, others, there(late))
    same_bits(written(other), between)
    same_bits(written(opt), between)
    assert opt.skipped_steps == other.skipped_steps == 0


@RULES
def test_an_engine_changed_between_steps(name, engine):
    """States stay where they are; leaves out the bits, which sums of another order may change."""
    engine.plans()
    sizes = (5, 300)
    opt, params = engine.train(name, starts(sizes), [])
    for t, grads in enumerate(tame(sizes, 3)):
        opt.param_groups[0]["backend"] = (engine.backend, "reference", engine.backend)[t]
        step(opt, params, there(grads))
    within_twins(params, name, 3)


def test_parameters_and_states_that_move(engine):
    """Their memory is looked at in every step: .data exchanged, a state replaced, a gradient elsewhere."""
    engine.plans()
    opt, params = engine.train("lamb", starts((5, 300)), [])
    twin, others = engine.train("lamb", starts((5, 300)), [])
    for t, grads in enumerate(tame((5, 300), 3)):
        if t == 1:
            params[1].data = params[1].data.clone()
        if t == 2:
            opt.state[params[1]]["exp_avg"] = opt.state[params[1]]["exp_avg"].clone()
        step(opt, params, there(grads))
        step(twin, others, there(grads))
    same_bits(written(opt), written(twin))


def test_memory_beside_the_states(engine):
    """What a launch keeps does not grow with the elements of a chunk."""
    opt, _ = engine.train("lamb", starts((5, 300)), tame((5, 300), 1))
    other, _ = engine.train("lamb", starts((5, 900)), tame((5, 900), 1))
    assert 0 < opt.workspace_bytes() == other.workspace_bytes()
