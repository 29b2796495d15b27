"""HD95 and NSD in millimetres, against their definitions pixel by pixel, and the unit of an evaluation."""

import json
import math

import numpy as np
import pytest
import torch

from vlsm import metrics
from vlsm.data.records import Record
from vlsm.results.evaluation import pixel_spacings
from vlsm.results.scores import describe, describe_classes, score, summarise

SPACINGS = [(0.7, 0.7), (0.5, 3.0), (2.5, 0.3)]  # row, column
TOLERANCES = (0, 0.3, 2.0, 4.5)
SPACED = [("a.png", (0.5, 0.5)), ("b.png", None)]


def boundary_points(mask):
    """Return the pixels [y, x] with one of four neighbours outside the mask."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


def contour(mask, row, column):
    """Return {corner (y, x): length of the contour there}, from the halves of the edges that it joins."""
    padded = np.pad(mask, 1)
    lengths = {}
    for y in range(padded.shape[0] - 1):
        for x in range(padded.shape[1] - 1):
            (a, b), (c, d) = padded[y : y + 2, x : x + 2]
            vertical = int(a != b) + int(c != d)  # edges above and below the corner
            horizontal = int(a != c) + int(b != d)
            if vertical == 2 and horizontal == 2:
                lengths[y, x] = math.hypot(row, column)
            elif vertical and horizontal:
                lengths[y, x] = math.hypot(row, column) / 2
            elif vertical or horizontal:
                lengths[y, x] = row if vertical else column
    return lengths


def nearest(points, others, spacing):
    """Return the distance of each point to the nearest other one, of all pairs in float64."""
    difference = (np.array(points)[:, None] - np.array(others)[None]) * np.array(spacing)
    return np.sqrt((difference**2).sum(2)).min(1)


def restated_hd95(a, b, spacing):
    a, b = boundary_points(a), boundary_points(b)
    return max(np.percentile(nearest(a, b, spacing), 95), np.percentile(nearest(b, a, spacing), 95))


def restated_nsd(a, b, tolerance, spacing):
    a, b = contour(a, *spacing), contour(b, *spacing)
    near = 0
    for ours, theirs in ((a, b), (b, a)):
        distances = nearest(list(ours), list(theirs), spacing)
        near += sum(np.array(list(ours.values()))[distances <= tolerance + 1e-9])
    return near / (sum(a.values()) + sum(b.values()))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_millimetres_by_definition(spacing):
    rng = np.random.default_rng(7)
    shapes = [(1, 1), (1, 9), (13, 1), *rng.integers(2, 18, (6, 2))]
    for shape in shapes:
        pred, target = rng.random((2, 3, *shape)) < rng.random((2, 1, 1, 1))
        pred[:, 0, 0] = target[:, -1, -1] = True
        target[0] = False
        target[0, 0, -1] = True  # a single pixel
        pairs = torch.from_numpy(pred), torch.from_numpy(target)
        want = [restated_hd95(a, b, spacing) for a, b in zip(pred, target)]
        assert metrics.hd95(*pairs, spacing).tolist() == pytest.approx(want, abs=1e-9)
        for tolerance in TOLERANCES:
            want = [restated_nsd(a, b, tolerance, spacing) for a, b in zip(pred, target)]
            assert metrics.nsd(*pairs, tolerance, spacing).tolist() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("spacing", [(0.1, 0.1), (0.01, 0.02)])
def test_millimetres_of_empty_and_full_masks(spacing):
    full, empty = torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=torch.bool)
    pred, target = torch.stack([full, empty, full, empty]), torch.stack([full, empty, empty, full])
    assert metrics.nsd(pred, target, 2.0, spacing).tolist() == [1, 1, 0, 0]
    distances = metrics.hd95(pred, target, spacing).tolist()
    assert distances[:2] == [0, 0] and all(map(math.isnan, distances[2:]))


def test_a_distance_of_just_the_tolerance_counts():
    for pixels, row in ((3, 0.1), (7, 0.1), (10, 0.2), (5, 0.7)):
        a, b = torch.zeros(2, 1, 24, 4, dtype=torch.bool)
        a[0, 1], b[0, 1 + pixels] = True, True
        for column in (row, 4.0):
            assert metrics.nsd(a, b, pixels * row, (row, column)).item() == 1
            assert metrics.nsd(a, b, 0.99 * pixels * row, (row, column)).item() < 1


def test_spacings_that_are_none():
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    for spacing in ((0, 1), (1.0, -1), (1, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match="spacing of pixels"):
            metrics.hd95(mask, mask, spacing)
        with pytest.raises(ValueError, match="spacing of pixels"):
            metrics.nsd(mask, mask, spacing=spacing)


# Of an evaluation


def test_distances_of_one_unit(capsys):
    known, unknown = (Record(name, name, None, None, spacing=spacing) for name, spacing in SPACED)
    assert pixel_spacings([known, known]) == [(0.5, 0.5)] * 2 and pixel_spacings([unknown]) == [None]
    assert pixel_spacings([known, unknown], [2.0, 1.0]) == [[2.0, 1.0]] * 2
    assert pixel_spacings([known, unknown, known]) == [None] * 3
    assert "1 of 3 records have no spacing" in capsys.readouterr().err


def test_scores_say_their_unit():
    pred, target = torch.zeros(2, 6, 8, dtype=torch.bool)
    pred[1, 1], target[1, 4] = True, True
    for spacing, unit, distance, diagonal in ((None, "px", 3, 10), ((1.0, 0.5), "mm", 1.5, math.hypot(6, 4))):
        row = score(pred, target, 1.5, spacing)
        assert (row["hd95"], row["diagonal"], row["unit"]) == (distance, diagonal, unit)
        assert row["nsd"] == (unit == "mm")
        rows = [{**row, "class": word} for word in "ab"]
        summary = summarise(rows)
        assert summary["unit"] == unit and "HD95 " + unit in "\n".join(
            describe_classes(summary["classes"], unit)
        )
        assert f"{unit} at original size" in describe(summary) and f"% at 2 {unit}" in describe(summary)


def test_evaluate_in_millimetres(cli, trained, tmp_path):
    found = {}
    for name, options in (("px", []), ("mm", ["--spacing", 0.5, 0.5, "--nsd-tolerance", 1])):
        code, printed, err = cli("evaluate", "--ckpt", trained, "--out", tmp_path / name, *options)
        assert code == 0 and f"{name} at original size" in printed, err
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        assert found[name]["unit"] == name
    assert found["mm"]["hd95"]["mean"] == pytest.approx(found["px"]["hd95"]["mean"] / 2)
    assert found["mm"]["nsd"]["mean"] == pytest.approx(found["px"]["nsd"]["mean"])
    code, _, err = cli("evaluate", "--ckpt", trained, "--spacing", 0, 1)
    assert code == 2 and "--spacing" in err and "more than 0" in err
