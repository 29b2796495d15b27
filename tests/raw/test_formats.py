"""The formats that raw downloads come in: TIFFs that Pillow refuses, run lengths, NIfTI."""

import gzip
import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from vlsm.data.images import ImageError, NeedsPackage, read_tiff
from vlsm.raw import download as formats
from vlsm.raw.download import Download

SHAPE = (20, 28)


def counts_string(mask):
    """COCO's compressed run lengths of a mask, written from their definition."""
    flat, runs, value = mask.T.ravel(), [0], False
    for v in flat:
        if v != value:
            runs.append(0)
            value = v
        runs[-1] += 1
    text = ""
    for i, n in enumerate(runs):
        n -= runs[i - 2] if i > 2 else 0
        while True:
            group, n = n & 31, n >> 5
            more = n != (-1 if group & 16 else 0)
            text += chr(group + 32 * more + 48)
            if not more:
                break
    return text


def strips(pixels, planar=False, order="<", bits=(8, 8, 8), rows=7):
    """A TIFF of uncompressed strips."""
    h, w, c = pixels.shape
    planes = [pixels[..., k : k + 1] for k in range(c)] if planar else [pixels]
    parts = [p[y : y + rows].tobytes() for p in planes for y in range(0, h, rows)]
    offsets = np.cumsum([8, *map(len, parts)])[:-1].tolist()
    body, extra = b"".join(parts), b""
    at = 8 + len(body)
    tags = [
        (256, 3, [w]),
        (257, 3, [h]),
        (258, 3, list(bits)),
        (259, 3, [1]),
        (262, 3, [2]),
        (273, 4, offsets),
        (277, 3, [c]),
        (278, 3, [rows]),
        (279, 4, [len(p) for p in parts]),
        (284, 3, [2 if planar else 1]),
    ]
    directory, after = struct.pack(order + "H", len(tags)), at + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        data = struct.pack(order + f"{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(data) > 4:
            value, extra = struct.pack(order + "I", after + len(extra)), extra + data
        else:
            value = data.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    return head + body + directory + struct.pack(order + "I", 0) + extra


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_by_hand(planar, order):
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
    data = strips(pixels, planar, order)
    assert (read_tiff(data, "a.tif") == pixels).all()
    assert (np.asarray(Image.open(io.BytesIO(strips(pixels, False, order)))) == pixels).all(), (
        "the fixture is a TIFF"
    )
    for cut in (data[:40], data[: len(data) // 2], b"II*\0", b"MM"):
        with pytest.raises(ImageError):
            read_tiff(cut, "a.tif")


def test_run_lengths():
    rng = np.random.default_rng(0)
    for shape in ((20, 28), (1, 1), (64, 3)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = rng.uniform(size=shape) < share
            assert (formats.decode_run_lengths(counts_string(mask), shape, "a.json") == mask).all()
    assert (formats.decode_run_lengths("231", (2, 3), "a.json") == [[0, 1, 1], [0, 1, 0]]).all()
    for wrong in ("23", "", "\0\xff", "231" * 99):
        with pytest.raises(ValueError):
            formats.decode_run_lengths(wrong, (2, 3), "a.json")
    for size in ((-2, -3), (10**6, 10**6)):
        with pytest.raises(ValueError, match="no size of an image"):
            formats.decode_run_lengths("231", size, "a.json")


def test_nifti_asks_for_its_reader_or_reads(tmp_path, monkeypatch):
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 2, SHAPE[1], SHAPE[0], 1, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    pixels = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE).astype(np.uint8)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(header) + pixels.tobytes()))
    d = Download(tmp_path)
    try:
        import nibabel  # noqa: F401
    except ImportError:
        pass
    else:
        assert (formats.read_nifti(d, "a.nii.gz") == pixels).all()
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(NeedsPackage, match="pip install nibabel"):
        formats.read_nifti(d, "a.nii.gz")
