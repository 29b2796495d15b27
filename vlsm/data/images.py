"""Pixels and masks: the one reader of each, for whatever formats users have; resizing.

Every image is read upright (EXIF orientation applied), so that a mask lies on it as viewers show it.
"""

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlsm.system.console import say_once

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
GREY_FROM, GREY_TO = 32, 223  # of 255: between these ends a value is neither background nor foreground
# A grey value, and all of them, count as noise below these shares of the image and of the foreground.
ONE_VALUE, ALL_VALUES = (5e-4, 0.02), (5e-3, 0.2)
NOT_FINITE = "it holds NaN or infinite values"
LFS_POINTER = b"version https://git-lfs"


class ImageError(ValueError):
    """A file that holds no image, or no mask, that can be used. `reason`: why, without the file's name."""

    def __init__(self, name, reason):
        super().__init__(f"'{name}' cannot be used: {reason}.")
        self.reason = reason


class NeedsPackage(ImageError):
    """A file that only an optional package reads."""


def image_files(root):
    """Return the image files below a folder, sorted by path; hidden files and folders are left out."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def open_image(source, name=None):
    """Return the first frame of an image as Pillow has it, upright.

    source: a path, or a file's bytes, which `name` then names in messages. Raises FileNotFoundError, or
    ImageError where the file is damaged, too large or no image.
    """
    name, data = name or source, source if isinstance(source, bytes) else None
    try:
        with Image.open(source if data is None else io.BytesIO(data)) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                say_once(
                    "frames", f"'{name}' holds {frames} frames; the first one is read, here and elsewhere."
                )
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        if Path(str(name)).suffix.lower() in (".tif", ".tiff") and not isinstance(
            error, (MemoryError, IsADirectoryError, PermissionError)
        ):
            data = data or Path(source).read_bytes()
            if data[:2] in (b"II", b"MM"):
                return Image.fromarray(read_tiff(data, name))
        raise ImageError(name, _reason(error, data, source)) from error


def _reason(error, data, source):
    """Return in words why Pillow could not read a file."""
    if isinstance(error, (IsADirectoryError, PermissionError)):
        return error.strerror.lower()
    text, head = str(error), data
    if head is None:
        with open(source, "rb") as file:
            head = file.read(64)
    if head.startswith(LFS_POINTER):
        return "it is a pointer of git LFS, not the file itself (git lfs pull fetches it)"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
    if isinstance(error, MemoryError):
        return "it claims more pixels than memory holds"
    if "cannot identify" in text:
        return "no picture" if head else "an empty file"
    known = re.search("truncated|broken|corrupt|incomplete|not enough|marker|decod", text)
    return "truncated or damaged" if known else f"truncated or damaged ({type(error).__name__}: {text[:80]})"


def read_tiff(data, name):
    """Return the 8-bit pixels of a TIFF's bytes, `[H, W]` or `[H, W, C]`: for those that Pillow refuses.

    Raises NeedsPackage where tifffile is not installed, ImageError for a file that is damaged or deeper.
    """
    try:
        import tifffile
    except ImportError:
        raise NeedsPackage(name, "it is a TIFF that Pillow does not read; pip install tifffile") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            if max(sum(page.databytecounts), page.size / 1000) > len(data):
                raise ValueError("its strips claim more bytes than it has")
            values = np.asarray(page.asarray())
            channels_first = values.ndim == 3 and page.planarconfig == 2
    except Exception as error:  # tifffile's and the decoders' own
        raise ImageError(name, f"truncated or damaged TIFF ({str(error)[:80]})") from error
    if values.dtype != np.uint8:
        raise ImageError(name, f"TIFF of {values.dtype}, other than 8 bits, that Pillow does not read")
    return np.moveaxis(values, 0, -1) if channels_first else values


def read_image(source, name=None):
    """Read an image as uint8 RGB `[H, W, 3]`; a `source` that is such an array is returned as it is.

    Palette, grey, RGBA and CMYK images are converted. Deeper ones: values from 0 to 1 are stretched to 255,
    signed ones (CT) from their least to their largest, others so that the largest is 255; what stays within
    0..255 is kept. source, name, errors: as `open_image`; ImageError for NaN or infinity.
    """
    if isinstance(source, np.ndarray):
        return source
    image = open_image(source, name)
    if image.mode.startswith(("I", "F")):
        return np.repeat(_eight_bits(np.asarray(image), name or source)[..., None], 3, 2)
    return np.array(image.convert("RGB"))


def _eight_bits(values, name):
    if not np.isfinite(values).all():
        raise ImageError(name, NOT_FINITE)
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return ((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    top = 1.0 if values.dtype.kind == "f" and high <= 1 else max(high, 255.0)
    return (values * (255 / top)).astype(np.uint8)


def read_mask(source, name=None):
    """Read a mask as bool `[H, W]`; of an array: bool, or foreground above 127.

    Foreground is white (255, 65535), any bright colour, or 1; of a picture in one colour, what is opaque. A
    palette counts by its colours, or by its numbers where the colours are not those of a mask. Raises
    FileNotFoundError, or ImageError, which names the values, where there are others than two and a little
    noise of compression or smoothing.
    """
    if isinstance(source, np.ndarray):
        return source > 127 if source.dtype == np.uint8 else source
    image = open_image(source, name)
    if image.mode == "P":
        colours, numbers = np.asarray(image.convert("RGB")).max(2), np.asarray(image)
        return _foreground(
            numbers if len(_grey_values(colours)) and numbers.max() <= 1 else colours, name or source
        )
    if image.mode.startswith(("I", "F")):
        return _foreground(np.asarray(image), name or source)
    if not image.mode.upper().endswith("A"):
        values = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        return _foreground(values if values.ndim == 2 else values.max(2), name or source)
    rgba = np.asarray(image.convert("RGBA"))
    values, alpha = rgba[..., :3].max(2), rgba[..., 3]
    seen = values[alpha > 0]
    if alpha.min() < 255 and (not seen.size or seen.min() == seen.max()):  # a stencil
        return _foreground(alpha, name or source)
    return _foreground(np.where(alpha > 127, values, 0), name or source)


def _foreground(values, name):
    """Return the bool mask of numbers `[H, W]`. Raises ImageError unless they are those of a mask."""
    if not np.isfinite(values).all():
        raise ImageError(name, NOT_FINITE)
    if values.min() >= 0 and values.max() <= 1 and not (values % 1).any():
        return values > 0
    full = 1 if values.max() <= 1 else 255 if values.max() <= 255 else 65535
    scaled = values if full == 255 else values * (255 / full)
    grey = _grey_values(scaled) if values.min() >= 0 else np.unique(scaled)
    if scaled.max() < GREY_FROM and (scaled > 0).mean() > ONE_VALUE[0]:  # class numbers
        grey = np.unique(scaled[scaled > 0])[::-1]
    if len(grey):
        some = ", ".join(f"{float(v) * full / 255:.4g}" for v in grey[:6])
        raise ImageError(
            name,
            f"a mask holds 0 and 255, or 0 and 1, and this one also {some}{', ...' if len(grey) > 6 else ''}"
            "; make a mask of each class",
        )
    return values > full / 2


def _grey_values(values):
    """Return the values (of 0..255) that are neither background, foreground nor noise, the commonest first.

    JPEG leaves values between the two ends, and so does smoothing: few, and each of them rare.
    """
    grey = values[(values >= GREY_FROM) & (values <= GREY_TO)]
    if not grey.size:
        return grey
    found, counts = np.unique(grey, return_counts=True)
    bright = (values > GREY_TO).sum()
    for (of_image, of_bright), count in ((ONE_VALUE, counts.max()), (ALL_VALUES, len(grey))):
        if count > max(of_image * values.size, of_bright * bright):
            return found[np.argsort(-counts)]
    return grey[:0]


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
