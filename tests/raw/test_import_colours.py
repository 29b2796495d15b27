"""The import of masks in colours: equal masks, through JPEG, too; folders; colours that are no class's."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlsm.raw.download import Download
from vlsm.raw.formats import colours

SIZE = (101, 147)
CLASSES = {"polyp": (255, 0, 0), "tool": (0, 255, 0)}


def picture(path, pixels=None, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8) if pixels is None else pixels).save(path, **settings)


def painted(colours=((255, 0, 0), (0, 255, 0))):
    image = Image.new("RGB", SIZE[::-1])
    canvas = ImageDraw.Draw(image)
    canvas.ellipse([10, 10, 70, 60], fill=colours[0])
    canvas.polygon([(80, 30), (140, 50), (90, 95)], fill=colours[1])
    return np.asarray(image)


def read(folder, classes=CLASSES):
    download = Download(folder)
    images = {image.name: image for image in colours.read(download, classes)}
    return images, str(dict(download.skipped))


@pytest.mark.parametrize("ending, most", [("png", 0), ("jpg", 4)])
def test_equal_masks(tmp_path, ending, most):
    pixels = painted()
    for stem in ("p1/1", "healthy"):
        picture(tmp_path / f"export/images/{stem}.jpg")
    picture(tmp_path / f"export/masks/p1/1.{ending}", pixels)
    picture(tmp_path / f"export/masks/healthy.{ending}")
    picture(tmp_path / "export/masks/alone.png")
    images, skipped = read(tmp_path)
    assert images.keys() == {"export/p1/1.jpg", "export/healthy.jpg"} and not np.any(
        [*images["export/healthy.jpg"].masks.values()]
    )
    assert (
        images["export/p1/1.jpg"].image == "export/images/p1/1.jpg"
        and images["export/p1/1.jpg"].masks.keys() == CLASSES.keys()
    )
    for word, colour in CLASSES.items():
        truth = (pixels == colour).all(-1)
        assert (images["export/p1/1.jpg"].masks[word] != truth).sum() <= most
    assert skipped == "{'mask without image': ['export/masks/alone.png']}"


def test_folders_of_splits(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / f"{split}/images/1.png")
        picture(tmp_path / f"{split}/labels/1.png", painted())
    assert read(tmp_path)[0].keys() == {"train/1.png", "val/1.png"}
    assert read(tmp_path / "train")[0].keys() == {"1.png"}


def test_colours_that_are_no_class(tmp_path):
    for stem, shades in {
        "a": ((255, 0, 0), (0, 0, 128)),
        "b": ((252, 3, 2), (0, 255, 0)),
        "c": ((255, 0, 0), (60, 255, 0)),
    }.items():
        picture(tmp_path / f"images/{stem}.png")
        picture(tmp_path / f"masks/{stem}.png", painted(shades))
    images, skipped = read(tmp_path)
    assert (
        images.keys() == {"b.png"}
        and "(0, 0, 128), which is no class's" in skipped
        and "(60, 255, 0)" in skipped
    )
    few = painted().copy()
    few[5, 5] = (0, 0, 255)
    with pytest.raises(ValueError, match=r"1 pixels have a colour like \(0, 0, 255\)"):
        colours.colour_masks(few, CLASSES)
    noise = np.random.default_rng(0).integers(-9, 9, few.shape)
    for side, refused in ((8, False), (20, True)):  # 64 and 400 pixels of 14847: 0.5 % is noise
        few[:side, :side] = (0, 0, 255)
        noisy = (few.astype(int) + noise).clip(0, 255).astype(np.uint8)
        if refused:
            with pytest.raises(ValueError, match="pixels have a colour like"):
                colours.colour_masks(noisy, CLASSES)
        else:
            assert not colours.colour_masks(noisy, CLASSES)["polyp"][:4, :4].any()


def test_black_may_be_a_class():
    masks = colours.colour_masks(painted(), CLASSES | {"lumen": (0, 0, 0)})
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all() and masks["lumen"][0, 0]


def test_classes_of_a_text(tmp_path):
    with pytest.raises(ValueError, match="needs the colour of each class: --classes"):
        read(tmp_path, None)
    assert colours.parse_classes("polyp=255,0,0;tool=0,255,0") == CLASSES
    assert colours.parse_classes(" left lung = 1, 2 ,3 ; ") == {"left lung": (1, 2, 3)}
    for text in ("", "polyp", "polyp=1,2", "polyp=1,2,3,4", "polyp=256,0,0", "a=1,2,3;a=3,2,1", "a=1,2,3;b=1,2,3", "a/b=1,2,3", "=1,2,3", "a=-1,2,3"):  # fmt: skip
        with pytest.raises(ValueError, match='--classes "polyp=255,0,0;tool=0,255,0"|cannot name a folder'):
            colours.parse_classes(text)
