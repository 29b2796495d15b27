"""Bring images and masks of another program's format into a folder that `datasets.py` knows."""

import inspect
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.describe import describe
from vlsm.data.folders import DEFAULT_RULES, divide, named_splits
from vlsm.data.pairing import stem_of
from vlsm.data.records import Record
from vlsm.raw.download import Download
from vlsm.raw.formats import coco, colours, cvat, dicom, labelme, labelstudio, nifti, nnunet, yolo
from vlsm.raw.prepare import Writer, describe_skipped, refuse_inside
from vlsm.system.console import first_few, progress, say
from vlsm.system.files import hash_of


def read_cvat(download):
    """Return an iterator over the images of one of CVAT's two exports. Raises ValueError for another one."""
    if download.find(r"annotations\.xml"):
        raise ValueError("annotations.xml of CVAT is not read: export 'COCO 1.0' or 'Segmentation mask 1.1'.")
    return cvat.read(download) if download.find(r"labelmap\.txt") else coco.read(download)


FORMATS = {
    "coco": coco.read, "labelme": labelme.read, "yolo": yolo.read, "cvat": read_cvat,
    "label-studio": labelstudio.read, "nnunet": nnunet.read, "nifti": nifti.read, "dicom": dicom.read,
    "masks-from-colours": colours.read,
}  # fmt: skip


FIRST_FOLDER = "(?:(?:train|val|test)/)?([^/]+)/"  # below that of the split: the group of an image


@dataclass
class Imported:
    """An image that was written, and its masks, which wait until it is known whether classes overlap."""

    name: str
    shape: tuple
    masks: dict  # class word -> packed and compressed mask, as `_pack` returns it
    prompts: dict  # class word -> MedVLSM's prompts
    spacing: tuple | None
    overlap: bool

    def mask(self, word):
        """Return the mask of a class, bool `[H, W]`; it is empty where the image does not show the class."""
        if word not in self.masks:
            return np.zeros(self.shape, bool)
        bits = np.frombuffer(zlib.decompress(self.masks[word]), np.uint8)
        return np.unpackbits(bits, count=self.shape[0] * self.shape[1]).reshape(self.shape) > 0

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
        raise ValueError(f"--import '{format_name}' is not known. Choose one of: {', '.join(FORMATS)}.")
    read = FORMATS[format_name]
    for name in options.keys() - inspect.signature(read).parameters.keys():
        raise ValueError(f"--{name.replace('_', '-')} has no effect on --import {format_name}; leave it out.")
    download = Download(source)
    refuse_inside(download, out)
    images = {}  # stem -> Imported
    with Writer(out, overwrite) as writer:
        with progress(None, f"importing {format_name}") as bar:
            for image in read(download, **options):
                bar.update()
                with download.skipping(image.name):
                    if stem_of(image.name) in images:
                        raise ValueError("another image has this name")
                    images[stem_of(image.name)] = _write_image(download, writer, image, templates)
        skipped = describe_skipped(download)
        counts = Counter(word for image in images.values() for word in image.masks)
        if not counts:
            content = "\n".join([first_few(download.names, 5) or "nothing", *skipped])
            raise ValueError(
                f"--import {format_name} found no image with a class in '{source}'. It holds {content}"
            )
        form = _write_masks(writer, list(images.values()), sorted(counts), templates)
        writer.commit(writer.outdated())
    say(f"{format_name}: {len(images)} images from '{source}', masks as {form}")
    for word in sorted(counts):
        say(f"  {word}: in {counts[word]} images")
    say(f"  no class: {sum(not image.masks for image in images.values())} images")
    for line in skipped:
        say(line)
    say(f"  files in '{out}': {writer.written} written, {len(writer.unchanged)} unchanged")
    say(f"Look at it with: python datasets.py --check {out}")


def _write_image(download, writer, image, templates):
    """Write a `LabelledImage`'s image; returns the `Imported`. Raises ValueError for what cannot be right."""
    pixels = image.image
    name = str(PurePosixPath(image.name).with_suffix(".png"))
    if isinstance(image.image, str):
        pixels = download.image(image.image)
        name = str(PurePosixPath(image.name).with_suffix(PurePosixPath(image.image).suffix))
    shape = pixels.shape[:2]
    covered = np.zeros(shape, np.uint8)
    kept = Imported(name, shape, {}, {}, image.spacing, overlap=False)
    for word, mask in image.masks.items():
        if word == "background":
            continue
        if mask.shape != shape:
            raise ValueError(f"image and mask differ in size, {shape} and {mask.shape}")
        covered += mask
        if mask.any():
            kept.masks[word] = zlib.compress(np.packbits(mask).tobytes(), 1)
            if templates:
                colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
                kept.prompts[word] = describe(colour, mask, word)
    kept.overlap = bool((covered > 1).any())
    if isinstance(image.image, str):
        writer.write(f"images/{name}", download.read(image.image))
    else:
        writer.png(f"images/{name}", pixels)
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
            labels = np.zeros(image.shape, np.uint8 if len(words) < 256 else np.uint16)
            for word in image.masks:
                labels[image.mask(word)] = content["labels"][word]
            writer.png(f"masks/{image.mask_name}", labels)
    spacing = {
        image.name: [round(float(length), 6) for length in image.spacing] for image in images if image.spacing
    }
    if spacing:
        content["spacing"] = spacing
        content["group"] = FIRST_FOLDER  # a volume
    if content:
        writer.write("dataset.json", json.dumps(content, indent=1).encode())
    return form


def _write_class_folders(writer, images, words):
    """Write a mask for each class in an image, or else an empty one of any class; returns their records."""
    rows = []
    for image in images:
        drawn = words[hash_of(image.name) % len(words)]
        for word in image.masks or [drawn]:
            mask_name = f"{word}/{image.mask_name}"
            writer.png(f"masks/{mask_name}", image.mask(word))
            prompts = image.prompts.get(word, {"p0": "", "p1": word})
            rows.append(Record(image.name, mask_name, None, None, prompts, word))
    return rows


def _write_annotations(writer, rows):
    """Write annotation files of the source's own splits, else of 80, 10 and 10 per cent."""
    for split, records in divide(named_splits(rows), DEFAULT_RULES, writer.root).items():
        entries = []
        for record in records:
            entries.append(dict(img_name=record.name, mask_name=record.mask_name, prompts=record.prompts))
        writer.write(f"anns/{split}.json", json.dumps(entries, indent=1).encode())
