"""Read a raw download, as published: a folder or a zip archive. Nothing is ever written there."""

import errno
import gzip
import math
import re
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from vlsm.data.images import EXTENSIONS, HIDDEN, ImageError, NeedsPackage, open_image, read_image, read_mask
from vlsm.system.console import first_few

LIMIT = 1 << 30  # bytes of a file in an archive
MOST_PIXELS = 1 << 28  # of a mask; pycocotools does not survive a size that memory cannot hold


@dataclass
class Sample:
    """An image and its masks."""

    name: str  # of the image's file in the data set
    image: object  # a file of the download, or the pixels
    masks: list  # [(name of its file in the data set, bool [H, W], class in words), ...]
    split: str | None = None  # if the publisher fixes it
    group: str | None = None  # samples of a group (a patient) share a split
    subfolder: str = ""  # of images/ and masks/, if the layout has one for the split


@dataclass
class LabelledImage:
    """An image and the masks of its classes, as the formats of `--import` yield them."""

    name: str  # of its file below images/, such as "case3/017.png": a volume's slices share a folder
    image: object  # a file of the download, or the pixels: uint8 [H, W] or [H, W, 3]
    masks: dict  # class in words -> bool [H, W]; none of a healthy image
    spacing: tuple | None = None  # millimetres from row to row, and from column to column


class Download:
    """The files of a folder or of a zip archive, by their paths within it.

    skipped: {reason: [name, ...]}. Raises FileNotFoundError, ValueError for a damaged archive.
    """

    def __init__(self, path):
        self.path = Path(path).expanduser()
        self.archive = None
        self.skipped = defaultdict(list)
        if self.path.is_dir():
            files = self.path.rglob("*")
            names = [file.relative_to(self.path).as_posix() for file in files if file.is_file()]
        elif self.path.is_file() and zipfile.is_zipfile(self.path):
            try:
                self.archive = zipfile.ZipFile(self.path)
                names = [entry.filename for entry in self.archive.infolist() if not entry.is_dir()]
            except Exception as error:  # zipfile raises many types
                raise ValueError(f"'{self.path}' is a damaged zip archive.") from error
        else:
            raise FileNotFoundError(f"'{self.path}' is neither a folder nor a zip archive.")
        self.names = sorted(name for name in names if not HIDDEN.search(name))

    def read(self, name):
        """Return a file's bytes. Raises ValueError if it is damaged, or unpacks to more than LIMIT."""
        if self.archive is None:
            return (self.path / name).read_bytes()
        try:
            with self.archive.open(name) as file:
                data = file.read(LIMIT + 1)
        except Exception as error:  # zipfile and the decompressors raise many types
            raise ValueError(f"'{name}' in '{self.path}' cannot be unpacked ({error}).") from error
        if len(data) > LIMIT:
            raise ValueError(f"it unpacks to more than {LIMIT >> 30} GiB")
        return data

    def text(self, name):
        """Return a file's text. Raises ValueError unless it is in UTF-8."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError:
            raise ValueError(f"'{name}' is no text in UTF-8; save it so.") from None

    def image_names(self):
        """Return the names of the image files."""
        return [name for name in self.names if name.lower().endswith(EXTENSIONS)]

    def find(self, pattern):
        """Return [(name, match)] of the files whose path ends in a pattern, at a folder's boundary; sorted.

        The path begins with the download's own name: --src may name the folder that a pattern begins with.
        """
        expression = re.compile(rf"(?:^|/){pattern}$", re.I)
        root = self.path.resolve().name
        hits = []
        for name in self.names:
            match = expression.search(f"{root}/{name}")
            if match:
                hits.append((name, match))
        return hits

    def only(self, pattern):
        """Return the one file that a pattern finds; None without any. Raises ValueError for several."""
        files = [name for name, _ in self.find(pattern)]
        if len(files) > 1:
            raise ValueError(f"'{self.path}' holds {first_few(files)}. Name the folder of one of them.")
        return files[0] if files else None

    def pairs(self, image_pattern, mask_pattern):
        """Yield (key, image, mask) of the files that match two patterns and lie in folders side by side.

        A file without a partner is skipped. Raises ValueError if several places hold pairs.
        """
        images = self.by_stem(image_pattern, with_place=True)
        masks = self.by_stem(mask_pattern, with_place=True)
        places = sorted({place for place, _ in images.keys() & masks.keys()})
        if len(places) > 1:
            names = first_few([f"'{place or '.'}'" for place in places], 6)
            raise ValueError(f"'{self.path}' holds images with masks in {names}. Name one of them.")
        yield from self.join(images, masks)

    def by_stem(self, pattern, with_place=False):
        """Return {stem: name} of the files that match; of equal stems the first counts.

        The stem is the text of the pattern's group "stem", else the file's. with_place: the key is (folder
        above the match, stem).
        """
        names = {}
        for name, match in self.find(pattern):
            key = match.groupdict().get("stem") or PurePosixPath(name).stem
            if with_place:
                key = match.string[: match.start()], key
            if key in names:
                self.skip(name, "a second file of that stem")
            else:
                names[key] = name
        return names

    def join(self, images, masks):
        """Yield (stem, image, mask) of two `by_stem`; a file without a partner is skipped."""
        for stem in sorted(images.keys() | masks.keys()):
            if stem not in masks:
                self.skip(images[stem], "image without mask")
            elif stem not in images:
                self.skip(masks[stem], "mask without image")
            else:
                yield stem, images[stem], masks[stem]

    def skip(self, name, reason):
        """Add a file to the skipped ones."""
        self.skipped[reason].append(name)

    @contextmanager
    def skipping(self, name):
        """Skip a file if the work inside finds it damaged, and go on with the next."""
        try:
            yield
        except NeedsPackage:
            raise
        except ImageError as error:
            self.skip(name, f"unusable ({error.reason})")
        except Exception as error:  # decoders and broken annotations raise many types
            if getattr(error, "errno", None) not in (None, errno.ENOENT):  # of the disk that is written to
                raise
            self.skip(name, f"unusable ({str(error) or type(error).__name__})")

    def image(self, name):
        """Return an image as `read_image` does."""
        return read_image(self.read(name), name)

    def mask(self, name):
        """Return a mask as `read_mask` does."""
        return read_mask(self.read(name), name)

    def labels(self, name):
        """Return the class numbers `[H, W]` of a label image: palette indices or ids, as stored."""
        labels = np.asarray(open_image(self.read(name), name))
        if labels.ndim != 2:
            raise ImageError(name, "it holds colours instead of class numbers")
        return labels


def checked_size(height, width):
    """Return (height, width). Raises ValueError if no image has that size."""
    whole = isinstance(height, int) and isinstance(width, int)
    if not whole or min(height, width) < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels is no size of an image")
    return height, width


# Formats other than ordinary images


MHD_TYPES = {"MET_UCHAR": "<u1", "MET_USHORT": "<u2", "MET_SHORT": "<i2", "MET_FLOAT": "<f4"}


def read_mhd(download, name):
    """Return the pixels of a little-endian MetaImage (.mhd with its .raw or .zraw), first axis last."""
    header = download.read(name).decode("ascii", "replace")
    fields = dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", header, re.MULTILINE))  # "DimSize = 549 778 1"
    file = PurePosixPath(name).with_name(PurePosixPath(fields["ElementDataFile"]).name)
    data = download.read(file.as_posix())
    if fields.get("CompressedData", "False").lower() == "true":
        data = zlib.decompress(data)
    pixels = np.frombuffer(data, MHD_TYPES[fields["ElementType"]])
    size = [int(n) for n in fields["DimSize"].split()]
    return pixels[: math.prod(size)].reshape(size[::-1])


def open_nifti(download, name):
    """Return a NIfTI file as nibabel's image. Raises NeedsPackage without nibabel."""
    try:
        import nibabel
    except ImportError:
        raise NeedsPackage(name, "it is a NIfTI file: pip install nibabel") from None
    data = download.read(name)
    if name.lower().endswith(".gz"):
        data = gzip.decompress(data)
    return nibabel.Nifti1Image.from_bytes(data)


def read_nifti(download, name):
    """Return the pixels of a NIfTI file, rows first. Raises NeedsPackage without nibabel."""
    return np.asarray(open_nifti(download, name).dataobj).T


def decode_run_lengths(counts, size, name):
    """Return the mask bool `[H, W]` of COCO's compressed run lengths (a text) of a file `name`.

    Raises NeedsPackage without pycocotools, ValueError unless they fill the image.
    """
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise NeedsPackage(name, "its masks are COCO's run lengths: pip install pycocotools") from None
    height, width = checked_size(*size)
    mask = coco.decode(dict(size=size, counts=counts))
    if coco.encode(mask)["counts"].decode() != counts:  # of too few, decode leaves pixels uninitialised
        raise ValueError(f"run lengths that do not fill {width} x {height} pixels")
    return mask > 0
