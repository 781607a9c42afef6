"""Storage types on the CUDA engine (device_storage.py, too): run-time fields, so all of them go in one launch."""

from itertools import product

import pytest
import torch
from cuda_cases import Cuda
from device_cases import there
from device_storage import *  # noqa: F403
from engines import ONE_PER_RULE, parameters, randn, same_bits, starts, tame, wild
from test_engine_storage import TYPES, set_gradient

ENGINE = Cuda
RULES = pytest.mark.parametrize("name", ONE_PER_RULE)


# All 81 mixtures of types of p, g, m and v in one launch, on chip and in several chunks; leaves out options of a rule,
# which device_bits.py has with every operand in one type.
@pytest.mark.parametrize("tile", [16, 64])
@RULES
def test_every_mixture_in_one_launch(name, tile, engine):
    engine.plans(tile=tile, grid=3)
    mixtures = list(product(TYPES, repeat=4))
    twins = engine.twins(name, [x.to(p) for x, (p, *_) in zip(starts((37,)) * 81, mixtures, strict=True)])
    for opt, params in zip(twins.opts, twins.params, strict=True):
        for p, (_, _, *types) in zip(params, mixtures, strict=True):
            keys = opt.rule_of(opt.param_groups[0]).states
            opt.state[p] |= {key: opt.state[p][key].to(dtype) for key, dtype in zip(keys, types, strict=False)}
    for (g,) in (*tame((37,), 2), *wild((37,), 1)):
        twins.step([g.to(dtype) for _, dtype, *_ in mixtures])
    assert twins.opts[1].traffic()["launches"] == len(twins.opts[1]._launches) == 1


def test_gradients_change_their_type(engine):
    """From step to step, and as autograd would not allow; float64 is copied, and none at all is none."""
    engine.plans(grid=2)
    sizes = (5, 100, 300)
    twins = engine.twins("lars", starts(sizes), max_grad_norm=3.0)
    half, bf16, double = torch.float16, torch.bfloat16, torch.float64
    for types in ((half, None, bf16), (bf16, half, torch.float32), (double, bf16, double), (half, half, half)):
        twins.step([dtype and g.to(dtype) for dtype, g in zip(types, next(tame(sizes, 1)), strict=True)])


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_a_type_does_not_reach_its_neighbours(name, engine):
    """Parameters of several types in one launch: each as it is alone."""
    values = there(randn(40, i).to(dtype) for i, dtype in enumerate((*TYPES, torch.bfloat16)))

    def final(values):
        params = parameters(values)
        opt = engine.make(name, params)
        for t in range(2):
            for p in params:
                set_gradient(p, (0.5 + t) * p.detach())
            opt.step()
        assert opt.traffic()["launches"] == 1
        return params

    for p, value in zip(final(values), values, strict=True):
        same_bits({"p": p.detach()}, {"p": final([value])[0].detach()})
