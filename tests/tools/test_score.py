"""Two folders of masks; that the saved masks of a run give its figures is proved in test_train.py."""

import json

import numpy as np
import pytest

from tests.conftest import rows, write_pair


@pytest.fixture
def masks(tmp_path):
    """Predictions and truths of three masks: equal, half, empty."""
    square = np.zeros((20, 30), bool)
    square[5:15, 5:15] = True
    half = square.copy()
    half[:, 10:] = False
    for name, predicted in (("p1_a", square), ("p1_b", half), ("p2_a", np.zeros_like(square))):
        write_pair(tmp_path / "pred", name, np.zeros((20, 30, 3), np.uint8), predicted)
        write_pair(tmp_path / "target", name, np.zeros((20, 30, 3), np.uint8), square)
    return tmp_path / "pred" / "masks", tmp_path / "target" / "masks"


def test_scores(cli, masks, tmp_path):
    code, said, err = cli("vlsm.tools.score", *masks, "--out", tmp_path / "out", "--group", "^[^_]*")
    assert code == 0 and "DSC     55.56" in said, err
    table = rows(tmp_path / "out" / "metrics.csv")
    assert [r["group"] for r in table] == ["p1", "p1", "p2"]
    assert [float(r["dsc"]) for r in table] == pytest.approx([1, 2 / 3, 0], abs=1e-6)
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert summary["nsd_tolerance"] == 2 and summary["hd95"]["n_undefined"] == 1
    assert summary["intervals"]["groups"] == 2
    assert summary["intervals"]["resampled"] == "what '^[^_]*' finds in a mask's name"


def test_what_lies_beside_masks_is_left_out(cli, masks):
    pred, target = masks
    (pred / "dataset.json").write_text("{}")
    (pred / "p1_a.overlay.png").write_bytes((pred / "p1_a.png").read_bytes())
    code, said, err = cli("vlsm.tools.score", pred, target)
    assert code == 0 and "DSC     55.56" in said, err
    (target / "p1_a.overlay.png").write_bytes((target / "p1_a.png").read_bytes())
    code, said, err = cli("vlsm.tools.score", pred, target)
    assert code == 0 and "4/4" in said or "3/4" in said, "a true mask of that name has its partner"


def test_mistakes(cli, masks, tmp_path):
    pred, target = masks
    for argv, named in (
        ([pred, tmp_path / "none"], "no folder"),
        ([pred, target, "--group", "("], "no regular expression"),
        ([pred, target, "--nsd-tolerance", "nan"], "--nsd-tolerance"),
        ([pred], "TARGET"),
    ):
        code, _, err = cli("vlsm.tools.score", *argv)
        assert code == 2 and named in err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("mine")
    code, _, err = cli("vlsm.tools.score", *masks, "--out", tmp_path / "out")
    assert code == 2 and "metrics.csv" in err and (tmp_path / "out" / "metrics.csv").read_text() == "mine"
    (target / "p2_a.png").unlink()
    code, _, err = cli("vlsm.tools.score", *masks)
    assert code == 2 and "p2_a" in err
    write_pair(tmp_path / "target", "p2_a", np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), bool))
    code, _, err = cli("vlsm.tools.score", *masks)
    assert code == 2 and "(20, 30) and (9, 9)" in err
