"""Decide from all masks of a folder what values other than 0 and 255 mean."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import ndimage

from vlsm.data.images import (
    APART,
    IMPORT_ADVICE,
    READERS,
    ImageError,
    MaskUnion,
    MaskValues,
    colour_distance,
    mask_colour,
    numbers_or_colours,
    open_image,
)
from vlsm.system.console import say_once

SAMPLE = 48  # masks that are looked at before all are
FEW_INSTANCES = 5  # fewer blobs in all_values file may as well be classes
ONE_BLOB = 0.9  # share of instances that are one blob; others were cut apart


def judge_masks(records):
    """Set the masks of binary records anew if the files hold other values, judged by all files together.

    One value beside 0 in all files is the class; numbers 1 to n, each a blob, of which the files hold more or
    fewer, are its instances: both are united, and this is said. Other values are left to the reader, which
    refuses them. Raises ValueError for files whose foregrounds differ in colour.
    """
    usable = [record for record in records if isinstance(record.mask, Path) and not record.problem]
    colours = {}
    odd = False
    for record in random.Random(0).sample(usable, min(SAMPLE, len(usable))):
        try:
            colour = mask_colour(record.mask)
            if colour:
                colours[record.mask] = colour
        except MaskValues:
            odd = True
        except (ImageError, OSError):  # the cache reports why
            pass
    _refuse_other_colours(dict(sorted(colours.items())))
    meaning = _meaning_of_values([record.mask for record in usable]) if odd else None
    if meaning:
        folder = usable[0].mask.parent
        say_once(f"values {folder}", f"'{folder}': {meaning}")
        for record in usable:
            record.mask = MaskUnion((record.mask,), record.image, any_value=True)


def _refuse_other_colours(colours):
    """Raise ValueError if the foregrounds of files, {file: colour}, differ in colour."""
    for file, colour in colours.items():
        first = next(iter(colours))
        if colour_distance(colour, colours[first]) > APART / 2:
            raise ValueError(
                f"The masks of one class have one colour, and '{first}' has {colours[first]}, '{file}' "
                f"{colour}{IMPORT_ADVICE}."
            )


def _meaning_of_values(files):
    """Return in words what the values other than 0 are in all files: one class or instances; else None."""
    with ThreadPoolExecutor(READERS) as pool:
        values_of_files = list(pool.map(_values_and_blobs, files))
    if any(values is None for values, _ in values_of_files):
        return None
    all_values = set().union(*(values for values, _ in values_of_files))
    if len(all_values) == 1:
        return f"its masks hold 0 and {all_values.pop()} alone, which is taken for foreground."
    numbered = all(values == set(range(1, len(values) + 1)) for values, _ in values_of_files)
    blobs = all(are_blobs for _, are_blobs in values_of_files)
    counts = {len(values) for values, _ in values_of_files}
    if numbered and blobs and len(counts) >= 3 and max(counts) >= FEW_INSTANCES:
        return (
            f"its masks hold numbers from 1 to at most {max(counts)}, each a blob: instances of one class, "
            "which are united. If they are classes, name them in dataset.json."
        )
    return None


def _values_and_blobs(file):
    """Return (values of a mask file but 0, or None; whether each number is one blob).

    Of colours on black the values are texts. None: it cannot be read, or holds many colours.
    """
    try:
        pixels = numbers_or_colours(open_image(file))
    except (ImageError, OSError):
        return None, False
    if pixels.ndim == 3:
        codes = np.unique(pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1]))  # rows take far longer
        names = {str((code >> 16, code >> 8 & 255, code & 255)) for code in codes.tolist() if code}
        return (names if len(names) <= 1 else None), False
    values = set(np.unique(pixels).tolist()) - {0}
    # 1 to n: `find_objects` makes a list as long as the largest number
    numbered = pixels.dtype.kind in "ui" and len(values) == max(values, default=0)
    if len(values) > 1 and numbered:
        boxes = ndimage.find_objects(pixels.astype(np.int32))
        pieces = [
            ndimage.label(pixels[box] == n + 1, np.ones((3, 3)))[1] for n, box in enumerate(boxes) if box
        ]
        return values, np.mean(np.array(pieces) == 1) > ONE_BLOB
    return values, True
