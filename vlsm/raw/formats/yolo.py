"""Ultralytics' YOLO segmentation: images/, labels/ with a .txt of polygons for each image, data.yaml."""

from functools import partial
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import open_image
from vlsm.raw.formats.colours import IMAGE
from vlsm.raw.formats.shapes import draw, draw_objects, in_pixels
from vlsm.system.console import first_few, say_once

FARTHEST = 1.5  # a fraction of width or height; larger ones are pixels


def read(download):
    """Yield the images below folders named images; one whose .txt is missing or empty is healthy.

    Raises ValueError for a wrong data.yaml.
    """
    classes = _classes(download)
    images = download.by_stem(rf"images/{IMAGE}", with_place=True)
    texts = download.by_stem(r"labels/(?P<stem>.+)\.txt", with_place=True)
    splits = {_split(*key) for key in texts}
    for key, image in images.items():
        if _split(*key) not in splits:
            download.skip(image, "image without annotation: its split has no labels")
            continue
        with download.skipping(image):
            text = texts.get(key)
            content = download.text(text) if text else ""
            lines = [(f"line {n}", line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
            size = open_image(download.read(image), image).size[::-1]
            yield from draw_objects(download, text, image, image, lines, partial(_read_line, classes, size))
    for key in sorted(texts.keys() - images.keys()):
        download.skip(texts[key], "labels without image")


def _split(place, stem):
    """Return the folder above images/ or labels/, and the one below, which may be of a split."""
    return place, PurePosixPath(stem).parts[:-1][:1]


def _classes(download):
    """Return {number: class} of data.yaml; None without such a file.

    Raises ValueError if there are several, or one is no YAML, or of keypoints.
    """
    import yaml

    settings = {}
    for name, _ in download.find(r"[^/]+\.ya?ml"):
        try:
            # Texts alone: nothing is executed, and a class named "no" stays a word.
            values = yaml.load(download.read(name), yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"'{name}' is not valid YAML ({error}).") from error
        if isinstance(values, dict) and "names" in values:
            settings[name] = values
    if not settings:
        say_once("yolo", "There is no data.yaml with 'names:'; the classes are named class0, class1, ...")
        return None
    if len(settings) > 1:
        raise ValueError(f"{first_few(settings)} all name classes. Name the folder of one.")
    [(name, values)] = settings.items()
    if "kpt_shape" in values:
        raise ValueError(f"'{name}' is of keypoints, not of segmentation: it holds 'kpt_shape'.")
    names = values["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        return {int(number): names[number] for number in names}
    except (TypeError, ValueError):
        raise ValueError(
            f"'{name}': 'names' should be a list of classes, or lines of number: class."
        ) from None


def _read_line(classes, size, line):
    """Return (class, mask bool `[H, W]`) of a line "class x1 y1 x2 y2 ...", fractions of width and height.

    classes: {number: class}, or None. Raises ValueError for a box, a class without name, or a broken line.
    """
    number, *values = map(float, line.split())
    if len(values) == 4:
        raise ValueError("a box, not a polygon")
    if len(values) % 2 or not (np.abs(values) <= FARTHEST).all():  # NaN, too
        raise ValueError("its coordinates are no pairs of fractions of width and height")
    if classes is not None and number not in classes:
        raise ValueError(f"data.yaml names no class {number:g}")
    word = classes[number] if classes else f"class{number:g}"
    points = np.clip(values, 0, 1).reshape(-1, 2)
    return word, draw("polygon", in_pixels(points, size), size)
