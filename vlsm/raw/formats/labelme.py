"""labelme: a .json with the shapes of each image, beside it."""

import base64
import posixpath
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import open_image, read_image
from vlsm.raw.formats.shapes import checked_points, checked_size, draw, draw_objects
from vlsm.system.console import first_few
from vlsm.system.files import field, parse_json

NO_CLASS = ("_background_", "__ignore__")  # labels that labelme reserves


def read(download):
    """Yield the images of labelme's files. Raises ValueError if there is no such file."""
    files = set(download.image_names())
    used = set()
    annotations = 0
    for name, _ in download.find(r"[^/]+\.json"):
        with download.skipping(name):
            annotation = parse_json(download.read(name), name)
            if not isinstance(annotation.get("shapes"), list):
                raise ValueError("no file of labelme: it has no list of shapes")
            annotations += 1
            target, image = _image(name, annotation, files)
            used.add(target)
            size = checked_size(annotation.get("imageHeight"), annotation.get("imageWidth"))
            shapes = [(f"shape {index}", shape) for index, shape in enumerate(annotation["shapes"])]
            yield from draw_objects(download, name, target, image, shapes, partial(_read_shape, size))
    if not annotations:
        raise ValueError(
            f"'{download.path}' holds no .json file of labelme, but {first_few(download.names)}."
        )
    for image in sorted(files - used):
        download.skip(image, "image without annotation")


def _image(name, annotation, files):
    """Return an annotation's image file twice, as name and image; if it is missing, a name and the pixels.

    Raises ValueError if the annotation does not hold these.
    """
    path = field(name, annotation, "imagePath", kind=str, words="a file").replace("\\", "/")
    folder = posixpath.dirname(name)
    for place in (path, posixpath.basename(path)):  # images may have been moved beside their annotations
        file = posixpath.normpath(posixpath.join(folder, place))
        if file in files:
            return file, file
    if not annotation.get("imageData"):
        raise ValueError(f"its image '{path}' is missing")
    pixels = read_image(base64.b64decode(annotation["imageData"]), name)
    return str(PurePosixPath(name).with_suffix(".png")), pixels


def _read_shape(size, shape):
    """Return (class, mask bool `[H, W]`) of a shape. Raises ValueError if it has no class or no area."""
    points = shape["points"]
    word = shape["label"]
    if word in NO_CLASS:
        raise ValueError(f"'{word}' is no class")
    kind = shape.get("shape_type") or "polygon"  # labelme 3 has polygons alone
    if kind == "oriented_rectangle":
        kind = "polygon"
    if kind != "mask":
        return word, draw(kind, points, size)
    mask = np.zeros(size, bool)
    (left, top), (right, bottom) = checked_points(points, size).astype(int)
    box = mask[top : bottom + 1, left : right + 1]
    patch = np.asarray(open_image(base64.b64decode(shape["mask"]), "mask"))
    if patch.shape != box.shape:
        raise ValueError(f"a mask of {patch.shape} pixels in a box of {box.shape}")
    box[:] = patch > 0
    return word, mask
