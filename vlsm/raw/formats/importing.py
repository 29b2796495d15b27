"""Bring images and masks of another program's format into a folder that `datasets.py` knows."""

import inspect
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.describe import describe
from vlsm.data.folders import DEFAULT_RULES, FIRST_FOLDER, divide, named_splits
from vlsm.data.images import open_image
from vlsm.data.pairing import stem_of
from vlsm.data.records import Record
from vlsm.raw.download import Download
from vlsm.raw.formats import coco, colours, cvat, dicom, labelme, labelstudio, nifti, nnunet, yolo
from vlsm.raw.prepare import (
    Writer,
    check_size,
    colour_pixels,
    describe_content,
    describe_skipped,
    encode_png,
    refuse_inside,
)
from vlsm.system.arguments import flag
from vlsm.system.console import did_you_mean, progress, say
from vlsm.system.files import hash_of


def read_cvat(download):
    """Return an iterator over the images of one of CVAT's two exports."""
    return cvat.read(download) if download.find(r"labelmap\.txt") else coco.read(download)


FORMATS = {
    "coco": coco.read, "labelme": labelme.read, "yolo": yolo.read, "cvat": read_cvat,
    "label-studio": labelstudio.read, "nnunet": nnunet.read, "nifti": nifti.read, "dicom": dicom.read,
    "masks-from-colours": colours.read,
}  # fmt: skip

LAYOUTS = {  # what an importer looks for, for the message that it found nothing
    "coco": "JSON files, objects of images, annotations and categories",
    "labelme": "a .json beside each image",
    "yolo": "folders images/ and labels/, with a .txt of each image",
    "cvat": "the exports 'COCO 1.0' or 'Segmentation mask 1.1', not annotations.xml",
    "label-studio": "a list of tasks with annotations, exported as JSON, not as JSON-MIN",
    "nnunet": "imagesTr/CASE_0000.nii.gz (or .png, .tif) with labelsTr/CASE.nii.gz, and dataset.json",
    "nifti": "images/a.nii.gz with labels/a.nii.gz, a.nii.gz with a_seg.nii.gz, a/image.nii with a/seg.nii",
    "dicom": "folders of .dcm files, each beside a NIfTI file of its labels",
    "masks-from-colours": "images/ beside masks/ or labels/, with files of equal names",
}


@dataclass
class Imported:
    """An image that was written, and its masks, which wait until it is known whether classes overlap."""

    name: str
    shape: tuple
    masks: dict  # class word -> PNG
    prompts: dict  # class word -> MedVLSM's prompts
    spacing: tuple | None
    overlap: bool

    @property
    def mask_name(self):
        """The name of the mask's file."""
        return str(PurePosixPath(self.name).with_suffix(".png"))


def import_dataset(format_name, source, out, templates=False, overwrite=False, **options):
    """Write the folder `out` of a source in a format of `FORMATS`: images, masks, dataset.json.

    Masks are label maps, or a folder for each class if classes overlap. templates: write MedVLSM's prompts of
    each mask instead, in annotation files. overwrite: replace files that were changed since they were
    written. options: of the format. Nothing is written after an error. Raises ValueError for an unknown
    format or option and if nothing fits, FileNotFoundError for a missing source, FileExistsError.
    """
    if format_name not in FORMATS:
        guess = did_you_mean(format_name, FORMATS)
        raise ValueError(
            f"--import '{format_name}' is not known.{guess} Choose one of: {', '.join(FORMATS)}."
        )
    read = FORMATS[format_name]
    for name in options.keys() - inspect.signature(read).parameters.keys():
        raise ValueError(f"{flag(name)} has no effect on --import {format_name}; leave it out.")
    download = Download(source)
    refuse_inside(download, out)
    images = {}  # stem -> Imported
    with Writer(out, overwrite) as writer:
        for image in progress(read(download, **options), f"importing {format_name}"):
            with download.skipping(image.name):
                stem = stem_of(image.name)
                if stem in images:
                    raise ValueError("another image has this name")
                images[stem] = _write_image(download, writer, image, templates)
        counts = Counter(word for image in images.values() for word in image.masks)
        if not counts:
            raise ValueError(
                f"--import {format_name} found no image with a class in '{source}'. It reads "
                f"{LAYOUTS.get(format_name)}. {describe_content(download)}"
            )
        form = _write_masks(writer, list(images.values()), sorted(counts), templates)
        writer.commit(writer.outdated())
    say(f"{format_name}: {len(images)} images from '{source}', masks as {form}")
    for word in sorted(counts):
        say(f"  {word}: in {counts[word]} images")
    say(f"  no class: {sum(not image.masks for image in images.values())} images")
    for line in describe_skipped(download):
        say(line)
    say(writer.describe())
    say(f"Look at it with: python datasets.py --check {out}")


def _write_image(download, writer, image, templates):
    """Write a `LabelledImage`'s image; returns the `Imported`. Raises ValueError for what cannot be right."""
    pixels = colour_pixels(download, image.image)
    suffix = PurePosixPath(image.image).suffix if isinstance(image.image, str) else ".png"
    name = str(PurePosixPath(image.name).with_suffix(suffix))
    covered = np.zeros(pixels.shape[:2], np.uint8)
    kept = Imported(name, covered.shape, {}, {}, image.spacing, overlap=False)
    image.masks.pop("background", None)
    for word, mask in image.masks.items():
        check_size(pixels, mask)
        covered += mask
        if mask.any():
            kept.masks[word] = encode_png(mask)
            if templates:
                kept.prompts[word] = describe(pixels, mask, word)
    kept.overlap = covered.max() > 1
    writer.image(name, download, image.image)
    return kept


def _write_masks(writer, images, words, templates):
    """Write masks, dataset.json and annotation files; returns the form of the masks in words."""
    content = {}
    if templates or any(image.overlap for image in images):
        if "ignore" in words:
            raise ValueError(
                "Pixels to ignore are kept in label maps alone: not beside classes that overlap."
            )
        form = "a folder for each class"
        rows = _write_class_folders(writer, images, words)
        if templates:
            form += ", with prompts in annotation files"
            _write_annotations(writer, rows)
    else:
        form = "label maps"
        content["labels"] = {"background": 0} | {word: number for number, word in enumerate(words, 1)}
        for image in images:
            labels = np.zeros(image.shape, np.min_scalar_type(len(words)))
            for word, mask in image.masks.items():
                labels[np.asarray(open_image(mask)) > 0] = content["labels"][word]
            writer.write(f"masks/{image.mask_name}", encode_png(labels))
    spacing = {image.name: image.spacing for image in images if image.spacing}
    if spacing:
        content["spacing"] = spacing
        content["group"] = FIRST_FOLDER  # a volume
    if content:
        writer.json("dataset.json", content)
    return form


def _write_class_folders(writer, images, words):
    """Write a mask for each class in an image, or else an empty one of any class; returns their records."""
    rows = []
    for image in images:
        drawn = words[hash_of(image.name) % len(words)]
        for word, mask in (image.masks or {drawn: encode_png(np.zeros(image.shape, bool))}).items():
            mask_name = f"{word}/{image.mask_name}"
            writer.write(f"masks/{mask_name}", mask)
            prompts = image.prompts.get(word, {"p0": "", "p1": word})
            rows.append(Record(image.name, mask_name, None, None, prompts, word))
    return rows


def _write_annotations(writer, rows):
    """Write annotation files of the source's own splits, else of 80, 10 and 10 per cent."""
    for split, records in divide(named_splits(rows), DEFAULT_RULES, writer.root).items():
        entries = []
        for record in records:
            entries.append(dict(img_name=record.name, mask_name=record.mask_name, prompts=record.prompts))
        writer.json(f"anns/{split}.json", entries)
