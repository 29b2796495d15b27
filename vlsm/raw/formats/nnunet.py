"""nnU-Net's folders: imagesTr/CASE_0000.nii.gz with labelsTr/CASE.nii.gz, and the classes in dataset.json."""

from pathlib import PurePosixPath

from vlsm.raw.download import LabelledImage
from vlsm.raw.formats.label_maps import class_masks, name_numbers, read_classes
from vlsm.raw.formats.volumes import NIFTI, read_volume, slices
from vlsm.system.console import first_few

ENDING = rf"(?:{NIFTI}|\.png|\.tiff?|\.bmp)"
CASE = r"(?P<stem>(?:(?!_\d{4}\.)[^/])+)"  # the Medical Segmentation Decathlon has no _0000


def read(download, axis=2, keep_empty=0.1, window=None):
    """Yield the slices of volumes, and images as they are; axis, keep_empty, window: of `slices`.

    Cases of imagesTs come below test/ and the others below train/, if there is a labelsTs. Raises ValueError
    without a dataset.json or a case.
    """
    classes = read_classes(download)
    cases = list(_cases(download))
    if not classes or not cases:
        raise ValueError(
            f"'{download.path}' holds no dataset.json, or no imagesTr/CASE_0000.nii.gz (or .png, .tif) with "
            f"labelsTr/CASE.nii.gz, as nnU-Net has them. It holds {first_few(download.names)}."
        )
    for name, _ in download.find(rf"images(?:Tr|Ts)/[^/]+_(?!0000)\d{{4}}{ENDING}"):
        download.skip(name, "only channel 0000 is read")
    for case, image, mask in cases:
        with download.skipping(f"{image}, {mask}"):
            if image.lower().endswith((".nii", ".nii.gz")):
                volume = read_volume(download, image)
                yield from slices(download, case, volume, mask, classes, axis, keep_empty, window)
            else:
                numbers = download.labels(mask)
                name_numbers(mask, numbers, classes)
                name = case + PurePosixPath(image).suffix
                yield LabelledImage(name, image, class_masks(numbers, classes))


def _cases(download):
    """Yield (case, image, labels); a file without a partner is skipped."""
    has_test = download.find(rf"labelsTs/[^/]+{ENDING}")
    for part, folder in (("Tr", "train/"), ("Ts", "test/")):
        images = download.by_stem(rf"images{part}/{CASE}(?:_0000)?{ENDING}")
        labels = download.by_stem(rf"labels{part}/(?P<stem>[^/]+?){ENDING}")
        for case, image, mask in download.join(images, labels):
            yield (folder if has_test else "") + case, image, mask
