"""`python -m bench model`: what it prints and writes, and what it says to wrong input. The model: test_bench_model."""

import json

import pytest

from bench import gpus, rivals
from bench.__main__ import main
from bench.ours import Settings


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps([[2048], [0], [7], [300, 300], [38799]]))
    return str(path)


def run(capsys, *words):
    main(["model", *words])
    return capsys.readouterr().out


def test_a_run_with_json(small, tmp_path, capsys):
    out = tmp_path / "deep" / "out.json"
    printed = run(
        capsys, "--shapes", f"{small},tiny", "--optimizers", "LAMB,Aida", "--device", "a100", "--json", str(out)
    )
    found = json.loads(out.read_text())
    assert (
        found["bench"] == "model"
        and found["device"]["name"] == "a100"
        and found["constants"]["chunk"] == Settings().chunk
    )
    assert [row["shapes"] for row in found["rows"]] == ["small"] * 4 + ["tiny"] * 4
    assert [row["optimizer"] for row in found["rows"]][:4] == ["LAMB", "Aida", *rivals.RIVALS]
    for row in found["rows"]:
        assert 0 < row["percent_of_roofline"] < row["percent_of_copy"] < 100 and 0 <= row["l2_hits"] < 1
    assert "PREDICTED for a100" in printed and "predicted ms" in printed and "measured" not in printed


def test_a_rival_without_a_model_of_the_type_is_skipped(capsys):
    assert "skipped apex.optimizers.FusedLAMB: no model" in run(capsys, "--shapes", "tiny", "--dtype", "bf16")


def test_a_sweep_prints_the_best_first(small, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--optimizers", "LAMB", "--chunk", "1024,4096", "--blocks", "1,2", "--json", str(out)]
    printed = run(capsys, "--shapes", small, *words)
    points = json.loads(out.read_text())["points"]
    assert [(p["constants"]["chunk"], p["constants"]["blocks"]) for p in points] == [
        (1024, 1),
        (1024, 2),
        (4096, 1),
        (4096, 2),
    ]
    lines = [line.split() for line in printed.splitlines()[2:-1]]
    scores = sorted(points, key=lambda point: point["score"])
    assert [line[0] for line in lines] == [str(point["constants"]["chunk"]) for point in scores]
    assert lines[0][7] == "1.000"


def measured(tmp_path, gpu="NVIDIA H200"):
    row = {"shapes": "tiny", "dtype": "fp32", "device": "cuda", "ours": True, "engine": "cuda", "median_ms": 0.01}
    rows = [row | {"optimizer": "LAMB(max_grad_norm=None)"}, row | {"optimizer": "AdamW", "engine": "triton"}]
    rows += [row | {"optimizer": "torch.AdamW:fused", "ours": False}, row | {"optimizer": "other.Lamb", "ours": False}]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"bench": "step", "machine": {"gpu": gpu, "cuda": "12.8"}, "rows": rows}))
    return str(path)


def test_predictions_beside_measurements(tmp_path, capsys):
    out = tmp_path / "out.json"
    printed = run(capsys, "--measured", measured(tmp_path), "--json", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["LAMB(max_grad_norm=None)", "torch.AdamW:fused"]
    for row in rows:
        assert row["error_percent"] == pytest.approx(100 * (row["predicted_ms"] / 0.01 - 1))
        assert f"{row['error_percent']:+.1f}" in printed
    assert "skipped tiny, AdamW: the model is of the CUDA engine, this is triton" in printed
    assert "skipped tiny, other.Lamb: no model of it" in printed
    assert f"median error {(rows[0]['error_percent'] + rows[1]['error_percent']) / 2:+.1f} %" in printed
    assert "over 2 rows" in printed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--chunk", "4k"], "'4k' is not INTEGER"),
        (["--chunk", "0"], "--chunk, --blocks and --threads must be >= 1"),
        (["--device", "b300"], "invalid choice: 'b300'"),
        (["--shapes", "resnet51"], "unknown shapes 'resnet51': give one of"),
        (["--optimizers", "torch.SGD"], "no model of 'torch.SGD': it must be layerfused's own"),
        (["--optimizers", "clip+AdamW"], "without clip"),
        (["--optimizers", ""], "must name at least one"),
        (["--against", "other.Lamb"], "no model of 'other.Lamb' in --against: there is one of torch.AdamW:fused"),
        (["--set", "l2=5"], "l2=5 is not FIELD=NUMBER > 0 with a FIELD of processors"),
        (["--set", "l2_bytes=-1"], "l2_bytes=-1 is not FIELD=NUMBER > 0"),
        (["--cuda", "new"], "--cuda must be a version as 12.8 or 13"),
        (["--resident", "1000000000"], "is more than 32 blocks of --chunk hold"),
        (["--measured", "absent.json"], "absent.json"),
    ],
)
def test_complaints(words, complaint, capsys):
    with pytest.raises(SystemExit):
        main(["model", "--shapes", "tiny", *words])
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "complaint"), [(None, "has no measurements on a GPU: give what"), ("RTX 1", "no model of 'RTX 1'")]
)
def test_measurements_of_nothing_known(tmp_path, capsys, gpu, complaint):
    with pytest.raises(SystemExit):
        main(["model", "--measured", measured(tmp_path, gpu)])
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "key"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L4", "l4")]
)
def test_devices_by_their_drivers_names(name, key):
    assert gpus.recognised(name).name == key
