"""Hundreds of groups: one native call, each group's own numbers, and every change of them seen and checked.

The twin is an optimizer for each group, which knows of one row alone. Left out: how long the host takes
(`python -m bench step --shapes many-groups`), and engines other than the CPU's, which take the same rows.
"""

import math

import pytest
import torch
from conduct import assert_same, give, parameters, refused, snapshot
from torch.optim.lr_scheduler import LambdaLR

import layerfused as lf

MANY = 465
NAN = float("nan")


class Counted:
    """A native engine whose runs are counted."""

    def __init__(self, native):
        self.native, self.runs = native, 0

    def run(self, *arguments):
        self.runs += 1
        return self.native.run(*arguments)


def layerwise_decay(cls, count=MANY, **options):
    params = parameters(*[(3,)] * count)
    return cls([{"params": [p], "lr": 0.1 * 0.99**k} for k, p in enumerate(params)], **options), params


@pytest.mark.parametrize("cls", [lf.AdamW, lf.LAMB])
def test_one_call_with_the_lr_of_every_group(cls):
    options = {} if cls is lf.AdamW else {"max_grad_norm": None}
    opt, params = layerwise_decay(cls, **options)
    rates = [group["lr"] for group in opt.param_groups]
    twins = [cls([p], lr=rate, **options) for p, rate in zip(parameters(*[(3,)] * MANY), rates, strict=True)]
    scheduler = LambdaLR(opt, lambda epoch: 1 / (1 + epoch))
    opt._current()[0]._native = counted = Counted(opt._current()[0]._native)
    for epoch in range(3):
        give(params, epoch)
        opt.step()
        for p, twin, rate in zip(params, twins, rates, strict=True):
            (own,) = twin.param_groups[0]["params"]
            own.grad, twin.param_groups[0]["lr"] = p.grad, rate / (1 + epoch)
            twin.step()
        scheduler.step()
        assert counted.runs == epoch + 1 and opt.traffic()["launches"] == 1
    others = [snapshot(twin, twin.param_groups[0]["params"])[0] for twin in twins]
    assert_same(snapshot(opt, params), others)


CHANGES = {  # name -> (class, its options, what changes a group between two steps)
    "betas": (lf.Adam, {}, lambda group: group.update(betas=(0.5, 0.9))),
    "betas in place": (lf.Adam, {"betas": [0.9, 0.99]}, lambda group: group["betas"].__setitem__(0, 0.5)),
    "a beta in place": (lf.Adam, {"betas": (torch.tensor(0.5), 0.99)}, lambda group: group["betas"][0].fill_(0.25)),
    "lr in place": (lf.Adam, {"lr": torch.tensor([0.5])}, lambda group: group["lr"].mul_(0.5)),
    "lr of an int": (lf.Adam, {}, lambda group: group.update(lr=1)),
    "no decay": (lf.AdamW, {"weight_decay": 0.5}, lambda group: group.update(weight_decay=0.0)),
    "ascent": (lf.LAMB, {}, lambda group: group.update(maximize=True)),
    "a bound": (lf.LAMB, {}, lambda group: group.update(trust_clip=0.01)),
    "a bound in place": (lf.LAMB, {"trust_clip": [0.0, 1.0]}, lambda group: group["trust_clip"].__setitem__(1, 0.01)),
    "momentum": (lf.SGD, {"momentum": 0.5}, lambda group: group.update(momentum=0.9)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_one_group_is_seen(name):
    """It takes part from the next step on: as in an optimizer that is built anew, with these numbers, from there."""
    cls, options, change = CHANGES[name]

    def made():
        params = parameters()
        groups = [{"params": params[:2], **options}, {"params": params[2:]}]
        opt = cls(groups)
        give(params, 0)
        opt.step()
        return opt, params

    (opt, params), (other, others) = made(), made()
    change(opt.param_groups[0])
    other.load_state_dict(opt.state_dict())
    for one, own in ((opt, params), (other, others)):
        give(own, 1)
        one.step()
    assert_same(snapshot(opt, params), snapshot(other, others))
    again, unchanged = made()
    give(unchanged, 1)
    again.step()
    assert not torch.equal(params[0], unchanged[0]) and torch.equal(params[2], unchanged[2])


def test_a_group_that_was_exchanged():
    """For a dict of the same parameters: its numbers count from then on, not those of the old one."""
    (p,) = parameters((3,))
    opt, start = lf.SGD([p], lr=0.5), p.detach().clone()
    p.grad = torch.ones(3)
    opt.step()
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.25}
    opt.step()
    assert torch.equal(p, start - 0.5 - 0.25)


BAD = {  # name -> (values that a group cannot have, the error, words of its message)
    "lr": ((-1.0, NAN, math.inf, torch.tensor(-1.0), torch.zeros(2)), ValueError, ["lr"]),
    "lr of another type": (("0.1", None, True), TypeError, ["lr", "[0, inf)"]),
    "betas": (((0.9, 1.0), (NAN, 0.9), (0.9, torch.tensor(2.0)), 0.9, [0.9]), ValueError, ["beta"]),
    "momentum": ((0.0,), ValueError, ["nesterov"]),
    "dampening": ((0.5,), ValueError, ["nesterov"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_in_one_group_is_refused_until_it_is_mended(name):
    values, kind, words = BAD[name]
    plain = name.split()[0] in lf.AdamW(parameters()).defaults
    options = {} if plain else {"momentum": 0.9, "nesterov": True}
    opt, params = layerwise_decay(lf.AdamW if plain else lf.SGD, 5, **options)
    give(params, 0)
    opt.step()
    before, group = snapshot(opt, params), opt.param_groups[3]
    for value in values:
        good, group[name.split()[0]] = group[name.split()[0]], value
        for _ in range(2):
            with refused(kind, *words):
                opt.step()
        group[name.split()[0]] = good
        assert_same(snapshot(opt, params), before)
    twin, others = layerwise_decay(lf.AdamW if plain else lf.SGD, 5, **options)
    for one, own in ((opt, params), (twin, others), (twin, others)):
        give(own, 0)
        one.step()
    assert_same(snapshot(opt, params), snapshot(twin, others))
