"""Prompts in MedVLSM's templates p0..p9, made from an image and its mask.

Templates: Poudel et al., "Exploring Transfer Learning in Medical Image Segmentation using VLMs" (MIDL 2024).
"""

import numpy as np
from scipy import ndimage

SMALL = 0.08  # fraction of the image's area: masks below it are small
MEDIUM = 0.30  # masks below it are medium, others large
GREY_SPREAD = 8  # largest difference between the channels of a grey pixel (JPEG's noise)
SPECK = 0.001  # components below this share of the image are not counted
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LOCATIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
COLOURS = {
    "red": (190, 50, 45), "pink": (225, 140, 135), "white": (235, 225, 215), "yellow": (215, 180, 80),
    "orange": (215, 125, 55), "brown": (120, 75, 50), "purple": (120, 60, 120), "black": (30, 25, 25),
    "gray": (130, 125, 125),
}  # fmt: skip

# The words with which prompts describe what they name, whatever that is
ATTRIBUTES = {*COLOURS, *NUMBERS, *" ".join(LOCATIONS).split(), "small", "medium", "large"}
ATTRIBUTES |= {"circle", "oval", "round", "irregular"}


def components(mask):
    """Return the 4-connected components of a bool mask, as a list of bool masks, the largest first.

    Components of equal size are in the order of their first pixels, row by row.
    """
    labels, count = ndimage.label(mask)
    masks = [labels == label for label in range(1, count + 1)]
    return sorted(masks, key=lambda component: -component.sum())


def locations(masks):
    """Return the places of components on a 3 x 3 grid, joined by commas: the centres of their boxes."""
    names = []
    for mask in masks:
        height, width = mask.shape
        rows, columns = np.nonzero(mask)
        # The centre of the box, in fractions of height and width
        cy = (rows.min() + rows.max() + 1) / 2 / height
        cx = (columns.min() + columns.max() + 1) / 2 / width
        row = min(2, int(3 * cy))
        column = min(2, int(3 * cx))
        names.append(LOCATIONS[3 * row + column])
    return ", ".join(names)


def shape_word(mask):
    """Return circle, oval, round or irregular.

    The mask is compared with the ellipse of equal second moments: the ratio of its axes, and how much of it
    the mask fills.
    """
    rows, columns = np.nonzero(mask)
    area = len(rows)
    if area < 2:
        return "round"
    moments = np.cov(np.stack([rows, columns])) + np.eye(2) / 12  # of the pixels' centres, and of a pixel
    minor, major = np.linalg.eigvalsh(moments)
    filled = area / (4 * np.pi * np.sqrt(minor * major))  # 1 for an ellipse, less for a ragged outline
    ratio = np.sqrt(minor / major)
    if filled < 0.93:
        return "irregular"
    if ratio > 0.88:
        return "circle"
    return "round" if ratio > 0.72 else "oval"


def colour_word(image, mask):
    """Return the name of the mask's mean colour, or "" for a grey image."""
    spread = np.ptp(image.astype(np.int16), axis=2)
    if (spread <= GREY_SPREAD).all():
        return ""
    mean = image[mask].mean(0)
    distances = {name: ((mean - colour) ** 2).sum() for name, colour in COLOURS.items()}
    return min(distances, key=distances.get)


def size_word(mask):
    """Return small, medium or large, by the share of the image that the mask covers."""
    share = mask.mean()
    if share < SMALL:
        return "small"
    return "medium" if share < MEDIUM else "large"


def describe(image, mask, word, descriptions=()):
    """Return prompts p0..p9 of an image `[H, W, 3]` and its bool mask; word: the class.

    descriptions: general ones of the class; without them there are no p7..p9.
    """
    masks = [component for component in components(mask) if component.mean() >= SPECK]
    if not masks:  # the class alone: "no polyp" would give the empty mask away
        count = 10 if descriptions else 7
        prompts = {f"p{i}": word for i in range(count)}
        return dict(prompts, p0="")
    number = NUMBERS[len(masks)] if len(masks) < len(NUMBERS) else "many"
    size = size_word(mask)
    shape = shape_word(masks[0])
    colour = colour_word(image, mask)
    place = f"located in {locations(masks)} of the image"
    look = f"{colour} {shape} {word}".strip()
    full = f"{number} {size} {look}"
    prompts = dict(p0="", p1=word, p2=f"{shape} {word}", p3=look, p4=f"{size} {look}", p5=full)
    prompts["p6"] = f"{full}, {place}"
    if descriptions:
        prompts["p7"] = [f"{word} which is {text}" for text in descriptions]
        prompts["p8"] = [f"{full} which is {text}" for text in descriptions]
        prompts["p9"] = [f"{full} which is {text} {place}" for text in descriptions]
    return prompts
