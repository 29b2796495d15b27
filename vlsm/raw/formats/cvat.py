"""CVAT's export "Segmentation mask 1.1"; its export "COCO 1.0" is read by `coco`."""

import re
from pathlib import PurePosixPath

from vlsm.raw.download import LabelledImage
from vlsm.raw.formats.colours import IMAGE, class_colours, colour_masks
from vlsm.raw.formats.paths import name_below, split_of


def read(download):
    """Yield the images of SegmentationClass/, whose classes' colours labelmap.txt tells."""
    file = download.only(r"labelmap\.txt")
    text = download.text(file)
    lines = re.findall(r"^[^#\s].*", text, re.MULTILINE)  # polyp:250,50,83:parts:actions
    classes = class_colours(lines, r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})\b.*", f"'{file}'")
    splits = _splits(download)
    images = download.by_stem(rf"(?:JPEGImages|images)/{IMAGE}")
    masks = download.by_stem(r"SegmentationClass/(?P<stem>.+)\.png")
    for stem in sorted(splits.keys() & images.keys() - masks.keys()):
        masks[stem] = None  # listed, but CVAT writes no mask without objects
    for stem, image, mask in download.join(images, masks):
        with download.skipping(mask or image):
            masks_of_image = colour_masks(download.image(mask), classes, 0, 0) if mask else {}
            name = name_below(stem + PurePosixPath(image).suffix, splits.get(stem))
            yield LabelledImage(name, image, masks_of_image)


def _splits(download):
    """Return {path without ending: split} of ImageSets/Segmentation/train.txt and others."""
    splits = {}
    for file, _ in download.find(r"ImageSets/Segmentation/[^/]+\.txt"):
        split = split_of(f"{PurePosixPath(file).stem}/")
        for line in download.text(file).splitlines():
            splits[line.strip(' "')] = split
    return splits
