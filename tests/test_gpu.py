"""The command for the first hour on a GPU, tried on the CPU."""

import json

import pytest

from tests import gpu


def test_goals_are_judged(tmp_path):
    rows = [
        dict(row="step dense vl, batch 32", ratios=dict(reference=2.6, compile=1.1), peak_GiB_ours=5.0,
             peak_GiB_reference=10.0),
        dict(row="dice_bce forward+backward", ratios=dict(eager=3.0)),
    ]  # fmt: skip
    (tmp_path / "bench-step-dense.json").write_text(json.dumps(dict(rows=rows)))
    lines = gpu.goals(tmp_path)
    assert [line.split("|")[-2].strip() for line in lines] == ["reached", "missed", "reached"]
    assert gpu.goals(tmp_path / "none") == []


def test_a_failing_part_is_survived(tmp_path, monkeypatch):
    made = [("a", 5, ["false"]), ("b", 1, ["sleep", "9"]), ("c", 5, ["true"])]
    monkeypatch.setattr(gpu, "parts", lambda args: made)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "r")]) == 2
    text = (tmp_path / "r" / "README.md").read_text()
    assert "FAILED (1)" in text and "FAILED (longer than 1 s)" in text and "| [c](c.txt) | passed |" in text
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "s"), "--limit", "0"]) == 3


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path):
    few = ["--parts", "train-compile-off,distances,bench-dice_bce,profile"]
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "r"), *few]) == 0
    assert (tmp_path / "r" / "dense-step-auto.json").stat().st_size > 10_000
