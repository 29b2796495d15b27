"""COCO: JSON files of images, categories, and a segmentation (polygons or run lengths) for each object."""

from functools import partial

import numpy as np

from vlsm.data.images import NeedsPackage
from vlsm.raw.download import checked_size, decode_run_lengths
from vlsm.raw.formats.paths import find_image, paths_by_name, split_of
from vlsm.raw.formats.shapes import draw_objects
from vlsm.system.schema import field, parse_json


def read(download):
    """Yield the images of COCO's files; those without an object are healthy."""
    paths = paths_by_name(download)
    for file, _ in download.find(r"[^/]+\.json"):
        with download.skipping(file):
            content = parse_json(download.read(file), file)
            if not {"images", "annotations"} <= content.keys():
                continue
            if any(isinstance(item, dict) and item.get("segmentation") for item in content["annotations"]):
                yield from _images_of_file(download, paths, file, content)
            else:  # its images would pass for healthy
                download.skip(file, "no segmentation, only boxes, keypoints or captions")


def _images_of_file(download, paths, file, content):
    """Yield the images of a file."""
    words = {number: item.get("name") for _, number, item in _items(download, file, content, "categories")}
    images = {}  # id -> (place in the file, image, its objects)
    for place, number, image in _items(download, file, content, "images"):
        if number in images:
            download.skip(place, "a second image of that id")
        else:
            images[number] = (place, image, [])
    for place, number, annotation in _items(download, file, content, "annotations", "image_id"):
        if number in images:
            images[number][2].append((place, annotation))
        else:
            download.skip(place, f"no image has the id {number}")
    for place, image, objects in images.values():
        with download.skipping(place):
            name = field(place, image, "file_name", kind=str, words="a file's name")
            name, path = find_image(paths, name, split_of(file))
            size = checked_size(image.get("height"), image.get("width"))
            draw = partial(_draw, words, size, file)
            yield from draw_objects(download, place, name, path, objects, draw)


def _items(download, file, content, key, id_key="id"):
    """Yield (place in words, id, item) of a list; ids as text, for some programs write 7 here, "7" there."""
    for index, item in enumerate(field(file, content, key, kind=list, words="a list")):
        place = f"{file}, {key}[{index}]"
        with download.skipping(place):
            yield place, str(field(place, item, id_key, kind=(int, str), words="an id")), item


def _draw(words, size, file, annotation):
    """Return (class, mask bool `[H, W]`) of an annotation."""
    category = str(annotation.get("category_id"))
    if category not in words:
        raise ValueError(f"no category has the id {category}")
    shape = annotation.get("segmentation")
    if not shape:
        raise ValueError("a box without a segmentation")
    if not isinstance(shape, dict):
        return words[category], draw_polygons(shape, size, file)
    if shape["size"] != list(size):
        raise ValueError(f"run lengths of size {shape['size']} in an image of {list(size)}")
    if isinstance(shape["counts"], str):
        return words[category], decode_run_lengths(shape["counts"], size, file)
    return words[category], fill_runs(shape["counts"], size[::-1]).T  # down the columns


# For other formats, too


def draw_polygons(rings, size, file):
    """Return the union of polygons [[x, y, x, y, ...], ...] as bool `[H, W]`, drawn as COCO does.

    Raises NeedsPackage without pycocotools, ValueError for another content.
    """
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise NeedsPackage(file, "its masks are COCO's polygons: pip install pycocotools") from None
    for ring in rings:
        points = np.asarray(ring, float)
        if points.size < 6 or points.size % 2:
            raise ValueError("a polygon of fewer than three points, or of an odd number of coordinates")
        if not np.abs(points).max() <= 2 * max(size):  # NaN, too; memory grows with an outline's length
            raise ValueError("a polygon with points far outside of its image")
    return coco.decode(coco.merge(coco.frPyObjects(rings, *size))) > 0


def fill_runs(runs, shape):
    """Return runs of False and True in turn as bool of a shape. Raises ValueError unless they fill it."""
    if sum(runs) != shape[0] * shape[1]:
        raise ValueError(f"run lengths that do not fill {shape} pixels")
    return np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(shape)
