"""The import of COCO's files: masks equal to pycocotools' own, splits, names, entries that cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from vlsm.data.images import NeedsPackage
from vlsm.raw.download import Download
from vlsm.raw.formats import coco, importing

SIZE = (37, 53)


def save(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8) if pixels is None else pixels).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def blob(seed):
    """A ragged mask that touches the border."""
    rng = np.random.default_rng(seed)
    small = rng.random((6, 8)) < 0.4
    return np.kron(small, np.ones((7, 7)))[: SIZE[0], : SIZE[1]] > 0


def runs_of(mask):
    """Uncompressed run lengths, down the columns, the first of background."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def image(number, name, size=SIZE):
    return dict(id=number, file_name=name, height=size[0], width=size[1])


def labels(number, category, segmentation, **more):
    return dict(
        id=1, image_id=number, category_id=category, segmentation=segmentation, bbox=[1, 1, 5, 5], **more
    )


def content(images, annotations, words=("polyp", " tool ")):
    categories = [dict(id=n, name=word) for n, word in enumerate(words, 1)]
    return dict(images=images, annotations=annotations, categories=categories)


def read(folder):
    """({name: image}, the skipped entries as text) of an import."""
    download = Download(folder)
    images = {}
    for image in coco.read(download):
        images.setdefault(image.name, image)
    return images, "\n".join(
        f"{name}: {reason}" for reason, names in download.skipped.items() for name in names
    )


TRIANGLE = [3, 4, 30.5, 6, 11, 29.25]
SQUARE = [40.0, 20.0, 52.0, 20.0, 52.0, 36.0, 40.0, 36.0]


def test_masks_are_those_of_pycocotools(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")
    packed = mask.encode(np.asfortranarray(blob(1).astype(np.uint8)))
    packed["counts"] = packed["counts"].decode()
    save(tmp_path / "images/a.png")
    save(tmp_path / "images/healthy.png")
    annotations = [
        labels("7", 1, [TRIANGLE, SQUARE]),
        labels(7, 2, packed),
        labels(7, "2", dict(size=list(SIZE), counts=runs_of(blob(2))), iscrowd=1),
    ]
    images = [image(7, "a.png"), image(8, "healthy.png")]
    write(tmp_path / "coco.json", content(images, annotations))
    write(tmp_path / "other.json", {"names": []})
    images, skipped = read(tmp_path)
    expected = mask.decode(mask.merge(mask.frPyObjects([TRIANGLE, SQUARE], *SIZE))) > 0
    assert images["a.png"].image == "images/a.png" and images["a.png"].masks.keys() == {"polyp", "tool"}
    assert expected.any() and (images["a.png"].masks["polyp"] == expected).all()
    assert (images["a.png"].masks["tool"] == blob(1) | blob(2)).all()
    assert images["healthy.png"].masks == {} and not skipped


def test_entries_that_cannot_be_used_cost_themselves_alone(tmp_path):
    pytest.importorskip("pycocotools")
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / name)
    crooked = {
        "three points": [[1, 2, 3, 4]],
        "odd number": [[1, 2, 3, 4, 5, 6, 7]],
        "far outside": [[1, 2, 3, 4, 5, float("nan")]],
        "far outside of": [[1, 2, 3, 4, 5, 1e9]],
        "of size [53, 37]": dict(size=[53, 37], counts=runs_of(blob(1))),
        "do not fill (53, 37)": dict(size=list(SIZE), counts=[5, 6]),
        "do not fill 53 x 37": dict(size=list(SIZE), counts="5"),
        "box without": [],
        "no pixel": [[60, 40, 70, 40, 70, 50]],
        "convert": "text",
        "unusable (counts)": dict(size=list(SIZE)),
    }
    annotations = [labels(1, 1, [SQUARE]), *(labels(1, 2, shape) for shape in crooked.values())]
    annotations += [
        labels(1, 99, [SQUARE]), labels(1, 3, [SQUARE]), labels(77, 1, [SQUARE]), 5, {}, labels(2, 1, []),
        dict(image_id=1, category_id=1),
    ]  # fmt: skip
    images = [
        image(1, "a.png"), image(2, "b.png"), image(3, "missing.png"), image(4, "sub/c.png"), image(4, "d.png"),
        image(5, "a.png"), image(6, "c.png", (0, 5)), dict(id=9), "x", image(10, "c.png", (2.5, 4)),
        image(11, "../d.jpg"),
    ]  # fmt: skip
    write(tmp_path / "bad.json", content(images, annotations, ("polyp", "tool", "a/b")))
    write(tmp_path / "captions.json", dict(images=[], annotations=[dict(image_id=1, caption="x")]))
    write(tmp_path / "cut.json", '{"images": [')
    images, skipped = read(tmp_path)
    assert images.keys() == {"a.png", "sub/c.png"} and images["sub/c.png"].masks == {}
    assert images["a.png"].masks.keys() == {"polyp"} and images["a.png"].masks["polyp"].sum() == 192
    for number, reason in enumerate(crooked, 1):
        assert any(
            f"annotations[{number}]" in line and reason in line.replace("'", "")
            for line in skipped.split("\n")
        )
    for expected in (
        "annotations[12], left out of its image's mask: unusable (no category has the id 99",
        "annotations[13], left out of its image's mask: unusable (its class 'a/b'", "annotations[14]: no image has the id 77",
        "annotations[15]: unusable", "annotations[16]: unusable", "images[1]: none of its objects is usable",
        "images[2]: unusable (0 image files fit its name 'missing.png'", "images[4]: a second image of that id",
        "images[6]: unusable (5 x 0 pixels", "images[7]: unusable",
        "images[8]: unusable", "images[9]: unusable", "images[10]: unusable (0 image files", "captions.json: no segmentation",
        "cut.json: unusable ('cut.json' is not valid JSON",
    ):  # fmt: skip
        assert f"{expected}" in skipped, f"{expected}\n{skipped}"


@pytest.mark.parametrize(
    "annotations, picture, file_name, name",
    [
        ("annotations/instances_train2017.json", "train2017/1.png", "1.png", "train/1.png"),
        ("annotations/instances_val.json", "images/val/p3/1.png", "p3/1.png", "val/p3/1.png"),
        ("valid/_annotations.coco.json", "valid/1.png", "1.png", "val/1.png"),
        ("instances_default.json", "images/1.png", "images\\1.png", "1.png"),
        ("instances_default.json", "images/train/1.png", "train/1.png", "train/1.png"),
        ("instances_default.json", "images/train/1.png", "1.png", "train/1.png"),
        ("instances_test.json", "deep/down/1.png", "C:\\data\\p3\\1.png", "test/1.png"),
        ("latest.json", "test_1.png", "/data/test_1.png", "test_1.png"),
        ("coco.json", "p3/1.png", "./p3/1.png", "p3/1.png"),
        ("coco.json", "images/1.png", "p3/1.png", "p3/1.png"),
        ("coco.json", "p4/1.png", "p3/1.png", None),
        ("train.json", "val/1.png", "1.png", None),
    ],
)
def test_names(tmp_path, annotations, picture, file_name, name):
    for path in (picture, picture.replace("1.png", "2.png")):
        save(tmp_path / path)
    mask = [dict(size=list(SIZE), counts=runs_of(blob(1)))]
    write(tmp_path / annotations, content([image(1, file_name)], [labels(1, 1, mask[0])]))
    images, skipped = read(tmp_path)
    assert list(images) == ([name] if name else []), skipped
    assert not name or images[name].image == picture


def test_files_of_one_name_in_several_folders(tmp_path):
    shape = dict(size=list(SIZE), counts=runs_of(blob(1)))
    for split in ("train", "valid"):
        save(tmp_path / split / "1.png")
        write(
            tmp_path / split / "_annotations.coco.json", content([image(1, "1.png")], [labels(1, 1, shape)])
        )
    for folder in ("images", "masks", "p1", "p2"):
        save(tmp_path / folder / "3.png")
        save(tmp_path / folder / "4.png") if folder[0] == "p" else None
    save(tmp_path / "testing/5.png")
    save(tmp_path / "images/5.png")
    names = ["3.png", "p2/3.png", "4.png", "testing/5.png"]
    write(
        tmp_path / "coco.json",
        content([image(n, name) for n, name in enumerate(names)], [labels(0, 1, shape)]),
    )
    images, skipped = read(tmp_path)
    assert {name: image.image for name, image in images.items()} == {
        "train/1.png": "train/1.png", "val/1.png": "valid/1.png", "3.png": "images/3.png", "p2/3.png": "p2/3.png",
        "test/5.png": "testing/5.png",
    }  # fmt: skip
    assert "images[2]: unusable (2 image files fit its name '4.png'" in skipped


@pytest.mark.parametrize("name", importing.LAYOUTS)
def test_what_is_not_of_the_format(tmp_path, name):
    assert importing.LAYOUTS.keys() == importing.FORMATS.keys()
    write(tmp_path / "src/cut.json", '{"images": [')
    options = dict(classes={"polyp": (255, 0, 0)}) if name == "masks-from-colours" else {}
    with pytest.raises(ValueError) as error:
        importing.import_dataset(name, tmp_path / "src", tmp_path / "out", **options)
    for words in (f"--import {name} found no image", importing.LAYOUTS[name], "It holds cut.json"):
        assert words in str(error.value)
    read_as_json = name in ("coco", "cvat", "labelme", "label-studio")
    assert ("'cut.json' is not valid JSON" in str(error.value)) == read_as_json
    assert not (tmp_path / "out").exists()


def test_polygons_need_pycocotools(tmp_path, monkeypatch):
    save(tmp_path / "1.png")
    write(tmp_path / "coco.json", content([image(1, "1.png")], [labels(1, 1, [SQUARE])]))
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(NeedsPackage, match="pip install pycocotools"):
        read(tmp_path)
