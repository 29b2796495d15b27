"""Label Studio: its JSON export (not JSON-MIN), with the images anywhere below the source."""

import re
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np

from vlsm.raw.download import checked_size
from vlsm.raw.formats.brush import decode_brush
from vlsm.raw.formats.paths import find_image, paths_by_name
from vlsm.raw.formats.shapes import draw, draw_objects, in_pixels
from vlsm.system.console import first_few, say_once
from vlsm.system.schema import field, parse_json

UPLOAD = re.compile("^[0-9a-f]{8}-")  # before the name of an uploaded file


def read(download):
    """Yield the images of annotated tasks."""
    paths = paths_by_name(download)
    for name in list(paths):
        uploaded = re.sub(r"[^\w.-]", "", name.replace(" ", "_"))  # as Label Studio spells it after an upload
        if uploaded != name:
            paths[uploaded] += paths[name]
    for name, _ in download.find(r"[^/]+\.json"):
        with download.skipping(name):
            for index, task in enumerate(parse_json(download.read(name), name, list, "a list of tasks")):
                number = task.get("id", index) if isinstance(task, dict) else index
                place = f"{name}, task {number}"
                with download.skipping(place):
                    yield from _read_task(download, place, task, paths)


def _read_task(download, place, task, paths):
    """Yield the image of a task. Raises ValueError if it has none, or no annotation."""
    items = field(place, task, "annotations", kind=list, words="a list, as in JSON, not in JSON-MIN")
    annotations = [item for item in items if not item.get("was_cancelled")]
    if not annotations:
        raise ValueError("image without annotation")
    if len(annotations) > 1:
        say_once("label-studio", f"{place} has several annotations; of such tasks the last one counts.")
    image = _find_image(task["data"].values(), paths)
    regions = _regions(annotations[-1]["result"])
    yield from draw_objects(download, place, image, image, regions, _read_region)


def _find_image(addresses, paths):
    """Return the path of the image that addresses name: of an upload, a local file "?d=", or a URL.

    Raises ValueError unless one file fits.
    """
    names = set()
    for address in addresses:
        url, _, name = unquote(str(address)).replace("\\", "/").partition("?d=")
        if not name:  # only local files tell their folder
            name = PurePosixPath(url.split("?")[0]).name
            name = name if name in paths else UPLOAD.sub("", name)
        if PurePosixPath(name).name in paths:
            names.add(name)
    if len(names) != 1:
        raise ValueError(f"{len(names)} image files fit {first_few(map(str, addresses))}")
    return find_image(paths, names.pop(), "")[1]


def _regions(results):
    """Return [(place, (class, region)), ...]; choices, texts and relations are no regions."""
    regions = []
    for index, region in enumerate(results):
        type_name = str(region["type"])
        if type_name.endswith("labels"):
            for word in region["value"].get(type_name) or [None]:
                regions.append((f"region {region.get('id', index)}", (word, region)))
    return regions


def _read_region(item):
    """Return (class, mask bool `[H, W]`) of (class, region). Raises ValueError if it has no area."""
    word, region = item
    value = region["value"]
    size = checked_size(region.get("original_height"), region.get("original_width"))
    if "rle" in value:
        return word, decode_brush(value["rle"], size)
    if region.get("image_rotation"):
        raise ValueError("its image is rotated")
    if "points" not in value:
        raise ValueError(f"'{region['type']}' is neither a brush nor a polygon")
    points = np.array(value["points"], float) / 100  # of per cent
    return word, draw("polygon", in_pixels(points, size), size)
