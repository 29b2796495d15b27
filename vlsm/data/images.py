"""Read images and masks: one reader for each, for all formats that users have; it refuses what is ambiguous.

Images and masks are turned upright by their EXIF orientation, as viewers show them, so that both match.
"""

import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from vlsm.system.console import first_few, say_once

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm",
)  # fmt: skip
# Those of Pillow's that are read. Of the others EPS would run the program Ghostscript on a file.
FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "TIFF", "WEBP", "GIF", "PPM")
BESIDE_IMAGES = (".json", ".txt", ".csv", ".xml", ".yaml", ".yml", ".md", ".html", ".db", ".ini")
READERS = min(16, os.cpu_count() or 1)  # threads: Pillow and numpy release the interpreter's lock
HIDDEN = re.compile(r"(^|/)\.")  # in paths: files and folders such as macOS adds to archives
GREY_FROM = 32  # of 255: from here to GREY_TO a value is neither background nor foreground
GREY_TO = 223
# Grey pixels of a mask are noise if they are few: as a share of the image, or of the foreground.
ONE_VALUE = (5e-4, 0.02)  # the pixels of one grey value
ALL_VALUES = (5e-3, 0.2)  # the pixels of all grey values together
WHITE_FROM = 248  # of 255
SMALLEST_NUMBERS = 2  # class numbers beside white, however few their pixels
FEW_PIXELS = 4  # of one grey value beside white: fewer are noise
FEW_NUMBERS = 8  # up to so many values, or colours, are somebody's; compression and smoothing leave more
SHADE = 48  # of 255, in a channel: flat colours that differ by more are two colours
APART = 64  # of 255: colours that differ by more in a channel are two colours, not one and its noise
EDGE = 3  # pixels: so far from a mask's edge smoothing leaves grey
IGNORED = 255  # in a target: the pixel counts in neither loss nor metrics
LABELS_FORM = '{"labels": {"background": 0, "liver": 1, "tumour": 2}}'  # of dataset.json
IMPORT_ADVICE = (
    "; if colours are classes: python datasets.py --import masks-from-colours SRC --out DIR --classes "
    '"polyp=255,0,0;tool=0,255,0"'
)
NOT_FINITE = "it holds NaN or infinite values"
LFS_POINTER = b"version https://git-lfs"


class ImageError(ValueError):
    """A file that cannot be used as an image or a mask. reason: why, without the file's name."""

    def __init__(self, name, reason):
        super().__init__(f"'{name}' cannot be used: {reason}.")
        self.reason = reason


class NeedsPackage(ImageError):
    """A file that needs an optional package."""


class MaskValues(ImageError):
    """A file whose values are not the two of a mask."""


@dataclass(frozen=True)
class LabelMask:
    """The mask of one class in a label map.

    file: the map's path, or its numbers, uint8 or uint16 `[H, W]`. Foreground: pixels of number `value`.
    ignore: the number of pixels that do not count.
    """

    file: object
    value: int
    ignore: int | None = None


@dataclass(frozen=True)
class MaskUnion:
    """The mask that several files hold together; without files it is empty, and of the size of `image`.

    any_value: whatever is not 0 is foreground, such as the numbers of instances.
    """

    files: tuple
    image: object
    any_value: bool = False


def image_files(root):
    """Return the image files below a folder, sorted by path; hidden files and folders are left out."""
    return sorted(path for path in _paths_below(root) if path.suffix.lower() in EXTENSIONS)


def _paths_below(root):
    """Yield the paths below a folder, but not those that are hidden."""
    for path in root.rglob("*"):
        if not HIDDEN.search(path.relative_to(root).as_posix()):
            yield path


def left_out(root):
    """Count by their endings the files below a folder that are no images: "3 .dcm, 2 .heic", or ""."""
    endings = Counter()
    for path in _paths_below(root):
        ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        ending = ending.lower()
        if ending not in (*EXTENSIONS, *BESIDE_IMAGES) and path.is_file():
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
        image = _decode(data, name)
        if not all(image.size):
            raise ImageError(name, "it has no pixels")
        return image.convert("RGB") if image.mode == "LAB" else image
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise ImageError(name, _reason(error, data)) from error


def _decode(data, name):
    """Return the first frame of a file's bytes as Pillow reads it, else a TIFF as tifffile does."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
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
    except (ImageError, MemoryError):
        raise
    except Exception:
        if Path(str(name)).suffix.lower() in (".tif", ".tiff") and data[:2] in (b"II", b"MM"):
            return Image.fromarray(read_tiff(data, name))
        raise


def orientation(source):
    """Return the EXIF orientation of an image file, 1 if it has none."""
    try:
        with Image.open(source) as image:
            return Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own method decodes all pixels
    except Exception:  # damaged, of a format that Pillow does not read, or pixels in memory
        return 1


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
    return rgb_pixels(open_image(source, name), name or source)


def rgb_pixels(image, name):
    """Return the pixels uint8 RGB `[H, W, 3]` of a Pillow image, as `read_image` says."""
    if not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB"))
    return grey_to_rgb(to_eight_bits(np.asarray(image), name))


def grey_to_rgb(grey):
    """Return grey pixels `[H, W]` as `[H, W, 3]`."""
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


# Masks


def read_labels(source):
    """Read a label map as its class numbers, uint8 or uint16 `[H, W]`; an array is returned as it is.

    Raises FileNotFoundError, or ImageError for colours without a palette.
    """
    if isinstance(source, np.ndarray):
        return source
    image = open_image(source)
    numbers = np.asarray(image)
    whole = image.mode in ("1", "L", "P") or image.mode.startswith("I")
    if not whole or numbers.min() < 0 or numbers.max() > 65535:
        raise ImageError(source, "a label map holds class numbers of 8 or 16 bits, grey or with a palette")
    return numbers.astype(np.uint16 if numbers.max() > 255 else np.uint8)


def read_target(source):
    """Read any mask source as uint8 `[H, W]`: 0, 1, and 255 where ignored. Raises as `read_mask`."""
    if isinstance(source, LabelMask):
        return class_target(read_labels(source.file), source)
    return read_mask(source).astype(np.uint8)


def class_target(labels, mask):
    """Return the target, as `read_target`, of one class (a `LabelMask`) in a map's numbers `[H, W]`."""
    target = (labels == mask.value).astype(np.uint8)
    if mask.ignore is not None:
        target[labels == mask.ignore] = IGNORED
    return target


def read_mask(source, name=None, one_colour=False):
    """Read a mask as bool `[H, W]`; of an array: bool, or foreground above 127; of a `LabelMask`: its class.

    Foreground is white (255, 65535), any bright colour, or 1; in an image of one colour, the opaque pixels. A
    palette counts by its colours, or by its numbers if the colours are not those of a mask. one_colour:
    refuse several bright colours. Raises FileNotFoundError, or MaskValues, which names the values, if there
    are others than two, and a little noise of compression, or grey along the edges.
    """
    if isinstance(source, LabelMask):
        return read_target(source) == 1
    if isinstance(source, MaskUnion):
        return _read_union(source)
    if isinstance(source, np.ndarray):
        return source > 127 if source.dtype == np.uint8 else source
    return _mask_of(open_image(source, name), name or source, one_colour)


def _mask_of(image, name, one_colour):
    """Return the mask of a Pillow image, as `read_mask` does."""
    mask = _foreground(_mask_values(image), name)
    if one_colour and mask.any():
        _refuse_colours(image, mask, name)
    return mask


def _read_union(union):
    """Read a `MaskUnion`. Raises ImageError for files of different size."""
    if not union.files:
        width, height = open_image(union.image).size
        return np.zeros((height, width), bool)
    reader = _read_nonzero if union.any_value else read_mask
    masks = [reader(file) for file in union.files]
    if len({mask.shape for mask in masks}) > 1:
        raise ImageError(union.files[0], "the masks of one image differ in size")
    return np.any(masks, axis=0)


def _read_nonzero(file):
    """Return which pixels of a file are neither 0 nor black, bool `[H, W]`."""
    pixels = numbers_or_colours(open_image(file))
    return pixels.any(2) if pixels.ndim == 3 else pixels > 0


def numbers_or_colours(image):
    """Return the numbers `[H, W]` of a Pillow image, or its colours `[H, W, 3]`.

    Those of a palette are numbers if the first of its colours is black, as background is.
    """
    first = image.getpalette()[:3] if image.mode == "P" else None
    if image.mode in ("1", "L") or image.mode.startswith(("I", "F")) or first == [0, 0, 0]:
        return np.asarray(image)
    return np.asarray(image.convert("RGB"))


def mask_colour(file):
    """Return the colour (red, green, blue) of a mask's foreground, or None for a mask without colours.

    Raises as `read_mask`.
    """
    image = open_image(file)
    mask = _mask_of(image, file, one_colour=True)
    if image.mode in ("1", "L", "I;16") or not mask.any():
        return None
    return common_colour(np.asarray(image.convert("RGB"))[mask])


def _refuse_colours(image, mask, name):
    """Raise MaskValues if the foreground has several colours: they may be classes."""
    colours = np.asarray(image.convert("RGB"))[mask]  # [n, 3]
    main = common_colour(colours)
    flat = count_colours(colours) <= FEW_NUMBERS  # without noise
    others = colours[colour_distance(colours, main) > (SHADE if flat else APART)]
    if max(main) - min(main) < APART / 4:  # beside white, grey is an edge
        others = others[np.ptp(others, axis=1) > APART / 4]
    if not len(others):
        return
    second = common_colour(others)
    alike = (colour_distance(others, second) <= APART).sum()
    if flat or alike > max(ONE_VALUE[0] * mask.size, ONE_VALUE[1] * len(colours)):
        raise MaskValues(
            name, f"its foreground has several colours, such as {main} and {second}{IMPORT_ADVICE}"
        )


def count_colours(pixels):
    """Return the number of colours of pixels uint8 `[..., 3]`."""
    return len(np.unique(pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])))


def colour_distance(colours, colour):
    """Return the largest difference between the channels of colours `[..., 3]` and a colour, `[...]`."""
    return np.abs(np.asarray(colours, np.int16) - colour).max(-1)


def common_colour(colours):
    """Return the commonest colour (red, green, blue) of pixels uint8 `[n, 3]`: the mean of those alike."""
    codes = (colours >> 5) @ np.array([64, 8, 1])
    alike = codes == np.bincount(codes).argmax()
    return tuple(int(channel) for channel in colours[alike].mean(0).round())


def _mask_values(image):
    """Return the numbers `[H, W]` of a Pillow image in which foreground is high and background low."""
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode == "P":
        colours = np.asarray(image.convert("RGB")).max(2)
        numbers = np.asarray(image)
        black_first = image.getpalette()[:3] == [0, 0, 0]
        by_number = len(_grey_values(colours)) > 0 and numbers.max() <= 1 and black_first
        return numbers if by_number else colours
    if not image.mode.upper().endswith("A"):
        return np.asarray(image.convert("RGB")).max(2)
    rgba = np.asarray(image.convert("RGBA"))
    values = rgba[..., :3].max(2)
    alpha = rgba[..., 3]
    visible = values[alpha > 0]
    one_colour = not visible.size or visible.min() == visible.max()
    if one_colour and alpha.min() < 255:  # a stencil
        return alpha
    return np.where(alpha > 127, values, 0)


def _foreground(values, name):
    """Return the bool mask of numbers `[H, W]`. Raises ImageError unless they are those of a mask."""
    if not np.isfinite(values).all():
        raise ImageError(name, NOT_FINITE)
    low = values.min()
    high = values.max()
    if low >= 0 and high <= 1 and not (values % 1).any():
        return values > 0
    full = 65535  # the number that stands for white
    if high <= 255:
        full = 1 if high <= 1 else 255
    scaled = values if full == 255 else values * (255 / full)
    wrong = np.unique(scaled) if low < 0 else _grey_values(scaled)
    exact = _exact_values(scaled)
    if len(wrong) and not len(exact) and _is_smoothed(scaled):
        say_once("smoothed", f"'{name}' is grey along its edges: above 127 is foreground (said once).")
        return values > full / 2
    if len(exact) or not len(wrong):
        wrong = exact if len(exact) else _class_numbers(scaled)
    if len(wrong):
        wrong = first_few([f"{float(value) * full / 255:.4g}" for value in wrong], 6)
        ignored = ', and "ignore": 255 if these pixels should not count' if high == 255 else ""
        raise MaskValues(
            name,
            f"a mask holds 0 and 255, or 0 and 1, and this one also {wrong}; if these are class numbers, "
            f"name them in dataset.json beside masks/: {LABELS_FORM}{ignored}",
        )
    return values > full / 2


def _is_smoothed(values):
    """Tell whether numbers (of 0..255) are those of a mask with grey of many levels along its edges alone."""
    grey = (values >= GREY_FROM) & (values <= GREY_TO)
    if len(np.unique(values[grey])) <= FEW_NUMBERS or not (values > GREY_TO).any():
        return False
    bright = values > 127
    near = ndimage.binary_dilation(bright, iterations=EDGE)
    inside = ndimage.binary_erosion(bright, iterations=EDGE, border_value=1)
    return (near & ~inside)[grey].mean() > 0.99


def _grey_values(values):
    """Return the values (of 0..255) that are neither background, foreground nor noise, the commonest first.

    JPEG and smoothing leave values between the two ends: few, and each of them rare.
    """
    grey = values[(values >= GREY_FROM) & (values <= GREY_TO)]
    if not grey.size:
        return grey
    levels, counts = np.unique(grey, return_counts=True)
    bright = (values > GREY_TO).sum()
    most_of_one = max(ONE_VALUE[0] * values.size, ONE_VALUE[1] * bright)
    most_of_all = max(ALL_VALUES[0] * values.size, ALL_VALUES[1] * bright)
    if counts.max() > most_of_one or len(grey) > most_of_all:
        return levels[np.argsort(-counts)]
    return grey[:0]


def _exact_values(values):
    """Return the class numbers among the values (of 0..255) of an image without noise, the largest first.

    Compression and smoothing leave many values. Beside one white a few may be somebody's, however rare: the
    smallest numbers, and grey of some pixels; dark ones from 4 on are known as noise, of ClinicDB's masks.
    """
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) > 2 + FEW_NUMBERS or levels[0] != 0 or (levels >= WHITE_FROM).sum() != 1:
        return levels[:0]
    small = levels <= SMALLEST_NUMBERS
    grey = (levels >= GREY_FROM) & (counts >= FEW_PIXELS)
    return levels[1:-1][(small | grey)[1:-1]][::-1]


def _class_numbers(values):
    """Return the dark values (of 0..255) that must be class numbers, the largest first.

    They are if there is nothing bright, or if few values have many pixels beside one value of white:
    compression leaves many values, at both ends.
    """
    dark = values[(values > 0) & (values < GREY_FROM)]
    numbers = np.unique(dark)[::-1]
    bright = values[values > GREY_TO]
    if not bright.size and len(dark) > ONE_VALUE[0] * values.size:
        return numbers
    many = len(dark) > max(ALL_VALUES[0] * values.size, ALL_VALUES[1] * len(bright))
    one_white = bright.size and bright.min() == bright.max()
    if many and one_white and len(numbers) <= FEW_NUMBERS and values.min() == 0:
        return numbers
    return numbers[:0]


def mask_image(mask):
    """Return a bool mask `[H, W]` as a Pillow image of 0 and 255."""
    return Image.fromarray(np.asarray(mask).astype(np.uint8) * 255)
