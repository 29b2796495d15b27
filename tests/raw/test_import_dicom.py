"""DICOM series become the slices that a NIfTI file of the same volume becomes."""

import json

import numpy as np
import pytest

from tests.raw.volumes import SIZES, affine, body, shown, write_nifti
from vlsm.raw.download import Download
from vlsm.raw.formats import nifti
from vlsm.raw.formats.dicom import read

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("nibabel")
UID = "1.2.826.0.1.3680043.8.498."
SLOPE, INTERCEPT = 2.0, -1000.0
# For each plane of acquisition: axes (sign, axis of RAS+) that a row, a column and the stack of slices run along.
PLANES = {
    "axial": ((-1, 0), (-1, 1), (1, 2)),
    "coronal": ((-1, 0), (-1, 2), (-1, 1)),
    "sagittal": ((-1, 1), (-1, 2), (1, 0)),
}
AXES = dict(axial=2, coronal=1, sagittal=0)


def basic(uid="1", **elements):
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    dataset.Modality, dataset.SeriesInstanceUID = "CT", UID + uid
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 16, 15
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept = SLOPE, INTERCEPT
    dataset.update(elements)
    return dataset


def save(dataset, path, pixels=None, syntax=pydicom.uid.ExplicitVRLittleEndian):
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is not None:
        dataset.Rows, dataset.Columns = pixels.shape[-2:]
        dataset.PixelData = pixels.astype("<i2").tobytes()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def places(values, plane):
    """Yield (pixels, position, orientation) of each slice of a volume in RAS+; x to the left, y to the back."""
    row, column, stack = PLANES[plane]
    size = values.shape
    turned = values.transpose(stack[1], column[1], row[1])
    flips = tuple(slice(None, None, sign) for sign, _ in (stack, column, row))
    turned = turned[flips]
    to_lps = np.array([-1, -1, 1])
    orientation = np.concatenate([to_lps * sign * np.eye(3)[axis] for sign, axis in (row, column)]).tolist()
    for k, pixels in enumerate(turned):
        index = np.ones(4)
        for (sign, axis), place in zip((row, column, stack), (0, 0, k)):
            index[axis] = place if sign > 0 else size[axis] - 1 - place
        position = to_lps * (affine() @ index)[:3]
        yield pixels, position.tolist(), orientation


def write_series(folder, plane="axial", values=None, **elements):
    """Write a series whose files are not in the order of its slices."""
    values = body()[0] if values is None else values
    row, column, _ = PLANES[plane]
    slices = list(places(values, plane))
    for k, (pixels, position, orientation) in enumerate(slices):
        dataset = basic(**elements)
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = position, orientation
        dataset.PixelSpacing = [SIZES[column[1]], SIZES[row[1]]]
        save(dataset, folder / f"{4 * k % len(slices)}.dcm", pixels)


def imported(folder, **options):
    download = Download(folder)
    images = list(read(download, keep_empty=1, **options))
    return images, {name: reason for reason, names in download.skipped.items() for name in names}


@pytest.fixture
def root(tmp_path):
    content = json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 2}})
    (tmp_path / "dataset.json").write_text(content)
    return tmp_path


@pytest.mark.parametrize("plane", PLANES)
def test_series_as_acquired(root, plane):
    write_series(root / "p1" / "scan", plane)
    values, labels = body()
    write_nifti(root / "p1" / "scan" / "seg.nii.gz", labels, orientation="LPS")
    axis = AXES[plane]
    images, skipped = imported(root)
    assert not skipped and [image.name for image in images] == [
        f"p1/scan/{k:03}.png" for k in range(values.shape[axis])
    ]
    column, row = np.delete(SIZES, axis)
    grey = (values - values.min()) * (255 / np.ptp(values))
    for k, image in enumerate(images):
        assert np.abs(image.image - shown(grey, axis, k)).max() < 0.51
        assert image.spacing == pytest.approx((row, column))
        for word, number in (("liver", 1), ("tumour", 2)):
            mask = image.masks.get(word, np.zeros(image.image.shape, bool))
            assert np.array_equal(mask, shown(labels == number, axis, k))


def test_window_axis_and_inverted_values(root):
    values, labels = body()
    write_series(root / "a")
    write_series(root / "b", PhotometricInterpretation="MONOCHROME1")
    for case in "ab":
        write_nifti(root / case / "seg.nii.gz", labels)
    write_nifti(root / "images" / "n.nii.gz", SLOPE * values + INTERCEPT)
    write_nifti(root / "labels" / "n.nii.gz", labels)
    window = (-1500.0, -900.0)
    images, _ = imported(root, axis=1, window=window)
    wanted = list(nifti.read(Download(root), axis=1, keep_empty=1, window=window))
    assert len(wanted) == 7 and len(images) == 14
    for image, other in zip(images, wanted):
        assert image.name == other.name.replace("n/", "a/") and np.array_equal(image.image, other.image)
    normal, inverted = np.split(np.stack([image.image for image in imported(root)[0]]).astype(int), 2)
    assert np.abs(normal + inverted - 255).max() <= 1


def test_bad_series_cost_themselves_alone(root):
    _, labels = body()
    for case in "abcdefgh":
        write_series(root / case)
        write_nifti(root / case / "seg.nii.gz", labels)
    write_series(root / "unlabelled")
    (root / "b" / "2.dcm").write_bytes((root / "b" / "2.dcm").read_bytes()[:400])
    (root / "c" / "again.dcm").write_bytes((root / "c" / "2.dcm").read_bytes())
    write_series(root / "d" / "other", uid="2")
    (root / "d" / "other" / "0.dcm").rename(root / "d" / "other.dcm")
    write_nifti(root / "e" / "second.nii.gz", labels)
    save(basic(Modality="RTSTRUCT"), root / "f" / "contours.dcm")
    localizer = pydicom.dcmread(root / "g" / "0.dcm")
    localizer.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    localizer.save_as(root / "g" / "0.dcm")
    frames = pydicom.dcmread(root / "h" / "0.dcm")
    frames.NumberOfFrames = 2
    frames.save_as(root / "h" / "0.dcm")
    images, skipped = imported(root)
    assert {image.name.split("/")[0] for image in images} == {"a"}
    for case, reason in dict(
        b="no slices in 'b/2.dcm'", c="several slices lie at one place", d="several slices lie at one place",
        e="2 NIfTI files of its labels", g="several orientations", f="no slices in 'f/contours.dcm'", h="several frames in one file; convert", unlabelled="0 NIfTI files",
    ).items():  # fmt: skip
        assert reason in skipped[case]
    assert "RTSTRUCT are not read" in skipped["unlabelled"]


def test_compressed_pixels_name_a_package(root, monkeypatch):
    write_series(root / "a")
    write_nifti(root / "a" / "seg.nii.gz", body()[1])
    dataset = pydicom.dcmread(root / "a" / "1.dcm")
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    save(dataset, root / "a" / "1.dcm", syntax=pydicom.uid.JPEGLosslessSV1)
    decoder = pydicom.pixels.decoders.JPEGLosslessSV1Decoder
    monkeypatch.setattr(decoder, "_available", {})
    images, skipped = imported(root)
    assert not images and "no slices in 'a/1.dcm'" in skipped["a"] and "requires pylibjpeg" in skipped["a"]
