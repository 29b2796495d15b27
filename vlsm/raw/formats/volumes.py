"""Volumes as slices: images of 8 bits, and the masks of their classes.

A volume's axes are turned to run to the patient's right, front and head (RAS+). A slice is shown as viewers
do: the front at the top of an axial slice, the head at the top of others, the patient's right (of a sagittal
slice the front) on the left.
"""

from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import NOT_FINITE
from vlsm.raw.download import LabelledImage, open_nifti
from vlsm.raw.formats.label_maps import class_masks, name_numbers, read_classes
from vlsm.system.console import say_once
from vlsm.system.files import hash_of

NIFTI = r"\.nii(?:\.gz)?"  # a file's ending


def turn(image):
    """Return numbers and affine, from indices to millimetres, of nibabel's image, turned to RAS+.

    Raises ValueError for several volumes in one, NaN, or an affine that cannot be right.
    """
    import nibabel

    turned = nibabel.as_closest_canonical(nibabel.squeeze_image(image))
    numbers = np.asarray(turned.dataobj, np.float32)
    if numbers.ndim != 3:
        raise ValueError(f"{numbers.shape} are no volume, or several; save each in its own file")
    if not np.isfinite(numbers).all():
        raise ValueError(NOT_FINITE)
    return numbers, turned.affine


def stack(frames):
    """Return the volume of a series, as `turn` does, and the axis across its slices.

    frames: (pixels `[H, W]`, affine from (column, row, slice) to millimetres) of each, in any order; an
    affine's third column has length 1. Raises ValueError unless they are slices of one volume.
    """
    import nibabel

    affines = np.stack([affine for _, affine in frames])  # [Z, 4, 4]
    normal = affines[0, :3, 2]
    order = np.argsort(affines[:, :3, 3] @ normal)
    affines = affines[order]
    if np.ptp(affines[:, :3, :3], 0).max() > 1e-3:
        raise ValueError("its slices have several orientations, or spacings")
    affine = affines[0]
    if len(frames) > 1:
        steps = np.diff(affines[:, :3, 3], axis=0)  # [Z - 1, 3]
        if (steps @ normal).min() < 1e-3:
            raise ValueError("several slices lie at one place: times, echoes, or several series")
        affine[:3, 2] = steps.mean(0)
    numbers = np.stack([frames[k][0] for k in order])  # [Z, Y, X]
    across = np.abs(normal).argmax()
    return turn(nibabel.Nifti1Image(numbers.transpose(), affine)), across


def read_cases(download, cases, axis, keep_empty, window):
    """Yield the slices of volumes, and images as they are, of cases (name, image, labels).

    axis, keep_empty, window: of `slices`.
    """
    classes = read_classes(download)
    for case, image, mask in cases:
        with download.skipping(f"{image}, {mask}"):
            if image.lower().endswith((".nii", ".nii.gz")):
                volume = turn(open_nifti(download, image))
                yield from slices(download, case, volume, mask, classes, axis, keep_empty, window)
            else:
                numbers = download.labels(mask)
                masks = class_masks(numbers, name_numbers(mask, numbers, classes))
                yield LabelledImage(case + PurePosixPath(image).suffix, image, masks)


def slices(download, case, volume, mask, classes, axis, keep_empty, window):
    """Yield a `LabelledImage`, CASE/017.png, of each slice across an axis.

    volume, axis: as `turn` returns it; 0 sagittal, 1 coronal, 2 axial. mask: a NIfTI file of class numbers.
    keep_empty: the share of slices without a class that is kept, the same ones each time. window: the values
    that become black and white; None: the least and the largest of the volume. Raises ValueError.
    """
    values, affine = volume
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    labels = _labels_on(download, mask, values.shape, affine, 0.1 * sizes.min())
    classes = name_numbers(mask, labels, classes)
    if window is None:
        say_once(
            "window",
            "Without --window LOW HIGH each volume is scaled by itself: its least value becomes black, its "
            "largest white.",
        )
    low, high = window or (values.min(), values.max())
    if not low < high:
        raise ValueError(f"values from {low} to {high} are no range of grey")
    column, row = np.delete(sizes, axis).tolist()
    planes = zip(_planes(values, axis), _planes(labels, axis))
    for k, (plane, numbers) in enumerate(planes):
        name = f"{case}/{k:03}.png"
        grey = np.interp(plane, (low, high), (0, 255))
        drawn = hash_of(name) < keep_empty * 2**64
        masks = class_masks(numbers, classes)
        if masks or drawn:
            yield LabelledImage(name, grey.round().astype(np.uint8), masks, (row, column))
        else:
            download.skip(name, f"slice without a class; --keep-empty {keep_empty:g} keeps this share")


def _labels_on(download, mask, shape, affine, tolerance):
    """Return a NIfTI file's class numbers, uint16, on the voxels of a volume. Raises ValueError for others.

    tolerance: of the place of the last voxel, in millimetres.
    """
    labels, own_affine = turn(open_nifti(download, mask))
    if labels.shape != shape:
        raise ValueError(f"the image has {shape} voxels, its labels {labels.shape}")
    shift = np.abs((own_affine - affine) @ (*shape, 1))
    if shift.max() > tolerance:
        raise ValueError(f"image and labels lie {shift.max():.3g} mm apart, by their headers")
    numbers = labels.astype(np.uint16)
    if (numbers != labels).any():
        raise ValueError(f"'{mask}' holds other than class numbers, 0 to 65535")
    return numbers


def _planes(numbers, axis):
    """Return the slices `[N, H, W]` of a volume across an axis, as viewers show them."""
    planes = np.moveaxis(numbers, axis, 0)
    return planes.swapaxes(1, 2)[:, ::-1, ::-1]
