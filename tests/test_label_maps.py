"""A folder of label maps as a user runs it: training, evaluation, masks of each class, label maps out."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import rows


@pytest.fixture
def scans(tmp_path):
    """Twenty images with a red disk (1), a blue square (2, absent from every third) and a border to ignore."""
    root, rng = tmp_path / "scans", np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            y, x = np.mgrid[:40, :60]
            image = rng.integers(0, 60, (40, 60, 3)).astype(np.uint8)
            labels = np.zeros((40, 60), np.uint8)
            labels[np.hypot(y - 12 - i % 5, x - 15) < 8] = 1
            if i % 3:
                labels[20:34, 35:52] = 2
            image[labels == 1], image[labels == 2] = (220, 40, 40), (40, 40, 220)
            labels[:, -3:] = 255
            Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(root / split / "masks" / f"{i}.png")
    labels = {"background": 0, "disk": 1, "square": 2, "ignore": 255}
    (root / "dataset.json").write_text(
        json.dumps({"labels": labels, "prompts": {"disk": ["disk", "red disk"]}})
    )
    return root


def test_from_label_maps_to_label_maps(cli, scans, tmp_path):
    run = tmp_path / "run"
    small = ["--weights", "mini", "--image-size", 48, "--batch-size", 8, "--dim", 16]
    code, said, err = cli("train", "--dataset", scans, *small, "--epochs", 12, "--lr", 3e-3, "--out", run)
    assert code == 0, err
    assert f"{12 + 8} train, {4 + 2} val, {4 + 2} test records" in said, "a record for each class in an image"
    options = ["--save-masks", tmp_path / "masks", "--prompts", "class"]
    code, table_text, err = cli("evaluate", "--ckpt", run, *options)
    assert code == 0, err
    classes = json.loads((run / "eval-test" / "metrics.json").read_text())["classes"]
    assert set(classes["each"]) == {"disk", "square"} and classes["each"]["disk"]["dsc"]["n"] == 4
    table = rows(run / "eval-test" / "metrics.csv")
    assert sorted({row["prompt"] for row in table}) == ["disk", "square"] and len(table) == 6
    for row in table:
        predicted = np.asarray(Image.open(tmp_path / "masks" / row["mask"])) > 0
        labels = np.asarray(Image.open(scans / "test" / "masks" / row["mask"].split("/")[1]))
        truth = labels == {"disk": 1, "square": 2}[row["prompt"]]
        predicted &= labels != 255  # ignored pixels count in no score
        dsc = 2 * (predicted & truth).sum() / max((predicted.sum() + truth.sum()), 1)
        assert float(row["dsc"]) == pytest.approx(dsc, abs=1e-5)
    maps = ["--prompt", "disk", "--prompt", "square", "--label-map", "--save-masks", tmp_path / "maps"]
    code, _, err = cli("evaluate", "--ckpt", run, "--images", scans / "test" / "images", *maps)
    assert code == 0, err
    names = json.loads((tmp_path / "maps" / "dataset.json").read_text())["labels"]
    assert names == {"background": 0, "disk": 1, "square": 2}
    counts = np.zeros((3, 3))
    for i in range(4):
        truth = np.asarray(Image.open(scans / "test" / "masks" / f"{i}.png"))
        predicted = np.asarray(Image.open(tmp_path / "maps" / f"{i}.png"))
        for true in range(3):
            for number in range(3):
                counts[true, number] += ((truth == true) & (predicted == number)).sum()
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    label_maps = json.loads((run / "eval-test" / "metrics.json").read_text())["label_maps"]
    assert label_maps["iou"] == pytest.approx(dict(background=iou[0], disk=iou[1], square=iou[2]))
    assert (
        label_maps["miou"] == pytest.approx(iou.mean()) and f"mIoU    {100 * iou.mean():.2f} %" in table_text
    )
    assert counts.sum() == 4 * 40 * 57, "the strip to ignore counts in no class"


def test_a_wrong_dataset_json_is_a_sentence(cli, scans, tmp_path):
    for labels, word in (({"background": 0, "disk": 1}, "2"), ({"disk": 1}, "background")):
        (scans / "dataset.json").write_text(json.dumps({"labels": labels}))
        code, _, err = cli("train", "--dataset", scans, "--weights", "mini", "--out", tmp_path / "x")
        assert code == 2 and "dataset.json" in err and word in err and "Traceback" not in err


def test_a_text_for_several_classes_and_a_run_without_bad_records(cli, scans, tmp_path):
    for split in ("train", "test"):
        next((scans / split / "masks").glob("*.png")).unlink()
    small = ["--weights", "mini", "--image-size", 48, "--batch-size", 8, "--dim", 8, "--epochs", 1]
    ask = ("train", "--dataset", scans, *small, "--prompts", "a thing", "--out", tmp_path / "run")
    code, _, err = cli(*ask)
    assert code == 2 and "image without mask" in err and "--skip-bad" in err
    code, said, err = cli(*ask, "--skip-bad")
    assert code == 0 and "'a thing' is one text for 2 classes" in err and "dropped 1 of" in said, err
    code, said, err = cli("evaluate", "--ckpt", tmp_path / "run")
    assert code == 0 and "dropped 1 of" in said, err
