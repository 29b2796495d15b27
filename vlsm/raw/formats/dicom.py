"""DICOM series, a folder each, with labels in NIfTI. DICOM SEG and contours (RTSTRUCT) are not read."""

import io
from collections import defaultdict
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import ImageError, NeedsPackage
from vlsm.raw.formats.label_maps import read_classes
from vlsm.raw.formats.volumes import NIFTI, slices, stack
from vlsm.system.console import first_few

NOT_READ = "DICOM SEG and RTSTRUCT are not read: convert them to NIfTI"


def read(download, axis=None, keep_empty=0.1, window=None):
    """Yield the slices of the series in folders; axis, keep_empty, window: of `slices`.

    axis: by default the one across the slices of the files. Labels: the one NIfTI file in a series' folder,
    or masks/FOLDER.nii.gz; classes: as in `nifti.read`. Values of MONOCHROME1 are negated. Raises ValueError
    without a .dcm file, NeedsPackage without pydicom.
    """
    folders = defaultdict(list)
    for name, _ in download.find(r"[^/]+\.(?:dcm|ima)"):
        folders[PurePosixPath(name).parent].append(name)
    if not folders:
        raise ValueError(f"'{download.path}' holds no .dcm file. It holds {first_few(download.names)}.")
    classes = read_classes(download)
    for folder, names in folders.items():
        with download.skipping(str(folder)):
            mask = _labels_of(download, folder)
            volume, acquired = read_series(download, names)
            across = acquired if axis is None else axis
            case = folder.as_posix() if folder.name else "case"
            yield from slices(download, case, volume, mask, classes, across, keep_empty, window)


def _labels_of(download, folder):
    """Return the NIfTI file with a series' labels. Raises ValueError unless there is one."""
    files = []
    for name, match in download.find(rf"(?P<stem>[^/]+?){NIFTI}"):
        place = PurePosixPath(name).parent
        named = place.name in ("masks", "labels") and match["stem"] == folder.name
        if named or place == folder:
            files.append(name)
    if len(files) != 1:
        raise ValueError(f"{len(files)} NIfTI files of its labels, not one. {NOT_READ}")
    return files[0]


def read_series(download, names):
    """Return the volume of a series, as `turn` does, and the axis across its slices.

    Raises NeedsPackage without pydicom, or a decoder of compressed pixels; ImageError.
    """
    try:
        import pydicom
    except ImportError:
        raise NeedsPackage(names[0], "it is a DICOM file: pip install pydicom nibabel") from None
    frames = []
    for name in names:
        try:
            dataset = pydicom.dcmread(io.BytesIO(download.read(name)))
            if dataset.Modality in ("SEG", "RTSTRUCT"):
                download.skip(name, NOT_READ)
            else:
                frames += _frames(dataset)
        except Exception as error:  # pydicom's own types
            if "missing dependencies" in str(error):
                reason = (
                    "its pixels are compressed: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
                )
                raise NeedsPackage(name, reason) from error
            raise ImageError(name, f"no slices in '{name}': {str(error)[:80]}") from error
    return stack(frames)


def _frames(dataset):
    """Yield (pixels `[H, W]`, affine from (column, row, slice) to millimetres, series) of each frame.

    The affine's third column, across the slice, has length 1.
    """
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    sign = -1 if dataset.PhotometricInterpretation == "MONOCHROME1" else 1
    groups = dataset.get("PerFrameFunctionalGroupsSequence", [])
    _copy_elements(dataset, dataset.get("SharedFunctionalGroupsSequence", []))
    for k, values in enumerate(pixels):
        _copy_elements(dataset, groups[k : k + 1])
        along_row, along_column = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
        row, column = dataset.PixelSpacing
        affine = np.eye(4)
        normal = np.cross(along_row, along_column)
        axes = [column * along_row, row * along_column, normal, dataset.ImagePositionPatient]
        affine[:3] = np.transpose(axes)
        affine[:2] *= -1  # DICOM's axes run to the left and the back
        values = values * np.float32(dataset.get("RescaleSlope") or 1)
        values = sign * (values + np.float32(dataset.get("RescaleIntercept") or 0))
        yield values, affine, dataset.SeriesInstanceUID


def _copy_elements(dataset, groups):
    """Set the elements of functional groups, those of one frame or of all, in the dataset."""
    for group in groups:
        for sequence in group:
            for item in sequence.value:
                dataset.update(item)
