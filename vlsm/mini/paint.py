"""Painting primitives that the scene generator and the demo share: noise, shapes as signed fields, blending.

Numpy, float32 in 0..1.
"""

import numpy as np
from PIL import Image


def noise(rng, shape, cells, octaves=3):
    """Return a smooth random field `shape` (H, W) of mean about 0 and amplitude about 1, `cells` bumps
    across, finer octaves at half strength.
    """
    H, W = shape
    field = np.zeros(shape, np.float32)
    for octave in range(octaves):
        n = max(2, int(cells * 2**octave))
        coarse = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
        field += np.asarray(coarse.resize((W, H), Image.BICUBIC)) / 2**octave
    return field


def grid(shape):
    """Return pixel-centre coordinates y, x `[H, W]`, in units of the shorter side, from 0."""
    H, W = shape
    y, x = np.mgrid[:H, :W].astype(np.float32)
    return (y + 0.5) / min(shape), (x + 0.5) / min(shape)


def blob(rng, dy, dx, radius, wobble):
    """Return the signed field, positive inside, of a star-shaped blob around dy = dx = 0 whose outline
    wobbles by a share of its radius.
    """
    angle, r = np.arctan2(dy, dx), np.hypot(dy, dx)
    outline = np.ones_like(r)
    for k in range(2, 6):
        outline += wobble / k * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return radius * np.maximum(outline, 0.3) - r


def blend(picture, colour, alpha):
    """Paint `colour` (`[3]` or `[H, W, 3]`) over the picture `[H, W, 3]`, in place, by the weight `alpha`
    `[H, W]`.
    """
    picture += alpha[..., None] * (np.asarray(colour, np.float32) - picture)


def to_uint8(picture):
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
