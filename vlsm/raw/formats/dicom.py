"""DICOM series, a folder each, with labels in NIfTI. DICOM SEG and contours (RTSTRUCT) are not read."""

import io
from collections import defaultdict
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import ImageError, NeedsPackage
from vlsm.raw.formats.label_maps import read_classes
from vlsm.raw.formats.volumes import NIFTI, slices, stack

NOT_READ = "DICOM SEG and RTSTRUCT are not read: convert them to NIfTI"


def read(download, axis=None, keep_empty=0.1, window=None):
    """Yield the slices of the series in folders; axis, keep_empty, window: of `slices`.

    axis: by default the one across the slices of the files. Labels: the one NIfTI file in a series' folder;
    classes: as in `nifti.read`. Values of MONOCHROME1 are negated. Raises NeedsPackage without pydicom.
    """
    folders = defaultdict(list)
    for name, _ in download.find(r"[^/]+\.(?:dcm|ima)"):
        folders[PurePosixPath(name).parent].append(name)
    classes = read_classes(download)
    for folder, names in folders.items():
        with download.skipping(str(folder)):
            mask = _labels_of(download, folder)
            volume, acquired = read_series(download, names)
            across = acquired if axis is None else axis
            case = folder.as_posix() if folder.name else "case"
            yield from slices(download, case, volume, mask, classes, across, keep_empty, window)


def _labels_of(download, folder):
    """Return the NIfTI file in a series' folder. Raises ValueError unless there is one."""
    volumes = download.find(rf"[^/]+{NIFTI}")
    files = [name for name, _ in volumes if PurePosixPath(name).parent == folder]
    if len(files) != 1:
        raise ValueError(f"{len(files)} NIfTI files of its labels beside it, not one. {NOT_READ}")
    return files[0]


def read_series(download, names):
    """Return the volume of a series, as `turn` does, and the axis across its slices.

    Raises NeedsPackage without pydicom, ImageError.
    """
    try:
        import pydicom
    except ImportError:
        raise NeedsPackage(names[0], "it is a DICOM file: pip install pydicom nibabel") from None
    frames = []
    for name in names:
        try:
            dataset = pydicom.dcmread(io.BytesIO(download.read(name)))
            frames.append(_frame(dataset))
        except Exception as error:  # pydicom's own types
            # Of compressed pixels, it names the packages that decode them.
            raise ImageError(name, f"no slices in '{name}': {str(error)[:500]}") from error
    return stack(frames)


def _frame(dataset):
    """Return (pixels `[H, W]`, affine from (column, row, slice) to millimetres) of a file.

    The affine's third column, across the slice, has length 1. Raises ValueError for several frames.
    """
    if dataset.get("NumberOfFrames", 1) > 1:
        raise ValueError("several frames in one file; convert the series to NIfTI, by dcm2niix")
    along_row, along_column = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
    row, column = dataset.PixelSpacing
    affine = np.eye(4)
    normal = np.cross(along_row, along_column)
    axes = [column * along_row, row * along_column, normal, dataset.ImagePositionPatient]
    affine[:3] = np.transpose(axes)
    affine[:2] *= -1  # DICOM's axes run to the left and the back
    values = dataset.pixel_array * np.float32(dataset.get("RescaleSlope") or 1)
    values += np.float32(dataset.get("RescaleIntercept") or 0)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = -values
    return values, affine
