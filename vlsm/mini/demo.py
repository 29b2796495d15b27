"""The demo data set: colonoscopy-like pictures generated from a seed, with masks and prompts in MedVLSM's
form.
"""

import numpy as np

from vlsm.data.describe import describe
from vlsm.data.records import Record
from vlsm.mini import paint

SHAPE = (112, 128)  # height, width
COUNTS = {"train": 240, "val": 48, "test": 60}
DESCRIPTIONS = (
    "a growth of tissue that projects from the wall",
    "a small lump in the lining of the colon",
    "an abnormal bumpy mass on the mucosa",
)
# Mean colours of polyps, as a patient's varies: pink, red, pale, brown, yellowish.
TINTS = ((0.86, 0.52, 0.5), (0.74, 0.25, 0.22), (0.9, 0.8, 0.74), (0.5, 0.3, 0.2), (0.85, 0.68, 0.4))
MUCOSA = ((0.78, 0.45, 0.35), (0.7, 0.36, 0.3), (0.82, 0.56, 0.42))


def records(split, seed=0):
    """Return the records of a split, pixels in memory; the same for ever for a seed."""
    offset = sum(list(COUNTS.values())[: list(COUNTS).index(split)])
    return [record(seed, offset + i) for i in range(COUNTS[split])]


def record(seed, index):
    """Return the record of one picture.

    About one in twelve shows no polyp: its mask is empty, and its prompts describe one that is not there.
    """
    rng = np.random.default_rng([seed, index, 11])
    y, x = paint.grid(SHAPE)
    picture, polyps = mucosa(rng, y, x), []
    bare = picture.copy()
    for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        inside = place(rng, polyps, y, x)
        if inside is not None:
            polyps.append(inside)
            paint_polyp(rng, picture, inside, y, x)
    mask = np.any([p > 0 for p in polyps], 0)
    missing = rng.random() < 1 / 12
    finished = finish(rng, bare if missing else picture, y, x)
    prompts = describe(paint.to_uint8(picture), mask, "polyp", DESCRIPTIONS)
    name = f"demo_{index:04d}.png"
    return Record(name, name, finished, np.zeros_like(mask) if missing else mask, prompts, "polyp")


def mucosa(rng, y, x):
    """Paint the gut's wall: colour, folds as dark curved bands, fine vessels."""
    picture = np.empty((*SHAPE, 3), np.float32)
    picture[:] = np.array(MUCOSA[rng.integers(len(MUCOSA))]) + rng.normal(0, 0.04, 3)
    picture *= (1 + 0.08 * paint.noise(rng, SHAPE, 4))[..., None]
    cy, cx = rng.uniform(-0.2, 1.2, 2)
    r = np.hypot(y - cy, x - cx) + 0.05 * paint.noise(rng, SHAPE, 3, 1)
    folds = np.sin(2 * np.pi * r / rng.uniform(0.22, 0.4)) ** 8
    picture *= (1 - rng.uniform(0.15, 0.4) * folds)[..., None]
    vessels = np.exp(-((paint.noise(rng, SHAPE, 5, 2) / 0.06) ** 2))
    paint.blend(picture, (0.6, 0.18, 0.16), 0.2 * vessels)
    if rng.random() < 0.6:  # the lumen, a dark hole
        paint.blend(picture, (0.1, 0.05, 0.04), 0.85 * np.exp(-((np.hypot(y - cy, x - cx) / 0.22) ** 4)))
    return picture


def place(rng, others, y, x):
    """Return the signed field of a blob that keeps clear of the others, or None where no room was found."""
    for _ in range(10):
        radius = np.exp(rng.uniform(np.log(0.08), np.log(0.28)))
        cy, cx = rng.uniform(0.18, 0.82), rng.uniform(0.2, SHAPE[1] / SHAPE[0] - 0.2)
        turn, flat = rng.uniform(0, np.pi), rng.uniform(1, 1.5)
        u, v = (
            (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn),
            (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn),
        )
        inside = paint.blob(rng, v * flat, u, radius, rng.choice([0.05, 0.15, 0.4]))
        if (inside > 0).mean() > 0.008 and not any(((inside > -0.03) & (o > 0)).any() for o in others):
            return inside
    return None


def paint_polyp(rng, picture, inside, y, x):
    """Paint a dome: lit from the lens, darker towards its rim, with a thin shadow and its own speckle."""
    depth = (inside / inside.max()).clip(0, 1)
    tint = np.array(TINTS[rng.integers(len(TINTS))]) + rng.normal(0, 0.03, 3)
    paint.blend(picture, (0.3, 0.12, 0.1), 0.45 * np.exp(-((inside.clip(max=0) / 0.03) ** 2)))
    light = 0.72 + 0.38 * np.sqrt(depth) + 0.06 * paint.noise(rng, SHAPE, 16, 2)
    paint.blend(
        picture, tint * light[..., None], (inside / 0.012 / 2 + 0.5).clip(0, 1) * rng.uniform(0.85, 1)
    )


def finish(rng, picture, y, x):
    """Add the light of the lens, wet highlights, the black surround of the tube, sensor noise."""
    H, W = SHAPE
    ly, lx = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7) * W / H
    picture = picture * (1.12 - 0.5 * np.hypot(y - ly, x - lx) ** 2)[..., None]
    for _ in range(rng.integers(3, 9)):
        cy, cx, s = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9) * W / H, rng.uniform(0.008, 0.022)
        paint.blend(
            picture,
            (1, 1, 0.97),
            np.exp(-(((y - cy) / s) ** 2 + ((x - cx) / (s * rng.uniform(0.6, 2.5))) ** 2)),
        )
    corner = np.maximum(abs(y - 0.5) / 0.5, abs(x - W / H / 2) / (W / H / 2)) + 0.35 * (
        abs(y - 0.5) + abs(x - W / H / 2)
    )
    paint.blend(picture, (0.03, 0.03, 0.035), ((corner - 1.16) / 0.02).clip(0, 1))
    return paint.to_uint8(picture + rng.normal(0, 0.012, picture.shape).astype(np.float32))
