"""Draw annotated shapes as masks, and collect those of an image.

A vertex marks the pixel that it falls into, and the outline belongs to the shape, as in labelme's own masks.
"""

import math
import re

import numpy as np
from PIL import Image, ImageDraw

from vlsm.raw.download import MOST_PIXELS, LabelledImage, checked_class

FARTHEST = 10  # times the image's longer side: the time to draw grows with the size of a shape
SNAP = 0.02  # pixels; x / width in six decimals, times the width, may lie a little below a whole number


def draw(shape, points, size):
    """Return the mask bool `[H, W]` of a shape.

    points: [[x, y], ...] in pixels, of a polygon; two corners of a rectangle; centre and rim of a circle.
    size: (H, W). Raises ValueError for other shapes and points.
    """
    points = checked_points(points, size)
    enough = len(points) > 2 if shape == "polygon" else len(points) == 2
    if not enough:
        raise ValueError(f"{len(points)} points are no {shape} with an area")
    image = Image.new("L", size[::-1])
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        radius = math.dist(*points)
        points = np.array([points[0] - radius, points[0] + radius])
    box = [*points.min(0), *points.max(0)]
    if shape == "polygon":
        canvas.polygon(points.ravel().tolist(), fill=1, outline=1)
    elif shape == "rectangle":
        canvas.rectangle(box, fill=1)
    elif shape == "circle":
        canvas.ellipse(box, fill=1)
    else:
        raise ValueError(f"'{shape}' has no area that could be a mask")
    return np.asarray(image).view(bool)


def checked_points(points, size):
    """Return points as numbers `[N, 2]`. Raises ValueError for others, NaN, and points far from the image."""
    points = np.array(points, float)
    if points.shape[1:] != (2,):
        raise ValueError("its points are no pairs of numbers")
    if not (np.abs(points) <= FARTHEST * max(size)).all():
        raise ValueError("a point is NaN or far outside of the image")
    return points


def in_pixels(fractions, size):
    """Return the points `[N, 2]` of fractions of the width and the height, for `draw`."""
    height, width = size
    return fractions * (width, height) + SNAP


def checked_size(height, width):
    """Return (height, width). Raises ValueError if no image has that size."""
    whole = isinstance(height, int) and isinstance(width, int)
    if not whole or min(height, width) < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels is no size of an image")
    return height, width


def draw_objects(download, source, name, image, objects, read_object):
    """Yield the `LabelledImage` of an image, unless all its objects are unusable.

    source: the annotation, for messages. objects: [(place in it, object), ...]; read_object turns an object
    into (class, mask), and an error there costs that object alone.
    """
    masks = {}
    for place, item in objects:
        with download.skipping(f"{source}, {place}, left out of its image's mask"):
            word, mask = read_object(item)
            word = checked_class(word)
            if not mask.any():
                raise ValueError("no pixel of it lies in the image")
            masks[word] = masks.get(word, False) | mask
    if objects and not masks:  # without masks it would pass for a healthy image
        download.skip(source, "none of its objects is usable")
    else:
        yield LabelledImage(below_images(name), image, masks)


def below_images(name):
    """Return a file's path without folders named images: train/images/1.png becomes train/1.png."""
    path = re.sub(r"(?<![^/])images/", "", name)
    return re.sub(r"^(train|val|test)\d{4}/", r"\1/", path)  # such as images/train2017/
