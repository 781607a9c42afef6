"""Stochastic rounding: without bias, the same for any number of threads, and other noise wherever it has to be.

Seeds are fixed, so that a bound of four standard errors does not fail by chance. Left out: Philox's quality, which its
paper shows, and its bits, which test_precision.py has.
"""

import pytest
import torch
from engines import make, same_bits, small_chunks, starts, tame, threads, train, written
from precision_oracle import distances
from test_engine_storage import HALVES, set_gradient
from torch.nn import Parameter

import layerfused as lf

N = 2**16
SAME = pytest.mark.parametrize("name", ["sgd", "adam-decay", "lamb", "ladabelief-post"])


def moved(start, by, dtype, steps=1, n=N, **options):
    """n parameters that start as one number, after steps of -by."""
    p = Parameter(torch.full((n,), start, dtype=dtype))
    opt = lf.SGD([p], lr=1.0, **options)
    for _ in range(steps):
        set_gradient(p, torch.full((n,), -by))
        opt.step()
    return p.detach(), opt.state[p]


# Within a binade and at both its ends, a number that is subnormal in float16; from a small share to almost all.
@pytest.mark.parametrize("start", [1.0, -1.5, 2.0 - 2**-7, 2.0**-20])
@pytest.mark.parametrize("share", [2.0**-10, 0.3, 0.75, 0.99])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_without_bias(dtype, share, start):
    unit = float(distances(torch.tensor(start).double().numpy(), dtype)[1])
    p, _ = moved(start, share * unit, dtype, precision="stochastic")
    exact = torch.tensor(start) + torch.tensor(share * unit)  # as a step has it, in float32
    below = (exact.double() / unit).floor() * unit
    share = float((exact.double() - below) / unit)
    assert set(p.unique().double().tolist()) == {float(below), float(below) + unit}
    standard_error = unit * (share * (1 - share) / N) ** 0.5
    assert abs(float(p.double().mean() - exact)) < 4 * standard_error


def test_what_small_steps_come_to():
    """500 steps of 2^-12 from 1, where bfloat16's distance is 2^-7: nearest stays, and nothing else does."""
    exact, steps = 1 + 500 * 2.0**-12, 500
    found = {word: moved(1.0, 2.0**-12, torch.bfloat16, steps, 1024, precision=word)
             for word in (None, "master", "remainder", "kahan", "stochastic")}  # fmt: skip
    p, _ = found[None]
    assert (p == 1).all()
    assert (found["master"][1]["master"] == exact).all()
    for word in ("master", "remainder"):
        assert (found[word][0] == torch.tensor(exact).bfloat16()).all()
    p, state = found["kahan"]
    total = p.double() + state["compensation"].double()
    assert ((total - exact).abs() <= steps * 2.0**-17).all()  # half a distance of numbers below 2^-8 at each step
    p, _ = found["stochastic"]
    spread = p.double().std()
    assert 0 < spread < 500**0.5 * 2**-7 and abs(float(p.double().mean()) - exact) < 4 * spread / 1024**0.5


def test_a_second_moment_decays_by_chance_alone():
    """beta2 = 0.999 takes less than half a distance from v: rounded to nearest it stays for ever."""
    means = {}
    for words in (None, "bf16-states"):
        p = Parameter(torch.zeros(4096))
        opt = lf.Adam([p], lr=0.0, precision=words)
        if words is None:
            saved = opt.state_dict()
            saved["state"][0] |= {key: torch.zeros(4096, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
            opt.load_state_dict(saved)
        v = opt.state[p]["exp_avg_sq"]
        v.fill_(1.25)
        for _ in range(200):
            p.grad = torch.zeros(4096)
            opt.step()
        assert v is opt.state[p]["exp_avg_sq"] and v.dtype == torch.bfloat16
        means[words] = float(v.double().mean()), float(v.double().std())
    assert means[None] == (1.25, 0.0)
    mean, spread = means["bf16-states"]
    assert abs(mean - 1.25 * 0.999**200) < 4 * spread / 4096**0.5 < 0.01


def coins(seed=0, number=0, t=1, element=0, of_v=False):
    """Which of N numbers half-way between two others go up: of parameter `number`, in step t, from `element` on."""
    p = Parameter(torch.ones(element + N, dtype=torch.float32 if of_v else torch.bfloat16))
    params = [*(Parameter(torch.zeros(1)) for _ in range(number)), p]
    if of_v:  # v = (1 + g^2) / 2
        opt = lf.Adam(params, betas=(0.0, 0.5), precision="bf16-states", seed=seed)
        opt.state[p]["exp_avg_sq"].fill_(1.0)
    else:
        opt = lf.SGD(params, lr=2.0**-8, maximize=True, precision="stochastic", seed=seed)
    opt.state[p]["step"].fill_(t - 1)
    p.grad = torch.full_like(p, (1 + 2.0**-7) ** 0.5 if of_v else 1.0)
    opt.step()
    return ((opt.state[p]["exp_avg_sq"] if of_v else p.detach()) > 1)[element:]


OTHERS = [{"seed": 1}, {"seed": 2**32}, {"seed": 2**52}, {"number": 1}, {"number": 2}, {"t": 2}, {"t": 2**20},
          {"element": 1}, {"element": 8}, {"element": 24}, {"of_v": True}, {"of_v": True, "number": 1}]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_noise_is_another_elsewhere(other):
    """Two fair coins agree in half of all cases."""
    one, two = coins(), coins(**other)
    for share in (one, two, one == two):
        assert abs(float(share.double().mean()) - 0.5) < 4 * 0.5 / N**0.5
    assert torch.equal(two, coins(**other))


@SAME
def test_threads_change_nothing(name, monkeypatch):
    words, sizes = ("stochastic", "bf16-states"), (5, 301, 64, 1000)
    values = [x.bfloat16() for x in starts(sizes)]
    gradients = [[g.bfloat16() for g in grads] for grads in tame(sizes, 3)]
    found = []
    for count, chunk in ((1, 64), (2, 64), (4, 64), (4, 64)):
        with small_chunks(monkeypatch, chunk, chunk), threads(count):
            found.append(written(train(name, values, gradients, precision=words, seed=7, max_grad_norm=2.0)[0]))
    for other in found[1:]:
        same_bits(other, found[0])


def test_cutting_into_chunks_changes_no_noise(monkeypatch):
    """Without sums, whose order depends on chunks."""
    found, values = [], [x.bfloat16() for x in starts((1000,))]
    gradients = [[g.bfloat16() for g in grads] for grads in tame((1000,), 2)]
    for chunk in (64, 13, 2**16):
        with small_chunks(monkeypatch, chunk, chunk):
            opt, _ = train("adam-decay", values, gradients, precision="stochastic")
            found.append(written(opt))
    same_bits(found[1], found[0])
    same_bits(found[2], found[0])


def test_a_new_group_leaves_the_others_noise():
    def run(grow):
        params = [Parameter(torch.ones(1000).bfloat16()) for _ in range(3)]
        opt = make("sgd", params[:2], precision="stochastic", backend="cpu")
        for t in range(2):
            if grow and t == 1:
                opt.add_param_group({"params": params[2:], "precision": "stochastic"})
            for p in params:
                p.grad = torch.full_like(p, 0.3)
            opt.step()
        return params

    for p, q in zip(run(True)[:2], run(False)[:2], strict=True):
        assert torch.equal(p, q)


def test_a_changed_seed_is_heard():
    p = Parameter(torch.ones(1000).bfloat16())
    opt = lf.SGD([p], lr=2.0**-8, precision="stochastic")
    found = []
    for seed in (0, 1, 0):
        opt.param_groups[0]["seed"] = seed
        with torch.no_grad():
            p.fill_(1.0)
        opt.state[p]["step"].zero_()
        p.grad = torch.full_like(p, -1.0)
        opt.step()
        found.append(p.detach().clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
