"""What `precision` keeps: how it begins, is saved, loaded and copied, follows its parameter; and what is refused.

Left out: sharded parameters, and backends that need a GPU.
"""

import pickle
from copy import deepcopy

import pytest
import torch
from conduct import assert_same, copies, give, make, parameters, refused, snapshot, through_a_file, train
from engines import NAMED
from precision_oracle import joined, stored
from test_engine_storage import HALVES, same_numbers
from test_precision import PAIRS, RESTS, each_engine, every_way, random_floats
from torch.nn import Parameter

import layerfused as lf
from layerfused import storing

BF16 = torch.bfloat16
WORDS = ["master", "remainder", "kahan", "stochastic", "bf16-states", ("kahan", "bf16-states")]
TYPES = {"master": lambda p: torch.float32, "remainder": lambda p: torch.int16, "compensation": lambda p: p.dtype}

every_word = pytest.mark.parametrize("word", WORDS, ids=str)


def built(word, dtype=BF16, name="adamw", **more):
    params = parameters((7, 5), (5,), (), dtype=dtype)
    return make(NAMED[name], params, precision=word, **more), params


def bytes_of(word, dtype, name="adamw"):
    """Of elementwise states and rests, an element."""
    p = Parameter(torch.zeros(1000, dtype=dtype))
    opt = make(NAMED[name], [p], precision=word)
    return sum(x.nbytes for x in opt.state[p].values() if x.numel() == 1000) // 1000


# Beside a 16-bit parameter: a float32 master with two float32 states, and what the words make of it.
def test_bytes_an_element():
    expected = {None: 8, "master": 12, "remainder": 10, "kahan": 10, "stochastic": 8, "bf16-states": 4,
                ("kahan", "bf16-states"): 6}  # fmt: skip
    assert {word: bytes_of(word, BF16) for word in expected} == expected
    assert bytes_of("master", torch.float32) == 8 and bytes_of(("master", "bf16-states"), torch.float32) == 4
    assert bytes_of(("remainder", "bf16-states"), BF16, "sgd-momentum") == 4


@each_engine
@every_way
def test_what_is_kept_begins_with_the_optimizer(word, dtype, backend):
    opt, params = built(word, dtype, backend=backend)
    for p in params:
        assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq", RESTS.get(word, "step")}
        if word in RESTS:
            rest = opt.state[p][RESTS[word]]
            assert rest.dtype == TYPES[RESTS[word]](p) and rest.shape == p.shape and not rest.requires_grad
            assert same_numbers(joined(word, p.detach(), rest), p.detach().float())


@each_engine
@every_word
def test_resume_is_bit_exact(word, backend):
    """In the middle of a stream of noise, too."""
    opt, params = built(word, backend=backend, seed=12345)
    train(opt, params, range(3))
    saved, resumed = through_a_file(opt.state_dict()), copies(params)
    other = make(NAMED["adamw"], resumed, precision=word, backend=backend)
    other.load_state_dict(saved)
    assert other.param_groups[0]["seed"] == 12345
    copied, pickled = deepcopy((opt, params)), pickle.loads(pickle.dumps((opt, params)))
    train(opt, params, range(3, 6))
    for twin, own in ((other, resumed), copied, pickled):
        train(twin, own, range(3, 6))
        assert_same(snapshot(twin, own), snapshot(opt, params))


def test_saved_types_are_kept():
    """float32 states of a parameter whose new ones would be bfloat16."""
    opt, params = built("bf16-states", torch.float32)
    train(opt, params, range(2))
    saved = opt.state_dict()
    for entries in saved["state"].values():
        entries["exp_avg_sq"] = entries["exp_avg_sq"].float()
    opt.load_state_dict(saved)
    train(opt, params, range(2))
    for p in params:
        assert (opt.state[p]["exp_avg"].dtype, opt.state[p]["exp_avg_sq"].dtype) == (BF16, torch.float32)


@pytest.mark.parametrize("saved", [None, *WORDS], ids=str)
@pytest.mark.parametrize("own", [None, *WORDS], ids=str)
def test_state_dicts_of_another_precision(saved, own):
    opt, params = built(own)
    state_dict = built(saved)[0].state_dict()
    if saved == own:
        opt.load_state_dict(state_dict)
        return
    before = snapshot(opt, params)
    with refused(ValueError, f"precision={saved!r}", repr(own), f"give it {saved!r}"):
        opt.load_state_dict(state_dict)
    assert_same(snapshot(opt, params), before)


def test_torchs_state_dicts_are_of_no_precision():
    opt, params = built("kahan")
    theirs = torch.optim.AdamW(parameters((7, 5), (5,), (), dtype=BF16))
    with refused(ValueError, "precision=None", "'kahan'"):
        opt.load_state_dict(theirs.state_dict())
    built(None)[0].load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    "word, entry",
    [
        ("master", lambda x: x.bfloat16()),
        ("master", lambda x: x.double()),
        ("remainder", lambda x: x.int()),
        ("kahan", lambda x: x.float()),
        ("kahan", lambda x: x.reshape(-1)),
        ("remainder", lambda x: x[:1]),
    ],
)
def test_state_dicts_with_rests_that_do_not_fit(word, entry):
    opt, params = built(word)
    saved = opt.state_dict()
    saved["state"][0][RESTS[word]] = entry(saved["state"][0][RESTS[word]])
    before = snapshot(opt, params)
    with refused(ValueError, repr(RESTS[word]), "(7, 5)"):
        opt.load_state_dict(saved)
    assert_same(snapshot(opt, params), before)


def test_state_dicts_without_or_with_another_rest():
    opt, _ = built("master")
    without, foreign = deepcopy(opt.state_dict()), deepcopy(opt.state_dict())
    del without["state"][1]["master"]
    foreign["state"][1]["remainder"] = torch.zeros(5, dtype=torch.int16)
    for saved in (without, foreign):
        with refused(ValueError, "step, exp_avg, exp_avg_sq, master"):
            opt.load_state_dict(saved)


# Somebody else writes the parameter


def changed(word, dtype, change, backend="cpu"):
    """Joined numbers before and after somebody's change, which a step of lr 0 has to take for given."""
    opt, params = built(word, dtype, "sgd-momentum", backend=backend)
    train(opt, params, range(3))
    p = params[0]
    before, rest = joined(word, p.detach(), opt.state[p].get(RESTS.get(word))), opt.state[p].get(RESTS.get(word))
    change(p)
    wanted = p.detach().clone()
    for group in opt.param_groups:
        group["lr"] = 0.0
    give(params, 9)
    opt.step()
    assert rest is opt.state[p].get(RESTS.get(word))
    return before, wanted, p.detach(), joined(word, p.detach(), rest)


def no_grad(change):
    def changing(p):
        with torch.no_grad():
            change(p)

    return changing


CHANGES = {
    "copy_": no_grad(lambda p: p.copy_(torch.linspace(-3, 3, 35).view(7, 5))),
    "zero_": no_grad(lambda p: p.zero_()),
    "small": no_grad(lambda p: p.mul_(2.0**-10)),
    "nan": no_grad(lambda p: p[0].fill_(float("nan"))),
    "inf": no_grad(lambda p: p[0].fill_(float("-inf"))),
    "data": lambda p: setattr(p, "data", torch.linspace(-3, 3, 35, dtype=p.dtype).view(7, 5)),
}


SERVED = [(change, backend) for change in CHANGES for backend in ("cpu", "reference")]
SERVED.remove(("inf", "reference"))  # its decay of nothing makes NaN of what is infinite


@pytest.mark.parametrize("change, backend", SERVED)
@pytest.mark.parametrize("word, dtype", [pair for pair in PAIRS if pair[0] in RESTS], ids=str)
def test_others_write_the_parameter(word, dtype, change, backend):
    before, wanted, p, numbers = changed(word, dtype, CHANGES[change], backend)
    assert same_numbers(p + 0.0, wanted + 0.0)
    apart = (numbers - wanted.float()).abs() > 2.0 ** (-8 if dtype == BF16 else -11) * wanted.float().abs() + 1e-38
    assert not (apart & wanted.isfinite()).any()
    if word == "master":
        assert same_numbers(numbers, before.where(before.to(dtype) == wanted, wanted.float()))


def test_what_others_left_alone_is_kept():
    """Of a master that was clamped, the elements within the bounds go on with all their digits."""
    before, wanted, p, numbers = changed("master", BF16, no_grad(lambda p: p.clamp_(-0.5, 0.5)))
    inside = before.bfloat16().abs() <= 0.5
    assert 5 < inside.sum() < 30 and same_numbers(numbers[inside], before[inside])
    assert same_numbers(numbers[~inside], wanted[~inside].float())


@each_engine
@pytest.mark.parametrize("word", RESTS)
def test_others_write_before_the_first_step(word, backend):
    """As who makes the optimizer first, and loads the model's weights then, or those of another step."""
    for load in (False, True):
        opt, params = built(word, backend=backend, lr=0.0)
        saved = opt.state_dict()
        with torch.no_grad():
            for p in params:
                p.mul_(-2.0**-6)
        if load:
            opt.load_state_dict(saved)
        wanted = [p.detach().clone() for p in params]
        train(opt, params, [0])
        assert all(same_numbers(p.detach(), q) for p, q in zip(params, wanted, strict=True))


def test_nobody_looks_at_what_nobody_wrote(monkeypatch):
    """That would be one more pass over the parameters."""
    opt, params = built("master")
    train(opt, params, [0])
    seen = []
    monkeypatch.setattr("layerfused.table.begin_anew", lambda p, rest, way: seen.append(way))
    train(opt, params, [1, 2])
    assert seen == []
    with torch.no_grad():
        params[1].add_(1.0)
    train(opt, params, [3, 4])
    assert seen == ["master"]


@every_way
def test_nothing_that_was_stored_begins_anew(word, dtype):
    """Not even of compensations that are half a distance, whose sum with the parameter rounds to the other side."""
    if word not in RESTS:
        return
    x = random_floats(2**18)
    p, rest = stored(word, x.where(x.to(dtype).isfinite() | x.isnan(), 0.0), dtype)
    before = rest.clone()
    if word == "kahan":
        assert (joined(word, p, rest).to(dtype) != p)[~p.isnan()].any()
    storing.begin_anew(p, rest, word)
    assert same_numbers(rest, before)


@each_engine
@pytest.mark.parametrize("word", RESTS)
def test_a_rest_that_was_exchanged(word, backend):
    opt, params = built(word, backend=backend)
    train(opt, params, range(2))
    p, key = params[0], RESTS[word]
    opt.state[p][key] = torch.zeros_like(opt.state[p][key])
    train(opt, params, [2])
    assert opt.state[p][key].any() and p.isfinite().all() and p.abs().max() < 5
    opt.state[p][key] = torch.zeros(7, 5, dtype=torch.float64)
    before = snapshot(opt, params)
    with refused(ValueError, repr(key), "float64"):
        train(opt, params, [3])
    assert_same(snapshot(opt, params), before)


def test_the_word_is_changed():
    """From then on numbers are kept another way; digits that the parameter does not show are lost."""
    opt, params = built("master", name="sgd-momentum")
    train(opt, params, range(2))
    before = snapshot(opt, params)
    for word in ("remainder", None, ("kahan", "bf16-states"), "master"):
        opt.param_groups[0]["precision"] = word
        opt.param_groups[0]["lr"] = 0.0
        train(opt, params, [2])
        first = word[0] if isinstance(word, tuple) else word
        for p, (old, _) in zip(params, before, strict=True):
            assert same_numbers(p.detach(), old)
            assert set(opt.state[p]) == {"step", "momentum_buffer", RESTS.get(first, "step")}


def test_the_parameters_type_is_changed():
    opt, params = built("master", BF16)
    train(opt, params, range(2))
    for p in params:
        p.data = p.data.half()
    train(opt, params, [2])
    for p in params:
        assert p.dtype == torch.float16 and same_numbers(opt.state[p]["master"].half(), p.detach())
        p.data = p.data.float()
    train(opt, params, [3])
    assert all(set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


# Refusals


def test_parameters_that_no_word_is_for():
    for word in WORDS:
        with refused(ValueError, "precision", "torch.float64"):
            built(word, torch.float64)
    for word in ("remainder", ("bf16-states", "remainder")):
        with refused(ValueError, "remainder", "float16", "'kahan'"):
            built(word, torch.float16)
    opt, params = built("remainder")
    before = snapshot(opt, params)
    with refused(ValueError, "remainder", "'kahan'"):
        opt.add_param_group({"params": parameters((3,), dtype=torch.float16)})
    assert_same(snapshot(opt, params), before)
    train(opt, params, [0])


def test_who_refuses_every_word():
    params = parameters((3,), dtype=BF16)
    for word in WORDS:
        for cls in (lf.CurvatureSGD, lf.CurvatureAdamW):
            with refused(ValueError, cls.__name__, "precision=None", repr(word)):
                cls(params, precision=word)
        with refused(ValueError, "XGrad", "precision=None", repr(word)):
            lf.XGrad(lf.Adam(params, precision=word))
        with refused(ValueError, "differentiable=True", "precision=None", repr(word)):
            lf.Adam(params, precision=word, differentiable=True)
    wrapped = lf.XGrad(lf.Adam(params))
    with refused(ValueError, "XGrad", "precision=None", "'master'"):
        wrapped.add_param_group({"params": parameters((2,)), "precision": "master"})
    train(wrapped, params, [0])
    wrapped.param_groups[0]["precision"] = "master"
    with refused(ValueError, "XGrad", "precision=None", "'master'"):
        train(wrapped, params, [1])


# What it moves: p and rest, m, v, g of AdamW in one sweep; of LAMB in two, of which the first reads p.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "word, reads, writes",
    [(None, 2, 2), ("master", 4, 6), ("remainder", 4, 4), ("kahan", 4, 4), ("stochastic", 2, 2)],
)
def test_traffic(word, reads, writes, dtype):
    if (word, dtype) == ("remainder", torch.float16):
        return
    for words, states in ((word, 16), ((*([word] if word else []), "bf16-states"), 8)):
        p = Parameter(torch.zeros(1000, dtype=dtype))
        counted = lf.AdamW([p], precision=words).traffic()
        assert counted["compulsory"] == counted["requested"] == 1000 * (2 + reads + writes + states)
        counted = lf.LAMB([p], precision=words, max_grad_norm=None).traffic()
        assert counted["compulsory"] == 1000 * (2 + reads + writes + states)
        assert counted["requested"] == counted["compulsory"] + 1000 * (reads + states // 2)


@every_word
def test_released_gradients_take_the_same_steps(word):
    """Each parameter by a launch of its own draws the noise that it would draw among the others."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).bfloat16()
    twin, x = deepcopy(model), torch.randn(4, 7).bfloat16()
    found = []
    for net, release in ((model, True), (twin, False)):
        opt = lf.AdamW(net.parameters(), lr=0.01, precision=word, seed=3)
        if release:
            opt.release_gradients()
        for _ in range(3):
            opt.zero_grad()
            net(x).square().sum().backward()
            opt.step()
        found.append(snapshot(opt, list(net.parameters())))
    assert_same(*found)
