"""A threshold with a guarantee."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlsm.data.cache import CachedSplit
from vlsm.data.records import Record
from vlsm.tools import risk


def test_the_risk_is_controlled():
    """Over many draws of records for fitting, the mean risk on new ones stays below the level."""
    rng = np.random.default_rng(0)

    def missed(n):  # a record's share of missed foreground grows with the threshold, more or less steeply
        steep = rng.uniform(0.2, 4, (n, 1))
        return risk.THRESHOLDS[None] ** steep

    new, level = missed(4000), 0.2
    risks = [
        new[:, np.searchsorted(risk.THRESHOLDS, risk.fit_threshold(missed(30), level))].mean()
        for _ in range(200)
    ]
    assert 0.1 < np.mean(risks) <= level
    with pytest.raises(ValueError, match="5 records with foreground allow no level below 0.1"):
        risk.fit_threshold(np.zeros((5, 999)), 0.1)
    with pytest.raises(ValueError, match="0 records with foreground"):
        risk.fit_threshold(np.zeros((0, 999)), 0.1)


def test_the_effect_of_a_threshold():
    """The left half is predicted at 0.9, the upper half is true; nothing can be missed in an empty mask."""
    truths = np.zeros((2, 4, 4), np.uint8)
    truths[0, :2] = 1
    images = np.zeros((2, 3, 4, 4), np.uint8)
    records = [Record(str(k), str(k), None, truth == 1, {"p1": "x"}) for k, truth in enumerate(truths)]
    data = CachedSplit(records, images, truths, range(2))
    logits = torch.full((2, 1, 4, 4), -9.0)
    logits[..., :2] = torch.logit(torch.tensor(0.9))
    predictor = SimpleNamespace(device=torch.device("cpu"), logits=lambda images, prompts: logits)
    for threshold, missed, dsc in ((0.6, 0.5, 0.25), (0.95, 1, 0.5)):
        found = risk.effect(predictor, data, ["x", "x"], threshold)
        assert found["missed"] == dict(mean=missed, std=0, n=1, ci95=[missed, missed])
        assert found["dsc"]["mean"] == dsc and found["dsc_at_half"]["mean"] == 0.25


def test_a_fitted_threshold(cli, trained):
    code, said, err = cli("vlsm.tools.risk", trained, "fn", 0.6)
    assert code == 0 and cli("evaluate", "--ckpt", trained)[0] == 0, err
    fitted = json.loads((trained / "eval-test" / "risk.json").read_text())
    scores = json.loads((trained / "eval-test" / "metrics.json").read_text())
    assert fitted["fitted_on"] == 6 and 0 < fitted["threshold"] < 1 and "Threshold" in said
    assert fitted["test"]["dsc_at_half"]["mean"] == pytest.approx(scores["dsc"]["mean"])


@pytest.mark.parametrize(
    "argv, named",
    [
        (["fp", "0.1"], "fp"),
        (["fn", "x"], "'x'"),
        (["fn", "1"], "1 is out of range"),
        (["fn", "0"], "0 is out of range"),
        (["fn", "0.1", "--split", "val"], "--split"),
    ],
)
def test_mistakes_are_sentences(argv, named, cli):
    code, _, err = cli("vlsm.tools.risk", "run", *argv)
    assert code == 2 and named in err
