"""Runs on the same records."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import without_dim
from vlsm.tools.compare import run_names, signed_rank


def test_signed_ranks_are_the_normal_approximation():
    rng = np.random.default_rng(0)
    for n, p, differing in (
        (12, 0.9645238640375574, 11),
        (60, 0.06885550116225884, 59),
        (300, 0.0003563879774951835, 289),
    ):
        a = rng.uniform(size=n).round(2)
        b = (a + rng.normal(0.02, 0.1, size=n)).round(2)
        assert signed_rank(a - b) == (pytest.approx(p, rel=1e-9), differing)


def test_signed_ranks_by_hand():
    assert signed_rank(np.zeros(3)) == (1.0, 0)
    p, n = signed_rank(np.arange(20) + 1.0)  # all on one side
    assert n == 20 and p == pytest.approx(8.857e-5, rel=1e-3)
    assert signed_rank(np.array([-2, 2, -2, 2]))[0] == 1.0


def test_names_are_distinct(tmp_path):
    assert run_names(["runs/a-seed4.2", "x/b.safetensors"]) == ["a-seed4.2", "b"]
    assert run_names(["dense/seed1", "coop/seed1", "coop/seed1"]) == [
        "1: dense/seed1",
        "2: coop/seed1",
        "3: coop/seed1",
    ]


def test_comparison_on_the_same_records(cli, quick, trained, tmp_path):
    options = without_dim(quick)[:-1]
    assert cli("train", *options, tmp_path / "tuned", "--peft", "decoder", "--epochs", 1)[0] == 0
    assert cli("train", *options, tmp_path / "word", "--peft", "none", "--prompts", "class")[0] == 0
    assert cli("evaluate", "--ckpt", tmp_path / "word")[0] == 0
    out = tmp_path / "sheet.png"
    code, said, err = cli("vlsm.tools.compare", trained, tmp_path / "tuned", "--figure", 3, "--out", out)
    assert code == 0, err
    assert "run - tuned: " in said and " points, p = " in said and "over 6 records" in said
    assert Image.open(out).width == 1840, "four images of 2.2 inches, at 200 dots an inch"
    drawing = tmp_path / "sheet.svg"
    assert cli("vlsm.tools.compare", trained, tmp_path / "tuned", "--figure", 3, "--out", drawing)[0] == 0
    assert drawing.read_text().count(" %, HD95 ") == 6, "at each of two runs' predictions, in three rows"
    code, said, err = cli("vlsm.tools.compare", trained, trained, "--out", out)
    assert code == 0 and ": +0.00 [+0.00, +0.00] points, p = 1 " in said, err
    code, said, err = cli("vlsm.tools.compare", tmp_path / "tuned", tmp_path / "word", "--out", out)
    mean = json.loads((tmp_path / "word" / "eval-test" / "metrics.json").read_text())["dsc"]["mean"]
    assert code == 0 and "prompts: random" in said and "prompts: class" in said, err
    assert f"{100 * mean:.2f} [" in said.split("word ")[1]
    out.write_bytes(b"mine")
    code, _, err = cli("vlsm.tools.compare", trained, trained, "--out", out)
    assert code == 2 and "sheet.png" in err and out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "argv, named",
    [(["a"], "run"), (["a", "b", "--out", "x.jpg"], "--out"), (["a", "b", "--figure", "0"], "--figure")],
)
def test_mistakes_are_sentences(argv, named, cli):
    code, _, err = cli("vlsm.tools.compare", *argv)
    assert code == 2 and named in err
