"""Pixels and masks: reading whatever formats users have, resizing."""

import numpy as np
from PIL import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def image_files(root):
    """Return the image files below a folder, sorted by path."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)


def read_image(source):
    """Read an image as uint8 RGB `[H, W, 3]`; `source` is a path, or such an array, which is returned as it
    is.

    Palette, grey, RGBA and CMYK images are converted. Deeper ones (16 bit, float) are scaled so that their
    largest value is 255. Raises OSError where the file is missing, truncated or no image.
    """
    if isinstance(source, np.ndarray):
        return source
    with Image.open(source) as image:
        if image.mode.startswith(("I", "F")):
            grey = _to_eight_bits(np.asarray(image))
            return np.repeat(grey[..., None], 3, 2)
        return np.array(image.convert("RGB"))


def read_mask(source):
    """Read a mask as bool `[H, W]`; `source` as in `read_image`.

    Foreground is where the grey value, or any colour channel, is above 127.
    """
    if isinstance(source, np.ndarray):
        return source > 127 if source.dtype == np.uint8 else source
    with Image.open(source) as image:
        if image.mode.startswith(("I", "F")):
            return _to_eight_bits(np.asarray(image)) > 127
        if image.mode in ("L", "1"):
            return np.asarray(image.convert("L")) > 127
        return np.asarray(image.convert("RGB")).max(2) > 127


def _to_eight_bits(values):
    top = max(float(values.max()), 255.0)  # an 8-bit range in a deep file stays as it is
    return (values.clip(0) * (255 / top)).astype(np.uint8)


def mask_image(mask):
    """Return a bool mask `[H, W]` as a Pillow image of 0 and 255."""
    return Image.fromarray(np.asarray(mask).astype(np.uint8) * 255)


def resize_image(image, size):
    """Resize uint8 `[H, W, 3]` to `[size, size, 3]`, bilinear with antialiasing; the aspect ratio is not
    kept.
    """
    return np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))


def resize_mask(mask, size):
    """Resize bool `[H, W]` to uint8 0/1 `[size, size]`, nearest at pixel centres."""
    return np.array(Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.NEAREST))
