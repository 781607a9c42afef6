"""The bench: names parsed, shapes true, turns balanced, and one small run whose JSON holds every field."""

import json
import math

import pytest
import torch

from bench import report, shapes, spec, step, timing
from bench.__main__ import main
from bench.contender import Contender, parameters

FIELDS = {
    *("shapes", "batch", "optimizer", "ours", "engine", "device", "threads", "tensors", "elements", "dtype", "rounds"),
    *("median_ms", "p10_ms", "p90_ms", "compulsory_bytes", "requested_bytes", "gb_per_s", "percent_of_copy"),
    *("native_calls", "host_us", "needed_bytes", "workspace_bytes", "ratios", "first_step_s"),
    *("launches", "memcpys", "memsets", "allocated_bytes", "peak_bytes"),
}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps([["conv.weight", [8, 4, 3, 3]], [30, 20], ["bias", [7]]]))
    return path


def test_split_leaves_commas_in_brackets_and_quotes():
    text = "LAMB, LAMB(betas=(0.9, 0.99),eps=1e-6),A(x='),('),torch.AdamW:fused,"
    assert spec.split(text) == ["LAMB", "LAMB(betas=(0.9, 0.99),eps=1e-6)", "A(x='),(')", "torch.AdamW:fused"]
    assert spec.split("") == []


@pytest.mark.parametrize(
    ("text", "package", "name", "options", "clip"),
    [
        ("LAMB", "layerfused", "LAMB", {}, False),
        ("LAMB(max_grad_norm=None)", "layerfused", "LAMB", {"max_grad_norm": None}, False),
        (
            "LAMB(betas=(0.9, 0.99), layer='slices')",
            "layerfused",
            "LAMB",
            {"betas": (0.9, 0.99), "layer": "slices"},
            False,
        ),
        ("torch.AdamW:fused", "torch.optim", "AdamW", {"fused": True}, False),
        ("torch.SGD:fused(momentum=0.9)", "torch.optim", "SGD", {"fused": True, "momentum": 0.9}, False),
        ("pytorch_optimizer.Lamb", "pytorch_optimizer", "Lamb", {}, False),
        ("apex.optimizers.FusedLAMB()", "apex.optimizers", "FusedLAMB", {}, False),
        ("clip+torch.AdamW:fused", "torch.optim", "AdamW", {"fused": True}, True),
    ],
)
def test_parse(text, package, name, options, clip):
    found = spec.parse(text)
    assert (found.package, found.name, found.options, found.clip) == (package, name, options, clip)
    assert found.text == text


@pytest.mark.parametrize(
    "text", ["", "2x", "LAMB(", "LAMB(0.1)", "LAMB(**{})", "LAMB(lr=open('x'))", "LAMB(lr=)", "a+LAMB"]
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="optimizer"):
        spec.parse(text)


@pytest.mark.parametrize("text", ["groups+LAMB", "xgrad+groups+AdamW", "clip+groups+torch.AdamW:fused"])
def test_a_group_for_each_tensor(text):
    params = parameters([(5, 3), (), (2,)], torch.float32, "cpu")
    contender = Contender.build(spec.parse(text), params)
    before = [group["lr"] for group in contender.opt.param_groups]
    contender.step()
    after = [group["lr"] for group in contender.opt.param_groups]
    assert len(before) == 3 and after == before and not any(a is b for a, b in zip(after, before, strict=True))


def test_unknown_class_is_an_error():
    with pytest.raises(ValueError, match=r"torch.optim has no optimizer 'Nadamax'"):
        spec.build(spec.parse("torch.Nadamax"), [torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("resnet50", 161, 25_557_032),
        ("bert-base", 199, 109_482_240),
        ("bert-large", 391, 335_141_888),
        ("gpt2", 148, 124_439_808),
        ("many-small", 1200, 400 * (256 + 256 + 256 * 256)),
        ("tiny", 300, 300 * 16),
        ("many-groups", 465, 465 * 16),
        ("llama-8b-slice", 36, 4 * 218_112_000),
    ],
)
def test_counts(name, tensors, elements):
    found = shapes.load(name)
    assert (len(found), shapes.elements(found)) == (tensors, elements)
    assert len({parameter for parameter, _ in found}) == tensors, "names are not unique"


def test_shapes_from_a_file(small):
    assert shapes.load(str(small)) == [("conv.weight", (8, 4, 3, 3)), ("tensor.1", (30, 20)), ("bias", (7,))]


@pytest.mark.parametrize("name", ["resnet51", "resnet50.txt"])
def test_unknown_shapes(name):
    with pytest.raises(ValueError, match="unknown shapes"):
        shapes.load(name)


def test_a_size_below_zero_in_a_file(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("[[3, -1]]")
    with pytest.raises(ValueError, match=r"shape of tensor.0 .* got \[3, -1\]"):
        shapes.load(str(path))


@pytest.mark.parametrize("n", range(1, 9))
def test_turns_are_balanced(n):
    rows = timing.turns(n)
    assert all(sorted(row) == list(range(n)) for row in rows)
    for place in range(n):
        stands = [row[place] for row in rows]
        assert all(stands.count(i) == len(rows) // n for i in range(n))
    follows = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    assert all(follows.count((i, j)) == len(rows) // n for i in range(n) for j in range(n) if i != j)


def test_interleave_takes_turns():
    seen = []
    samples = timing.interleave([lambda i=i: seen.append(i) for i in range(3)], repeats=6, seconds=0)
    assert [len(s) for s in samples] == [6, 6, 6]
    assert [seen[i : i + 3] for i in range(0, 18, 3)] == timing.turns(3)


def test_interleave_goes_on_until_the_time_is_used():
    (samples,) = timing.interleave([lambda: None], repeats=1, seconds=0.02)
    assert len(samples) > 1


def test_summary_in_milliseconds():
    found = timing.summary([i / 1000 for i in range(11)])
    assert found["rounds"] == 11
    assert (found["median_ms"], found["p10_ms"], found["p90_ms"]) == pytest.approx((5, 1, 9))


def test_batches_hold_all_competitors():
    assert step.batches(["a", "b", "c"], ["x", "y"], room=9) == [["a", "b", "c"]]
    assert step.batches(["a", "b", "c"], ["x", "y"], room=4) == [["a", "b"], ["c"]]
    with pytest.raises(MemoryError, match="2 optimizers, 3 are needed"):
        step.batches(["a"], ["x", "y"], room=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torch.AdamW:fused", 7),
        ("torch.Adam", 7),
        ("clip+torch.AdamW:fused", 8),
        ("torch.SGD(momentum=0.9)", 5),
        ("torch.SGD", 3),
        ("torch.AdamW(amsgrad=True)", None),
        ("torch.RMSprop", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_bytes_of_torch(text, words, dtype):
    params = parameters([(5, 3), ()], dtype, "cpu")
    found = Contender.build(spec.parse(text), params).traffic()
    assert found["compulsory_bytes"] == (words and words * 16 * dtype.itemsize)
    assert found["requested_bytes"] is None and found["native_calls"] > 0


def test_gradients_have_norm_one():
    params = parameters([(100, 30), (50,)], torch.float32, "cpu")
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in params))
    assert norm == pytest.approx(1, rel=0.1)  # 3,050 normal numbers: the standard deviation is 1.3 %


def test_needed_memory_counts_shared_storage_once():
    params = parameters([(10,), (20,)], torch.float32, "cpu")
    assert Contender.build(spec.parse("torch.SGD(momentum=0.9)"), params).memory()["needed_bytes"] == 3 * 30 * 4


def run(small, *words):
    out = small.with_name("out.json")
    main(["step", "--shapes", str(small), "--repeats", "3", "--seconds", "0", "--json", str(out), *words])
    return json.loads(out.read_text())


def test_a_run_with_torch_on_both_sides(small, capsys):
    plot = small.with_name("out.png")
    ours, against = "torch.AdamW:fused,torch.SGD(lr=0.1, momentum=0.9)", "torch.AdamW:foreach,absent_package.Lamb"
    found = run(small, "--optimizers", ours, "--against", against, "--threads", "1", "--plot", str(plot))
    assert [row["optimizer"] for row in found["rows"]] == [*spec.split(ours), "torch.AdamW:foreach"]
    for row in found["rows"]:
        assert set(row) == FIELDS
        assert (row["tensors"], row["elements"], row["rounds"], row["threads"]) == (3, 895, 3, 1)
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["host_us"] > 0 < row["first_step_s"]
        assert list(row["ratios"]) == ["torch.AdamW:foreach"]
        assert row["gb_per_s"] == pytest.approx(row["compulsory_bytes"] / row["median_ms"] / 1e6)
    assert found["copies"][0]["bytes"] == 2 * 2**28 and found["copies"][0]["others_cpus"] >= 0
    assert found["skipped"] == [{"optimizer": "absent_package.Lamb", "reason": found["skipped"][0]["reason"]}]
    assert {"date", "command", "machine", "versions", "threads", "methods", "not_measured"} <= set(found)
    assert found["machine"]["cpu"] and found["versions"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "torch.SGD(lr=0.1, momentum=0.9)" in printed.out
    assert "skipped absent_package.Lamb: ModuleNotFoundError" in printed.out + printed.err


def test_a_run_with_ours(small, capsys):
    found = run(small, "--optimizers", "LAMB(max_grad_norm=None)", "--against", "clip+torch.AdamW:fused")
    ours, rival = found["rows"]
    assert ours["ours"] and not rival["ours"] and ours["engine"] == "cpu"
    assert ours["native_calls"] == 1
    assert ours["compulsory_bytes"] == 7 * 4 * ours["elements"] <= ours["requested_bytes"]
    assert (
        ours["workspace_bytes"] > 0 and rival["workspace_bytes"] is None
    )  # how much is allowed is not the bench's matter
    main(["report", "--markdown", str(small.with_name("out.json"))])
    table = capsys.readouterr().out.split("| shapes |")[-1]
    assert "| small | LAMB(max_grad_norm=None) |" in table and "× clip+torch.AdamW:fused" in table


def test_ours_must_be_there(small):
    with pytest.raises(ImportError, match="absent_package"):
        run(small, "--optimizers", "absent_package.LAMB", "--against", "")


@pytest.mark.parametrize(("others", "warning"), [(None, ""), (0.05, ""), (1.24, "kept 1.2 CPUs busy")])
def test_a_noisy_run_says_so(others, warning):
    found = report.noise({"others_cpus": others})
    assert warning in found and bool(found) == bool(warning)


def test_numbers():
    assert [report.number(x) for x in (None, 4, 1629, 9.874, 13.0, 1629.4, 0.0945)] == [
        *("–", "4", "1,629", "9.87", "13.0", "1,629", "0.0945")
    ]
    assert [report.ratio(x) for x in (None, 1.104, 0.1, 0.00123)] == ["–", "1.10", "0.10", "0.0012"]
