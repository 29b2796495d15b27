"""Importing Label Studio's JSON export: brushes, shapes, the tasks' images and annotations."""

import json

import numpy as np
import pytest
from PIL import Image

from vlsm.raw.download import Download
from vlsm.raw.formats.brush import decode_brush
from vlsm.raw.formats.labelstudio import read

SIZE = (11, 13)
# Of the mask below, written by label_studio_sdk 2.1.
BRUSH = list(
    bytes.fromhex(
        "0000023c391bfc7ff9ec02dffe2300c27ff86c030dffe1700c37ff85c030dffe1b00c27ff88c02dffe73008ffc"
    )
)
ROWS = """
#............
.............
......###....
.....#####...
....#######..
....#######..
....#######..
.....#####...
......###....
.............
............#
""".split()
MASK = np.array([[pixel == "#" for pixel in row] for row in ROWS])


def encode(values, bit_sizes=(3, 4, 8, 16)):
    """Write run lengths from their definition: repeats, and blocks of all values between them."""
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in bit_sizes)
    start = 0
    while start < len(values):
        end = start + 1
        while end < len(values) and values[end] == values[start] and end - start < 1 << 16:
            end += 1
        repeated = end - start > 1
        while not repeated and end < len(values) and end - start < 8 and values[end] != values[end - 1]:
            end += 1
        index = next(k for k, size in enumerate(bit_sizes) if end - start <= 1 << size)
        bits += f"{repeated:b}{index:02b}{end - start - 1:0{bit_sizes[index]}b}"
        bits += "".join(f"{value:08b}" for value in values[start : start + 1 if repeated else end])
        start = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def region(kind, *labels, size=SIZE, **value):
    return dict(
        id=f"r{kind[0]}", type=kind, value={**value, kind: list(labels)}, original_height=size[0], original_width=size[1],
        image_rotation=0, from_name="tag", to_name="image",
    )  # fmt: skip


def task(number, image, *results, **more):
    return (
        dict(
            id=number,
            data={"image": image},
            annotations=[dict(id=1, result=list(results), was_cancelled=False)],
        )
        | more
    )


def write(root, tasks, *images):
    (root / "export.json").write_text(json.dumps(tasks))
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(root / name)
    download = Download(root)
    return {image.name: image for image in read(download)}, download.skipped


def reasons(skipped):
    return {name: reason for reason, names in skipped.items() for name in names}


def test_brushes():
    assert (decode_brush(BRUSH, SIZE) == MASK).all()
    rgba = np.empty((*SIZE, 4), int)
    rgba[:] = (9, 8, 7, 0)  # in colours, so that blocks of all values occur
    rgba[MASK] = (1, 31, 30, 100)
    assert (decode_brush(encode(rgba.ravel().tolist()), SIZE) == MASK).all()
    empty = encode([0] * 4 * 300 * 400)
    assert not decode_brush(empty, (300, 400)).any()
    smooth = np.repeat(np.where(MASK, 255, 40), 4)  # grey pixels at edges
    assert (decode_brush(encode(smooth.tolist()), SIZE) == MASK).all()


@pytest.mark.parametrize(
    "numbers", [BRUSH[:-6], BRUSH[:3], [], BRUSH[:4] + [0] + BRUSH[5:], encode([0] * 100), encode([0] * 1000)]
)
def test_broken_brushes(numbers):
    with pytest.raises(ValueError, match="do not fill 13 x 11 pixels"):
        decode_brush(numbers, SIZE)


def test_regions_of_all_types(tmp_path):
    results = [
        region("brushlabels", " polyp ", format="rle", rle=BRUSH),
        region(
            "polygonlabels",
            "box",
            "two",
            points=[[i / 0.13, j / 0.11] for i, j in [(2, 1), (6.97, 1), (6.97, 5), (2, 5)]],
        ),
        dict(type="choices", value={"choices": ["good"]}, id="c"),
        dict(type="relation", from_id="rb", to_id="rp", labels=[]),
        dict(type="brush", id="rb", value={"rle": BRUSH}),
    ]
    images, skipped = write(tmp_path, [task(1, "/data/upload/3/1a2b3c4d-a.png", *results)], "a.png")
    masks = images["a.png"].masks
    y, x = np.mgrid[:11, :13]
    square = (x >= 2) & (x <= 6) & (y >= 1) & (y <= 5)
    assert sorted(masks) == ["box", "polyp", "two"] and not skipped
    assert (masks["polyp"] == MASK).all() and (masks["two"] == square).all()
    assert (masks["box"] == square).all()


@pytest.mark.parametrize(
    "address, file",
    [
        ("/data/upload/3/1a2b3c4d-case_1.png", "images/p3/case 1.png"),
        ("/data/upload/3/1a2b3c4d-case_1.png", "upload/1a2b3c4d-case_1.png"),
        ("/data/local-files/?d=all/p3/1.png", "p3/1.png"),
        ("/data/local-files/?d=p3%2F1.png", "all/p3/1.png"),
        ("/data/local-files/?d=all\\1.png", "images/1.png"),
        ("https://host/b/a%20b.png?token=x", "a b.png"),
        ("s3://bucket/key/a.png", "a.png"),
    ],
)
def test_images_of_tasks(tmp_path, address, file):
    brush = region("brushlabels", "polyp", rle=BRUSH)
    images, _ = write(tmp_path, [task(1, address, brush)], file, "other/p4/2.png")
    assert [(name, image.image) for name, image in images.items()] == [(file.removeprefix("images/"), file)]


def test_images_that_may_be_others(tmp_path):
    brush = region("brushlabels", "polyp", rle=BRUSH)
    tasks = [
        task(1, "/data/local-files/?d=p5/1.png", brush),
        task(2, "/data/upload/1/1a2b3c4d-1.png", brush),
        task(3, "/data/local-files/?d=p3/1.png", brush),
        task(4, "../../1.png", brush),
    ]
    images, skipped = write(tmp_path, tasks, "p3/1.png", "p4/1.png")
    told = reasons(skipped)
    assert list(images) == ["p3/1.png"]
    assert "0 image files fit its name 'p5/1.png'" in told["export.json, task 1"]
    assert (
        "2 image files fit" in told["export.json, task 2"] and "2 image files" in told["export.json, task 4"]
    )


def test_annotations_that_count(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlsm.system.console._printed", set())
    first = region("brushlabels", "first", rle=BRUSH)
    second = region("brushlabels", "second", rle=BRUSH)
    tasks = [
        task(
            1,
            "a.png",
            annotations=[dict(result=[first]), dict(result=[second]), dict(result=[], was_cancelled=True)],
        ),
        task(2, "b.png"),
        task(3, "c.png", annotations=[]),
        task(4, "d.png", annotations=[dict(result=[first], was_cancelled=True)]),
        {"id": 5, "image": "e.png", "tag": []},  # of JSON-MIN
    ]
    images, skipped = write(tmp_path, tasks, *(f"{letter}.png" for letter in "abcde"))
    assert {name: list(image.masks) for name, image in images.items()} == {"a.png": ["second"], "b.png": []}
    assert "several annotations" in capsys.readouterr().err
    told = reasons(skipped)
    assert told.keys() == {"export.json, task 3", "export.json, task 4", "export.json, task 5"}
    for number, reason in ((3, "image without annotation"), (4, "image without annotation"), (5, "JSON-MIN")):
        assert reason in told[f"export.json, task {number}"]


def test_a_bad_region_costs_itself_alone(tmp_path):
    bad = [
        (region("brushlabels", "polyp", rle=BRUSH[:20]), "do not fill 13 x 11 pixels"),
        (region("brushlabels", "polyp", rle=BRUSH, size=(13, 11)), "(11,13) (13,11)"),
        (region("brushlabels", "polyp", rle=BRUSH, size=(None, 11)), "no size of an image"),
        (region("brushlabels", "polyp", rle=[256]), ""),
        (region("keypointlabels", "polyp", x=1, y=2, width=3), "'keypointlabels' is neither"),
        (region("rectanglelabels", "polyp", x=1, y=2, width=30, height=30), "is neither a brush"),
        (region("polygonlabels", points=[[1, 1], [50, 1], [50, 50]]), "None cannot name a folder"),
        (region("polygonlabels", "a/b", points=[[1, 1], [50, 1], [50, 50]]), "'a/b' cannot name a folder"),
        (region("polygonlabels", "polyp", points=[[1, 1], [50, 1], [50]]), ""),
    ]
    for number, (entry, _) in enumerate(bad):
        entry["id"] = number
    good = region("brushlabels", "polyp", rle=BRUSH)
    tasks = [
        task(1, "a.png", good, *(entry for entry, _ in bad)),
        task(2, "b.png", bad[0][0]),
        task(3, "c.png", "x"),
    ]
    images, skipped = write(tmp_path, tasks, "a.png", "b.png", "c.png")
    assert list(images) == ["a.png"] and list(images["a.png"].masks) == ["polyp"]
    assert (images["a.png"].masks["polyp"] == MASK).all()
    told = reasons(skipped)
    for number, (_, reason) in enumerate(bad):
        assert reason in told[f"export.json, task 1, region {number}, left out of its image's mask"]
    assert told["export.json, task 2"] == "none of its objects is usable"
    assert "unusable" in told["export.json, task 3"]
