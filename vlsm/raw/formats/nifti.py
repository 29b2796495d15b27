"""NIfTI volumes with their labels: in folders side by side, in one folder, or in a folder for each case."""

import re
from pathlib import PurePosixPath

from vlsm.data.images import LABELS_FORM
from vlsm.raw.formats.label_maps import read_classes
from vlsm.raw.formats.volumes import NIFTI, read_volume, slices
from vlsm.system.console import first_few, say_once

WORD = r"(?:masks?|labels?(?:T[rs])?|seg|segmentations?|gt|ground_?truth)"
# A folder's name, or the end of a file's: masks/a, a_seg, case1/seg.
LABEL = re.compile(rf"(?:^|/){WORD}(?=/)|(?:^|[/_. -]){WORD}$", re.I)
IMAGE = re.compile(r"(?:^|/)images?(?:T[rs])?(?=/)|(?:^|[/_. -])(?:image|img)$", re.I)


def read(download, axis=2, keep_empty=0.1, window=None):
    """Yield the slices of volumes; axis, keep_empty, window: of `slices`.

    "labels" of a dataset.json name the classes; without it they are class1, class2, ... Raises ValueError
    without a pair.
    """
    classes = read_classes(download)
    images, labels = _cases(download)
    if not images.keys() & labels.keys():
        raise ValueError(
            f"'{download.path}' holds no NIfTI image with labels, such as images/a.nii.gz with "
            "labels/a.nii.gz, a.nii.gz with a_seg.nii.gz, or a/ct.nii.gz with a/seg.nii.gz. It holds "
            f"{first_few(download.names) or 'nothing'}."
        )
    if classes is None:
        say_once("classes", f"No dataset.json names the classes, as in {LABELS_FORM}: class1, class2, ...")
    for case, image, mask in download.join(images, labels):
        with download.skipping(f"{image}, {mask}"):
            volume = read_volume(download, image)
            yield from slices(download, case or "case", volume, mask, classes, axis, keep_empty, window)


def _cases(download):
    """Return {case: file} of images, and of labels."""
    images = {}
    labels = {}
    for name, _ in download.find(rf"[^/]+{NIFTI}"):
        path = re.sub(f"{NIFTI}$", "", name, flags=re.I)
        files = labels if LABEL.search(path) else images
        case = IMAGE.sub("", LABEL.sub("", path)).strip("/")
        if case in files:
            download.skip(name, "a second file of that stem")
        else:
            files[case] = name
    # a folder's one image, case1/ct, belongs to its labels, case1/seg
    for case in labels.keys() - images.keys():
        inside = [key for key in images if PurePosixPath(key).parent == PurePosixPath(case)]
        if len(inside) == 1 and inside[0] not in labels:
            images[case] = images.pop(inside[0])
    return images, labels
