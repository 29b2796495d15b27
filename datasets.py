"""Every data set: where its files lie, its prompts and splits. `python datasets.py --prepare NAME --src DOWNLOAD` makes its folder of a raw
download, `--check NAME` looks it over, `--export demo DIR` writes the demo as files.

Layout (MedVLSM's): DATA_ROOT/<folder>/images/..., masks/..., anns/{train,val,test}.json. A user's own folder needs images/ and masks/
only, or train/ val/ test/ with these inside; README shows each.
"""

import argparse
import hashlib
import json
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vlsm import check as checking
from vlsm import demo, parallel
from vlsm.cache import DataError, Record, open_split
from vlsm.console import speaking
from vlsm.images import leaves_folder, picture_files
from vlsm.prepare import prepare, read_descriptions
from vlsm.prompts import class_word, prompt_of
from vlsm.raw import READERS
from vlsm.shards import open_share
from vlsm.weights import read_json

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Source:
    """A data set in MedVLSM's layout. word: its class in words, None where each record's p1 names it."""

    folder: str
    url: str
    word: str | None = None
    subfolders: dict | None = None  # split -> folder below images/ and masks/


DATASETS = {
    "kvasir": Source("kvasir_polyp", "https://datasets.simula.no/kvasir-seg", "polyp"),
    "clinicdb": Source("clinicdb_polyp", "https://polyp.grand-challenge.org/CVCClinicDB", "polyp"),
    "bkai": Source("bkai_polyp", "https://www.kaggle.com/c/bkai-igh-neopolyp", "polyp"),
    "isic": Source("isic", "https://challenge.isic-archive.com/data/#2016"),
    "dfu": Source("dfu", "https://dfu-challenge.github.io", "foot ulcer"),
    "camus": Source("camus", "https://www.creatis.insa-lyon.fr/Challenge/camus", None, dict(train="train", val="train", test="test")),
    "busi": Source("busi", "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset", "tumor"),
    "chexlocalize": Source("chexlocalize", "https://stanfordaimi.azurewebsites.net/datasets"),
    "cvc300": Source("cvc300_polyp", "https://github.com/DengPingFan/PraNet", "polyp"),
    "colondb": Source("colondb_polyp", "https://github.com/DengPingFan/PraNet", "polyp"),
    "etis": Source("etis_polyp", "https://github.com/DengPingFan/PraNet", "polyp"),
    "cityscapes": Source("cityscapes", "https://www.cityscapes-dataset.com"),
    "voc": Source("voc", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"),
}


def default_cache():
    """Folder of the decode-once cache, unless --cache-dir names one."""
    return str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlsm")


def records(dataset, split, data_root="data", split_seed=0):
    """The records of a split, in a fixed order. dataset: "demo", a key of `DATASETS`, or the path of a folder.

    Raises ValueError or FileNotFoundError, in words, for what is not there; DataError for pairs that do not match.
    """
    if dataset == "demo":
        return demo.records(split)
    root, source = _locate(dataset, data_root)
    return _annotated(root, split, source) if source else _own_folder(root, split, split_seed)


def available_splits(dataset, data_root="data", split_seed=0):
    """The splits that the data set has records for, in the order train, val, test. Raises as `records` does."""
    if dataset == "demo":
        return list(SPLITS)
    root, source = _locate(dataset, data_root)
    if source:
        return [s for s in SPLITS if (root / "anns" / f"{s}.json").is_file()]
    return [s for s in SPLITS if _own_folder(root, s, split_seed)]


def _locate(dataset, data_root):
    """(folder, its `Source`, or None for a folder without annotation files)."""
    if dataset in DATASETS:
        source = DATASETS[dataset]
        root = Path(data_root).expanduser() / source.folder
        if not root.is_dir():
            raise FileNotFoundError(_where_to_get(dataset, source, root))
        return root, source
    root = Path(dataset).expanduser()
    if not root.is_dir():
        raise ValueError(f"Data set '{dataset}' is neither known ({', '.join(['demo', *DATASETS])}) nor the path of a folder.")
    return root, Source(root.name, "") if (root / "anns").is_dir() else None


def open_dataset(
    dataset, splits, size, data_root="data", cache_dir=None, split_seed=0, prompts="random", skip_bad=False, limit_train=1.0, shard=False,
    say=print,
):  # fmt: skip
    """`{split: Decoded}` at `size` pixels: checked, resized, cached. All problems of all splits are raised together as one ValueError.

    skip_bad: go on without the records that cannot be used, and say how many they are; limit_train: the share of the training records
    to take, always the same ones, of which a smaller share takes some; shard: several processes hold a share of the pictures each, where
    else each machine holds them all.
    """
    shard = shard and parallel.world() > 1
    opened, turns = (open_share, nullcontext()) if shard else (open_split, parallel.first_here())
    ready, troubles = {}, []
    with turns:
        for split in splits:
            label = f"{Path(dataset).name} {split}"
            try:
                found = _chosen(dataset, split, data_root, split_seed, prompts, limit_train)
                try:
                    ready[split] = opened(found, size, cache_dir, label)
                except DataError as error:
                    if not skip_bad or len(error.bad) == len(found):
                        raise
                    say(f"{label}: {error}\n  --skip-bad: dropped {len(error.bad)} of {len(found)} records.")
                    bad = set(error.bad)
                    ready[split] = opened([r for i, r in enumerate(found) if i not in bad], size, cache_dir, label)
            except (ValueError, FileNotFoundError) as error:
                if str(error) not in troubles:
                    troubles.append(f"{label}: {error}" if isinstance(error, DataError) else str(error))
    if troubles:
        hint = (
            "\nMend the files, or pass --skip-bad to go on without these records." if any("records cannot" in t for t in troubles) else ""
        )
        raise ValueError("\n".join(troubles) + hint)
    return ready


def _chosen(dataset, split, data_root, split_seed, prompts, limit_train):
    """The records of a split that take part. Raises ValueError where there are none, or one lacks the prompt that is asked for."""
    found = records(dataset, split, data_root, split_seed)
    if not found:
        raise ValueError(
            f"The {split} split of '{dataset}' is empty. If its files are split by a hash of their names, a handful of them can "
            "leave a part empty: try another --split-seed, or train/, val/ and test/ folders."
        )
    if split == "train" and limit_train < 1:
        order = random.Random(0).sample(range(len(found)), len(found))
        found = [found[i] for i in sorted(order[: max(1, round(limit_train * len(found)))])]
    for i, record in enumerate(found):
        prompt_of(record, i, prompts, 0)  # a key that is not there is found here, not in the middle of an epoch
    return found


def _where_to_get(name, source, root):
    return (
        f"There is no folder '{root}' for data set '{name}'.\n"
        f"  1. Download the images and masks from {source.url}\n"
        "  2. Get the prompts and splits from https://github.com/naamiinepal/medvlsm (MedVLSM's annotation files)\n"
        f"  3. Lay them out as {root}/images/*, {root}/masks/*, {root}/anns/{{train,val,test}}.json\n"
        "or pass --data-root with the folder in which it lies."
    )


class _Folder:
    """Files below a folder, found by exact name, else by the one file of the same stem."""

    def __init__(self, root):
        self.root = root
        self.by_name, self.by_stem = {}, {}
        for path in picture_files(root) if root.is_dir() else []:
            name = path.relative_to(root).as_posix()
            self.by_name[name] = path
            self.by_stem.setdefault(_stem(name), []).append(path)

    def find(self, name):
        if name in self.by_name:
            return self.by_name[name]
        same = self.by_stem.get(_stem(name), [])
        if len(same) > 1:
            raise ValueError(
                f"'{name}' is not in '{self.root}', and {len(same)} files share its stem: {', '.join(p.name for p in same[:3])}."
            )
        return same[0] if same else self.root / name  # a missing file is reported when it is read, with all others


def _stem(name):
    return str(PurePosixPath(name).with_suffix("")).casefold()


def _annotated(root, split, source):
    """Records by an annotation file."""
    path = root / "anns" / f"{split}.json"
    if not path.is_file():
        there = sorted(p.name for p in (root / "anns").glob("*.json")) if (root / "anns").is_dir() else []
        raise FileNotFoundError(
            f"There is no '{path}'. Expected {root}/images, {root}/masks and {root}/anns/{{train,val,test}}.json; "
            f"in anns/ there is {', '.join(there) or 'nothing'}."
        )
    entries = read_json(path, list, "a list of records")
    below = (source.subfolders or {}).get(split, "")
    images, masks = _Folder(root / "images" / below), _Folder(root / "masks" / below)
    found = []
    for i, entry in enumerate(entries):
        for key, kind in (("img_name", str), ("mask_name", str), ("prompts", dict)):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ValueError(f"'{path}', record {i}: the key '{key}' is missing or is no {'text' if kind is str else 'object'}.")
        for name in (entry["img_name"], entry["mask_name"]):
            if leaves_folder(name):
                raise ValueError(f"'{path}', record {i}: the file name '{name}' leaves the data set's folder; that is refused.")
        prompts = entry["prompts"]
        for key, value in prompts.items():
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"'{path}', record {i}: prompt '{key}' is neither a text nor a list of texts.")
        word = source.word or class_word(prompts)
        found.append(
            Record(entry["img_name"], entry["mask_name"], images.find(entry["img_name"]), masks.find(entry["mask_name"]), prompts, word)
        )
    return found


def _own_folder(root, split, split_seed):
    """Records of a user's folder without annotation files: images/ and masks/ paired by stem, split by folder or by name."""
    parts = {s: next((root / n for n in names if (root / n / "images").is_dir()), None) for s, names in SPLIT_NAMES.items()}
    if parts["train"]:
        if split != "test" and not parts["val"]:  # a tenth of the training files, by name, serves for validation
            return [r for r in _pairs(parts["train"]) if (_share(r.name, split_seed) < 0.1) == (split == "val")]
        return _pairs(parts[split]) if parts[split] else []
    if not (root / "images").is_dir() or not (root / "masks").is_dir():
        inside = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"'{root}' should hold images/ and masks/ (equal stems), or train/, val/ and test/ with these inside, or anns/ beside them; "
            f"it holds {inside}."
        )
    low, high = {"train": (0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1)}[split]
    return [r for r in _pairs(root) if low <= _share(r.name, split_seed) < high]


def _share(name, seed):
    """A number in 0..1 that depends on the file's name alone, so that a file keeps its side when others are added."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big") / 2**64


def _pairs(folder):
    images, masks = _Folder(folder / "images"), _Folder(folder / "masks")
    lone_images = [p[0].name for s, p in images.by_stem.items() if s not in masks.by_stem]
    lone_masks = [p[0].name for s, p in masks.by_stem.items() if s not in images.by_stem]
    double = [p[0].name for files in (images, masks) for p in files.by_stem.values() if len(p) > 1]
    found = [
        Record(images.by_stem[s][0].name, masks.by_stem[s][0].name, images.by_stem[s][0], masks.by_stem[s][0])
        for s in images.by_stem
        if s in masks.by_stem and len(images.by_stem[s]) == len(masks.by_stem[s]) == 1
    ]
    problems = {"image without mask": lone_images, "mask without image": lone_masks, "stem with several files": double}
    for kind, names in problems.items():  # they take part as records, so that --skip-bad and the report treat them like any other
        for name in names:
            found.append(Record(name, name, folder / "images" / name, folder / "masks" / name, problem=kind))
    return sorted(found, key=lambda r: r.name)


def export(name, folder):
    """Write the demo in MedVLSM's layout. Raises FileExistsError rather than writing over anything."""
    if name != "demo":
        raise ValueError(f"Only the demo is generated and can be exported; '{name}' lies in files already.")
    root = Path(folder)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"'{root}' is not empty; give a new folder.")
    for part in ("images", "masks", "anns"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        entries = []
        for r in demo.records(split):
            Image.fromarray(r.image).save(root / "images" / r.name)
            Image.fromarray(r.mask.astype(np.uint8) * 255).save(root / "masks" / r.mask_name)
            entries.append(dict(img_name=r.name, mask_name=r.mask_name, prompts=r.prompts))
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    return root


def check(dataset, data_root, split_seed, out):
    """--check: print a data set's fingerprint and write a contact sheet. Raises as `records` does."""
    parts = available_splits(dataset, data_root, split_seed)
    if not parts:
        raise ValueError(f"'{dataset}' has no annotation file (anns/train.json, val.json or test.json), so there is nothing to look at.")
    splits = {part: records(dataset, part, data_root, split_seed) for part in parts}
    splits = {part: found for part, found in splits.items() if found}
    name = Path(dataset).name
    print(checking.in_words(name, checking.look(splits)))
    file = Path(out or f"{name}-check.png")
    checking.contact_sheet(splits, file)
    print(f"Wrote {file}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Data sets for train.py and evaluate.py.")
    parser.add_argument("--list", action="store_true", help="list the known data sets and where to download them")
    parser.add_argument("--prepare", metavar="NAME", help=f"make a data set's folder of its download, --src: {', '.join(READERS)}")
    parser.add_argument("--src", metavar="DOWNLOAD", help="folder or zip archive, as its publisher ships it; nothing is written there")
    parser.add_argument("--data-root", default="data", help="folder that holds the data sets' folders (default: data)")
    parser.add_argument("--anns", metavar="DIR", help="MedVLSM's annotation files: its data folder, or a data set's (default: made here)")
    parser.add_argument("--describe", metavar="FILE.json", help="a list of general descriptions of the class, for prompts p7 to p9")
    parser.add_argument("--check", metavar="NAME|PATH", help="print a data set's fingerprint, and write a contact sheet")
    parser.add_argument("--split-seed", type=int, default=0, help="of the 80/10/10 split of your own folder (default 0)")
    parser.add_argument("--out", metavar="FILE.png", help="of --check: the contact sheet (default: NAME-check.png)")
    parser.add_argument("--export", nargs=2, metavar=("demo", "DIR"), help="write the demo data set in MedVLSM's layout to DIR")
    args = parser.parse_args(argv)
    if args.export:
        print(f"Wrote {export(*args.export)}. Train on it with: python train.py --dataset {args.export[1]}")
    elif args.prepare:
        if args.prepare not in READERS:
            raise ValueError(f"--prepare '{args.prepare}' is not known. Choose one of: {', '.join(READERS)}.")
        if not args.src:
            raise ValueError("--prepare wants the download, folder or zip archive: --src DOWNLOAD.")
        folder = DATASETS[args.prepare].folder
        anns = Path(args.anns) if args.anns else None
        if anns:  # MedVLSM's data folder, the data set's in it, or that one's anns
            anns = next((anns / below for below in (f"{folder}/anns", folder) if (anns / below).is_dir()), anns)
        texts = read_descriptions(args.describe) if args.describe else ()
        prepare(args.prepare, args.src, Path(args.data_root) / folder, anns, texts)
        print(f"Look at it with: python datasets.py --check {args.prepare} --data-root {args.data_root}")
    elif args.check:
        check(args.check, args.data_root, args.split_seed, args.out)
    elif args.list:
        for name, source in DATASETS.items():
            print(f"{name:13} {source.folder:15} {source.url}")
    else:
        parser.print_help()


if __name__ == "__main__":
    with speaking():
        main()
