"""File formats of raw downloads that hold no ordinary pictures: NIfTI by nibabel, MetaImage, run lengths."""

import gzip
import zlib
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import NeedsPackage

MHD_TYPES = {"MET_UCHAR": "u1", "MET_CHAR": "i1", "MET_USHORT": "u2", "MET_SHORT": "i2", "MET_FLOAT": "f4"}


def read_mhd(d, name):
    """Return the pixels of a MetaImage (.mhd with its .raw or .zraw), first axis last."""
    fields = dict(
        line.split("=", 1) for line in d.read(name).decode("ascii", "replace").splitlines() if "=" in line
    )
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    size, kind = [int(n) for n in fields["DimSize"].split()], MHD_TYPES[fields["ElementType"]]
    data = d.read((PurePosixPath(name).parent / PurePosixPath(fields["ElementDataFile"]).name).as_posix())
    if fields.get("CompressedData", "False").lower() == "true":
        data = zlib.decompress(data)
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    order = ">" if big.lower() == "true" else "<"
    return np.frombuffer(data, order + kind)[: int(np.prod(size))].reshape(size[::-1])


def read_nifti(d, name):
    """Return the pixels of a NIfTI file, rows first."""
    try:
        import nibabel
    except ImportError:
        raise NeedsPackage(
            name, "it is a NIfTI file: pip install nibabel. (CAMUS's .mhd files are read without it)"
        ) from None
    data = d.read(name)
    data = gzip.decompress(data) if name.endswith(".gz") else data
    return np.asarray(nibabel.Nifti1Image.from_bytes(data).dataobj).T


def decode_run_lengths(text):
    """Return the run lengths in a COCO string: numbers in groups of five bits, little end first, all but the
    first three as differences.
    """
    counts, at = [], 0
    while at < len(text):
        value = shift = 0
        while True:
            byte = ord(text[at]) - 48
            at += 1
            value |= (byte & 31) << shift
            shift += 5
            if not byte & 32:
                value -= (1 << shift) if byte & 16 else 0
                break
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def decode_mask(counts, size):
    """Return the mask bool `[H, W]` of run lengths, background first, down the columns.

    Raises ValueError where they do not fill the picture.
    """
    counts = decode_run_lengths(counts) if isinstance(counts, str) else counts
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"run lengths that do not fill {size[1]} x {size[0]} pixels")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(size[1], size[0]).T
