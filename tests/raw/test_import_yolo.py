"""Importing Ultralytics' segmentation labels: layouts, classes, lines that cannot be used."""

import numpy as np
import pytest
from PIL import Image

from vlsm.raw.download import Download
from vlsm.raw.formats.yolo import read

SIZE = (37, 53)
BOX = "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n"


def write(root, image, text=None, size=SIZE, **save):
    """Write an image, and its labels where the format has them."""
    file = root / image
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1]).save(file, **save)
    if text is not None:
        labels = root / image.replace("images/", "labels/").rsplit(".", 1)[0]
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.with_name(labels.name + ".txt").write_text(text)


def load(root):
    download = Download(root)
    return {image.name: image for image in read(download)}, download.skipped


def reasons(skipped):
    return {name: reason for reason, names in skipped.items() for name in names}


@pytest.mark.parametrize("layout", ["images/train/p1/{}", "train/images/p1/{}", "images/train2017/p1/{}"])
@pytest.mark.parametrize("above", ["", "export/"])
def test_layouts_and_splits(tmp_path, layout, above):
    write(tmp_path, above + layout.format("a.png"), BOX)
    write(tmp_path, above + layout.format("b.jpg"), "")
    write(tmp_path, above + layout.format("c.jpg"))
    write(tmp_path, above + layout.replace("train", "test").format("d.jpg"))
    (tmp_path / above / "data.yaml").write_text("path: /elsewhere\nnames: [polyp]\n")
    (tmp_path / above / "results.png").write_bytes((tmp_path / above / layout.format("a.png")).read_bytes())
    images, skipped = load(tmp_path)
    folder = f"train/{above}p1"
    assert sorted(images) == [f"{folder}/a.png", f"{folder}/b.jpg", f"{folder}/c.jpg"]
    assert images[f"{folder}/a.png"].image == above + layout.format("a.png")
    assert images[f"{folder}/b.jpg"].masks == {} == images[f"{folder}/c.jpg"].masks
    test = above + layout.replace("train", "test").format("d.jpg")
    assert reasons(skipped) == {test: "image without annotation: its split has no labels"}


def test_contours_come_back(tmp_path):
    # Vertices at pixels, printed in six decimals, as converters of masks write them.
    y, x = np.mgrid[:37, :53]
    corners = [(5, 3), (41, 3), (41, 29), (5, 29)]
    first = " ".join(f"{i / 53:.6f} {j / 37:.6f}" for i, j in corners)
    second = " ".join(f"{i / 53:.6f} {j / 37:.6f}" for i, j in [(45, 31), (51, 31), (51, 35), (45, 35)])
    write(tmp_path, "images/a.png", f"1 {first}\n\n1 {second}\n0 {first}\n")
    (tmp_path / "data.yaml").write_text("names:\n  0: left lung\n  1: no\n")
    [image] = load(tmp_path)[0].values()
    large = (x >= 5) & (x <= 41) & (y >= 3) & (y <= 29)
    small = (x >= 45) & (x <= 51) & (y >= 31) & (y <= 35)
    assert list(image.masks) == ["no", "left lung"]
    assert (image.masks["no"] == large | small).all() and (image.masks["left lung"] == large).all()


@pytest.mark.parametrize(
    "names", ["names: ['a b', c]", "names:\n- a b\n- c", "names:\n  1: c\n  0: a b\nnc: 2"]
)
def test_three_forms_of_names(tmp_path, names):
    write(tmp_path, "images/a.png", BOX + BOX.replace("0 ", "1 ", 1))
    (tmp_path / "data.yaml").write_text(names)
    [image] = load(tmp_path)[0].values()
    assert list(image.masks) == ["a b", "c"]


def test_without_names_classes_are_numbered(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlsm.system.console._printed", set())
    write(tmp_path, "images/a.png", BOX.replace("0 ", "3 ", 1))
    [image] = load(tmp_path)[0].values()
    assert list(image.masks) == ["class3"] and "no data.yaml" in capsys.readouterr().err


def test_an_image_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, "images/a.jpg", "0 0 0 1 0 1 0.5 0 0.5", exif=exif)
    (tmp_path / "data.yaml").write_text("names: [polyp]")
    [image] = load(tmp_path)[0].values()
    y, _ = np.mgrid[: SIZE[1], : SIZE[0]]
    assert (image.masks["polyp"] == (y <= 26)).all()


def test_a_bad_line_costs_itself_alone(tmp_path):
    bad = {
        "0 0.5 0.5 0.2 0.2": "a box, not a polygon",
        "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1": "no pairs of fractions",
        "0 0.1 0.1 nan 0.1 0.5 0.5": "no pairs of fractions",
        "0 0.1 0.1 0.5 inf 0.5 0.5": "no pairs of fractions",
        "2 0.1 0.1 0.5 0.1 0.5 0.5": "data.yaml names no class 2",
        "1 0.1 0.1 0.5 0.1 0.5 0.5": "'a/b' cannot name a folder",
        "0 0.1 0.1": "'polygon' of 1 points is no polygon",
        "0 10 10 0 60 70 0": "no pairs of fractions",
        "polyp 0.1 0.1 0.5 0.1 0.5 0.5": "polyp",
    }
    outside = "0 0 0 1.4 0 0 1.4"
    write(tmp_path, "images/a.png", "\n".join([*bad, outside]))
    write(tmp_path, "images/b.png", next(iter(bad)))
    (tmp_path / "labels/gone.txt").write_text(BOX)
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "data.yaml").write_text("names: [polyp, a/b]")
    images, skipped = load(tmp_path)
    assert list(images) == ["a.png"], "an image of boxes alone is no healthy image"
    mask = images["a.png"].masks["polyp"]
    assert mask[3, :3].all() and mask[0, -1] and not mask[-1, -1], "a corner is clipped to the image's"
    told = reasons(skipped)
    for number, reason in enumerate(bad.values(), 1):
        assert reason in told[f"labels/a.txt, line {number}, left out of its image's mask"]
    assert told["labels/b.txt"] == "none of its objects is usable"
    assert told["labels/gone.txt"] == "labels without image"
    assert "unusable" in told["images/broken.png"]


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("names: [a, b", "'data.yaml' is not valid YAML"),
        ("[" * 2000, "'data.yaml' is not valid YAML"),
        ("names: polyp", "'names' should be a list of classes"),
        ("names: {polyp: 0}", "'names' should be a list of classes"),
        ("names: [a]\nkpt_shape: [17, 3]", "keypoints"),
    ],
)
def test_a_wrong_data_yaml_is_refused(tmp_path, yaml, message):
    write(tmp_path, "images/a.png", BOX)
    (tmp_path / "data.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_yaml_executes_nothing(tmp_path):
    write(tmp_path, "images/a.png", BOX)
    (tmp_path / "data.yaml").write_text(f"names: [!!python/object/apply:os.mkdir ['{tmp_path}/made']]")
    images, skipped = load(tmp_path)
    assert not images and "cannot name a folder" in str(reasons(skipped)) and not (tmp_path / "made").exists()


def test_sources_of_another_layout(tmp_path):
    write(tmp_path, "images/a.png", BOX)
    (tmp_path / "data.yaml").write_text("names: [a]")
    (tmp_path / "copy.yaml").write_text("names: [b]")
    with pytest.raises(ValueError, match="copy.yaml, data.yaml all name classes"):
        load(tmp_path)
