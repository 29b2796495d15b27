"""From a raw download to a folder in MedVLSM's layout: images, one binary PNG a record, annotation files with
prompts and splits.
"""

import hashlib
import io
import json
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vlsm.data.describe import describe
from vlsm.data.images import mask_image, read_image
from vlsm.data.records import read_annotations
from vlsm.raw.download import Download
from vlsm.raw.readers import READERS
from vlsm.system.console import progress, say
from vlsm.system.files import (
    check_targets,
    leaves_folder,
    owned_write,
    read_json,
    sweep_temporary,
    temporary_beside,
)

# Records that MedVLSM has for train, val, test: the shares in which ours are split, where the publisher
# leaves that open.
SIZES = {
    "kvasir": (800, 100, 100), "clinicdb": (490, 61, 61), "bkai": (800, 100, 100), "isic": (810, 90, 0),
    "dfu": (1600, 200, 200), "camus": (400, 50, 50), "busi": (624, 78, 78),
    "chexlocalize": (1279, 446, 452), "cityscapes": (9, 1, 0), "voc": (9, 1, 0),
}  # fmt: skip
SEED = 0  # of these splits
CLASS_WORD_ONLY = ("cityscapes", "voc")  # TuneVLSeg's prompt; shapes and colours of streets say little


class Writer:
    """Files below a folder, written only where their content is new, and all of them or none.

    They wait in a folder beside it until `commit`. `counts` says what became of each. overwrite: replace
    files that were changed since an earlier run wrote them.
    """

    def __init__(self, root, overwrite=False):
        self.root, self.overwrite, self.counts, self.waiting = Path(root), overwrite, Counter(), []

    def __enter__(self):
        self.root.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporary(self.root.parent)  # of a preparation that was killed
        self.stage = temporary_beside(self.root.resolve())
        self.stage.mkdir()
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.stage)  # what was not committed

    def write(self, name, data):
        if leaves_folder(name):
            raise ValueError(f"the name '{name}' leaves the data set's folder")
        path = self.root / name
        if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
            self.counts["unchanged"] += 1
            return
        (self.stage / name).parent.mkdir(parents=True, exist_ok=True)
        (self.stage / name).write_bytes(data)
        self.waiting.append(name)

    def png(self, name, pixels):
        """Write pixels, uint8, or bool as 0 and 255."""
        data = io.BytesIO()
        image = mask_image(pixels) if pixels.dtype == bool else Image.fromarray(pixels)
        image.save(data, format="PNG")
        self.write(name, data.getvalue())

    def commit(self, replaced=()):
        """Move the files to their places, and remove `replaced` ones. Raises as `check_targets`."""
        names = list(dict.fromkeys(self.waiting))
        root = self.root.resolve()
        linked = [n for n in names if not (self.root / n).parent.resolve().is_relative_to(root)]
        if linked:
            raise ValueError(
                f"'{self.root / linked[0]}' leads out of '{self.root}' by a link; remove the link."
            )
        check_targets([self.root / name for name in (*names, *replaced)], overwrite=self.overwrite)
        for name in names:
            with owned_write(self.root / name) as temporary:
                temporary.write_bytes((self.stage / name).read_bytes())
        for name in replaced:
            (self.root / name).unlink()
        self.counts["written"] += len(names)


def prepare(name, source, root, anns=None, descriptions=(), overwrite=False):
    """Read the download `source` of a data set and write its folder `root`.

    anns: a folder with the published annotation files, which are then used as they are; else prompts and
    splits are made here. descriptions: general ones of the class, for p7 to p9. overwrite: replace what was
    changed by hand since it was written.

    Can be run again: files that would not change stay; on an error nothing is written. Raises ValueError
    where nothing fits, FileNotFoundError for what is not there, FileExistsError for files changed by hand.
    """
    download, entries = Download(source), []
    inside = Path(root).resolve()
    if download.path.resolve() in (inside, *inside.parents):
        raise ValueError(
            f"'{root}' lies in the download '{source}', where nothing is written. Choose another --data-root."
        )
    with Writer(root, overwrite) as writer:
        canonical = {}  # the group of each image's bytes: equal images under two names stay together
        with progress(None, f"preparing {name}") as bar:
            for sample in READERS[name](download):
                with download.skipping(sample.name):
                    entries += _write(name, download, writer, sample, descriptions, anns is None, canonical)
                bar.update()
        skipped = [
            f"  skipped, {reason}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for reason, names in download.skipped.items()
        ]
        if not entries:
            some = ", ".join(download.names[:5]) or "nothing"
            raise ValueError(
                f"'{source}' does not look like {name}'s download: no image with a usable mask was found. It "
                "holds " + "\n".join([f"{some}, ...", *skipped])
            )
        splits = made_splits(name, writer, entries) if anns is None else published(anns, writer, entries)
        there = {f"anns/{f.name}" for f in Path(root).glob("anns/*.json")}
        writer.commit(replaced=sorted(there - {f"anns/{part}.json" for part in splits}))
    images = len({(e["below"], e["img_name"]) for e in entries})
    say(f"{name}: {images} images and {len(entries)} masks from '{source}'")
    say(
        f"  records: {', '.join(f'{len(rows)} {part}' for part, rows in splits.items())} "
        f"({'published' if anns else 'made here'})"
    )
    say(f"  files in '{root}': {writer.counts['written']} written, {writer.counts['unchanged']} unchanged")
    say(*skipped, sep="\n", end="\n" if skipped else "")
    return splits


def made_splits(name, writer, entries):
    """Split the records, and write annotation files of them; returns the splits."""
    splits = split(name, entries)
    for part, rows in splits.items():
        found = [{k: v for k, v in e.items() if k not in ("split", "group", "below")} for e in rows]
        writer.write(f"anns/{part}.json", json.dumps(found, indent=1).encode())
    return splits


def _write(name, download, writer, sample, descriptions, made, canonical):
    """Write an image and its masks; an entry of the annotation files for each mask."""
    target = PurePosixPath("images", sample.below, sample.name)
    if isinstance(sample.image, str):
        data = download.read(sample.image)
        pixels = read_image(data, sample.image) if made else None
        writer.write(target, data)
    else:
        pixels = sample.image
        writer.png(target, pixels)
        pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
        data = pixels.tobytes()
    group = sample.group or f"{sample.below}/{sample.name}"
    group = canonical.setdefault(group, canonical.setdefault(hashlib.blake2b(data).digest(), group))
    entries = []
    for mask_name, mask, word in sample.masks:
        if pixels is not None and mask.shape != pixels.shape[:2]:
            raise ValueError(f"image and mask differ in size, {pixels.shape[:2]} and {mask.shape}")
        writer.png(PurePosixPath("masks", sample.below, mask_name), mask)
        prompts = None
        if made:
            prompts = (
                dict(p0="", p1=word)
                if name in CLASS_WORD_ONLY
                else describe(pixels, mask, word, descriptions)
            )
        entry = dict(img_name=sample.name, mask_name=mask_name, prompts=prompts, below=sample.below)
        entries.append(dict(entry, split=sample.split, group=group))
    return entries


def split(name, entries):
    """Return {part: entries}: the publisher's where it has one, else drawn from a fixed seed in the published
    shares, group by group, so that no image (of CAMUS and CheXlocalize: no patient) is in two parts.
    """
    groups = defaultdict(list)
    for entry in entries:
        groups[entry["split"], entry["group"]].append(entry)
    free = sorted(group for part, group in groups if part is None)
    random.Random(SEED).shuffle(free)
    shares = SIZES.get(name, (0, 0, 1))
    if any(part == "test" for part, _ in groups):
        shares = (*shares[:2], 0)
    ends = [round(len(free) * sum(shares[: k + 1]) / (sum(shares) or 1)) for k in range(3)]
    drawn = {"train": free[: ends[0]], "val": free[ends[0] : ends[1]], "test": free[ends[1] : ends[2]]}
    found = {
        part: [e for group in sorted(names) for e in groups[None, group]] for part, names in drawn.items()
    }
    for (part, _), rows in groups.items():
        if part is not None:
            found[part] += rows
    return {part: rows for part, rows in found.items() if rows}


def published(folder, writer, entries):
    """Return {part: records} of published annotation files, which are copied as they are.

    Raises ValueError where records lack their files.
    """
    masks = {PurePosixPath(e["mask_name"]).with_suffix("") for e in entries}
    images = {PurePosixPath(e["img_name"]).with_suffix("") for e in entries}
    found, missing = {}, []
    for part in ("train", "val", "test"):
        file = Path(folder) / f"{part}.json"
        if file.is_file():
            found[part] = read_annotations(file)
            for record in found[part]:
                pair = [PurePosixPath(record[key]).with_suffix("") for key in ("img_name", "mask_name")]
                missing += [record["mask_name"]] if pair[0] not in images or pair[1] not in masks else []
            writer.write(f"anns/{part}.json", file.read_bytes())
    if not found:
        raise ValueError(f"'{folder}' holds no train.json, val.json or test.json.")
    if missing:
        raise ValueError(
            f"{len(missing)} of the published records have no image or mask in the download: "
            f"{', '.join(missing[:3])}, ... Is it complete?"
        )
    return found


def read_descriptions(file):
    """Return the texts of --describe, a JSON list of general descriptions of the class."""
    texts = read_json(file, list, "a list of texts")
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"'{file}' should hold a list of texts, such as [\"an abnormal growth of tissue\"].")
    return texts
