"""Find the images that annotations name, wherever they lie, and the split that a path says."""

import re
from collections import defaultdict
from pathlib import PurePosixPath

from vlsm.system.files import leaves_folder

# A split in the name of a folder, or of a JSON file: "val/", "instances_val2017.json".
SPLIT = re.compile(r"(?:^|[/_.-])(train|val|test)(?:ing|id|idation)?\d*(?=/|[_.-][^/]*json$)", re.I)
# Folders of all images, or of a split: others may be a patient's.
COMMON = re.compile(r"(?<![^/])(?:(?:jpeg)?images|(?:train|val|test)(?:ing|id|idation)?\d*)/", re.I)


def split_of(path):
    """Return the split, "train", "val", "test" or "", that a path's folders or a JSON file's name say."""
    words = SPLIT.findall(path)
    return words[-1].lower() if words else ""


def paths_by_name(download):
    """Return {an image file's name: its paths}."""
    paths = defaultdict(list)
    for path in download.image_names():
        paths[PurePosixPath(path).name].append(path)
    return paths


def name_below(path, split=""):
    """Return a name below images/, in the folder of its split: images/train2017/1.png becomes train/1.png."""
    return PurePosixPath(split or split_of(path), COMMON.sub("", path)).as_posix()


def find_image(paths, name, split):
    """Return (name below images/, path) of the image that the annotations of a split call `name`.

    Raises ValueError unless one file fits best.
    """
    wanted = PurePosixPath(name.replace("\\", "/")).as_posix()
    file = PurePosixPath(wanted).name
    if leaves_folder(wanted) or ":" in name:  # a place on another computer
        wanted = file
    split = split or split_of(wanted)
    same = paths.get(file, [])
    candidates = [path for path in same if split_of(path) == split]
    if not candidates:  # but never of another split, which may use the same names
        candidates = [path for path in same if "" in (split, split_of(path))]
    fitting = [path for path in candidates if path in (wanted, f"images/{wanted}")]
    if not fitting:
        fitting = [path for path in candidates if f"/{path}".endswith(f"/{wanted}")]
    if not fitting:  # another folder, unless both name a patient: patient4/1.png is not patient3/1.png
        below = COMMON.sub("", wanted)
        for path in candidates:
            if below == file or f"/{below}".endswith(f"/{COMMON.sub('', path)}"):
                fitting.append(path)
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} image files fit its name '{name}'")
    return name_below(wanted, split or split_of(fitting[0])), fitting[0]
