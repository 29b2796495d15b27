"""Draw annotated shapes as masks, and collect those of an image.

A vertex marks the pixel that it falls into, and the outline belongs to the shape, as in labelme's own masks.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from vlsm.raw.download import LabelledImage
from vlsm.raw.formats.label_maps import checked_class
from vlsm.raw.formats.paths import name_below

FARTHEST = 10  # times the image's longer side: the time to draw grows with the size of a shape
SNAP = 0.02  # pixels; x / width in six decimals, times the width, may lie a little below a whole number


def draw(shape, points, size):
    """Return the mask bool `[H, W]` of a shape.

    points: [[x, y], ...] in pixels, of a polygon; two corners of a rectangle; centre and rim of a circle.
    size: (H, W). Raises ValueError for other shapes and points.
    """
    points = np.array(points, float)
    if points.shape[1:] != (2,):
        raise ValueError("its points are no pairs of numbers")
    if not (np.abs(points) <= FARTHEST * max(size)).all():
        raise ValueError("a point is NaN or far outside of the image")
    image = Image.new("L", size[::-1])
    canvas = ImageDraw.Draw(image)
    if shape == "polygon" and len(points) > 2:
        canvas.polygon(points.ravel().tolist(), fill=1, outline=1)
    elif shape == "rectangle" and len(points) == 2:
        canvas.rectangle([*points.min(0), *points.max(0)], fill=1)
    elif shape == "circle" and len(points) == 2:
        radius = math.dist(*points)
        canvas.ellipse([*(points[0] - radius), *(points[0] + radius)], fill=1)
    else:
        raise ValueError(f"'{shape}' of {len(points)} points is no polygon, rectangle or circle")
    return np.asarray(image).view(bool)


def in_pixels(fractions, size):
    """Return the points `[N, 2]` of fractions of the width and the height, for `draw`."""
    height, width = size
    return fractions * (width, height) + SNAP


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
        yield LabelledImage(name_below(name), image, masks)
