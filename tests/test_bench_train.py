"""`python -m bench train`: every study runs, chooses as it says, and sees the step sizes that a step really takes."""

import json
import math

import pytest
import torch

import layerfused as lf
from bench import claims, digits, studies, sweep, text, training, watch
from bench.__main__ import main
from bench.studies import STUDIES


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quick(name, folder, processes=1):
    """JSON of a quick run, and its picture."""
    found = folder / f"{name}{processes}.json", folder / f"{name}{processes}.png"
    words = ["--study", name, "--quick", "--processes", str(processes)]
    main(["train", *words, "--json", str(found[0]), "--plot", str(found[1])])
    return json.loads(found[0].read_text()), found[1].read_bytes()


@pytest.mark.parametrize("name", STUDIES)
def test_a_study(name, tmp_path, capsys):
    document, png = quick(name, tmp_path)
    study, printed = STUDIES[name], capsys.readouterr().out
    assert len(document["rows"]) == len(study.settings) * len(study.contenders)
    assert document["claims"] and all(found["claim"] in printed for found in document["claims"])
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB\x60\x82")
    for row in document["rows"]:
        assert row["optimizer"] in printed and row["lr"] in [point["lr"] for point in row["grid"]]
        assert max(row["grid"], key=lambda point: sweep.merit(point, row["criterion"]))["lr"] == row["lr"]
        assert [run["seed"] for run in row["runs"]] == [0]
        for run in row["runs"]:
            assert run["cpu_s"] > 0 and len(run["curve"]["loss"]) == len(run["curve"]["steps"]) > 0
            recorded = [values for layer in run["seen"].values() for values in layer.values()]
            assert all(len(values) == len(run["curve"]["steps"]) for values in recorded)
    assert any(row["runs"][0]["seen"] for row in document["rows"]) == (study.watch is not None)


@pytest.mark.all
def test_processes_change_no_number(tmp_path):
    first, second = (quick("lambc", tmp_path, processes)[0]["rows"] for processes in (1, 2))
    for a, b in zip(first, second, strict=True):
        for run in a["runs"] + b["runs"]:
            del run["cpu_s"]
        assert a["runs"] == b["runs"] and a["lr"] == b["lr"]


def test_equally_many_learning_rates():
    for study in STUDIES.values():
        assert len({len(set(c.rates)) for c in study.contenders if not c.by_closure}) == 1
        assert all(c.rates == (1.0,) for c in study.contenders if c.by_closure)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (lf.Adam, {}),
        (lf.AdaBelief, {}),
        (lf.Aida, {}),
        (lf.SETAdam, {"eps": 1e-6}),
        (lf.SETAdam, {"betas": (0.8, 0.9)}),
    ],
)
def test_step_sizes_are_those_of_the_step(kind, options):
    torch.manual_seed(0)
    params = [("matrix", torch.randn(5, 7)), ("vector", torch.randn(9)), ("one", torch.randn(1))]
    opt = kind(params, lr=0.01, **options)
    for step in range(1, 4):
        for _, p in params:
            p.grad = torch.randn_like(p)
        before = [p.double() for _, p in params]
        opt.step()
        sizes = watch.step_sizes(opt)
        for (name, p), old in zip(params, before, strict=True):
            ic1 = 1 / (1 - opt.param_groups[0]["betas"][0] ** step)
            taken = 0.01 * ic1 * opt.state[p]["exp_avg"].double() * sizes[name].double()
            torch.testing.assert_close(old - p, taken, rtol=1e-5, atol=1e-6)  # atol: p's rounding, 2^-24 of 1 to 4


def test_ranges_are_of_matrices():
    model = digits.network()
    opt = lf.Adam(model.named_parameters())
    training.train(model, opt, training.batches(digits.load().train, 64, 2))
    found = watch.ranges(opt)
    assert list(found) == [name for name, p in model.named_parameters() if p.ndim > 1]
    sizes = watch.step_sizes(opt)["linear.weight"]
    seen = found["linear.weight"]
    assert sizes.min() <= seen["q01"] <= seen["median"] <= seen["q99"] <= sizes.max()
    assert seen["mean"] == pytest.approx(sizes.double().mean().item(), rel=1e-5)
    assert seen["std"] == pytest.approx(sizes.double().std(correction=0).item(), rel=1e-5)


def test_the_text_is_split_by_file_and_predicts_what_follows():
    task = text.modelling(share=64)
    files = [task.facts[split]["files"] for split in ("train", "validation", "test")]
    assert all(files) and len(set().union(*files)) == sum(map(len, files))
    for split in task.data:
        assert split.x.shape == split.y.shape and split.x.shape[1] == text.WINDOW
        assert (split.x.flatten()[1:] == split.y.flatten()[:-1]).all() and split.x.min() >= 0
    assert task.network(0)(task.data.test.x[:2]).shape == (2, text.WINDOW, task.facts["symbols"])


def test_bytes_unknown_to_the_training_text_are_one_symbol():
    found = text.windows(b"ab\xff\x00" * 16 + b"d", sorted(b"abd"))
    assert found.x[0, :4].tolist() == [1, 2, 0, 0] and found.y[-1, -3:].tolist() == [0, 0, 3]


def test_all_digits_are_trained_on():
    task = digits.classification(everything=True)
    assert len(task.data.train.y) == len(task.sample.y) == 1797 and task.data.test is None


def run(loss, accuracy=0.5, diverged_at=None):
    results = dict.fromkeys(sweep.RESULTS, loss) | {"validation_accuracy": accuracy, "test_accuracy": accuracy}
    return results | {"seed": 0, "diverged_at": diverged_at, "curve": {"steps": [], "loss": []}, "seen": {}}


def test_the_choice():
    good, lower, diverged = [run(0.3), run(0.1)], [run(0.1), run(0.1)], [run(0.01, 0.9), run(0.01, 0.9, diverged_at=3)]
    points = [sweep.point(lr, runs) for lr, runs in ((1, good), (2, lower), (3, diverged))]
    assert points[0]["mean"]["train_loss"] == pytest.approx(0.2) and points[2]["mean"]["train_loss"] is None
    assert points[0]["std"]["train_loss"] == pytest.approx(math.sqrt(0.02))
    row = sweep.row(studies.DIGITS, studies.Contender("Adam", (1, 2, 3)), points, "accuracy")
    assert row["lr"] == 2 and not row["at_edge"] and len(row["grid"]) == 3
    points.append(sweep.point(4, [run(0.5, 0.6)] * 2))
    for criterion, lr in (("accuracy", 4), ("loss", 2), ("training", 2)):
        row = sweep.row(studies.DIGITS, studies.Contender("Adam", (1, 2, 3, 4)), points, criterion)
        assert row["lr"] == lr and row["at_edge"] == (lr == 4)


def test_claims_of_tuned_rows_with_a_divergence():
    ours, other = ({"optimizer": name, **sweep.point(1, [run(0.1)] * 2)} for name in ("CurvatureSGD", "SGD"))
    assert [found["holds"] for found in claims.tuned("digits", ours, other)] == [True, True]
    ours |= sweep.point(1, [run(0.1, diverged_at=2)] * 2)
    assert [found["holds"] for found in claims.tuned("digits", ours, other)] == [False]
    rows = [row | {"criterion": "loss"} for row in (ours, other)]
    assert [found["holds"] for found in claims.better("digits", *rows)] == [False]


def test_claims_of_what_is_stored():
    def row(name, *losses):
        return {"optimizer": name, **sweep.point(1, [run(loss) for loss in losses])}

    plain, master = row("AdamW", 0.5, 0.6), row("AdamW(precision='master')", 0.1, 0.2)
    ours = row("AdamW(precision='kahan')", 0.101, 0.197), row("AdamW(precision='kahan')", 0.1, 0.7)
    for rival, holds in ((plain, (True, False)), (master, (True, False))):
        assert tuple(claims.as_float32("digits", one, rival)[0]["holds"] for one in ours) == holds
    ours = {"optimizer": "X", **sweep.point(1, [run(0.1, diverged_at=2)] * 2)}
    assert not any(claims.as_float32("digits", ours, rival)[0]["holds"] for rival in (plain, master))


def test_rivals_are_contenders():
    for study in STUDIES.values():
        labels = [c.label for c in study.contenders]
        assert len(set(labels)) == len(labels)
        assert {rival for c in study.contenders for rival in c.rivals} <= set(labels)


def test_no_processes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--study", "aida", "--processes", "0"])
    assert "--processes must be >= 1, got 0" in capsys.readouterr().err
