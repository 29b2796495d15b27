"""A raw download, as its publisher ships it: a folder or a zip archive, which is never written to."""

import re
import struct
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from vlsm.data.images import ImageError, NeedsPackage, open_image, read_image, read_mask

# What damaged files and archives raise: encrypted, of an unknown compression, cut off, other than they say.
UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, MemoryError, zlib.error,
    zipfile.BadZipFile, struct.error,
)  # fmt: skip
LIMIT = 1 << 30  # bytes of a file in an archive


@dataclass
class Sample:
    """An image and its masks.

    name: that of the image's file to be; image: a file of the download, or the pixels; masks: of each the
    name of its file to be, the pixels (bool) and the class in words; split: where the publisher fixes it;
    group: what a split must not tear apart (a patient); below: the folder of its split's files, where the
    layout has one.
    """

    name: str
    image: object
    masks: list
    split: str | None = None
    group: str | None = None
    below: str = ""


class Download:
    """The files of a folder or of a zip archive, by their paths within it; nothing is ever written there.

    Raises FileNotFoundError.
    """

    def __init__(self, path):
        self.path = Path(path).expanduser()
        self.archive, self.skipped = None, defaultdict(list)
        if self.path.is_dir():
            names = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        elif self.path.is_file() and zipfile.is_zipfile(self.path):
            self.archive = zipfile.ZipFile(self.path)
            names = (i.filename for i in self.archive.infolist() if not i.is_dir())
        else:
            raise FileNotFoundError(
                f"'{self.path}' is neither a folder nor a zip archive. Name the download with --src."
            )
        hidden = re.compile(r"(^|/)\.")  # such as macOS adds to archives
        self.names = sorted(name for name in names if not hidden.search(name))

    def read(self, name):
        if self.archive is None:
            return (self.path / name).read_bytes()
        with self.archive.open(name) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ValueError(f"it unpacks to more than {LIMIT >> 30} GiB")
        return data

    def find(self, pattern):
        """Return (name, match) of the files whose path ends in a pattern, at a folder's boundary; sorted.

        The path begins with the download's own name: --src may name the folder that a pattern begins with.
        """
        wanted, top = re.compile(rf"(?:^|/){pattern}$", re.I), self.path.resolve().name
        return [(name, match) for name in self.names if (match := wanted.search(f"{top}/{name}"))]

    def pairs(self, images, masks):
        """Yield (stem, image, mask) of the files that match two patterns and lie in folders side by side.

        A file without a partner is skipped. Raises ValueError where several places hold pairs.
        """
        found = defaultdict(lambda: ({}, {}))
        for k, pattern in enumerate((images, masks)):
            for name, match in self.find(pattern):
                parent, stem = match.string[: match.start()], PurePosixPath(name).stem
                if found[parent][k].setdefault(stem, name) != name:
                    self.skip(name, "a second file of that stem")
        places = [parent for parent, (ours, theirs) in found.items() if set(ours) & set(theirs)]
        if len(places) > 1:
            named = ", ".join(f"'{place or '.'}'" for place in sorted(places)[:6])
            raise ValueError(
                f"'{self.path}' holds pictures with masks in {named}. Name one of them with --src."
            )
        for ours, theirs in found.values():
            yield from self.join(ours, theirs)

    def join(self, images, masks):
        """Yield (stem, image, mask) of two {stem: name}; a file without a partner is skipped."""
        for stem in sorted(images.keys() | masks.keys()):
            if stem not in masks:
                self.skip(images[stem], "image without mask")
            elif stem not in images:
                self.skip(masks[stem], "mask without image")
            else:
                yield stem, images[stem], masks[stem]

    def by_stem(self, pattern):
        """Return {stem: name} of the files that match; of equal stems the first counts.

        The stem is what the pattern's group of that name finds, else the file's.
        """
        found = {}
        for name, match in self.find(pattern):
            stem = match.groupdict().get("stem") or PurePosixPath(name).stem
            if found.setdefault(stem, name) != name:
                self.skip(name, "a second file of that stem")
        return found

    def skip(self, name, reason):
        self.skipped[reason].append(name)

    @contextmanager
    def skipping(self, name):
        """Skip a file where what is done with it finds it damaged, and go on with the next."""
        try:
            yield
        except NeedsPackage:
            raise
        except ImageError as error:
            self.skip(name, f"unusable ({error.reason})")
        except UNREADABLE as error:
            self.skip(name, f"unusable ({str(error) or type(error).__name__})")

    def image(self, name):
        """Return an image as `read_image` does."""
        return read_image(self.read(name), name)

    def mask(self, name):
        """Return a mask as `read_mask` does."""
        return read_mask(self.read(name), name)

    def labels(self, name):
        """Return the class numbers `[H, W]` of a label image: palette indices and ids, untouched."""
        labels = np.asarray(open_image(self.read(name), name))
        if labels.ndim != 2:
            raise ImageError(name, "it holds colours instead of class numbers")
        return labels
