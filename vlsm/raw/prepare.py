"""Turn a raw download into a folder in MedVLSM's layout: images, a binary PNG for each record, annotation
files with prompts and splits.
"""

import io
import json
import random
import shutil
from pathlib import Path, PurePosixPath

from PIL import Image

from vlsm.data.describe import describe
from vlsm.data.images import grey_to_rgb, mask_image
from vlsm.data.records import read_annotations
from vlsm.raw.download import Download
from vlsm.raw.readers import READERS
from vlsm.system.console import first_few, progress, say
from vlsm.system.files import (
    LEDGER,
    check_targets,
    digest,
    is_owned,
    leaves_folder,
    make_room,
    owned_write,
    sweep_temporary,
    temporary_beside,
)
from vlsm.system.schema import read_json

# Numbers of MedVLSM's records for train, val, test: splits that are drawn here have these shares.
SIZES = {
    "kvasir": (800, 100, 100), "clinicdb": (490, 61, 61), "bkai": (800, 100, 100), "isic": (810, 90, 0),
    "dfu": (1600, 200, 200), "camus": (400, 50, 50), "busi": (624, 78, 78),
    "chexlocalize": (1279, 446, 452), "cityscapes": (9, 1, 0), "voc": (9, 1, 0),
}  # fmt: skip
SEED = 0  # of the splits
CLASS_WORD_ONLY = ("cityscapes", "voc")  # the class is their only prompt, as in TuneVLSeg


class Writer:
    """Files below a folder that are written together or not at all, and only if their content is new.

    They are in a temporary folder beside it until `commit`; a new folder is that one, renamed. overwrite:
    replace files that were changed since an earlier run wrote them. Attributes: `written`, a number of files;
    `unchanged`, paths.
    """

    def __init__(self, root, overwrite=False):
        self.root = Path(root)
        self.overwrite = overwrite
        self.written = 0
        self.unchanged = set()
        self.waiting = {}  # path -> temporary file

    def __enter__(self):
        make_room(self.root.parent)
        for folder in self.root.glob("**/"):
            sweep_temporary(folder)  # of a preparation that was killed
        self.stage = temporary_beside(self.root.resolve())
        self.stage.mkdir()
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.stage, ignore_errors=True)

    def write(self, name, data):
        """Write bytes under a path below the root. Raises ValueError for a name that leaves it."""
        if leaves_folder(name):
            raise ValueError(f"the name '{name}' leaves the data set's folder")
        path = self.root / name
        if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
            self.unchanged.add(path)
            return
        staged = self.stage / name
        with owned_write(staged) as temporary:
            temporary.write_bytes(data)
        self.waiting[path] = staged

    def image(self, name, download, image):
        """Write an image below images/: a file of a download as it is, or pixels as PNG."""
        data = download.read(image) if isinstance(image, str) else encode_png(image)
        self.write(PurePosixPath("images", name), data)

    def json(self, name, value):
        """Write a value as JSON."""
        self.write(name, json.dumps(value, indent=1).encode())

    def describe(self):
        """Say how many files were written."""
        return f"  files in '{self.root}': {self.written} written, {len(self.unchanged)} unchanged"

    def outdated(self):
        """Return the files that an earlier run wrote and this one does not. Raises ValueError for others."""
        files = [path for path in sorted(self.root.rglob("*")) if path.is_file() and path.name != LEDGER]
        rest = [path for path in files if path not in self.waiting and path not in self.unchanged]
        foreign = [path for path in rest if not is_owned(path)]
        if foreign:
            raise ValueError(
                f"'{self.root}' holds files of another origin, such as '{foreign[0]}'. Name a new folder."
            )
        return rest

    def commit(self, outdated=()):
        """Move the files to their places, and remove the `outdated` ones. Raises as `check_targets`."""
        root = self.root.resolve()
        targets = [*self.waiting, *outdated]
        for path in targets:
            if not path.parent.resolve().is_relative_to(root):
                raise ValueError(f"'{path}' leads out of '{self.root}' by a link; remove the link.")
        check_targets(targets, overwrite=self.overwrite)
        self.written = len(self.waiting)
        if not root.exists():
            self.stage.rename(root)
            return
        for path, staged in self.waiting.items():
            with owned_write(path) as temporary:
                staged.replace(temporary)
        for path in outdated:
            path.unlink()
            if [other.name for other in path.parent.iterdir()] == [LEDGER]:
                shutil.rmtree(path.parent)


def encode_png(pixels):
    """Return the bytes of a PNG of pixels: uint8, or bool as 0 and 255."""
    image = mask_image(pixels) if pixels.dtype == bool else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def colour_pixels(download, image):
    """Return the pixels `[H, W, 3]` of an image: a file of a download, or pixels."""
    pixels = download.image(image) if isinstance(image, str) else image
    return pixels if pixels.ndim == 3 else grey_to_rgb(pixels)


def check_size(pixels, mask):
    """Raise ValueError if an image and its mask differ in size."""
    if mask.shape != pixels.shape[:2]:
        raise ValueError(f"image and mask differ in size, {pixels.shape[:2]} and {mask.shape}")


def prepare(name, source, root, anns=None, descriptions=(), overwrite=False):
    """Read the download `source` of a data set, write its folder `root`, and return its splits.

    anns: a folder with the published annotation files, which are used as they are; without it prompts and
    splits are made. descriptions: general ones of the class, for p7 to p9. overwrite: replace files that were
    changed by hand since they were written.

    A second run leaves files that would not change; after an error nothing is written. Raises ValueError if
    nothing fits, FileNotFoundError for a missing download, FileExistsError for files changed by hand.
    """
    download = Download(source)
    refuse_inside(download, root)
    with Writer(root, overwrite) as writer:
        entries = _write_samples(name, download, writer, descriptions, made=anns is None)
        if not entries:
            raise ValueError(
                f"'{source}' does not look like {name}'s download: no image with a usable mask was found. "
                f"{describe_content(download)}"
            )
        splits = _write_splits(name, writer, entries) if anns is None else _published(anns, writer, entries)
        outdated = [file for file in sorted(Path(root).glob("anns/*.json")) if file.stem not in splits]
        writer.commit(outdated)
    images = {(entry["subfolder"], entry["img_name"]) for entry in entries}
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    say(f"{name}: {len(images)} images and {len(entries)} masks from '{source}'")
    say(f"  records: {counts} ({'published' if anns else 'made here'})")
    say(writer.describe())
    for line in describe_skipped(download):
        say(line)
    return splits


def refuse_inside(download, root):
    """Raise ValueError if a folder to write is inside a download."""
    target = Path(root).resolve()
    if download.path.resolve() in (target, *target.parents):
        raise ValueError(
            f"'{root}' is inside the download '{download.path}', where nothing is written. Choose another "
            "place."
        )


def describe_skipped(download):
    """Return a line for each reason to skip files."""
    lines = []
    for reason, names in download.skipped.items():
        lines.append(f"  skipped, {reason}: {len(names)} ({first_few(names)})")
    return lines


def describe_content(download):
    """Say what a download holds of which nothing could be used."""
    names = first_few(download.names, 5) or "nothing"
    return "\n".join([f"It holds {names}", *describe_skipped(download)])


def _write_samples(name, download, writer, descriptions, made):
    """Write all images and masks, and return an entry for each mask.

    made: whether prompts are made. An entry: img_name, mask_name and prompts, as in an annotation file, and
    split, group and subfolder.
    """
    entries = []
    group_of = {}  # group, or digest of an image -> group: equal images under two names stay in one split
    for sample in progress(READERS[name](download), f"preparing {name}"):
        with download.skipping(sample.name):
            pixels = colour_pixels(download, sample.image)
            writer.image(PurePosixPath(sample.subfolder, sample.name), download, sample.image)
            group = sample.group or f"{sample.subfolder}/{sample.name}"
            equal = group_of.setdefault(digest(pixels.tobytes(), 16), group)
            group = group_of.setdefault(group, equal)
            rows = []
            for mask_name, mask, word in sample.masks:
                prompts = {"p0": "", "p1": word}
                if made:
                    check_size(pixels, mask)
                if made and name not in CLASS_WORD_ONLY:
                    prompts = describe(pixels, mask, word, descriptions)
                writer.write(PurePosixPath("masks", sample.subfolder, mask_name), encode_png(mask))
                rows.append(
                    dict(
                        img_name=sample.name,
                        mask_name=mask_name,
                        prompts=prompts,
                        split=sample.split,
                        group=group,
                        subfolder=sample.subfolder,
                    )
                )
            entries += rows
    return entries


def _write_splits(name, writer, entries):
    """Split the records, and write annotation files of them; returns the splits."""
    splits = draw_splits(name, entries)
    for split, rows in splits.items():
        records = [{key: entry[key] for key in ("img_name", "mask_name", "prompts")} for entry in rows]
        writer.json(f"anns/{split}.json", records)
    return splits


def draw_splits(name, entries):
    """Return {split: entries} for train, val and test.

    An entry's own split counts. The others are drawn from a fixed seed in the published shares, by groups: no
    image (of CAMUS and CheXlocalize: no patient) is in two splits.
    """
    free = sorted({entry["group"] for entry in entries if entry["split"] is None})
    random.Random(SEED).shuffle(free)
    train, val, test = SIZES.get(name, (1, 0, 0))  # test sets have no records to draw
    if any(entry["split"] == "test" for entry in entries):
        test = 0
    total = train + val + test
    train_end = round(len(free) * train / total)
    val_end = round(len(free) * (train + val) / total)
    split_of = dict.fromkeys(free, "test")
    split_of.update(dict.fromkeys(free[:val_end], "val"))
    split_of.update(dict.fromkeys(free[:train_end], "train"))
    splits = {"train": [], "val": [], "test": []}
    for entry in sorted(entries, key=lambda entry: entry["group"]):
        splits[entry["split"] or split_of[entry["group"]]].append(entry)
    return {split: rows for split, rows in splits.items() if rows}


def _published(folder, writer, entries):
    """Copy published annotation files; returns {split: records}.

    Raises ValueError if there are none, or records lack their files.
    """
    pairs = {_pair(entry) for entry in entries}
    splits = {}
    missing = []
    for split in ("train", "val", "test"):
        file = Path(folder) / f"{split}.json"
        if not file.is_file():
            continue
        splits[split] = read_annotations(file)
        for record in splits[split]:
            if _pair(record) not in pairs:
                missing.append(record["mask_name"])
        writer.write(f"anns/{split}.json", file.read_bytes())
    if not splits:
        raise ValueError(f"'{folder}' holds no train.json, val.json or test.json.")
    if missing:
        raise ValueError(
            f"{len(missing)} of the published records have no image or mask in the download: "
            f"{first_few(missing)}. Is it complete?"
        )
    return splits


def _pair(record):
    """Return the names of image and mask, without suffixes: published ones may differ from prepared ones."""
    return tuple(PurePosixPath(record[key]).with_suffix("") for key in ("img_name", "mask_name"))


def read_descriptions(file):
    """Return the texts of --describe, a JSON list of general descriptions of the class."""
    texts = read_json(file, list, "a list of texts")
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"'{file}' should hold a list of texts, such as [\"an abnormal growth of tissue\"].")
    return texts
