"""Read and resize images: one reader for all formats that users have; `masks` reads masks.

Images and masks are turned upright by their EXIF orientation, as viewers show them, so that both match.
"""

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlsm.system.console import say_once

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm",
)  # fmt: skip
BESIDE_IMAGES = (".json", ".txt", ".csv", ".xml", ".yaml", ".yml", ".md", ".html", ".db", ".ini")
HIDDEN = re.compile(r"(^|/)\.")  # in paths: files and folders such as macOS adds to archives
NOT_FINITE = "it holds NaN or infinite values"
LFS_POINTER = b"version https://git-lfs"


class ImageError(ValueError):
    """A file that cannot be used as an image or a mask. reason: why, without the file's name."""

    def __init__(self, name, reason):
        super().__init__(f"'{name}' cannot be used: {reason}.")
        self.reason = reason


class NeedsPackage(ImageError):
    """A file that needs an optional package."""


def image_files(root):
    """Return the image files below a folder, sorted by path; hidden files and folders are left out."""
    files = []
    for path in root.rglob("*"):
        hidden = HIDDEN.search(path.relative_to(root).as_posix())
        if path.suffix.lower() in EXTENSIONS and not hidden:
            files.append(path)
    return sorted(files)


def left_out(root):
    """Count by their endings the files below a folder that are no images: "3 .dcm, 2 .heic", or ""."""
    endings = Counter()
    for path in root.rglob("*"):
        ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        ending = ending.lower()
        hidden = HIDDEN.search(path.relative_to(root).as_posix())
        if path.is_file() and not hidden and ending not in (*EXTENSIONS, *BESIDE_IMAGES):
            endings[ending or "without ending"] += 1
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common())


def say_left_out(root):
    """Say once which files below a folder are left out, as they are no images."""
    endings = left_out(root)
    if endings:
        say_once(f"left out {root}", f"'{root}' also holds files that are not read: {endings}.")


def open_image(source, name=None):
    """Return the first frame of an image, upright, as a Pillow image.

    source: a path, or a file's bytes, for which messages print `name`. Raises FileNotFoundError, or
    ImageError if the file is damaged, too large or no image.
    """
    name = name or source
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(name, error.strerror.lower()) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                say_once("frames", f"'{name}' holds {frames} frames; only the first one of a file is read.")
            if image.mode in ("RGB", "RGBA", "LA") and _bits(image, data) > 8:
                raise ImageError(
                    name,
                    "it is of 16 bits a channel and in colour, of which half would be lost; save it in 8 "
                    "bits, or in 16 bits without colour",
                )
            return ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        tiff = Path(str(name)).suffix.lower() in (".tif", ".tiff") and data[:2] in (b"II", b"MM")
        if tiff and not isinstance(error, MemoryError):
            return Image.fromarray(read_tiff(data, name))
        raise ImageError(name, _reason(error, data)) from error


def is_turned(source):
    """Tell whether an image file's EXIF orientation turns it by a quarter."""
    try:
        with Image.open(source) as image:
            return image.getexif().get(0x0112, 1) >= 5
    except (OSError, AttributeError):  # of a format that Pillow does not read, or pixels in memory
        return False


def _bits(image, data):
    """Return the bits a channel of a Pillow image's file, of which `data` are the bytes."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,)))
    if image.format == "JPEG2000":  # one less than the bits stands in the codestream's marker of sizes
        place = data.find(b"\xff\x4f\xff\x51")
        return 1 + (data[place + 42] & 127) if place >= 0 else 8
    return 8


def _reason(error, data):
    """Return in words why Pillow could not read a file's bytes."""
    text = str(error)
    if data.startswith(LFS_POINTER):
        return "it is a pointer of git LFS, not the file itself (git lfs pull fetches it)"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
    if isinstance(error, MemoryError):
        return "it claims more pixels than memory holds"
    if not data:
        return "an empty file"
    if "cannot identify" in text:
        return "no image"
    if re.search("truncated|broken|corrupt|incomplete|not enough|marker|decod", text):
        return "truncated or damaged"
    return f"truncated or damaged ({type(error).__name__}: {text[:80]})"


def read_tiff(data, name):
    """Return the 8-bit pixels of a TIFF's bytes, `[H, W]` or `[H, W, C]`, for those that Pillow refuses.

    Raises NeedsPackage without tifffile, ImageError for a file that is damaged or deeper than 8 bits.
    """
    try:
        import tifffile
    except ImportError:
        raise NeedsPackage(name, "it is a TIFF that Pillow does not read; pip install tifffile") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            claimed = max(sum(page.databytecounts), page.size / 1000)
            if claimed > len(data):
                raise ValueError("its strips claim more bytes than it has")
            values = np.asarray(page.asarray())
            channels_first = values.ndim == 3 and page.planarconfig == 2
    except Exception as error:  # tifffile's and its decoders' own types
        raise ImageError(name, f"truncated or damaged TIFF ({str(error)[:80]})") from error
    if values.ndim > 2 and values.shape[0 if channels_first else -1] > 4:
        raise ImageError(name, f"TIFF of {values.shape} values, more than four channels")
    if values.dtype != np.uint8:
        raise ImageError(name, f"TIFF of {values.dtype}, other than 8 bits, that Pillow does not read")
    return np.moveaxis(values, 0, -1) if channels_first else values


def read_image(source, name=None):
    """Read an image as uint8 RGB `[H, W, 3]`; a `source` that is such an array is returned as it is.

    Palette, grey, RGBA and CMYK images are converted. Deeper ones: values from 0 to 1 are stretched to 255,
    signed ones (CT) from their least to their largest, others so that the largest is 255; values within
    0..255 are kept. source, name, errors: as `open_image`; ImageError for NaN or infinity.
    """
    if isinstance(source, np.ndarray):
        return source
    image = open_image(source, name)
    if not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB"))
    grey = to_eight_bits(np.asarray(image), name or source)
    return np.repeat(grey[..., None], 3, 2)


def to_eight_bits(values, name):
    """Scale numbers `[H, W]` to uint8, as `read_image` says. Raises ImageError for NaN or infinity."""
    if not np.isfinite(values).all():
        raise ImageError(name, NOT_FINITE)
    low = float(values.min())
    high = float(values.max())
    if low < 0:
        scale = 255 / max(high - low, 1e-12)
        return ((values - low) * scale).astype(np.uint8)
    unit_range = values.dtype.kind == "f" and high <= 1
    top = 1.0 if unit_range else max(high, 255.0)
    return (values * (255 / top)).astype(np.uint8)


def resize_image(image, size):
    """Resize uint8 `[H, W, 3]` to `[size, size, 3]`, bilinear with antialiasing, whatever its aspect."""
    return np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))
