"""nnU-Net's folders: imagesTr/CASE_0000.nii.gz with labelsTr/CASE.nii.gz, and the classes in dataset.json."""

from vlsm.raw.formats.volumes import NIFTI, read_cases

ENDING = rf"(?:{NIFTI}|\.png|\.tiff?|\.bmp)"
CASE = r"(?P<stem>(?:(?!_\d{4}\.)[^/])+)"  # the Medical Segmentation Decathlon has no _0000


def read(download, axis=2, keep_empty=0.1, window=None):
    """Return an iterator over images, and slices of volumes; axis, keep_empty, window: of `slices`.

    Cases of imagesTs come below test/ and the others below train/, if there is a labelsTs.
    """
    for name, _ in download.find(rf"images(?:Tr|Ts)/[^/]+_(?!0000)\d{{4}}{ENDING}"):
        download.skip(name, "only channel 0000 is read")
    return read_cases(download, _cases(download), axis, keep_empty, window)


def _cases(download):
    """Yield (case, image, labels); a file without a partner is skipped."""
    has_test = download.find(rf"labelsTs/[^/]+{ENDING}")
    for part, folder in (("Tr", "train/"), ("Ts", "test/")):
        images = download.by_stem(rf"images{part}/{CASE}(?:_0000)?{ENDING}")
        labels = download.by_stem(rf"labels{part}/(?P<stem>[^/]+?){ENDING}")
        for case, image, mask in download.join(images, labels):
            yield (folder if has_test else "") + case, image, mask
