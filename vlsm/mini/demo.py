"""The demo data set: colonoscopy-like images generated from a seed, of polyps and of an instrument's tip.

Masks are label maps, and prompts are given for each class, as in a dataset.json. Images are float32
`[H, W, 3]` in 0..1 while they are painted. A signed field `[H, W]` is positive inside a shape. The order of
random draws is fixed: another order would be another data set.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from vlsm.data.images import READERS, LabelMask
from vlsm.data.records import Record

SHAPE = (112, 128)  # height, width
ASPECT = SHAPE[1] / SHAPE[0]
_ROWS, _COLUMNS = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.float32)
Y = (_ROWS + 0.5) / SHAPE[0]  # pixel centres [H, W], in units of the height
X = (_COLUMNS + 0.5) / SHAPE[0]
COUNTS = {"train": 200, "val": 40, "test": 60}
# What a dataset.json beside the label maps would hold
LABELS = {"polyp": 1, "instrument": 2}
PROMPTS = {
    "polyp": ["polyp", "a polyp", "the polyp on the wall of the colon"],
    "instrument": ["instrument", "an instrument", "the tip of an instrument"],
}
CONTENTS = {"polyp": 0.4, "instrument": 0.25, "polyp, instrument": 0.35}  # shares of the images
# Mean colours of polyps, which vary between patients: pink, red, pale, brown, yellowish.
TINTS = ((0.86, 0.52, 0.5), (0.74, 0.25, 0.22), (0.9, 0.8, 0.74), (0.5, 0.3, 0.2), (0.85, 0.68, 0.4))
METAL = ((0.62, 0.64, 0.68), (0.45, 0.48, 0.52), (0.75, 0.76, 0.74))
MUCOSA = ((0.78, 0.45, 0.35), (0.7, 0.36, 0.3), (0.82, 0.56, 0.42))
VESSEL = (0.6, 0.18, 0.16)
LUMEN = (0.1, 0.05, 0.04)
SHADOW = (0.3, 0.12, 0.1)
HIGHLIGHT = (1, 1, 0.97)
SURROUND = (0.03, 0.03, 0.035)


def records(split):
    """Return the records of a split, pixels in memory."""
    names = list(COUNTS)
    first = sum(COUNTS[name] for name in names[: names.index(split)])
    with ThreadPoolExecutor(READERS) as pool:
        by_image = pool.map(image_records, range(first, first + COUNTS[split]))
        return [record for rows in by_image for record in rows]


def image_records(index):
    """Return a record for each class in an image: they share its label map."""
    image, labels = draw(np.random.default_rng([0, index, 11]))
    name = f"demo_{index:04d}.png"
    rows = []
    for word, number in LABELS.items():
        if (labels == number).any():
            prompts = {"p0": "", "p1": PROMPTS[word]}
            rows.append(Record(name, f"{word}/{name}", image, LabelMask(labels, number), prompts, word))
    return rows


def draw(rng):
    """Return an image uint8 `[H, W, 3]` and its label map uint8 `[H, W]`."""
    image = mucosa(rng)
    labels = np.zeros(SHAPE, np.uint8)
    content = rng.choice(list(CONTENTS), p=list(CONTENTS.values()))
    if "polyp" in content:
        polyps = []
        count = rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])
        for _ in range(count):
            field = place(rng, polyps)
            if field is not None:
                polyps.append(field)
                paint_polyp(rng, image, field)
                labels[field > 0] = LABELS["polyp"]
    if "instrument" in content:
        field, across = instrument(rng)
        paint_instrument(rng, image, field, across)
        labels[field > 0] = LABELS["instrument"]  # it lies over the polyps
    return finish(rng, image), labels


def mucosa(rng):
    """Paint the wall of the gut: colour, folds as dark curved bands, fine vessels, perhaps the lumen."""
    image = np.empty((*SHAPE, 3), np.float32)
    colour = np.array(MUCOSA[rng.integers(len(MUCOSA))])
    image[:] = colour + rng.normal(0, 0.04, 3)
    image *= channels(1 + 0.08 * noise(rng, 4))
    cy, cx = rng.uniform(-0.2, 1.2, 2)
    r = np.hypot(Y - cy, X - cx)
    bent_r = r + 0.05 * noise(rng, 3, octaves=1)
    period = rng.uniform(0.22, 0.4)
    folds = np.sin(2 * np.pi * bent_r / period) ** 8
    darkness = rng.uniform(0.15, 0.4)
    image *= channels(1 - darkness * folds)
    vessels = bell(noise(rng, 5, octaves=2) / 0.06)
    blend(image, VESSEL, 0.2 * vessels)
    if rng.random() < 0.6:
        hole = np.exp(-((r / 0.22) ** 4))
        blend(image, LUMEN, 0.85 * hole)
    return image


def place(rng, others):
    """Return the signed field of a blob apart from the others, or None if ten trials find no room."""
    for _ in range(10):
        field = random_blob(rng)
        inside = field > 0
        surroundings = field > -0.03
        overlaps = any((surroundings & (other > 0)).any() for other in others)
        if inside.mean() > 0.008 and not overlaps:
            return field
    return None


def random_blob(rng):
    """Return the signed field of a blob of random place, size, direction and outline."""
    log_radius = rng.uniform(np.log(0.08), np.log(0.28))
    cy = rng.uniform(0.18, 0.82)
    cx = rng.uniform(0.2, ASPECT - 0.2)
    angle = rng.uniform(0, np.pi)
    flattening = rng.uniform(1, 1.5)
    wobble = rng.choice([0.05, 0.15, 0.4])
    dy = Y - cy
    dx = X - cx
    cos = np.cos(angle)
    sin = np.sin(angle)
    along = dx * cos + dy * sin
    across = dy * cos - dx * sin
    return blob(rng, across * flattening, along, np.exp(log_radius), wobble)


def blob(rng, dy, dx, radius, wobble):
    """Return the signed field of a star-shaped blob around dy = dx = 0; wobble: how far its outline varies,
    as a share of the radius.
    """
    angle = np.arctan2(dy, dx)
    r = np.hypot(dy, dx)
    outline = np.ones_like(r)
    for k in range(2, 6):
        amplitude = wobble / k * rng.normal()
        phase = rng.uniform(0, 2 * np.pi)
        outline += amplitude * np.cos(k * angle + phase)
    outline = np.maximum(outline, 0.3)
    return radius * outline - r


def paint_polyp(rng, image, field):
    """Paint a dome: lit from the lens, darker towards its rim, with a thin shadow and its own speckle."""
    tint = np.array(TINTS[rng.integers(len(TINTS))])
    tint = tint + rng.normal(0, 0.03, 3)
    cast_shadow(image, field)
    height = (field / field.max()).clip(0, 1)
    speckle = noise(rng, 16, octaves=2)
    light = 0.72 + 0.38 * np.sqrt(height) + 0.06 * speckle
    opacity = rng.uniform(0.85, 1)
    blend(image, tint * channels(light), soft_inside(field) * opacity)


def cast_shadow(image, field):
    """Darken the wall close to a shape."""
    beyond_rim = field.clip(max=0)
    blend(image, SHADOW, 0.45 * bell(beyond_rim / 0.03))


def soft_inside(field):
    """Return the weight `[H, W]` of a shape: 1 inside, with a blurred edge."""
    return (field / 0.012 / 2 + 0.5).clip(0, 1)


def instrument(rng):
    """Return the signed field of a rod from the image's border, and the distance from its axis."""
    angle = rng.uniform(0, 2 * np.pi)
    radius = rng.uniform(0.045, 0.075)
    tip_y = rng.uniform(0.3, 0.7)
    tip_x = rng.uniform(0.3, 0.7) * ASPECT
    dy = Y - tip_y
    dx = X - tip_x
    along = dx * np.cos(angle) + dy * np.sin(angle)
    across = dy * np.cos(angle) - dx * np.sin(angle)
    beyond_tip = along.clip(max=0)  # the tip is round
    return radius - np.hypot(across, beyond_tip), across


def paint_instrument(rng, image, field, across):
    """Paint a rod of metal: bright along its axis, dark towards its sides, with a thin shadow."""
    cast_shadow(image, field)
    metal = np.array(METAL[rng.integers(len(METAL))])
    light = 0.55 + 0.6 * bell(across / field.max() / 0.6) + 0.05 * noise(rng, 16, octaves=2)
    blend(image, metal * channels(light), soft_inside(field))


def finish(rng, image):
    """Add the light of the lens, wet highlights, the black surround and sensor noise; return uint8."""
    image = image * channels(lens_light(rng))
    highlights = rng.integers(3, 9)
    for _ in range(highlights):
        blend(image, HIGHLIGHT, highlight(rng))
    blend(image, SURROUND, surround())
    sensor_noise = rng.normal(0, 0.012, image.shape)
    return to_uint8(image + sensor_noise.astype(np.float32))


def lens_light(rng):
    """Return the brightness `[H, W]` around a random bright point."""
    cy = rng.uniform(0.3, 0.7)
    cx = rng.uniform(0.3, 0.7) * ASPECT
    r = np.hypot(Y - cy, X - cx)
    return 1.12 - 0.5 * r**2


def highlight(rng):
    """Return the weight `[H, W]` of a small bright spot."""
    cy = rng.uniform(0.1, 0.9)
    cx = rng.uniform(0.1, 0.9) * ASPECT
    height = rng.uniform(0.008, 0.022)
    width = height * rng.uniform(0.6, 2.5)
    dy = (Y - cy) / height
    dx = (X - cx) / width
    return np.exp(-(dy**2 + dx**2))


def surround():
    """Return the weight `[H, W]` of the tube's black surround: the image's corners, cut off."""
    dy = abs(Y - 0.5)
    dx = abs(X - ASPECT / 2)
    side = np.maximum(dy / 0.5, dx / (ASPECT / 2))
    corner = side + 0.35 * (dy + dx)
    return ((corner - 1.16) / 0.02).clip(0, 1)


def noise(rng, cells, octaves=3):
    """Return a smooth random field `[H, W]` of mean about 0 and amplitude about 1: `cells` bumps across, each
    finer octave at half the strength.
    """
    height, width = SHAPE
    field = np.zeros(SHAPE, np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        coarse = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
        smooth = coarse.resize((width, height), Image.BICUBIC)
        field += np.asarray(smooth) / 2**octave
    return field


def bell(x):
    """Return exp(-x^2): 1 at 0, near 0 beyond 2."""
    return np.exp(-(x**2))


def channels(values):
    """Return values `[H, W]` as `[H, W, 1]`, to be multiplied with an image."""
    return values[..., None]


def blend(image, colour, alpha):
    """Paint `colour` (`[3]` or `[H, W, 3]`) over the image, in place, by the weight `alpha` `[H, W]`."""
    colour = np.asarray(colour, np.float32)
    image += channels(alpha) * (colour - image)


def to_uint8(image):
    """Round an image in 0..1 to uint8."""
    levels = image.clip(0, 1) * 255 + 0.5
    return levels.astype(np.uint8)
