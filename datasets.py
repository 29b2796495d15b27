"""Every data set: where its files lie, its prompts and splits.

`python datasets.py --prepare NAME --src DOWNLOAD` makes a data set's folder of its raw download, `--check
NAME` looks it over, `--export demo DIR` writes the demo as files.

Layout (MedVLSM's): DATA_ROOT/<folder>/images/..., masks/..., anns/{train,val,test}.json. A user's own folder
needs images/ and masks/ only, or train/ val/ test/ with these inside.
"""

import argparse
import hashlib
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlsm.data.images import image_files
from vlsm.data.prompts import choose_prompt, class_word
from vlsm.data.records import DataError, Record, read_annotations
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import check_targets, is_filled, write_json

SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Source:
    """A data set in MedVLSM's layout.

    word: its class in words, None where each record's p1 names it. subfolders: split -> folder below images/
    and masks/. group: a pattern that finds, in an image's name, the patient.
    """

    folder: str
    url: str
    word: str | None = None
    subfolders: dict | None = None
    group: str | None = None


DATASETS = {
    "kvasir": Source("kvasir_polyp", "https://datasets.simula.no/kvasir-seg", "polyp"),
    "clinicdb": Source("clinicdb_polyp", "https://polyp.grand-challenge.org/CVCClinicDB", "polyp"),
    "bkai": Source("bkai_polyp", "https://www.kaggle.com/c/bkai-igh-neopolyp", "polyp"),
    "isic": Source("isic", "https://challenge.isic-archive.com/data/#2016"),
    "dfu": Source("dfu", "https://dfu-challenge.github.io", "foot ulcer"),
    "camus": Source(
        "camus",
        "https://www.creatis.insa-lyon.fr/Challenge/camus",
        subfolders=dict(train="train", val="train", test="test"),
        group=r"patient\d+",
    ),
    "busi": Source("busi", "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset", "tumor"),
    "chexlocalize": Source(
        "chexlocalize", "https://stanfordaimi.azurewebsites.net/datasets", group=r"patient\d+"
    ),
    "cvc300": Source("cvc300_polyp", "https://github.com/DengPingFan/PraNet", "polyp"),
    "colondb": Source("colondb_polyp", "https://github.com/DengPingFan/PraNet", "polyp"),
    "etis": Source("etis_polyp", "https://github.com/DengPingFan/PraNet", "polyp"),
    "cityscapes": Source("cityscapes", "https://www.cityscapes-dataset.com"),
    "voc": Source("voc", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"),
}

# Records of a split


def records(dataset, split, data_root="data", split_seed=0):
    """Return the records of a split, in a fixed order.

    dataset: "demo", a key of `DATASETS`, or the path of a folder. Raises ValueError or FileNotFoundError for
    what is not there.
    """
    if dataset == "demo":
        from vlsm.mini import demo

        return demo.records(split)
    root, source = _locate(dataset, data_root)
    return _annotated_records(root, split, source) if source else _folder_records(root, split, split_seed)


def available_splits(dataset, data_root="data", split_seed=0):
    """Return the splits that the data set has records for, in the order train, val, test.

    Raises as `records`.
    """
    if dataset == "demo":
        return list(SPLITS)
    root, source = _locate(dataset, data_root)
    if source:
        return [s for s in SPLITS if (root / "anns" / f"{s}.json").is_file()]
    return [s for s in SPLITS if _folder_records(root, s, split_seed)]


def _locate(dataset, data_root):
    """Return (folder, its `Source`, or None for a folder without annotation files)."""
    if dataset in DATASETS:
        source = DATASETS[dataset]
        root = Path(data_root).expanduser() / source.folder
        if not root.is_dir():
            raise FileNotFoundError(_where_to_get(dataset, source, root))
        return root, source
    root = Path(dataset).expanduser()
    if not root.is_dir():
        known = ", ".join(["demo", *DATASETS])
        raise ValueError(f"Data set '{dataset}' is neither known ({known}) nor the path of a folder.")
    return root, Source(root.name, "") if (root / "anns").is_dir() else None


def _where_to_get(name, source, root):
    return (
        f"There is no folder '{root}' for data set '{name}'.\n"
        f"  1. Download the images and masks from {source.url}\n"
        "  2. Get the prompts and splits from https://github.com/naamiinepal/medvlsm (MedVLSM's annotation "
        "files)\n"
        f"  3. Lay them out as {root}/images/*, {root}/masks/*, {root}/anns/{{train,val,test}}.json\n"
        "or pass --data-root with the folder in which it lies."
    )


class ImageFolder:
    """Files below a folder, found by exact name, else by the one file of the same stem."""

    def __init__(self, root):
        self.root = root
        self.by_name, self.by_stem = {}, {}
        for path in image_files(root):
            name = path.relative_to(root).as_posix()
            self.by_name[name] = path
            self.by_stem.setdefault(_stem(name), []).append(path)

    def find(self, name):
        """Return the file of a name; one that is missing is reported when it is read, with all others."""
        if name in self.by_name:
            return self.by_name[name]
        same = self.by_stem.get(_stem(name), [])
        if len(same) > 1:
            names = ", ".join(p.name for p in same[:3])
            raise ValueError(
                f"'{name}' is not in '{self.root}', and {len(same)} files share its stem: {names}."
            )
        return same[0] if same else self.root / name


def _stem(name):
    return str(PurePosixPath(name).with_suffix("")).casefold()


def _annotated_records(root, split, source):
    """Return the records that an annotation file lists."""
    path = root / "anns" / f"{split}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in (root / "anns").glob("*.json"))) or "nothing"
        raise FileNotFoundError(
            f"There is no '{path}'. Expected {root}/images, {root}/masks and "
            f"{root}/anns/{{train,val,test}}.json; in anns/ there is {there}."
        )
    below = (source.subfolders or {}).get(split, "")
    images, masks = ImageFolder(root / "images" / below), ImageFolder(root / "masks" / below)
    found = []
    for entry in read_annotations(path):
        image, mask, prompts = entry["img_name"], entry["mask_name"], entry["prompts"]
        word = source.word or class_word(prompts)
        found.append(Record(image, mask, images.find(image), masks.find(mask), prompts, word))
    return found


def _folder_records(root, split, split_seed):
    """Return the records of a user's folder without annotation files: paired by stem, split by folder or by
    name.
    """

    def existing(split):
        folders = (root / name for name in SPLIT_FOLDERS[split] if (root / name / "images").is_dir())
        return next(folders, None)

    if existing("train"):
        if split != "test" and not existing("val"):  # a tenth of the training files, by name, validates
            pairs = _pairs(existing("train"))
            return [r for r in pairs if (_unit_hash(r.name, split_seed) < 0.1) == (split == "val")]
        return _pairs(existing(split)) if existing(split) else []
    if not (root / "images").is_dir() or not (root / "masks").is_dir():
        inside = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"'{root}' should hold images/ and masks/ (equal stems), or train/, val/ and test/ with these "
            f"inside, or anns/ beside them; it holds {inside}."
        )
    low, high = {"train": (0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1)}[split]
    return [r for r in _pairs(root) if low <= _unit_hash(r.name, split_seed) < high]


def _unit_hash(name, seed):
    """Return a number in 0..1 of a file's name alone: it keeps its split when others are added."""
    text = f"{seed}:{name}".encode(errors="surrogateescape")  # names that are no UTF-8
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def _pairs(folder):
    """Return records of images/ and masks/, paired by stem; lone files become records that tell their
    problem.
    """
    images, masks = ImageFolder(folder / "images"), ImageFolder(folder / "masks")
    found = []
    for stem, files in images.by_stem.items():
        partners = masks.by_stem.get(stem, [])
        if len(files) == len(partners) == 1:
            pair = (files[0], images.root), (partners[0], masks.root)
            names = (p.relative_to(below).as_posix() for p, below in pair)
            found.append(Record(*names, files[0], partners[0]))
    problems = {
        "image without mask": [p[0].name for s, p in images.by_stem.items() if s not in masks.by_stem],
        "mask without image": [p[0].name for s, p in masks.by_stem.items() if s not in images.by_stem],
        "stem with several files": [
            p[0].name for files in (images, masks) for p in files.by_stem.values() if len(p) > 1
        ],
    }
    for kind, names in problems.items():
        for name in names:
            found.append(Record(name, name, folder / "images" / name, folder / "masks" / name, problem=kind))
    return sorted(found, key=lambda r: r.name)


# Opening


def open_dataset(
    dataset, splits, size, data_root="data", cache_dir=None, split_seed=0, prompts="random", skip_bad=False,
    limit_train=1.0, shard=False,
):  # fmt: skip
    """Return `{split: CachedSplit}` at `size` pixels: checked, resized, cached.

    skip_bad: go on without the records that cannot be used, and say how many they are. limit_train: the share
    of the training records to take, always the same ones, of which a smaller share takes some. shard: several
    processes hold a share of the images each, where else each machine holds them all. Raises ValueError, all
    problems of all splits together.
    """
    from vlsm.data.cache import open_split
    from vlsm.data.sharded_cache import open_share
    from vlsm.system import parallel

    shard = shard and parallel.world_size() > 1
    opener, turns = (open_share, nullcontext()) if shard else (open_split, parallel.local_first())
    data, problems = {}, []
    with turns:
        for split in splits:
            label = f"{Path(dataset).name} {split}"
            try:
                chosen = _chosen_records(dataset, split, data_root, split_seed, prompts, limit_train)
                data[split] = _open_usable(opener, chosen, size, cache_dir, label, skip_bad)
            except DataError as error:
                problems.append(f"{label}: {error}")
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
    if problems:
        hint = ""
        if any("records cannot" in p for p in problems):
            hint = "\nMend the files, or pass --skip-bad to go on without these records."
        raise ValueError("\n".join(dict.fromkeys(problems)) + hint)
    return data


def _open_usable(opener, chosen, size, cache_dir, label, skip_bad):
    """Open records; with `skip_bad`, those that can be used. Raises DataError."""
    try:
        return opener(chosen, size, cache_dir, label)
    except DataError as error:
        if not skip_bad or len(error.bad) == len(chosen):
            raise
        say(f"{label}: {error}\n  --skip-bad: dropped {len(error.bad)} of {len(chosen)} records.")
        bad = set(error.bad)
    return opener([r for i, r in enumerate(chosen) if i not in bad], size, cache_dir, label)


def _chosen_records(dataset, split, data_root, split_seed, prompts, limit_train):
    """Return the records of a split that take part.

    Raises ValueError where there are none, or one lacks the prompt that is asked for.
    """
    found = records(dataset, split, data_root, split_seed)
    if not found:
        raise ValueError(
            f"The {split} split of '{dataset}' is empty. If its files are split by a hash of their names, a "
            "handful of them can leave a part empty: try another --split-seed, or train/, val/ and test/ "
            "folders."
        )
    if split == "train" and limit_train < 1:
        order = random.Random(0).sample(range(len(found)), len(found))
        found = [found[i] for i in sorted(order[: max(1, round(limit_train * len(found)))])]
    for i, record in enumerate(found):
        choose_prompt(record, prompts, 0, i)  # a missing key is found here, not in the middle of an epoch
    return found


def open_run_split(
    metadata, split="test", dataset=None, data_root=None, prompts=None, seed=None, cache_dir=None
):
    """Return (`CachedSplit`, one prompt for each record) of a split, as the run with this metadata read it.

    metadata: a checkpoint's. dataset, data_root, prompts, seed: those of the run unless given. Raises as
    `open_dataset`.
    """
    dataset = dataset or metadata["dataset"]
    data_root = data_root or metadata["data_root"]
    prompts = prompts or metadata["prompts"]
    if seed is None:
        seed = metadata["recipe"]["seed"]
    size = metadata["image_size"]
    splits = open_dataset(dataset, [split], size, data_root, cache_dir, metadata["split_seed"], prompts)
    data = splits[split]
    texts = [choose_prompt(record, prompts, seed, i) for i, record in enumerate(data.records)]
    return data, texts


def group_pattern(dataset, group=None):
    """Return (pattern of the bootstrap's group in an image's name, or None; the group in words).

    group: a pattern that replaces the data set's own.
    """
    if not group and dataset in DATASETS:
        group = DATASETS[dataset].group
    if not group:
        return None, "image"
    return group, f"what '{group}' finds in an image's name"


# The command line


def export(name, folder):
    """Write the demo in MedVLSM's layout. Raises FileExistsError rather than writing over anything."""
    from PIL import Image

    from vlsm.data.images import mask_image

    if name != "demo":
        raise ValueError(f"Only the demo is generated and can be exported; '{name}' lies in files already.")
    root = Path(folder)
    if is_filled(root):
        raise FileExistsError(f"'{root}' is not empty; give a new folder.")
    for part in ("images", "masks", "anns"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        entries = []
        for r in records("demo", split):
            Image.fromarray(r.image).save(root / "images" / r.name)
            mask_image(r.mask).save(root / "masks" / r.mask_name)
            entries.append(dict(img_name=r.name, mask_name=r.mask_name, prompts=r.prompts))
        write_json(root / "anns" / f"{split}.json", entries)
    return root


def check(dataset, data_root, split_seed, out, overwrite=False):
    """Print a data set's fingerprint and write a contact sheet. Raises as `records` does."""
    from vlsm.results import dataset_check

    parts = available_splits(dataset, data_root, split_seed)
    if not parts:
        raise ValueError(
            f"'{dataset}' has no annotation file (anns/train.json, val.json or test.json), so there is "
            "nothing to look at."
        )
    splits = {part: records(dataset, part, data_root, split_seed) for part in parts}
    splits = {part: found for part, found in splits.items() if found}
    name = Path(dataset).name
    file = Path(out or f"{name}-check.png")
    inputs = [f for found in splits.values() for r in found for f in (r.image, r.mask)]
    check_targets([file], inputs, overwrite)
    say(dataset_check.describe(name, dataset_check.inspect_splits(splits)))
    dataset_check.contact_sheet(splits, file)
    say(f"Wrote {file}")


def prepare(name, source, data_root, anns, descriptions, overwrite):
    """Make a data set's folder of its raw download; see `vlsm.raw.prepare`."""
    from vlsm.raw import prepare as raw

    if name not in DATASETS:
        raise ValueError(f"--prepare '{name}' is not known. Choose one of: {', '.join(DATASETS)}.")
    if not source:
        raise ValueError("--prepare wants the download, folder or zip archive: --src DOWNLOAD.")
    folder = DATASETS[name].folder
    if anns:  # MedVLSM's data folder, the data set's in it, or that one's anns
        inside = (Path(anns) / below for below in (f"{folder}/anns", folder))
        anns = next((path for path in inside if path.is_dir()), Path(anns))
    texts = raw.read_descriptions(descriptions) if descriptions else ()
    raw.prepare(name, source, Path(data_root) / folder, anns, texts, overwrite)
    say(f"Look at it with: python datasets.py --check {name} --data-root {data_root}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Data sets for train.py and evaluate.py.")
    add = parser.add_argument
    add("--list", action="store_true", help="list the known data sets and where to download them")
    add("--prepare", metavar="NAME", help="make a data set's folder of its download, --src")
    add(
        "--src",
        metavar="DOWNLOAD",
        help="folder or zip archive, as its publisher ships it; nothing is written there",
    )
    add("--data-root", default="data", help="folder that holds the data sets' folders (default: data)")
    add(
        "--anns",
        metavar="DIR",
        help="MedVLSM's annotation files: its data folder, or a data set's (default: made)",
    )
    add(
        "--describe",
        metavar="FILE.json",
        help="general descriptions of the class, a list, for prompts p7 to p9",
    )
    add("--overwrite", action="store_true", help="replace files changed by hand, or not ours")
    add("--check", metavar="NAME|PATH", help="print a data set's fingerprint, and write a contact sheet")
    add("--split-seed", type=int, default=0, help="of the 80/10/10 split of your own folder (default 0)")
    add("--out", metavar="FILE.png", help="of --check: the contact sheet (default: NAME-check.png)")
    add(
        "--export",
        nargs=2,
        metavar=("demo", "DIR"),
        help="write the demo data set in MedVLSM's layout to DIR",
    )
    args = parser.parse_args(argv)
    if args.export:
        say(f"Wrote {export(*args.export)}. Train on it with: python train.py --dataset {args.export[1]}")
    elif args.prepare:
        prepare(args.prepare, args.src, args.data_root, args.anns, args.describe, args.overwrite)
    elif args.check:
        check(args.check, args.data_root, args.split_seed, args.out, args.overwrite)
    elif args.list:
        for name, source in DATASETS.items():
            say(f"{name:13} {source.folder:15} {source.url}")
    else:
        parser.print_help()


if __name__ == "__main__":
    with friendly_errors():
        main()
