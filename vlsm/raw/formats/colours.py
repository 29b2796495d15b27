"""Masks in colours: images/ beside masks/ or labels/ with files of equal paths, and each class's colour."""

import re

import numpy as np

from vlsm.data.images import EXTENSIONS, FEW_NUMBERS, colour_distance, common_colour, count_colours
from vlsm.raw.download import LabelledImage
from vlsm.raw.formats.label_maps import checked_class
from vlsm.raw.formats.paths import name_below

IMAGE = rf"(?P<stem>.+)(?:{'|'.join(EXTENSIONS)})"
FORM = '--classes "polyp=255,0,0;tool=0,255,0"'
BACKGROUND = ""  # the class of black
BLACK = (0, 0, 0)  # background, unless it is a class's colour
TOLERANCE = 48  # of each channel; compression changes colours
MOST_UNKNOWN = 0.005  # of an image; compression leaves a few pixels of other colours along outlines


def parse_classes(text):
    """Return {class in words: (red, green, blue)} of "polyp=255,0,0;tool=0,255,0". Raises ValueError."""
    pattern = r"(.+)=\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*"
    return class_colours(text.strip("; ").split(";"), pattern, FORM)


def class_colours(lines, pattern, source):
    """Return {class in words: (red, green, blue)} of lines of a pattern with these four groups.

    Raises ValueError, which names the `source`, for another line, or two equal classes or colours.
    """
    classes = {}
    for line in lines:
        match = re.fullmatch(pattern, line)
        if not match:
            raise ValueError(f"{source}: '{line}' is no class with its colour.")
        word = checked_class(match[1])
        colour = tuple(int(number) for number in match.groups()[1:])
        if max(colour) > 255 or word in classes or colour in classes.values():
            raise ValueError(f"{source}: '{line}' exceeds 255, or has the class or colour of another.")
        classes[word] = colour
    return classes


def colour_masks(pixels, classes, tolerance=TOLERANCE, most_unknown=MOST_UNKNOWN):
    """Return {class: mask} of pixels uint8 `[H, W, 3]`: each pixel belongs to the nearest colour.

    classes: as `class_colours` returns them. Raises ValueError if a colour farther than `tolerance` from all
    has more than a share `most_unknown` of the pixels.
    """
    named = classes if BLACK in classes.values() else {BACKGROUND: BLACK, **classes}
    distances = [colour_distance(pixels, colour) for colour in named.values()]
    nearest = np.argmin(distances, 0)  # of equally near ones the background
    unknown = pixels[np.min(distances, 0) > tolerance]  # [n, 3]
    flat = count_colours(pixels) <= len(named) + FEW_NUMBERS  # without noise
    if len(unknown):
        colour = common_colour(unknown)
        count = (colour_distance(unknown, colour) <= 16).sum()
        if flat or count > most_unknown * nearest.size:
            raise ValueError(f"{count} pixels have a colour like {colour}, which is no class's")
    return {word: nearest == number for number, word in enumerate(named) if word != BACKGROUND}


def read(download, classes=None):
    """Yield the images whose masks are in colours. classes: as `parse_classes` returns them.

    Raises ValueError without classes.
    """
    if not classes:
        raise ValueError(f"masks-from-colours needs the colour of each class: {FORM}")
    images = download.by_stem(rf"images/{IMAGE}", with_place=True)
    masks = download.by_stem(rf"(?:masks|labels)/{IMAGE}", with_place=True)
    for _, image, mask in download.join(images, masks):
        with download.skipping(mask):
            masks_of_image = colour_masks(download.image(mask), classes)
            yield LabelledImage(name_below(image), image, masks_of_image)
