"""The reference functions against other people's code, against identities of the papers, and at the edges."""

from types import SimpleNamespace

import pytest
import torch
import transcriptions
from cases import ADAPT, CASES, FIXED, REPORTS, RULES, STATES, Case, run, zero_state

from layerfused import reference

EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Float64 against float64: some 20 rounded operations a step, 20 steps, corrections 1/(1 - 0.999**t) that magnify an
# ulp of the power 500 times: 20 * (20 + 500) * 1.1e-16 is 1.2e-12 of an update, and updates here are below 0.2 of p.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def layer(n, seed=0, dtype=torch.float64):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(n, steps=20, seed=1, dtype=torch.float64):
    """Gradients with a common direction and noise, so that m and g are neither parallel nor unrelated."""
    return list(layer((steps, n), seed, dtype) + layer(n, seed + 1, dtype))


def rule(case):
    return getattr(reference, case.rule)


def ours(case, p, grads, adapt=True, **changed):
    return run(rule(case), {**case.hyper, **changed}, p, grads, adapt)


def theirs(optimizer, p, grads):
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


def test_the_table_names_every_rule():
    assert list(RULES) == list(STATES) == list(REPORTS)
    assert {case.rule for case in CASES} == set(RULES)
    assert len({case.name for case in CASES}) == len(CASES)


# torch.optim has no other rule of ours.
@pytest.mark.parametrize("case", [c for c in CASES if c.cls in ("SGD", "Adam", "AdamW")], ids=lambda case: case.name)
def test_base_rules_equal_torch(case: Case):
    grads = gradients(37)
    q = torch.nn.Parameter(layer(37))
    q, state = theirs(getattr(torch.optim, case.cls)([q], **case.kwargs), q, grads)
    p, s, _ = ours(case, layer(37), grads)
    torch.testing.assert_close(p, q, **EXACT)
    for name in STATES[case.rule][0]:
        torch.testing.assert_close(s[name], state[name], **EXACT)


@pytest.mark.parametrize("eps", [1e-8, 1e-6])
@pytest.mark.parametrize("case", [c for c in CASES if c.cls == "Aida"], ids=lambda case: case.name)
def test_aida_equals_pytorch_optimizer(case: Case, eps):
    """Theirs puts 1e-15 inside the root and eps outside it, which the author code does not.

    A step thus differs by the share eps/sqrt(v) + 5e-16/v of itself. With coupled decay the deviation of p enters the
    next g, below 1e-2 of it over these 20 steps, which the factor 1.01 covers.
    """
    optimizers = pytest.importorskip("pytorch_optimizer")
    grads = gradients(37)
    h = {**case.hyper, "eps": eps}
    q = torch.nn.Parameter(layer(37))
    options = {"k": int(h["k"]), "xi": h["xi"], "eps": eps, "weight_decay": h["weight_decay"]}
    q, state = theirs(optimizers.Aida([q], lr=h["lr"], weight_decouple=bool(h["decoupled"]), **options), q, grads)
    p, s, allowed = layer(37), zero_state("aida", layer(37)), 0.0
    for t, g in enumerate(grads, 1):
        before = p
        p, _ = reference.aida(p, g, s, SimpleNamespace(**h), t, True)
        v = s["exp_avg_var"]
        step = (p - before).abs() + h["lr"] * h["weight_decay"] * before.abs()
        allowed = allowed + step * (eps / v.sqrt() + 5e-16 / v)
    assert ((p - q).abs() <= 1.01 * allowed + 1e-13).all()
    exact = EXACT if h["decoupled"] or not h["weight_decay"] else {"rtol": 1e-4, "atol": 0.0}
    torch.testing.assert_close(s["exp_avg_var"], state["exp_avg_var"], **exact)


TRANSCRIBED = [case for case in CASES if hasattr(transcriptions, case.rule)]


@pytest.mark.parametrize("start", [1.0, 0.0], ids=["p", "p=0"])
@pytest.mark.parametrize("case", TRANSCRIBED, ids=lambda case: case.name)
def test_rules_equal_their_transcriptions(case: Case, start):
    """Leaves out what float64 hides (see the float32 test) and layers of other sizes (the rules do not see them).

    The gradient falls to a third half-way, which AdaNorm answers, and is zero at first and once more.
    """
    grads = [0 * layer(37), *gradients(37, 8), 0 * layer(37), *(g / 3 for g in gradients(37, 8, 5))]
    q, state = start * layer(37), zero_state(case.rule, layer(37))
    for t, g in enumerate(grads, 1):
        expected = getattr(transcriptions, case.rule)(q, g, state, SimpleNamespace(**case.hyper), t)
    p, s, report = ours(case, start * layer(37), grads)
    torch.testing.assert_close(p, q, **EXACT)
    torch.testing.assert_close(s, state, **EXACT)
    for name in REPORTS[case.rule]:
        torch.testing.assert_close(float(report[name]), float(expected[name]), **EXACT)


@pytest.mark.parametrize("case", [c for c in CASES if c.rule == "setadam"], ids=lambda case: case.name)
def test_setadam_angle_and_least_denominator(case: Case):
    _, s, report = ours(case, layer(37), gradients(37))
    v, h = s["exp_avg_sq"], SimpleNamespace(**case.hyper)
    cosine = torch.nn.functional.cosine_similarity(v, torch.ones_like(v), dim=0)
    w = (v * cosine**2 / (1 - h.beta2**20) + h.eps).sqrt()
    torch.testing.assert_close(report["cos"], cosine, **EXACT)
    torch.testing.assert_close(report["minimum"], w.min(), **EXACT)


# What is left without the layer-wise factor; eps = 0 where base and rule put eps in different places.
ROW = {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "lr": 0.01, "eps": 0.0}
PLAIN = [
    ("lamb", {**ROW, "eps": 1e-6}, "adam", {**ROW, "eps": 1e-6, "decoupled": 1.0}),
    ("lamb", {**ROW, "lower": 2.0, "upper": 3.0}, "adam", {**ROW, "decoupled": 1.0}),
    ("lars", {"lr": 0.1}, "sgd", {"lr": 0.1, "weight_decay": 1e-4}),
    ("lars", {"lr": 0.1, "nesterov": 1.0, "larc": 1.0}, "sgd", {"lr": 0.1, "weight_decay": 1e-4, "nesterov": 1.0}),
    ("lars", {"lr": 0.1, "lr_in_momentum": 1.0}, "sgd", {"lr": 0.1, "weight_decay": 1e-4}),
    ("aida", ROW, "adabelief", {**ROW, "decoupled": 0.0}),
    ("setadam", ROW, "adam", ROW),
    ("setadam", {**ROW, "decoupled": 1.0}, "adam", {**ROW, "decoupled": 1.0}),
    ("adanorm", ROW, "adam", ROW),
    ("adanorm", {**ROW, "belief": 1.0, "eps": 1e-8}, "adabelief", {**ROW, "eps": 1e-8, "decoupled": 0.0}),
]


@pytest.mark.parametrize("name, row, base, base_row", PLAIN, ids=[f"{p[0]}-{i}" for i, p in enumerate(PLAIN)])
def test_without_adaptation_the_base_rule_is_left(name, row, base, base_row):
    grads = gradients(37)
    p, _, report = run(getattr(reference, name), {**RULES[name], **row}, layer(37), grads, adapt=False)
    q, _, _ = run(getattr(reference, base), {**RULES[base], **base_row}, layer(37), grads)
    torch.testing.assert_close(p, q, **EXACT)
    assert set(report) == set(REPORTS[name])


@pytest.mark.parametrize("name", FIXED)
def test_rules_that_are_nothing_without_adaptation_refuse(name):
    with pytest.raises(ValueError, match=f"adapt must be True for {name}, got False"):
        run(getattr(reference, name), RULES[name], layer(3), gradients(3, 1), adapt=False)


EDGES = {
    "zero gradient": (layer(5), [torch.zeros(5).double()] * 3),
    "zero parameter": (torch.zeros(5).double(), gradients(5, 3)),
    "both": (torch.zeros(5).double(), [torch.zeros(5).double()] * 3),
    "gradient after zeros": (layer(5), [torch.zeros(5).double(), *gradients(5, 2)]),
    "one dead element": (layer(5), [g * torch.tensor([1, 1, 0, 1, 1]) for g in gradients(5, 3)]),
    "empty": (layer(0), [layer(0)] * 3),
    "one element": (layer(1), gradients(1, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("edge", EDGES)
@EVERY
def test_edges_stay_finite_and_nothing_is_overwritten(case: Case, edge, dtype):
    for adapt in (True, False) if case.rule in ADAPT else (True,):
        p0, grads = EDGES[edge][0].to(dtype), [g.to(dtype) for g in EDGES[edge][1]]
        p0, grads = p0.clone().requires_grad_(), [g.clone().requires_grad_() for g in grads]
        copies = [x.detach().clone() for x in (p0, *grads)]
        p, s, report = ours(case, p0, grads, adapt)
        derivatives = torch.autograd.grad(p.sum(), [p0, *grads], materialize_grads=True)
        values = [p, *s.values(), *derivatives, *map(torch.as_tensor, report.values())]
        assert all(x.isfinite().all() for x in values)
        assert all(torch.equal(x, y) for x, y in zip((p0, *grads), copies, strict=True))
        assert tuple(report) == REPORTS[case.rule] and all(torch.as_tensor(x).ndim == 0 for x in report.values())
        assert p.dtype == dtype and p.shape == p0.shape
        elementwise, scalars = STATES[case.rule]
        assert all(s[name].dtype == dtype and s[name].shape == p0.shape for name in elementwise)
        assert all(s[name].dtype == torch.float64 and s[name].ndim == 0 for name in scalars)


@EVERY
def test_derivatives(case: Case):
    """Through p, two gradients and lr; leaves out kinks (a bound just reached, a tie in the minimum) and g = 0."""

    def two_steps(p, g1, g2, lr):
        return ours(case, p, [g1, g2], lr=lr)[0]

    lr = torch.tensor(0.7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (layer(4, 11), layer(4, 12), layer(4, 13), lr)]
    assert torch.autograd.gradcheck(two_steps, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


# The bound every engine has to keep, kept here by float32 itself: leaves out sizes above 1,000.
@pytest.mark.parametrize("wild", [False, True], ids=["tame", "wild"])
@pytest.mark.parametrize("n", [1, 1000])
@EVERY
def test_float32_within_the_bound(case: Case, n, wild):
    p0, grads = layer(n, dtype=torch.float32), gradients(n, 50, dtype=torch.float32)
    if wild:  # each gradient at its own size between 1e-30 and 1e15, every fifth one 0
        grads = [g * 10.0 ** (k * 29 % 45 - 30) * (k % 5 > 0) for k, g in enumerate(grads)]
    p = ours(case, p0, grads)[0]
    q = ours(case, p0.double(), [g.double() for g in grads])[0]
    assert p.isfinite().all()
    assert (p - q).norm() <= 1e-5 * (q - p0).norm() + 4e-7 * p0.norm()


def test_novograd_takes_the_first_nonzero_norm():
    zero, g = torch.zeros(3).double(), layer(3)
    _, s, report = run(reference.novograd, RULES["novograd"], layer(3, 2), [zero, zero, g])
    torch.testing.assert_close(s["exp_avg_sq"], g @ g, **EXACT)
    torch.testing.assert_close(report["grad_norm"], g.norm(), **EXACT)


def test_global_norm():
    grads = [layer(5).float(), layer((2, 3), 1).bfloat16(), layer(0)]
    expected = sum((g.double() ** 2).sum() for g in grads) ** 0.5
    torch.testing.assert_close(reference.global_norm(grads), expected, **EXACT)
    assert reference.global_norm([]).item() == 0
    assert reference.global_norm([torch.tensor([float("nan")])]).isnan()


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_power(beta):
    for t in (0, 1, 2, 7, 1000, 123457):  # squaring makes at most 2*log2(t) roundings, each magnified up to t times
        assert reference.power(beta, t) == pytest.approx(beta**t, rel=2.3e-16 * max(t, 1), abs=0)


def test_an_average_at_rest_stays():
    q = layer(1000, dtype=torch.float32)
    v = q
    for _ in range(100):
        v = reference.ema(v, q, 0.9999)
    assert torch.equal(v, q)
