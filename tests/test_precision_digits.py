"""`precision` on real data: bfloat16 weights of the digits' network learn as float32 ones do.

`python -m bench train --study precision` compares final losses from five seeds; here are the bits.
"""

import pytest
import torch
from precision_oracle import stored
from test_engine_storage import same_numbers
from test_precision import RESTS
from torch.nn import Parameter

import layerfused as lf


def trained(optimizer, word, steps=60):
    """Weights of bfloat16, their rests, and float32 weights that were given the same gradients."""
    pytest.importorskip("sklearn")
    from bench import digits, training

    task = digits.in_bfloat16(digits.classification())
    params = list((model := task.network(0)).parameters())
    twins = [Parameter(p.detach().float()) for p in params]
    opt, twin = (optimizer(own, **more) for own, more in ((params, {"precision": word}), (twins, {})))
    for x, y in training.batches(task.data.train, 128, steps):
        opt.zero_grad()
        task.loss(model(x), y).backward()
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
        opt.step()
        twin.step()
    return params, [opt.state[p][RESTS[word]] for p in params], twins


@pytest.mark.all
@pytest.mark.parametrize("word", ["master", "remainder"])
@pytest.mark.parametrize("optimizer", [lf.AdamW, lf.LAMB, lf.NovoGrad, lf.Aida])
def test_the_gradients_train_float32_weights(optimizer, word):
    for p, rest, q in zip(*trained(optimizer, word), strict=True):
        expected, expected_rest = stored(word, q.detach(), torch.bfloat16)
        assert same_numbers(p.detach(), expected) and same_numbers(rest, expected_rest)
