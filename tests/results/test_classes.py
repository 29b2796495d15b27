"""Scores by class: a label map of eight classes against as many binary runs, and what is ignored."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from vlsm.data.images import read_target
from vlsm.results.scores import calibration_counts, describe, score, summarise

WORDS = [f"organ {k}" for k in range(1, 9)]


@pytest.fixture
def eight(tmp_path):
    """A label map of eight classes an image, as MedSegBench has them, with a strip that is ignored."""
    root, rng = tmp_path / "eight", np.random.default_rng(0)
    for content in ("images", "masks"):
        (root / "test" / content).mkdir(parents=True)
        (root / "train" / content).mkdir(parents=True)
    for i in range(12):
        numbers = np.kron(rng.integers(0, 9, (4, 5)), np.ones((9, 10))).astype(np.uint8)
        numbers[:2] = 255
        folder = root / ("test" if i < 8 else "train")
        Image.fromarray(numbers).save(folder / f"masks/{i}.png")
        Image.fromarray(rng.integers(0, 255, (36, 50, 3)).astype(np.uint8)).save(folder / f"images/{i}.png")
    labels = {"background": 0, **{word: k for k, word in enumerate(WORDS, 1)}, "ignore": 255}
    (root / "dataset.json").write_text(json.dumps(dict(labels=labels)))
    return root


def predict(i, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(i)) < 0.3


def rows_of(records):
    rows = []
    for record in records:
        truth = torch.from_numpy(read_target(record.mask))
        prediction = predict(int(record.name[0]), truth.shape)
        rows.append(dict(score(prediction, truth), image=record.name, group=record.name))
        rows[-1]["class"] = record.class_word
    return rows


def test_figures_of_a_label_map_are_those_of_binary_runs(eight):
    records = datasets.records(str(eight), "test")
    summary = summarise(rows_of(records))
    classes = summary["classes"]
    assert list(classes["each"]) == WORDS
    for number, word in enumerate(WORDS, 1):
        binary = []
        for record in records:
            if record.class_word == word:
                numbers = np.asarray(Image.open(record.mask.file))
                prediction = predict(int(record.name[0]), numbers.shape) & torch.from_numpy(numbers != 255)
                truth = torch.from_numpy(numbers == number)
                binary.append(dict(score(prediction, truth), group=record.name))
        alone = summarise(binary)
        for metric in ("dsc", "iou", "hd95", "nsd"):
            for key in ("mean", "std", "ci95"):
                assert classes["each"][word][metric][key] == pytest.approx(alone[metric][key], abs=1e-6)
    for metric in ("dsc", "hd95", "nsd"):
        want = np.mean([classes["each"][word][metric]["mean"] for word in WORDS])
        assert classes["mean"][metric]["mean"] == pytest.approx(want)
    json.dumps(summary)
    text = describe(summary)
    assert all(word in text for word in WORDS) and "\nmean" in text and "NSD %" in text


def test_one_class_has_no_table():
    empty, some = torch.zeros(2, 4, 4, dtype=torch.bool)
    some[1] = True
    rows = [{**score(some, some), "class": "a"}, {**score(empty, empty), "class": "a"}]
    assert "classes" not in summarise(rows) and "class" not in describe(summarise(rows))
    rows[1]["class"] = None
    assert list(summarise(rows)["classes"]["each"]) == ["a", "no class"]


def test_ignored_pixels_count_in_no_score():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(20, 30, generator=generator)
    truth = (torch.rand(20, 30, generator=generator) < 0.4).to(torch.uint8)
    truth[:, 20:] = 255
    want = calibration_counts(probability[:, :20], truth[:, :20] > 0)
    assert calibration_counts(probability, truth) == want
    prediction = probability > 0.5
    got, clean = score(prediction, truth), score(prediction & (truth != 255), truth == 1)
    assert got == clean
    truth[truth == 1] = 0
    prediction[:, :20] = False
    row = score(prediction, truth)
    assert row["target_empty"] and row["pred_empty"] and row["dsc"] == 1


def test_false_alarms_of_healthy_controls():
    empty, some = torch.zeros(2, 4, 4, dtype=torch.bool)
    some[1] = True
    summary = summarise([score(some, empty), score(empty, empty), score(empty, empty), score(empty, empty)])
    assert "Empty masks: 4, foreground predicted in 25.0 % of them" in describe(summary)
