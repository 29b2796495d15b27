"""Resize images and masks to the side that a network reads."""

import math

import numpy as np
from PIL import Image
from scipy import ndimage


def resize_image(image, size):
    """Resize uint8 `[H, W, 3]` to `[size, size, 3]`, bilinear with antialiasing, whatever its aspect."""
    return np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))


def resize_mask(mask, size):
    """Resize bool, or uint8 0/1/255, `[H, W]` to uint8 `[size, size]`, nearest at pixel centres.

    A component of the foreground that falls between the centres keeps the pixel that it covers most, so that
    no lesion vanishes.
    """
    small = np.array(Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.NEAREST))
    if max(mask.shape) > size and mask.any():
        labels, count = ndimage.label(mask == 1, np.ones((3, 3)))
        kept = Image.fromarray(labels.astype(np.int32, copy=False)).resize((size, size), Image.NEAREST)
        is_lost = np.ones(count + 1, bool)
        is_lost[0] = False
        is_lost[np.asarray(kept)] = False
        if is_lost.any():
            _restore(small, labels, is_lost)
    return small


def _restore(small, labels, is_lost):
    """Set the pixel of `small` that each lost component of `labels` covers most; is_lost: bool `[labels]`."""
    size = len(small)
    height, width = labels.shape
    rows, columns = np.nonzero(is_lost[labels])
    places = rows * size // height * size + columns * size // width
    pairs, areas = np.unique(labels[rows, columns].astype(np.int64) * size**2 + places, return_counts=True)
    pairs = pairs[np.argsort(areas, kind="stable")]
    best = np.zeros(len(is_lost), np.int64)
    best[pairs // size**2] = pairs % size**2  # of equal labels the last counts: the largest area
    small.reshape(-1)[best[is_lost]] = 1


def least_side(mask):
    """Return the side to which an image must be resized for its mask's largest component to be a pixel.

    It is 0 for an empty mask.
    """
    labels, _ = ndimage.label(mask == 1, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    return math.ceil(math.sqrt(mask.size / areas.max())) if len(areas) else 0


def describe_smaller(sides, total, size):
    """Say how many of all masks are below a pixel at `size` pixels; sides: of each its `least_side`."""
    return (
        f"the lesions of {len(sides)} of {total} masks are too small for {size} x {size} pixels, and kept "
        f"as one pixel. At --image-size {max(sides)} each has a pixel, at {int(np.median(sides))} half."
    )


def touches_corners(mask):
    """Tell whether all corners of a mask bool, or uint8 0/1/255, `[H, W]` are foreground."""
    return bool((mask[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all())


def describe_inverted(count, total):
    """Say that masks cover the corners of their images."""
    return f"{count} of {total} masks cover all corners, or have no background: are they inverted?"
