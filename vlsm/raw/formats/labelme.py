"""labelme: a .json with the shapes of each image, beside it."""

import posixpath
from functools import partial

from vlsm.raw.download import checked_size
from vlsm.raw.formats.shapes import draw, draw_objects
from vlsm.system.schema import field, parse_json

NO_CLASS = ("_background_", "__ignore__")  # labels that labelme reserves


def read(download):
    """Yield the images of labelme's files."""
    files = set(download.image_names())
    used = set()
    for name, _ in download.find(r"[^/]+\.json"):
        with download.skipping(name):
            annotation = parse_json(download.read(name), name)
            shapes = field(name, annotation, "shapes", kind=list, words="labelme's list of shapes")
            image = _find_image(name, annotation, files)
            used.add(image)
            size = checked_size(annotation.get("imageHeight"), annotation.get("imageWidth"))
            objects = [(f"shape {index}", shape) for index, shape in enumerate(shapes)]
            yield from draw_objects(download, name, image, image, objects, partial(_read_shape, size))
    for image in sorted(files - used):
        download.skip(image, "image without annotation")


def _find_image(name, annotation, files):
    """Return an annotation's image file. Raises ValueError if it is missing."""
    path = field(name, annotation, "imagePath", kind=str, words="a file").replace("\\", "/")
    folder = posixpath.dirname(name)
    for place in (path, posixpath.basename(path)):  # images may have been moved beside their annotations
        file = posixpath.normpath(posixpath.join(folder, place))
        if file in files:
            return file
    raise ValueError(f"its image '{path}' is missing; put it beside the annotation")


def _read_shape(size, shape):
    """Return (class, mask bool `[H, W]`) of a shape. Raises ValueError if it has no class or no area."""
    word = shape["label"]
    if word in NO_CLASS:
        raise ValueError(f"'{word}' is no class")
    shape_type = shape.get("shape_type") or "polygon"  # labelme 3 has polygons alone
    return word, draw(shape_type, shape["points"], size)
