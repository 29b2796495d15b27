"""Importing labelme's files: shapes, and entries that cannot be used."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlsm.raw.download import Download
from vlsm.raw.formats.labelme import read
from vlsm.raw.formats.shapes import draw

SIZE = (37, 53)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shape(label, points, shape_type="polygon", **more):
    return dict(label=label, points=points, shape_type=shape_type, group_id=None, flags={}, **more)


def write(root, name, shapes, image="{}.png", write_image=True, **more):
    stem = name.rsplit("/", 1)[-1]
    path = image.format(stem)
    file = root / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = dict(version="5.5.0", shapes=shapes, imagePath=path, imageData=None)
    content |= dict(imageHeight=SIZE[0], imageWidth=SIZE[1]) | more
    file.write_text(json.dumps(content))
    if write_image:
        target = file.parent / path.replace("\\", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png(np.zeros((*SIZE, 3), np.uint8)))


def load(root):
    download = Download(root)
    return {image.name: image for image in read(download)}, download.skipped


def reasons(skipped):
    return {name: reason for reason, names in skipped.items() for name in names}


def test_a_pixel_belongs_to_a_shape_by_its_definition():
    y, x = np.mgrid[:37, :53]
    box = draw("rectangle", [[40.6, 30.2], [22.1, 5.5]], SIZE)
    assert (box == ((x >= 22) & (x <= 40) & (y >= 5) & (y <= 30))).all()
    # A circle's pixels, but for those that its rim crosses.
    distance = np.hypot(x - 26, y - 18)
    circle = draw("circle", [[26, 18], [36, 18]], SIZE)
    assert circle[distance < 9.5].all() and not circle[distance > 10.8].any()
    triangle = draw("polygon", [[0, 0], [20, 0], [0, 20]], SIZE)
    assert (triangle == (x + y <= 20)).all()
    clipped = draw("polygon", [[-300, -300], [400, -300], [400, 17], [-300, 17]], SIZE)
    assert (clipped == (y <= 17)).all()


def test_shapes_of_a_class_are_united_and_subfolders_kept(tmp_path):
    first = [[2, 2], [12, 2], [12, 12], [2, 12]]
    write(
        tmp_path,
        "patient3/0001",
        [
            shape(" polyp ", first),
            shape("polyp", [[20, 20], [30, 30]], "rectangle"),
            shape("tool", [[40, 10], [44, 10]], "circle"),
        ],
    )
    write(tmp_path, "patient4/0001", [])
    (tmp_path / "patient4/0002.png").write_bytes(png(np.zeros(SIZE, np.uint8)))
    images, skipped = load(tmp_path)
    assert sorted(images) == ["patient3/0001.png", "patient4/0001.png"]
    assert images["patient3/0001.png"].image == "patient3/0001.png"
    masks = images["patient3/0001.png"].masks
    assert list(masks) == ["polyp", "tool"]
    assert masks["polyp"].dtype == bool and masks["polyp"].shape == SIZE
    assert masks["polyp"].sum() == 2 * 11 * 11 and masks["polyp"][25, 25] and masks["polyp"][7, 7]
    assert images["patient4/0001.png"].masks == {}
    assert reasons(skipped) == {"patient4/0002.png": "image without annotation"}


@pytest.mark.parametrize("path", ["..\\images\\b.png", "../images/b.png"])
def test_images_elsewhere_below_the_source(tmp_path, path):
    write(tmp_path, "annotations/b", [shape("polyp", [[1, 1], [9, 9]], "rectangle")], path)
    images, _ = load(tmp_path)
    assert [(name, image.image) for name, image in images.items()] == [("b.png", "images/b.png")]


def test_images_out_of_the_source_are_missing(tmp_path):
    (tmp_path / "b.png").write_bytes(png(np.zeros(SIZE, np.uint8)))
    write(tmp_path / "source", "a", [shape("polyp", [[1, 1], [9, 9]], "rectangle")], "../b.png", False)
    images, skipped = load(tmp_path / "source")
    assert not images and "its image '../b.png' is missing" in reasons(skipped)["a.json"]


def test_a_bad_shape_costs_itself_alone(tmp_path):
    good = shape("polyp", [[1, 1], [9, 9]], "rectangle")
    bad = [
        (shape("polyp", [[1, 1], [9, 9]], "linestrip"), "'linestrip' of 2 points is no polygon"),
        (shape("polyp", [[1, 1], [9, 9]]), "'polygon' of 2 points is no polygon"),
        (shape("polyp", [[1, 1], [9, 9]], "mask", mask="iVBO"), "'mask' of 2 points is no polygon"),
        (shape("polyp", [[1, 1], [9, 9], [9, 1]], "circle"), "'circle' of 3 points is no polygon"),
        (shape("polyp", [[1, 1], [9, 9], [5, float("nan")]]), "NaN"),
        (shape("polyp", [[1, 1], [9, 9], [5, 1e300]]), "far outside"),
        (shape("polyp", [[100, 1], [120, 9]], "rectangle"), "no pixel of it"),
        (shape("../x", [[1, 1], [9, 9]], "rectangle"), "'../x' cannot name a folder"),
        (shape("..", [[1, 1], [9, 9]], "rectangle"), "'..' cannot name a folder"),
        (shape("a\\b", [[1, 1], [9, 9]], "rectangle"), "cannot name a folder"),
        (shape(" ", [[1, 1], [9, 9]], "rectangle"), "' ' cannot name a folder"),
        (shape(7, [[1, 1], [9, 9]], "rectangle"), "7 cannot name a folder"),
        (shape("_background_", [[1, 1], [9, 9]], "rectangle"), "'_background_' is no class"),
        (shape("polyp", [[0, 0, 0], [1, 1, 1], [2, 2, 2]]), "no pairs of numbers"),
        ({"label": "polyp"}, "points"),
        ("polyp", ""),
    ]
    write(tmp_path, "a", [good, *(item for item, _ in bad)])
    write(tmp_path, "b", [bad[0][0]])
    images, skipped = load(tmp_path)
    assert list(images) == ["a.png"], "an image of bad shapes alone is no healthy image"
    assert images["a.png"].masks["polyp"].sum() == 81 and list(images["a.png"].masks) == ["polyp"]
    told = reasons(skipped)
    for index, (_, reason) in enumerate(bad, 1):
        assert reason in told[f"a.json, shape {index}, left out of its image's mask"]
    assert told["b.json"] == "none of its objects is usable"


@pytest.mark.parametrize("size", [(0, 5), (None, 5), ("37", 5), (10**9, 10**9)])
def test_sizes_that_are_none(tmp_path, size):
    write(tmp_path, "a", [], imageHeight=size[0], imageWidth=size[1])
    images, skipped = load(tmp_path)
    assert not images and "is no size of an image" in reasons(skipped)["a.json"]
