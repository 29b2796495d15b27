"""A threshold with a guarantee."""

import json

import numpy as np
import pytest

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
