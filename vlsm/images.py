"""Pixels: reading whatever picture formats users have, resizing, and the base's normalisation."""

from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def picture_files(root):
    """The picture files below a folder, sorted by path."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)


def leaves_folder(name):
    """Whether a file's name, from an annotation file or a download, leads out of the folder that it is meant for, on any system."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in str(name)


def read_image(source):
    """A picture as uint8 RGB `[H, W, 3]`; `source` is a path, or such an array, which is returned as it is.

    Palette, grey, RGBA and CMYK pictures are converted. Deeper ones (16 bit, float) are scaled so that their largest value is 255.
    Raises OSError where the file is missing, truncated or no picture.
    """
    if isinstance(source, np.ndarray):
        return source
    with Image.open(source) as picture:
        if picture.mode.startswith(("I", "F")):
            grey = _to_eight_bits(np.asarray(picture))
            return np.repeat(grey[..., None], 3, 2)
        return np.array(picture.convert("RGB"))


def read_mask(source):
    """A mask as bool `[H, W]`: foreground where the grey value, or any colour channel, is above 127. `source` as in `read_image`."""
    if isinstance(source, np.ndarray):
        return source > 127 if source.dtype == np.uint8 else source
    with Image.open(source) as picture:
        if picture.mode.startswith(("I", "F")):
            return _to_eight_bits(np.asarray(picture)) > 127
        if picture.mode in ("L", "1"):
            return np.asarray(picture.convert("L")) > 127
        return np.asarray(picture.convert("RGB")).max(2) > 127


def _to_eight_bits(values):
    top = max(float(values.max()), 255.0)  # an 8-bit range in a deep file stays as it is
    return (values.clip(0) * (255 / top)).astype(np.uint8)


def resize_image(image, size):
    """uint8 `[H, W, 3]` -> `[size, size, 3]`, bilinear with antialiasing; the aspect ratio is not kept (as published)."""
    return np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))


def resize_mask(mask, size):
    """bool `[H, W]` -> uint8 0/1 `[size, size]`, nearest at pixel centres."""
    return np.array(Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.NEAREST))


def normalise(pixels, out=None, mean=MEAN, std=STD):
    """uint8 (or float 0..255) `[B, 3, H, W]` -> float32 `pixel_values`, by a mean and standard deviation (ImageNet's) of values to 1.

    `out`: memory to write to. A large batch's fresh memory costs a CPU more than the arithmetic, which goes image by image there, that
    both steps find it in the cache.
    """
    std = torch.tensor(std, device=pixels.device)
    scale, shift = (1 / (255 * std))[:, None, None], (-torch.tensor(mean, device=pixels.device) / std)[:, None, None]
    out = torch.empty(pixels.shape, device=pixels.device) if out is None else out
    for source, target in zip(pixels, out) if pixels.device.type == "cpu" else [(pixels, out)]:
        torch.mul(source, scale, out=target).add_(shift)
    return out
