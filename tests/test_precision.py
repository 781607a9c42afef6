"""`precision`: what lies in memory, bit for bit, against definitions; of both engines that run on a CPU.

Left out: other engines (device_precision.py, test_cuda_precision.py), whole trainings (test_precision_training.py).
"""

import pytest
import torch
from engines import small_chunks
from precision_oracle import DIGITS, distances, noise, philox, stored
from precision_oracle import joined as join_by_definition
from test_engine_storage import HALVES, patterns, same_numbers, set_gradient

import layerfused as lf
from layerfused import storing

WAYS = ("master", "remainder", "kahan", "stochastic")
RESTS = {"master": "master", "remainder": "remainder", "kahan": "compensation"}
PAIRS = [(word, dtype) for word in WAYS for dtype in HALVES if (word, dtype) != ("remainder", torch.float16)]
# Counter and key of Random123's own known answers, and the words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

every_way = pytest.mark.parametrize("word, dtype", PAIRS, ids=str)
each_engine = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_has_the_known_answers(counter, key, words):
    assert philox(counter, key) == words
    assert tuple(int(w) for w in storing.philox((torch.tensor([counter[0]]), *counter[1:]), key)) == words


def written(word, x, dtype, backend, **more):
    """Whatever float32 x is after a step that leads there: p, and its rest. 0.0 - lr * -(x) is x but for -0.0."""
    p = torch.nn.Parameter(torch.zeros(x.shape, dtype=dtype))
    opt = lf.SGD([p], lr=1.0, maximize=True, backend=backend, precision=word, **more)
    set_gradient(p, x)
    opt.step()
    return p.detach(), opt.state[p].get(RESTS.get(word)), opt


def edges(dtype):
    """Each number of the type, what lies in the middle and at the quarters between neighbours, the floats around."""
    x = patterns(dtype).float()
    x = x[x.isfinite() & (x >= 0)].sort().values[::7]
    unit = torch.from_numpy(distances(x.double().numpy(), dtype)[1])
    between = [(x.double() + k / 4 * unit).float() for k in range(4)]
    around = [torch.nextafter(y, torch.tensor(to)) for y in between for to in (float("inf"), 0.0)]
    top = torch.tensor([torch.finfo(dtype).max, torch.finfo(torch.float32).max, 65519.99, 65520.0, 65536.0, 1e-10])
    values = torch.cat([*between, *around, top, torch.tensor([float("inf"), float("nan"), 1e-45, 2.0**-33])])
    return torch.cat([values, -values]) + 0.0


def random_floats(n):
    source = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (n,), generator=source).to(torch.int32).view(torch.float32) + 0.0


# Leaves out most of the numbers of a type: test_engine_storage.py has them all, rounded to nearest.
@each_engine
@every_way
def test_what_is_stored(word, dtype, backend):
    for x in (edges(dtype), random_floats(2**15)):
        drawn = noise(x.numel(), 5, 0, 1) if word == "stochastic" else None
        p, rest, _ = written(word, x, dtype, backend, seed=5)
        expected, expected_rest = stored(word, x, dtype, drawn)
        assert same_numbers(p, expected)
        assert rest is None if expected_rest is None else same_numbers(rest, expected_rest)


@each_engine
@every_way
def test_what_is_read_is_what_was_kept(word, dtype, backend):
    """A step by nothing leaves all bits: those of p + c, too, which another compensation could stand for."""
    x = random_floats(2**12) if word != "stochastic" else patterns(dtype).float()
    x = x.where(x.to(dtype).isfinite(), 0.0)  # the reference's decay of nothing makes NaN of what is infinite
    p, rest, opt = written(word, x, dtype, backend)
    first = p.clone(), None if rest is None else rest.clone()
    opt.param_groups[0]["lr"] = 0.0
    (q,) = opt.param_groups[0]["params"]
    set_gradient(q, torch.zeros_like(x))
    opt.step()
    kept = x if rest is None else join_by_definition(word, *first)
    again = stored(word, kept + 0.0, dtype, noise(x.numel(), 0, 0, 2) if word == "stochastic" else None)
    assert same_numbers(p, again[0]) and (rest is None or same_numbers(rest, again[1]))
    if word in ("master", "remainder"):
        assert same_numbers(kept, x)
        assert same_numbers(p, first[0]) and same_numbers(rest, first[1])


def test_a_tie_is_rounded_away_from_zero_by_remainders_alone():
    """Of 1 + 2^-8, the upper half is 1 + 2^-7 and the lower -2^-8: to even it would be 1, as any 1 + 2^-8 - tiny is."""
    x = torch.tensor([1 + 2.0**-8, 1 + 2.0**-8 - 2.0**-23])
    p, rest, _ = written("remainder", x, torch.bfloat16, "cpu")
    assert p.tolist() == [1 + 2.0**-7, 1.0] and rest.tolist() == [-(2**15), 2**15 - 1]
    assert written("master", x, torch.bfloat16, "cpu")[0].tolist() == [1.0, 1.0]


# The engine walks through memory, whatever the shape says, and draws 8 elements at once from wherever it begins.
@each_engine
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_noise_belongs_to_places_in_memory(dtype, backend, monkeypatch):
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        lying = torch.zeros([x.shape[k] for k in order], dtype=dtype).permute([order.index(k) for k in range(3)])
        p = torch.nn.Parameter(lying)
        assert p.shape == x.shape and p.detach().is_contiguous() == (order == (0, 1, 2))
        layer = "slices" if p.stride(0) == 35 else "tensor"
        groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}, {"params": [p], "layer": layer}]
        ascent = dict(lr=1.0, momentum=0.0, weight_decay=0.0, maximize=True)  # without weights the trust ratio is 1
        with small_chunks(monkeypatch, 13, 13):  # layers and chunks begin within a block of 8
            opt = lf.LARS(groups, **ascent, backend=backend, precision="stochastic", seed=2**40 + 3)
            set_gradient(p, torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(x))
            opt.step()
        in_memory = x.permute(order).reshape(-1)
        expected = stored("stochastic", in_memory, dtype, noise(x.numel(), 2**40 + 3, 2, 1))[0]
        assert same_numbers(p.detach().permute(order).reshape(-1), expected)


@each_engine
@every_way
def test_float32_stays_as_it_is(word, dtype, backend):
    x = random_floats(1000)
    p, rest, opt = written(word, x, torch.float32, backend)
    assert rest is None and same_numbers(p, x) and set(opt.state[opt.param_groups[0]["params"][0]]) == {"step"}


def test_every_distance_is_a_power_of_two():
    """The oracle's own: neighbours of each type are as far apart as it says."""
    for dtype in HALVES:
        x = patterns(dtype).double()
        x = x[x.isfinite() & (x > 0)].sort().values
        assert torch.equal(torch.from_numpy(distances(x[:-1].numpy(), dtype)[1]), x[1:] - x[:-1])
        assert x[0] == 2.0 ** DIGITS[dtype][1]
