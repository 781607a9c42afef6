"""Sharded parameters of 16 bits: what `precision` keeps, GradScaler in the step, and steps in compiled code.

Left out: the rules one by one, which see float32 whatever is stored; GPUs.
"""

import math

import pytest
import torch
from ranks import run
from sharding import assert_whole, over, parameters, plain, ranks_agree, steps_of, tensors, told, train

import layerfused as lf

WORDS = ["master", "remainder", "kahan", "bf16-states", ("master", "bf16-states")]
KEPT = WORDS[:3]  # nothing is drawn, so that parts and wholes are the same numbers
HALF = torch.bfloat16


def kept(laid, word):
    params = parameters(laid, tensors(dtype=HALF))
    opt = lf.LAMB(params, lr=0.1, precision=word)
    train(opt, params, steps_of(dtype=HALF), laid)
    opt.load_state_dict(opt.state_dict())
    train(opt, params, steps_of(dtype=HALF)[:1], laid)
    return told(opt, params)


def scaled(laid, spoil=False):
    """Gradients of 1,024 times their size; one step has a gradient that is not finite, on one rank alone."""
    params = parameters(laid, tensors())
    opt = lf.LAMB(params, lr=0.1, amp_scaling=True)
    opt.grad_scale = torch.tensor(1024.0)
    for number, step in enumerate(steps_of()):
        opt.found_inf = torch.tensor(float(spoil and number == 2))  # GradScaler lets ranks agree in it
        train(opt, params, [[1024 * g for g in step]], laid)
    return told(opt, params)


def compiled(laid):
    params = parameters(laid, tensors())
    opt = lf.LAMB(params, lr=0.1)
    for p, g in zip(params, laid(steps_of()[0]), strict=True):
        p.grad = g
    torch.compile(lambda: opt.step(), backend="aot_eager")()
    return told(opt, params)


def noise():
    """Rows that are all alike, rounded at random: what lies here after a step, when spread and when copied."""
    found = []
    for layout in ("rows", "copied"):
        laid = over(layout)
        params = parameters(laid, [torch.ones(2, 4096, dtype=HALF)])
        opt = lf.SGD(params, lr=1e-3, precision="stochastic")
        train(opt, params, [[torch.ones(2, 4096, dtype=HALF)]], laid)
        found.append(params[0].to_local().detach().clone())
    return found


def work():
    laid = over("mixed")
    answers = {word: kept(laid, word) for word in WORDS}
    answers |= {"scaled": scaled(laid), "spoiled": scaled(laid, spoil=True), "compiled": compiled(laid)}
    return answers, noise()


@pytest.fixture(scope="module")
def found():
    return run(work, 2, timeout=120)


@pytest.mark.parametrize("word", WORDS, ids=str)
def test_ranks_agree(found, word):
    ranks_agree([answers[word] for answers, _ in found])


@pytest.mark.parametrize("word", KEPT)
def test_as_in_one_process(found, word):
    assert_whole(found[0][0][word], kept(plain, word), tensors(dtype=HALF))


@pytest.mark.parametrize("name, scenario", [("scaled", scaled), ("spoiled", lambda laid: scaled(laid, spoil=True))])
def test_gradscaler_in_the_step(found, name, scenario):
    answer = found[0][0][name]
    assert answer["skipped"] == (name == "spoiled")
    assert_whole(answer, scenario(plain), tensors())


def test_compiled(found):
    params = parameters(plain, tensors())
    opt = lf.LAMB(params, lr=0.1)
    train(opt, params, steps_of()[:1], plain)
    assert_whole(found[0][0]["compiled"], told(opt, params), tensors())


def test_no_two_parts_draw_the_same_noise(found):
    """Of 4,096 elements a quarter goes up: two equal draws would agree in all, two different ones in 5 of 8."""
    (first, copied), (second, same) = (noises for _, noises in found)
    assert torch.equal(copied, same)
    agreement = (first == second).double().mean().item()
    share = (first == first.max()).double().mean().item()
    expected = share**2 + (1 - share) ** 2
    assert abs(agreement - expected) < 5 * math.sqrt(expected * (1 - expected) / 4096) and 0.1 < share < 0.9
