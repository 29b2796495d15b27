"""Label Studio: its JSON export (not JSON-MIN), with the images anywhere below the source."""

import re
from collections import defaultdict
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np

from vlsm.raw.formats.brush import decode_brush
from vlsm.raw.formats.shapes import below_images, checked_size, draw, draw_objects, in_pixels
from vlsm.system.console import first_few, say_once
from vlsm.system.files import parse_json

UPLOAD = re.compile("^[0-9a-f]{8}-")  # before the name of an uploaded file


def read(download):
    """Yield the images of annotated tasks. Raises ValueError if no file holds tasks."""
    paths = defaultdict(list)
    for path in download.image_names():
        paths[_uploaded_name(path)].append(path)
    tasks = 0
    for place, task in _tasks(download):
        tasks += 1
        with download.skipping(place):
            image = _find_image(dict(task["data"]).values(), paths)
            annotations = [item for item in task["annotations"] if not dict(item).get("was_cancelled")]
            if len(annotations) > 1:
                say_once(
                    "label-studio", f"{place} has several annotations; of such tasks the last one counts."
                )
            if annotations:
                regions = _regions(annotations[-1]["result"])
                yield from draw_objects(download, place, image, image, regions, _read_region)
            else:
                download.skip(place, "image without annotation")
    if not tasks:
        raise ValueError(
            f"'{download.path}' holds no tasks with 'annotations', as Label Studio exports them as JSON (not "
            f"JSON-MIN), but {first_few(download.names)}."
        )


def _tasks(download):
    """Yield (place for messages, task)."""
    for name, _ in download.find(r"[^/]+\.json"):
        with download.skipping(name):
            tasks = parse_json(download.read(name), name, list, "a list of tasks")
            for index, task in enumerate(tasks):
                if isinstance(task, dict) and isinstance(task.get("annotations"), list):
                    yield f"{name}, task {task.get('id', index)}", task
                else:
                    download.skip(f"{name}, item {index}", "no task with 'annotations'")


def _uploaded_name(path):
    """Return a file's name as Label Studio spells it after an upload."""
    return re.sub(r"[^\w.-]", "", PurePosixPath(path).name.replace(" ", "_"))


def _find_image(addresses, paths):
    """Return the path of the image that addresses name: of an upload, a local file "?d=", or a URL.

    paths: {name as in an upload: paths}. Raises ValueError unless one file fits.
    """
    fitting = set()
    for address in addresses:
        url, _, path = unquote(str(address)).replace("\\", "/").partition("?d=")
        name = _uploaded_name(path or url.split("?")[0])
        if name not in paths:
            name = UPLOAD.sub("", name)
        for file in paths.get(name, ()):
            # Only local files tell their folder: patient4/1.png must not become patient3/1.png.
            if not path or f"/{file}".endswith(f"/{path}") or f"/{path}".endswith(f"/{below_images(file)}"):
                fitting.add(file)
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} image files fit {first_few(map(str, addresses))}")
    return fitting.pop()


def _regions(results):
    """Return [(place, (class, region)), ...]; choices, texts and relations are no regions."""
    regions = []
    for index, region in enumerate(results):
        kind = str(region["type"])
        if kind.endswith("labels"):
            for word in dict(region["value"]).get(kind) or [None]:
                regions.append((f"region {region.get('id', index)}", (word, region)))
    return regions


def _read_region(item):
    """Return (class, mask bool `[H, W]`) of (class, region). Raises ValueError if it has no area."""
    word, region = item
    value = dict(region["value"])
    size = checked_size(region.get("original_height"), region.get("original_width"))
    if "rle" in value:
        return word, decode_brush(value["rle"], size)
    if region.get("image_rotation"):
        raise ValueError("its image is rotated")
    if "points" not in value:
        raise ValueError(f"'{region['type']}' is neither a brush nor a polygon")
    points = np.array(value["points"], float) / 100  # of per cent
    return word, draw("polygon", in_pixels(points, size), size)
