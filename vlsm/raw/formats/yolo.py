"""Ultralytics' YOLO segmentation: images/, labels/ with a .txt of polygons for each image, data.yaml."""

import re
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import open_image
from vlsm.raw.formats.shapes import draw, draw_objects, in_pixels
from vlsm.system.console import first_few, say_once

FARTHEST = 1.5  # a fraction of width or height; larger ones are pixels


def read(download):
    """Yield the images below folders named images; one whose .txt is missing or empty is healthy.

    Raises ValueError for another layout, or a wrong data.yaml.
    """
    root, classes = _classes(download)
    texts = {name for name in download.names if re.search(r"(^|/)labels/.*\.txt$", name, re.I)}
    splits = {_split(text) for text in texts}
    images = [name for name in download.image_names() if re.search(r"(^|/)images/", name)]
    if not texts or not images:
        raise ValueError(
            f"'{download.path}' holds no images/ with labels/*.txt, but {first_few(download.names)}."
        )
    for image in images:
        text = _text_of(image)
        if _split(text) not in splits:
            download.skip(image, "image without annotation: its split has no labels")
            continue
        with download.skipping(image):
            content = download.read(text).decode() if text in texts else ""
            lines = [(f"line {n}", line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
            size = open_image(download.read(image), image).size[::-1]
            name = image.removeprefix(f"{root}/")
            yield from draw_objects(download, text, name, image, lines, partial(_read_line, classes, size))
    for text in sorted(texts.difference(map(_text_of, images))):
        download.skip(text, "labels without image")


def _text_of(image):
    """Return the path that an image's labels have."""
    path = re.sub(r"(.*/|^)images/", r"\1labels/", image)
    return str(PurePosixPath(path).with_suffix(".txt"))


def _split(text):
    """Return the folder labels/ of a file, with the folder of the split in it."""
    return re.match(r"(?:.*/)?labels/(?:[^/]+/)?", text)[0]


def _classes(download):
    """Return (folder of data.yaml, {number: class}); (".", None) without such a file.

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
        return ".", None
    if len(settings) > 1:
        raise ValueError(f"{first_few(settings)} all name classes. Name the folder of one.")
    [(name, values)] = settings.items()
    if "kpt_shape" in values:
        raise ValueError(f"'{name}' is of keypoints, not of segmentation: it holds 'kpt_shape'.")
    names = values["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        return str(PurePosixPath(name).parent), {int(number): names[number] for number in names}
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
    if len(values) % 2 or not np.isfinite(values).all():
        raise ValueError("its coordinates are no pairs of finite numbers")
    if np.abs(values).max(initial=0) > FARTHEST:
        raise ValueError("its coordinates are no fractions of width and height")
    if classes is not None and number not in classes:
        raise ValueError(f"data.yaml names no class {number:g}")
    word = classes[number] if classes else f"class{number:g}"
    points = np.clip(values, 0, 1).reshape(-1, 2)
    return word, draw("polygon", in_pixels(points, size), size)
