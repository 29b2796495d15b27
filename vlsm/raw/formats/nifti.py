"""NIfTI volumes with their labels: in folders side by side, in one folder, or in a folder for each case."""

import re

from vlsm.raw.formats.volumes import NIFTI, read_cases

WORD = r"(?:masks?|labels?(?:T[rs])?|seg|segmentations?|gt|ground_?truth)"
# A folder's name, or the end of a file's: masks/a, a_seg, case1/seg.
LABEL = re.compile(rf"(?:^|/){WORD}(?=/)|(?:^|[/_. -]){WORD}$", re.I)
IMAGE = re.compile(r"(?:^|/)images?(?:T[rs])?(?=/)|(?:^|[/_. -])(?:image|img)$", re.I)


def read(download, axis=2, keep_empty=0.1, window=None):
    """Return an iterator over the slices of volumes; axis, keep_empty, window: of `slices`.

    "labels" of a dataset.json name the classes; without it they are class1, class2, ...
    """
    images, labels = _cases(download)
    return read_cases(download, download.join(images, labels), axis, keep_empty, window)


def _cases(download):
    """Return {case: file} of images, and of labels."""
    images = {}
    labels = {}
    for name, _ in download.find(rf"[^/]+{NIFTI}"):
        path = re.sub(f"{NIFTI}$", "", name, flags=re.I)
        files = labels if LABEL.search(path) else images
        case = IMAGE.sub("", LABEL.sub("", path)).strip("/") or "case"
        if case in files:
            download.skip(name, "a second file of that stem")
        else:
            files[case] = name
    return images, labels
