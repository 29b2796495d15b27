"""Small volumes for the tests of formats: a body whose shape tells right, front and head apart."""

import numpy as np

SIZES = (0.5, 0.75, 3.0)  # millimetres of a voxel to the right, to the front, to the head


def body(shape=(9, 7, 5)):
    """Return values and class numbers `[X, Y, Z]` in RAS+; classes 1 and 2 in slices 1 and 2 of Z alone."""
    x, y, z = np.indices(shape)
    values = (100 * x + 10 * y + z).astype(np.int16) - 400
    labels = np.zeros(shape, np.uint8)
    labels[1:4, 2:4, 1] = 1
    labels[5:, 4:, 1:3] = 2
    return values, labels


def affine():
    """Return the affine of `body`, from indices to millimetres."""
    matrix = np.diag([*SIZES, 1.0])
    matrix[:3, 3] = (-12.0, 3.5, 40.0)
    return matrix


def write_nifti(path, numbers, matrix=None, orientation="RAS"):
    """Write a volume given in RAS+ as a NIfTI file whose axes have an orientation such as LPS."""
    import nibabel
    from nibabel.orientations import axcodes2ornt, ornt_transform

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(numbers, affine() if matrix is None else matrix)
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    nibabel.save(image.as_reoriented(change), path)


def shown(numbers, axis, k):
    """Return slice k as viewers show it, pixel by pixel: top is head or front, left is right or front."""
    rest = [a for a in range(3) if a != axis]
    plane = np.take(numbers, k, axis)
    across, up = (numbers.shape[a] for a in rest)
    return np.array([[plane[across - 1 - c, up - 1 - r] for c in range(across)] for r in range(up)])
