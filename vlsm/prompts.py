"""Which prompt a record is given, and prompts in MedVLSM's templates p0..p9 made from a mask.

Templates: Poudel et al., "Exploring Transfer Learning in Medical Image Segmentation using VLMs" (MIDL 2024).
"""

import re

import numpy as np

SMALL, MEDIUM = 0.08, 0.30  # below these shares of the image's area: small, medium; large above
SPECK = 0.001  # components below this share of the image are not counted
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LOCATIONS = tuple(f"{row} {column}".strip() or "center" for row in ("top", "", "bottom") for column in ("left", "", "right"))
COLOURS = {
    "red": (190, 50, 45), "pink": (225, 140, 135), "white": (235, 225, 215), "yellow": (215, 180, 80), "orange": (215, 125, 55),
    "brown": (120, 75, 50), "purple": (120, 60, 120), "black": (30, 25, 25), "gray": (130, 125, 125),
}  # fmt: skip


def choose(prompts, mode, rng, class_word=None):
    """The text for a record with `prompts` (key -> string or list of strings). mode:

    "random": a key drawn uniformly from all but the first (p0, the empty prompt), then one of its variants; "class": the class word;
    a key (p0..p9); any other text is itself the prompt. rng: numpy Generator. Raises ValueError for a key that is not there.
    """
    if mode == "class":
        if not class_word:
            raise ValueError('--prompts class: these records have no class word (no prompt p1). Give the word itself: --prompts "polyp".')
        return class_word
    if mode == "random":
        keys = list(prompts)[1:] or list(prompts)
        if not keys:
            raise ValueError('--prompts random: these images came without prompts. Give one for all: --prompts "a polyp".')
        key = keys[rng.integers(len(keys))]
    elif re.fullmatch(r"p\d+", mode):
        key = mode
        if key not in prompts:
            known = ", ".join(prompts) or "none"
            raise ValueError(f'--prompts {mode}: there is no such key. Known here: {known}; or "random", "class", or a text of your own.')
    else:
        return mode
    value = prompts[key]
    return value if isinstance(value, str) else value[rng.integers(len(value))]


def prompt_of(record, index, mode, *seed):
    """The prompt of a record, drawn by (seed, index): equal seeds give equal prompts, whatever was drawn before."""
    return choose(record.prompts, mode, np.random.default_rng([*seed, index]), record.class_word)


def class_word(prompts):
    """What p1 names, without where it is seen: "Myocardium of the heart." -> "Myocardium". None without p1."""
    value = prompts.get("p1")
    text = value if isinstance(value, str) or not value else value[0]
    if not text:
        return None
    return (
        re.sub(r"\s+(in|of)\s+(the|a)\s+(heart|cardiac ultrasound|chest x-?ray|breast ultrasound image).*$", "", text, flags=re.I).strip(
            " ."
        )
        or None
    )


def components(mask):
    """The 4-connected components of a bool mask, as a list of bool masks, the largest first."""
    rest, found = mask.copy(), []
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
        found.append(seed)
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
    """The name of the cell of a 3 x 3 grid in which the point (in shares of height and width) lies."""
    return LOCATIONS[3 * min(2, int(3 * cy)) + min(2, int(3 * cx))]


def locations(masks, shape):
    """Where the components lie, by the centre of each one's bounding box on a 3 x 3 grid, joined by commas."""
    names = []
    for m in masks:
        ys, xs = np.nonzero(m)
        names.append(location(*((v.min() + v.max() + 1) / 2 / n for v, n in zip((ys, xs), shape))))
    return ", ".join(names)


def shape_word(mask):
    """circle, oval, round or irregular, by how much of its bounding ellipse the mask fills and by the ratio of its axes."""
    ys, xs = np.nonzero(mask)
    if len(ys) < 2:
        return "round"
    spread = np.linalg.eigvalsh(np.cov(np.stack([ys, xs])) + np.eye(2) / 12)
    ratio = np.sqrt(spread[0] / spread[1])
    filled = len(ys) / (4 * np.pi * np.sqrt(spread[0] * spread[1]))  # 1 for an ellipse, less for a ragged outline
    if filled < 0.93:
        return "irregular"
    return "circle" if ratio > 0.88 else "round" if ratio > 0.72 else "oval"


def colour_word(image, mask):
    mean = image[mask].mean(0)
    return min(COLOURS, key=lambda name: ((mean - COLOURS[name]) ** 2).sum())


def describe(image, mask, word, descriptions=()):
    """Prompts p0..p9 (p0..p6 without general `descriptions` of the class) for an image `[H, W, 3]` and its bool mask."""
    found = [m for m in components(mask) if m.mean() >= SPECK]
    if not found:
        return {"p0": "", **{f"p{i}": word for i in range(1, 10 if descriptions else 7)}}  # saying "no" would give it away
    area = mask.mean()
    size = "small" if area < SMALL else "medium" if area < MEDIUM else "large"
    shape, colour, where = shape_word(found[0]), colour_word(image, mask), locations(found, mask.shape)
    number = NUMBERS[len(found)] if len(found) < len(NUMBERS) else "many"
    p5 = f"{number} {size} {colour} {shape} {word}"
    prompts = dict(p0="", p1=word, p2=f"{shape} {word}", p3=f"{colour} {shape} {word}", p4=f"{size} {colour} {shape} {word}", p5=p5)
    prompts["p6"] = f"{p5}, located in {where} of the image"
    if descriptions:
        prompts["p7"] = [f"{word} which is {d}" for d in descriptions]
        prompts["p8"] = [f"{p5} which is {d}" for d in descriptions]
        prompts["p9"] = [f"{p5} which is {d} located in {where} of the image" for d in descriptions]
    return prompts
