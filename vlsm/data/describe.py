"""Prompts in MedVLSM's templates p0..p9, made from an image and its mask.

Templates: Poudel et al., "Exploring Transfer Learning in Medical Image Segmentation using VLMs" (MIDL 2024).
"""

import numpy as np

SMALL, MEDIUM = 0.08, 0.30  # below these shares of the image's area: small, medium; large above
GREY_SPREAD = 8  # the channels of a grey pixel differ by no more (JPEG's noise)
SPECK = 0.001  # components below this share of the image are not counted
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")
LOCATIONS = tuple(f"{row} {column}".strip() or "center" for row in ROWS for column in COLUMNS)
COLOURS = {
    "red": (190, 50, 45), "pink": (225, 140, 135), "white": (235, 225, 215), "yellow": (215, 180, 80),
    "orange": (215, 125, 55), "brown": (120, 75, 50), "purple": (120, 60, 120), "black": (30, 25, 25),
    "gray": (130, 125, 125),
}  # fmt: skip


def components(mask):
    """Return the 4-connected components of a bool mask, as a list of bool masks, the largest first."""
    if not mask.any():
        return []
    box = tuple(slice(v.min(), v.max() + 1) for v in np.nonzero(mask))  # most masks fill a small part
    rest, found = mask[box].copy(), []
    while rest.any():
        seed = np.zeros_like(rest)
        seed.flat[int(rest.argmax())] = True
        while True:  # grow along rows and columns until nothing is added
            grown = seed.copy()
            for axis in (0, 1):
                for step in (1, -1):
                    grown |= _flood(grown, rest, axis, step)
            if (grown == seed).all():
                break
            seed = grown
        found.append(np.zeros_like(mask))
        found[-1][box] = seed
        rest &= ~seed
    return sorted(found, key=lambda m: -m.sum())


def _flood(seed, allowed, axis, step):
    """Spread `seed` along one direction of an axis, through allowed pixels, as far as it goes."""
    if step < 0:
        return np.flip(_flood(np.flip(seed, axis), np.flip(allowed, axis), axis, 1), axis)
    runs = np.cumsum(~allowed, axis)  # constant within a run of allowed pixels
    last = np.maximum.accumulate(np.where(seed, runs, -1), axis)  # the run in which a seed was last seen
    return allowed & (last == runs)


def location(cy, cx):
    """Return the name of the cell of a 3 x 3 grid that holds a point (in shares of height and width)."""
    return LOCATIONS[3 * min(2, int(3 * cy)) + min(2, int(3 * cx))]


def locations(masks, shape):
    """Name where the components lie: the centres of their boxes on a 3 x 3 grid, joined by commas."""
    names = []
    for m in masks:
        ys, xs = np.nonzero(m)
        names.append(location(*((v.min() + v.max() + 1) / 2 / n for v, n in zip((ys, xs), shape))))
    return ", ".join(names)


def shape_word(mask):
    """Return circle, oval, round or irregular, by how much of its bounding ellipse the mask fills and by the
    ratio of its axes.
    """
    ys, xs = np.nonzero(mask)
    if len(ys) < 2:
        return "round"
    spread = np.linalg.eigvalsh(np.cov(np.stack([ys, xs])) + np.eye(2) / 12)
    ratio = np.sqrt(spread[0] / spread[1])
    # 1 for an ellipse, less for a ragged outline
    filled = len(ys) / (4 * np.pi * np.sqrt(spread[0] * spread[1]))
    if filled < 0.93:
        return "irregular"
    return "circle" if ratio > 0.88 else "round" if ratio > 0.72 else "oval"


def colour_word(image, mask):
    """Name the mask's mean colour; of a grey picture there is none to name."""
    if (np.ptp(image.astype(np.int16), axis=2) <= GREY_SPREAD).all():
        return ""
    mean = image[mask].mean(0)
    return min(COLOURS, key=lambda name: ((mean - COLOURS[name]) ** 2).sum())


def describe(image, mask, word, descriptions=()):
    """Return prompts p0..p9 (p0..p6 without general `descriptions` of the class) for an image `[H, W, 3]` and
    its bool mask.
    """
    found = [m for m in components(mask) if m.mean() >= SPECK]
    if not found:  # saying "no" would give it away
        return {"p0": "", **{f"p{i}": word for i in range(1, 10 if descriptions else 7)}}
    area = mask.mean()
    size = "small" if area < SMALL else "medium" if area < MEDIUM else "large"
    shape, colour, where = shape_word(found[0]), colour_word(image, mask), locations(found, mask.shape)
    number = NUMBERS[len(found)] if len(found) < len(NUMBERS) else "many"
    seen = f"{colour} {shape} {word}".strip()
    p5 = f"{number} {size} {seen}"
    prompts = dict(p0="", p1=word, p2=f"{shape} {word}", p3=seen, p4=f"{size} {seen}", p5=p5)
    prompts["p6"] = f"{p5}, located in {where} of the image"
    if descriptions:
        prompts["p7"] = [f"{word} which is {d}" for d in descriptions]
        prompts["p8"] = [f"{p5} which is {d}" for d in descriptions]
        prompts["p9"] = [f"{p5} which is {d} located in {where} of the image" for d in descriptions]
    return prompts
