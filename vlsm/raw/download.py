"""A raw download, as its publisher ships it: a folder or a zip archive, which is never written to."""

import io
import re
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vlsm.raw.formats import NeedsPackage, read_tiff


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
        self.names = sorted(
            n for n in names if not PurePosixPath(n).name.startswith(".")
        )  # such as macOS adds to archives

    def read(self, name):
        return self.archive.read(name) if self.archive else (self.path / name).read_bytes()

    def find(self, pattern):
        """(name, match) of the files whose path ends in a pattern, at a folder's boundary; sorted."""
        wanted = re.compile(rf"(?:^|/){pattern}$", re.I)
        return [(name, match) for name in self.names if (match := wanted.search(name))]

    def by_stem(self, pattern):
        """{stem: name} of the files that match; of equal stems the first counts."""
        found = {}
        for name, _ in self.find(pattern):
            if found.setdefault(PurePosixPath(name).stem, name) != name:
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
        except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
            self.skip(name, f"unusable ({str(error) or type(error).__name__})")

    def pixels(self, name):
        """Return an image as Pillow has it, palette indices and label ids untouched.

        TIFFs that Pillow refuses are read by tifffile.
        """
        data = self.read(name)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image)
        except (OSError, KeyError, SyntaxError):
            if data[:2] not in (b"II", b"MM"):
                raise
            return read_tiff(data, name)

    def mask(self, name):
        """bool `[H, W]`: any channel above 127 (of four, the last is transparency)."""
        values = self.pixels(name)
        values = values.astype(np.uint8) * 255 if values.dtype == bool else values
        return values > 127 if values.ndim == 2 else values[..., :3].max(2) > 127
