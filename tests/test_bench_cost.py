"""The bench of what curvature costs: that it runs, and that its numbers fit together. Leaves out how much it is."""

import json

import pytest

pytest.importorskip("sklearn", reason="no scikit-learn: the digits are its")

from bench.__main__ import main  # noqa: E402


def test_every_product_of_every_optimizer(tmp_path, capsys):
    file = tmp_path / "cost.json"
    main(["cost", "--repeats", "2", "--seconds", "0", "--json", str(file)])
    printed, rows = capsys.readouterr().out, json.loads(file.read_text())["rows"]
    assert {row["model"] for row in rows} == {"mlp", "conv"}
    for row in rows:
        assert len(row["steps"]) == 4 and row["rounds"] >= 2
        for step in row["steps"]:
            assert step["extra"] == pytest.approx(step["step_ms"] / row["forward_backward_ms"] - 1)
            assert f"{step['step_ms']:.2f}" in printed and step["product"] in printed
