"""File formats of raw downloads that Pillow does not read: MetaImage, NIfTI by nibabel, COCO's run lengths by
pycocotools.
"""

import gzip
import math
import zlib
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import NeedsPackage

MHD_TYPES = {"MET_UCHAR": "<u1", "MET_USHORT": "<u2", "MET_SHORT": "<i2", "MET_FLOAT": "<f4"}
MOST_PIXELS = 1 << 28  # of a mask in run lengths; pycocotools does not survive a size that memory cannot hold


def read_mhd(download, name):
    """Return the pixels of a little-endian MetaImage (.mhd with its .raw or .zraw), first axis last."""
    fields = {}
    for line in download.read(name).decode("ascii", "replace").splitlines():
        key, separator, value = line.partition("=")
        if separator:
            fields[key.strip()] = value.strip()
    file = PurePosixPath(name).with_name(PurePosixPath(fields["ElementDataFile"]).name)
    data = download.read(file.as_posix())
    if fields.get("CompressedData", "False").lower() == "true":
        data = zlib.decompress(data)
    pixels = np.frombuffer(data, MHD_TYPES[fields["ElementType"]])
    size = [int(n) for n in fields["DimSize"].split()]
    return pixels[: math.prod(size)].reshape(size[::-1])


def read_nifti(download, name):
    """Return the pixels of a NIfTI file, rows first. Raises NeedsPackage without nibabel."""
    try:
        import nibabel
    except ImportError:
        raise NeedsPackage(
            name, "it is a NIfTI file: pip install nibabel. (CAMUS's .mhd files are read without it)"
        ) from None
    data = download.read(name)
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    return np.asarray(nibabel.Nifti1Image.from_bytes(data).dataobj).T


def decode_run_lengths(counts, size, name):
    """Return the mask bool `[H, W]` of COCO's compressed run lengths (a text) of a file `name`.

    Raises NeedsPackage without pycocotools, ValueError unless they fill the image.
    """
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise NeedsPackage(name, "its masks are COCO's run lengths: pip install pycocotools") from None
    height, width = size
    if min(size) < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels is no size of an image")
    mask = coco.decode(dict(size=size, counts=counts))
    if coco.encode(mask)["counts"].decode() != counts:  # of too few, decode leaves pixels uninitialised
        raise ValueError(f"run lengths that do not fill {width} x {height} pixels")
    return mask > 0
