"""What `datasets.py --import` writes of any format: the form of the masks, names, splits, prompts, spacing."""

import json

import numpy as np
import pytest
from PIL import Image

import datasets
from tests.raw.test_import_coco import save
from vlsm.data.images import read_image, read_mask
from vlsm.raw.download import LabelledImage
from vlsm.raw.formats import importing
from vlsm.system import files

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 15, 3), dtype=np.uint8)


def square(row, column, side=5):
    mask = np.zeros(PIXELS.shape[:2], bool)
    mask[row : row + side, column : column + side] = True
    return mask


@pytest.fixture
def bring(tmp_path, monkeypatch):
    """Import given images as a format of that content, and return the folder."""
    (tmp_path / "src").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "src/photo.jpg")

    def run(images, templates=False, overwrite=False):
        files._inputs.clear()  # as a process of its own
        monkeypatch.setitem(importing.FORMATS, "test", lambda download: iter(images))
        importing.import_dataset("test", tmp_path / "src", tmp_path / "out", templates, overwrite)
        return tmp_path / "out"

    return run


def records(folder):
    return [r for rows in datasets.read_splits(str(folder)).values() for r in rows]


def images(n=6, **masks):
    return [LabelledImage(f"{k}.png", PIXELS, masks) for k in range(n)]


def test_classes_apart_become_label_maps(bring, capsys):
    healthy = LabelledImage("sub/healthy.tif", PIXELS[..., 0], {"tool": square(0, 0, 0)})
    photo = LabelledImage("photo.png", "photo.jpg", {"polyp": square(1, 2)})
    out = bring([*images(polyp=square(0, 0), tool=square(6, 8)), healthy, photo])
    assert json.loads((out / "dataset.json").read_text()) == {
        "labels": {"background": 0, "polyp": 1, "tool": 2}
    }
    assert (out / "images/photo.jpg").read_bytes() == (out.parent / "src/photo.jpg").read_bytes()
    rows = records(out)
    assert len(rows) == 6 * 2 + 2
    for record in rows:
        mask = read_mask(record.mask)
        if record.name == "sub/healthy.png":
            assert not mask.any() and (read_image(record.image)[..., 1] == PIXELS[..., 0]).all()
        else:
            want = (
                square(1, 2)
                if "photo" in record.name
                else dict(polyp=square(0, 0), tool=square(6, 8))[record.class_word]
            )
            assert (mask == want).all()
    text = capsys.readouterr().out
    assert "8 images" in text and "polyp: in 7 images" in text and "no class: 1 images" in text
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    bring([*images(polyp=square(0, 0), tool=square(6, 8)), healthy, photo])
    assert "0 written, 17 unchanged" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}


def test_classes_that_overlap_become_folders(bring):
    one = LabelledImage("p1/a.png", PIXELS, {"liver": square(0, 0, 9), "tumour": square(3, 3)})
    healthy = LabelledImage("p2/b.png", PIXELS, {})
    out = bring([one, healthy, *images(liver=square(1, 1))])
    assert not (out / "dataset.json").exists()
    rows = records(out)
    assert len(rows) == 2 + 1 + 6
    found = {record.class_word: read_mask(record.mask) for record in rows if record.name == "p1/a.png"}
    assert (found["liver"] == square(0, 0, 9)).all() and (found["tumour"] == square(3, 3)).all()
    [empty] = [record for record in rows if record.name == "p2/b.png"]
    assert not read_mask(empty.mask).any()


def test_ignored_pixels_stay_ignored_in_label_maps_alone(bring):
    out = bring(images(liver=square(0, 0), ignore=square(6, 6)))
    data = datasets.open_dataset(str(out), ["train"], 12)["train"]
    assert set(np.unique(data.masks)) == {0, 1, 255}
    with pytest.raises(ValueError, match="Pixels to ignore are kept in label maps alone"):
        bring(images(liver=square(0, 0, 9), tumour=square(1, 1), ignore=square(6, 6)), overwrite=True)


def test_prompts_by_templates_and_the_sources_split(bring):
    rows = [
        LabelledImage(f"{part}/{k}.png", PIXELS, {"polyp": square(k, k)})
        for part, n in (("train", 4), ("val", 2), ("test", 1))
        for k in range(n)
    ]
    out = bring(rows, templates=True)
    splits = datasets.read_splits(str(out))
    assert {split: len(found) for split, found in splits.items()} == dict(train=4, val=2, test=1)
    prompts = splits["train"][0].prompts
    assert list(prompts) == [f"p{k}" for k in range(7)] and prompts["p1"] == "polyp"
    assert prompts["p6"].startswith("one ") and "located in top left of the image" in prompts["p6"]
    assert all(read_mask(record.mask).sum() == 25 for record in splits["val"])


def test_spacing_reaches_the_records(bring):
    rows = [
        LabelledImage(f"case{k}/00.png", PIXELS, {"liver": square(0, k)}, (0.5, 0.25 + k)) for k in range(5)
    ]
    out = bring(rows)
    assert {record.name: record.spacing for record in records(out)} == {
        f"case{k}/00.png": (0.5, 0.25 + k) for k in range(5)
    }


@pytest.mark.parametrize(
    "image, reason",
    [
        (LabelledImage("0.jpg", PIXELS, {"polyp": square(0, 0)}), "another image has this name"),
        (LabelledImage("../x.png", PIXELS, {"polyp": square(0, 0)}), "leaves"),
        (LabelledImage("x.png", PIXELS[:5], {"polyp": square(0, 0)}), "differ in size"),
        (LabelledImage("x.png", "missing.png", {"polyp": square(0, 0)}), "missing.png"),
    ],
)
def test_a_bad_image_costs_itself_alone(bring, image, reason, capsys):
    out = bring([*images(polyp=square(0, 0)), image])
    assert len(records(out)) == 6
    text = capsys.readouterr().out
    assert reason in text and image.name in text
    assert sorted(p.name for p in (out / "images").glob("[!.]*")) == [f"{k}.png" for k in range(6)]


def test_what_is_refused(bring, cli, tmp_path):
    with pytest.raises(ValueError, match="found no image with a class"):
        bring([LabelledImage("x.png", PIXELS, {})])
    assert not (tmp_path / "out").exists()
    out = bring(images(polyp=square(0, 0)))
    Image.fromarray(np.zeros((12, 15), np.uint8)).save(out / "masks/0.png")
    with pytest.raises(FileExistsError, match="masks/0.png' exists, and was not written by this program"):
        bring(images(polyp=square(0, 0)))
    bring(images(polyp=square(0, 0)), overwrite=True)
    for options, said in (
        (
            ("--import", "cocoo", "x", "--out", "y"),
            "'cocoo' is not known. Did you mean 'coco'? Choose one of: coco,",
        ),
        (("--import", "coco", tmp_path / "src"), "--import needs the folder to write: --out DIR"),
        (("--import", "coco", tmp_path / "src", "--out", tmp_path / "src/x"), "is inside the download"),
        (("--import", "coco", "x", "--out", "y", "--axis", 1), "--axis has no effect on --import coco"),
        (("--check", "x", "--axis", 1), "--axis has an effect only with --import"),
        (
            ("--import", "masks-from-colours", tmp_path, "--out", "y", "--classes", "a=1"),
            "no class with its colour",
        ),
    ):
        code, _, err = cli("datasets", *options)
        assert code == 2 and said in err, err


def test_a_folder_of_colours_from_the_command_line(cli, tmp_path):
    for k in range(6):
        pixels = np.zeros((12, 15, 3), np.uint8)
        pixels[square(0, k)] = 255, 0, 0
        pixels[square(7, k)] = 0, 255, 0
        save(tmp_path / f"src/images/{k}.png", PIXELS)
        save(tmp_path / f"src/masks/{k}.png", pixels)
    options = ("--import", "masks-from-colours", tmp_path / "src", "--out", tmp_path / "mine")
    code, out, err = cli("datasets", *options, "--classes", "polyp=255,0,0;tool=0,255,0")
    assert code == 0, err
    assert "tool: in 6 images" in out and f"--check {tmp_path / 'mine'}" in out
    code, out, _ = cli("datasets", "--check", tmp_path / "mine", "--out", tmp_path / "check.png")
    assert code == 0 and "classes: polyp (4), tool (4)" in out


def test_a_second_import_leaves_nothing_of_the_first(bring, capsys):
    bring(images(8, tool=square(0, 0)))
    out = bring(images(6, polyp=square(0, 0), tool=square(6, 8)))
    rows = records(out)
    assert {record.name for record in rows} == {f"{k}.png" for k in range(6)} and len(rows) == 12
    assert all((read_mask(r.mask) == square(6, 8)).all() for r in rows if r.class_word == "tool")
    bring(images(6, polyp=square(0, 0, 9), tool=square(1, 1)))  # they overlap
    assert not (out / "dataset.json").exists() and len(records(out)) == 12
    bring(images(6, polyp=square(0, 0)), templates=True)
    bring(images(6, tool=square(0, 0)))
    assert {record.class_word for record in records(out)} == {"tool"} and not list(out.glob("anns/*"))
    (out / "images/mine.png").write_bytes((out / "images/0.png").read_bytes())
    with pytest.raises(ValueError, match="holds files of another origin, such as .*mine.png"):
        bring(images(6, tool=square(0, 0)), overwrite=True)
    assert (out / "images/mine.png").exists()


def test_the_slices_of_few_volumes_stay_in_one_split(bring):
    rows = [
        LabelledImage(f"case{k}/{n}.png", PIXELS, {"liver": square(n, k)}, (1, 1))
        for k in range(4)
        for n in range(5)
    ]
    splits = datasets.read_splits(str(bring(rows)))
    assert sorted(len({r.group for r in found}) for found in splits.values()) == [1, 1, 2]
