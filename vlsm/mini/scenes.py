"""Procedural scenes with phrases: the task on which the embedded base learns that a prompt says what to
segment.

A scene holds one to four objects that differ in shape, colour, size, texture and place. A phrase names some
attributes; its mask is the union of the objects that have them all, and is empty where none does. Scene `i`
of a seed is the same for ever.
"""

import numpy as np

from vlsm.data.describe import LOCATIONS, location
from vlsm.mini import paint

SIDE = 96
COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.2, 0.65, 0.25), "blue": (0.2, 0.3, 0.85),
    "yellow": (0.9, 0.85, 0.2), "orange": (0.95, 0.55, 0.1), "purple": (0.55, 0.2, 0.65),
    "pink": (0.95, 0.6, 0.7), "brown": (0.45, 0.28, 0.15),
    "white": (0.95, 0.95, 0.93), "black": (0.07, 0.07, 0.08), "gray": (0.5, 0.5, 0.52),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "oval", "ring", "cross", "star", "irregular")
NOUNS = {"oval": ("oval", "ellipse"), "irregular": ("irregular shape", "blob"), "circle": ("circle", "disk")}
# radius, in sides of the picture
SIZES = {"small": (0.07, 0.105), "medium": (0.13, 0.18), "large": (0.21, 0.29)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
NUMBERS = ("zero", "one", "two", "three", "four")
GENERIC = ("object", "thing", "shape")
ATTRIBUTES = ("size", "colour", "texture", "shape", "location")


def field(rng, shape, dy, dx, r):
    """Return the signed field of a shape of radius r, positive inside, about in units of distance."""
    turn = rng.uniform(0, 2 * np.pi)
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    if shape == "circle":
        return r - np.hypot(u, v)
    if shape == "square":
        return 0.85 * r - np.maximum(abs(u), abs(v))
    if shape == "triangle":
        return 0.55 * r - np.maximum(v, abs(u) * 0.866 - v * 0.5)
    if shape == "oval":
        return r * (1 - np.hypot(u / (1.15 * r), v / (rng.uniform(0.5, 0.65) * r))) * 0.6
    if shape == "ring":
        return 0.26 * r - abs(np.hypot(u, v) - 0.8 * r)
    if shape == "cross":
        return np.maximum(
            np.minimum(r - abs(u), 0.32 * r - abs(v)), np.minimum(r - abs(v), 0.32 * r - abs(u))
        )
    if shape == "star":
        return r * (0.72 + 0.3 * np.cos(5 * np.arctan2(v, u))) - np.hypot(u, v)
    return paint.blob(rng, v, u, 0.95 * r, 0.55)


def texture(rng, name, y, x):
    """Return a pattern in -1..1 to brighten and darken an object with."""
    turn, period = rng.uniform(0, np.pi), rng.uniform(0.05, 0.08)
    u, v = (x * np.cos(turn) + y * np.sin(turn)) / period, (y * np.cos(turn) - x * np.sin(turn)) / period
    if name == "striped":
        return np.sign(np.sin(np.pi * u))
    if name == "dotted":
        return np.where(np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3, 1.0, -0.4)
    if name == "checkered":
        return np.sign(np.sin(np.pi * u) * np.sin(np.pi * v))
    return np.zeros_like(u)


def draw(seed, index, side=SIDE):
    """Draw scene `index` of `seed`: picture uint8 `[side, side, 3]` and its objects, dictionaries of
    attributes with a bool `mask`.
    """
    rng = np.random.default_rng([seed, index])
    shape = (side, side)
    y, x = paint.grid(shape)
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = (
        rng.uniform(0.1, 0.9, 3)
        if rng.random() < 0.7
        else np.array((0.75, 0.45, 0.4)) * rng.uniform(0.6, 1.2)
    )
    picture += (
        rng.uniform(0.02, 0.12)
        * paint.noise(rng, shape, rng.integers(2, 8))[..., None]
        * rng.uniform(0.3, 1, 3).astype(np.float32)
    )
    objects, shared = [], {}
    if rng.random() < 0.4:  # all of one colour, or of one shape: then that does not tell them apart
        key, values = (("colour", list(COLOURS)), ("shape", SHAPES))[rng.integers(2)]
        shared = {key: rng.choice(values)}
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.1, 0.4, 0.3, 0.2])):
        thing = place(rng, objects, shared)
        if thing is not None:
            objects.append(thing)
            paint_object(rng, picture, thing, y, x)
    for i, thing in enumerate(objects):  # later objects lie on top
        for above in objects[i + 1 :]:
            thing["mask"] &= ~above["mask"]
    shade = 1 + rng.uniform(0, 0.35) * ((y - 0.5) * rng.normal() + (x - 0.5) * rng.normal())
    picture *= shade[..., None]
    picture += rng.uniform(0, 0.03) * rng.standard_normal(picture.shape, dtype=np.float32)
    return paint.to_uint8(picture), [t for t in objects if t["mask"].sum() >= 20]


def place(rng, others, shared):
    """Return the attributes of a new object that hardly touches the others, or None where no room was found;
    `shared` ones are given.
    """
    size = rng.choice(list(SIZES))
    r = rng.uniform(*SIZES[size])
    for _ in range(12):
        cy, cx = rng.uniform(0.7 * r, 1 - 0.7 * r, 2)
        if all(np.hypot(cy - o["cy"], cx - o["cx"]) > 0.95 * (r + o["r"]) for o in others):
            drawn = dict(
                colour=rng.choice(list(COLOURS)),
                texture=rng.choice(TEXTURES, p=[0.4, 0.2, 0.2, 0.2]),
                shape=rng.choice(SHAPES),
            )
            return {**drawn, **shared, "size": size, "location": location(cy, cx), "cy": cy, "cx": cx, "r": r}
    return None


def paint_object(rng, picture, thing, y, x):
    """Paint the object and set its `mask`.

    Soft edges, shading and a drifting colour keep edges from being a giveaway.
    """
    side, reach = len(y), 1.7 * thing["r"]  # the window that holds any outline of that radius
    window = tuple(
        slice(max(0, int((c - reach) * side)), int((c + reach) * side) + 1)
        for c in (thing["cy"], thing["cx"])
    )
    y, x = y[window], x[window]
    inside = field(rng, thing["shape"], y - thing["cy"], x - thing["cx"], thing["r"])
    thing["mask"] = np.zeros((side, side), bool)
    thing["mask"][window] = inside > 0
    colour = np.array(COLOURS[thing["colour"]]) + rng.normal(0, 0.04, 3)
    relief = 1 + rng.uniform(0, 0.3) * ((thing["cy"] - y) + (thing["cx"] - x)) / thing["r"]
    relief = (
        relief
        + rng.uniform(0.12, 0.3) * texture(rng, thing["texture"], y, x)
        + 0.05 * paint.noise(rng, y.shape, 6, 1)
    )
    soft = rng.uniform(0.003, 0.02)
    paint.blend(
        picture[window],
        colour * relief[..., None],
        ((inside / soft) / 2 + 0.5).clip(0, 1) * rng.uniform(0.85, 1),
    )


def matching(objects, wanted):
    return [o for o in objects if all(o[k] == v for k, v in wanted.items())]


def union(objects, side=SIDE):
    return np.any([o["mask"] for o in objects], 0) if objects else np.zeros((side, side), bool)


def phrase(rng, wanted, count):
    """Return words for the attributes `wanted`, which `count` objects have (0: for what is not there)."""
    noun = wanted.get("shape") or rng.choice(GENERIC)
    noun = str(rng.choice(NOUNS.get(noun, (noun,))))
    words = [wanted[k] for k in ("size", "colour", "texture") if k in wanted] + [noun]
    if count > 1 and rng.random() < 0.5:
        words[-1] += "es" if noun.endswith("s") else "s"
        words.insert(0, NUMBERS[count] if rng.random() < 0.5 else "the")
    else:
        words.insert(0, str(rng.choice(["", "", "the", "a", "one"])))
    text = " ".join(w for w in words if w)
    if "location" in wanted:
        where = wanted["location"]
        located = f", located in {where} of the image"
        text += str(rng.choice([located, f" in the {where}", f" at the {where}", f" on the {where}"]))
    return text


def describe(rng, objects, target, first, more):
    """Return a phrase that names attribute `first` of the target and `more` others drawn at random, and all
    objects that it fits.
    """
    others = [k for k in rng.permutation(ATTRIBUTES) if k != first]
    wanted = {k: target[k] for k in [first, *others[:more]]}
    found = matching(objects, wanted)
    return phrase(rng, wanted, len(found)), found


def absent(rng, objects):
    """Return a phrase that fits no object of the scene: most often one's own with an attribute changed."""
    choices = dict(size=list(SIZES), colour=list(COLOURS), texture=TEXTURES, shape=SHAPES, location=LOCATIONS)
    while True:
        base = (
            rng.choice(objects)
            if objects and rng.random() < 0.7
            else {k: rng.choice(v) for k, v in choices.items()}
        )
        keys = list(rng.permutation(ATTRIBUTES)[: rng.integers(1, 4)])
        wanted = {k: str(base[k]) for k in keys}
        wanted[keys[0]] = str(rng.choice(choices[keys[0]]))
        if not matching(objects, wanted):
            return phrase(rng, wanted, 0)


def sample(seed, index, side=SIDE):
    """Return a training sample: picture, three phrases and their masks bool `[3, side, side]`.

    The first two phrases are of two objects (where there are two) and name an attribute in which these
    differ, half the time that one alone, so that each attribute must be listened to; the third is of nothing
    in the scene as often as not.
    """
    picture, objects = draw(seed, index, side)
    rng = np.random.default_rng([seed, index, 1])
    rng.shuffle(objects)
    one, other = (objects[0], objects[1 % len(objects)]) if objects else (None, None)
    differing = [k for k in ATTRIBUTES if objects and one[k] != other[k]] or ATTRIBUTES
    first = rng.choice(differing)
    phrases, masks = [], []
    for slot in range(3):
        if not objects or (slot == 2 and rng.random() < 0.5):
            text, found = absent(rng, objects), []
        else:
            target = (one, other, objects[rng.integers(len(objects))])[slot]
            more = rng.choice(5, p=[0.5, 0.2, 0.15, 0.1, 0.05])
            text, found = describe(rng, objects, target, first if slot < 2 else rng.choice(ATTRIBUTES), more)
        phrases.append(text)
        masks.append(union(found, side))
    return picture, phrases, np.stack(masks)


def distinct_pair(seed, index, fewest=2, side=SIDE):
    """Return, for the test of listening, a picture, and (phrase, mask) of two objects that their phrases, of
    `fewest` to five attributes, tell apart from all others in the scene; None for scenes without.
    """
    picture, objects = draw(seed, index, side)
    rng = np.random.default_rng([seed, index, 2])
    rng.shuffle(objects)
    pairs = []
    for target in objects:
        for _ in range(20):
            text, found = describe(rng, objects, target, rng.choice(ATTRIBUTES), rng.integers(fewest - 1, 5))
            if len(found) == 1:
                pairs.append((text, target["mask"]))
                break
    return (picture, *pairs[:2]) if len(pairs) >= 2 else None
