"""The import of CVAT's two exports of one task."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.raw.test_import_coco import SIZE, blob, content, image, labels, save, write
from vlsm.raw.download import Download
from vlsm.raw.formats.importing import import_dataset, read_cvat

LABELMAP = (
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\npolyp:250,50,83::\r\nleft tool:51,221,255:tip:\n\n"
)


def read(folder):
    download = Download(folder)
    images = {image.name: image for image in read_cvat(download)}
    return images, "\n".join(
        f"{name}: {reason}" for reason, names in download.skipped.items() for name in names
    )


def test_segmentation_mask(tmp_path):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[blob(1)] = (250, 50, 83)
    pixels[2:9, 3:8] = (51, 221, 255)
    unknown = pixels.copy()
    unknown[0, 0] = (250, 50, 84)
    write(tmp_path / "labelmap.txt", LABELMAP)
    for stem, mask in {
        "a b": pixels,
        "sub/2": pixels,
        "3": unknown,
        "black": pixels * 0,
        "test/4": pixels,
    }.items():
        save(tmp_path / f"SegmentationClass/{stem}.png", mask)
        save(tmp_path / f"SegmentationObject/{stem}.png", mask)
        save(tmp_path / f"JPEGImages/{stem}.jpg")
    for stem in ("healthy", "unlisted"):
        save(tmp_path / f"JPEGImages/{stem}.jpg")
    as_palette = Image.fromarray(pixels).convert("P", palette=Image.ADAPTIVE)
    as_palette.save(tmp_path / "SegmentationClass/sub/2.png")
    write(tmp_path / "ImageSets/Segmentation/Validation.txt", '"a b"\r\nnothing\n')
    write(tmp_path / "ImageSets/Segmentation/default.txt", "sub/2\n3\nhealthy")
    images, skipped = read(tmp_path)
    assert images.keys() == {"val/a b.jpg", "sub/2.jpg", "healthy.jpg", "black.jpg", "test/4.jpg"}
    assert images["healthy.jpg"].masks == {}
    assert [word for word, mask in images["black.jpg"].masks.items() if mask.any()] == ["background"]
    for name in ("val/a b.jpg", "sub/2.jpg"):
        masks = images[name].masks
        assert (
            masks.keys() == {"background", "polyp", "left tool"}
            and (masks["polyp"] == (pixels == (250, 50, 83)).all(-1)).all()
        )
        assert masks["left tool"].sum() == 35 and masks["left tool"][2:9, 3:8].all()
    assert (
        "3.png: unusable (1 pixels have a colour like (250, 50, 84)" in skipped
        and "unlisted.jpg: image without mask" in skipped
    )
    import_dataset("cvat", tmp_path, tmp_path.with_name(f"{tmp_path.name}-out"))
    content = json.loads((tmp_path.with_name(f"{tmp_path.name}-out") / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "left tool": 1, "polyp": 2}
    write(tmp_path / "labelmap.txt", "polyp:300,0,0::")
    with pytest.raises(ValueError, match="'labelmap.txt': 'polyp:300,0,0::' exceeds 255"):
        read(tmp_path)
    write(tmp_path / "second/labelmap.txt", LABELMAP)
    with pytest.raises(ValueError, match="holds .*labelmap.txt, .*labelmap.txt. Name the folder of one"):
        read(tmp_path)


def test_coco(tmp_path):
    save(tmp_path / "images/a.png")
    shape = dict(size=list(SIZE), counts=[5, SIZE[0] * SIZE[1] - 5])
    write(
        tmp_path / "annotations/instances_default.json", content([image(1, "a.png")], [labels(1, 1, shape)])
    )
    images, _ = read(tmp_path)
    assert images["a.png"].masks["polyp"].sum() == SIZE[0] * SIZE[1] - 5
    (tmp_path / "annotations/instances_default.json").unlink()
    assert not read(tmp_path)[0]
