"""Find the files, prompts and splits of every data set.

`python datasets.py --prepare NAME --src DOWNLOAD` makes a data set's folder of its raw download, `--check
NAME` prints its statistics and writes a contact sheet.

Layout (MedVLSM's): DATA_ROOT/<folder>/images/..., masks/..., anns/{train,val,test}.json. A user's own folder
needs images/ and masks/ only, or train/ val/ test/ with these inside; its masks may be label maps, with class
numbers named in dataset.json, or lie in a folder for each class. vlsm/data/README.md shows the forms.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlsm.data.classes import find_labels, label_records, present_records
from vlsm.data.images import LabelMask, image_files
from vlsm.data.records import DataError, Record, choose_prompt, class_word, mark_absent, read_annotations
from vlsm.system.console import first_few, friendly_errors, say
from vlsm.system.files import check_targets, digest, owned_write

SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {  # names of a split's folder in a user's own data set
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Source:
    """A data set in MedVLSM's layout.

    folder: its name below the data root. url: where to download it. word: its class in words; None if each
    record's prompt p1 names the class. subfolders: split -> folder below images/ and masks/. group: a regular
    expression that finds the patient in an image's name.
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

    dataset: "demo", a key of `DATASETS`, or the path of a folder. Raises ValueError for an unknown data set
    or another layout, FileNotFoundError for a missing folder or annotation file.
    """
    if dataset == "demo":
        from vlsm.mini import demo

        return mark_absent(demo.records(split))
    root, source = _locate(dataset, data_root)
    if source:
        return mark_absent(_annotated_records(root, split, source))
    return mark_absent(_folder_records(root, split, split_seed))


def available_splits(dataset, data_root="data", split_seed=0):
    """Return the splits that have records, in the order train, val, test. Raises as `records`."""
    if dataset == "demo":
        return list(SPLITS)
    root, source = _locate(dataset, data_root)
    splits = []
    for split in SPLITS:
        if source:
            available = (root / "anns" / f"{split}.json").is_file()
        else:
            available = _folder_records(root, split, split_seed)
        if available:
            splits.append(split)
    return splits


def group_pattern(dataset, group=None):
    """Return (regular expression of the bootstrap's group in an image's name, the group in words).

    group: a pattern that replaces the data set's own. Without one: (None, "image").
    """
    if not group and dataset in DATASETS:
        group = DATASETS[dataset].group
    if not group:
        return None, "image"
    return group, f"match of '{group}' in an image's name"


def _locate(dataset, data_root):
    """Return (folder, its `Source`, or None for a folder without annotation files)."""
    if dataset in DATASETS:
        source = DATASETS[dataset]
        root = Path(data_root).expanduser() / source.folder
        if not root.is_dir():
            raise FileNotFoundError(
                f"There is no folder '{root}' for data set '{dataset}'.\n"
                f"  1. Download the images and masks from {source.url}\n"
                "  2. Get the prompts and splits from https://github.com/naamiinepal/medvlsm (MedVLSM's "
                "annotation files)\n"
                f"  3. Lay them out as {root}/images/*, {root}/masks/*, {root}/anns/{{train,val,test}}.json\n"
                "or pass --data-root with the folder that holds it."
            )
        return root, source
    root = Path(dataset).expanduser()
    if not root.is_dir():
        known = ", ".join(["demo", *DATASETS])
        raise ValueError(f"Data set '{dataset}' is neither known ({known}) nor the path of a folder.")
    if (root / "anns").is_dir():
        return root, Source(root.name, "")
    return root, None


class ImageFolder:
    """Files below a folder, found by exact name, else by the one file of the same stem."""

    def __init__(self, root):
        self.root = root
        self.by_name = {}
        self.by_stem = {}
        for path in image_files(root):
            name = path.relative_to(root).as_posix()
            self.by_name[name] = path
            self.by_stem.setdefault(_stem(name), []).append(path)

    def find(self, name):
        """Return the file of a name. A missing file is reported later, when it is read, with all others."""
        if name in self.by_name:
            return self.by_name[name]
        paths = self.by_stem.get(_stem(name), [])
        if not paths:
            return self.root / name
        if len(paths) > 1:
            names = first_few(path.name for path in paths)
            raise ValueError(
                f"'{name}' is not in '{self.root}', and {len(paths)} files share its stem: {names}."
            )
        return paths[0]


def _stem(name):
    """Return a relative name without its suffix, in lower case, by which images and masks are paired."""
    return str(PurePosixPath(name).with_suffix("")).casefold()


def _annotated_records(root, split, source):
    """Return the records that an annotation file lists."""
    path = root / "anns" / f"{split}.json"
    if not path.is_file():
        present = first_few(sorted(file.name for file in path.parent.glob("*.json")))
        raise FileNotFoundError(
            f"There is no '{path}'. Expected {root}/images, {root}/masks and "
            f"{root}/anns/{{train,val,test}}.json; anns/ holds {present or 'nothing'}."
        )
    subfolder = source.subfolders[split] if source.subfolders else ""
    images = ImageFolder(root / "images" / subfolder)
    masks = ImageFolder(root / "masks" / subfolder)
    rows = []
    for entry in read_annotations(path):
        name = entry["img_name"]
        mask_name = entry["mask_name"]
        prompts = entry["prompts"]
        word = source.word or class_word(prompts)
        rows.append(Record(name, mask_name, images.find(name), masks.find(mask_name), prompts, word))
    return rows


def _folder_records(root, split, split_seed):
    """Return the records of a folder without annotation files: of its masks, or of the classes in them.

    Raises ValueError for a wrong dataset.json.
    """
    folder, rows = _split_records(root, split, split_seed)
    if any(record.class_word for record in rows):  # a folder for each class
        return present_records(rows)
    labels = find_labels(folder, root)
    if labels:
        rows = present_records(label_records(rows, labels), labels)
        if split == "train":
            _refuse_unused_labels(root, rows, labels, split_seed)
    return rows


def _refuse_unused_labels(root, rows, labels, split_seed):
    """Raise ValueError if a label has no pixel in any split; rows: the training records."""
    words = {record.class_word for record in rows}
    for split in ("val", "test"):
        if words >= set(labels.numbers):
            return
        words |= {record.class_word for record in _folder_records(root, split, split_seed)}
    unused = [word for word in labels.numbers if word not in words]
    if unused and rows:
        raise ValueError(
            f"'{labels.file}': 'labels' names {first_few(unused)}, of which no map holds a pixel; "
            "correct the number, or remove the class."
        )


def _split_records(root, split, split_seed):
    """Return (folder with images/ and masks/, records): paired by stem, split by folder or name."""
    folders = {name: _split_folder(root, name) for name in SPLITS}
    if folders["train"] and (folders["val"] or split == "test"):
        folder = folders[split]
        return folder or root, _paired_records(folder) if folder else []
    if folders["train"]:  # a tenth of the training files, by name, validates
        folder = folders["train"]
        low, high = (0, 0.1) if split == "val" else (0.1, 1)
    elif (root / "images").is_dir() and (root / "masks").is_dir():
        folder = root
        low, high = {"train": (0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1)}[split]
    else:
        content = first_few(sorted(path.name for path in root.iterdir()), 8)
        raise ValueError(
            f"'{root}' should hold images/ and masks/ (equal stems), or train/, val/ and test/ with these "
            f"inside, or anns/ beside them; it holds {content or 'nothing'}."
        )
    rows = _paired_records(folder)
    return folder, [record for record in rows if low <= _unit_hash(record.name, split_seed) < high]


def _split_folder(root, split):
    """Return the folder of a split that holds images/, or None."""
    for name in SPLIT_FOLDERS[split]:
        if (root / name / "images").is_dir():
            return root / name
    return None


def _unit_hash(name, seed):
    """Return a number in 0..1 from a file's name alone, so that it keeps its split when others are added."""
    text = f"{seed}:{name}".encode(errors="surrogateescape")  # names need not be UTF-8
    return int(digest(text), 16) / 2**64


def _class_folders(folder):
    """Return the names of the folders in masks/ if each holds the masks of one class, else [].

    That is so if all masks lie in folders, of whose names images/ has none.
    """
    masks = folder / "masks"
    names = set()
    for file in image_files(masks):
        name, *inner = file.relative_to(masks).parts
        if not inner or (folder / "images" / name).is_dir():
            return []
        names.add(name)
    return sorted(names)


def _paired_records(folder):
    """Return records of images/ and masks/, or of each class's folder in masks/, paired by stem.

    Files without a partner become records with `problem` set.
    """
    images = ImageFolder(folder / "images")
    mask_root = folder / "masks"
    rows = []
    used = set()  # stems of images
    for word in _class_folders(folder) or [""]:
        masks = ImageFolder(mask_root / word)
        used.update(masks.by_stem)
        for stem in sorted(masks.by_stem):
            record = _pair(images, masks, stem, mask_root)
            if word and not record.problem:
                record.class_word = word
                record.prompts = {"p0": "", "p1": word}
            rows.append(record)
    for stem in sorted(images.by_stem.keys() - used):
        rows.append(_pair(images, masks, stem, mask_root))
    return sorted(rows, key=lambda record: record.name)


def _pair(images, masks, stem, mask_root):
    """Return the record of a stem, with `problem` set unless it has one image and one mask."""
    image_paths = images.by_stem.get(stem, [])
    mask_paths = masks.by_stem.get(stem, [])
    if len(image_paths) == len(mask_paths) == 1:
        image = image_paths[0]
        mask = mask_paths[0]
        name = image.relative_to(images.root).as_posix()
        mask_name = mask.relative_to(mask_root).as_posix()
        return Record(name, mask_name, image, mask)
    if not mask_paths:
        problem = "image without mask"
    elif not image_paths:
        problem = "mask without image"
    else:
        problem = "stem with several files"
    name = (image_paths or mask_paths)[0].name
    return Record(name, name, images.root / name, masks.root / name, problem=problem)


# Opening


def open_dataset(
    dataset, splits, size, data_root="data", cache_dir=None, split_seed=0, prompts="random", skip_bad=False,
    limit_train=1.0, need_foreground=("train", "val"),
):  # fmt: skip
    """Return `{split: CachedSplit}` at `size` pixels: checked, resized, cached.

    skip_bad: drop records that cannot be used, and print how many. limit_train: fraction of the training
    records to take; it is fixed which ones, and smaller fractions are subsets of larger ones.
    need_foreground: splits that are refused if all their masks are empty. Raises ValueError, which lists the
    problems of all splits.
    """
    from vlsm.system import parallel  # it imports torch, for which --list need not wait

    data = {}
    problems = []
    hint = ""
    with parallel.local_first():
        for split in splits:
            label = f"{Path(dataset).name} {split}"
            try:
                rows = _chosen_records(dataset, split, data_root, split_seed, prompts, limit_train)
                needed = split in need_foreground
                data[split] = _open_usable(rows, size, cache_dir, label, skip_bad, needed)
            except DataError as error:
                problems.append(f"{label}: {error}")
                hint = "\nMend the files, or pass --skip-bad to go on without these records."
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)) + hint)
    return data


def _open_usable(rows, size, cache_dir, label, skip_bad, need_foreground):
    """Return the `CachedSplit` of records, with `skip_bad` of the usable ones. Raises DataError."""
    from vlsm.data.cache import open_split

    try:
        return open_split(rows, size, cache_dir, label, need_foreground)
    except DataError as error:
        bad = set(error.bad)
        if not skip_bad or len(bad) == len(rows):
            raise
        say(f"{label}: {error}\n  --skip-bad: dropped {len(bad)} of {len(rows)} records.")
    usable = [record for i, record in enumerate(rows) if i not in bad]
    return open_split(usable, size, cache_dir, label, need_foreground)


def _chosen_records(dataset, split, data_root, split_seed, prompts, limit_train):
    """Return the records of a split to use.

    Raises ValueError if it is empty, or a record lacks the chosen prompt.
    """
    rows = records(dataset, split, data_root, split_seed)
    if not rows:
        raise ValueError(
            f"The {split} split of '{dataset}' is empty. If its files are split by a hash of their names, a "
            "split of only a few files can be empty: try another --split-seed, or train/, val/ and test/ "
            "folders."
        )
    if split == "train" and limit_train < 1:
        order = random.Random(0).sample(range(len(rows)), len(rows))
        count = max(1, round(limit_train * len(rows)))
        rows = [rows[i] for i in sorted(order[:count])]
    for i, record in enumerate(rows):
        choose_prompt(record, prompts, 0, i)  # reject a missing key now, not in the middle of an epoch
    return rows


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
    splits = open_dataset(
        dataset, [split], size, data_root, cache_dir, metadata["split_seed"], prompts, need_foreground=()
    )
    data = splits[split]
    texts = [choose_prompt(record, prompts, seed, i) for i, record in enumerate(data.records)]
    return data, texts


# The command line


def check(dataset, data_root, split_seed, out, overwrite=False):
    """Print a data set's statistics and write a contact sheet. Raises as `records` does."""
    from vlsm.data.check import describe_splits, inspect_splits, sheet_rows
    from vlsm.results.figures import sheet

    splits = {}
    inputs = []
    for split in available_splits(dataset, data_root, split_seed):
        rows = records(dataset, split, data_root, split_seed)
        if rows:
            splits[split] = rows
        for record in rows:
            inputs += record.files
    if not splits:
        raise ValueError(
            f"'{dataset}' has no records to check: expected anns/train.json, val.json or test.json, or "
            "images/ and masks/ with files of equal stems."
        )
    name = Path(dataset).name
    file = Path(out or f"{name}-check.png")
    check_targets([file], inputs, overwrite)
    say(f"{name}: {_describe_form(dataset, data_root, next(iter(splits.values()))[0])}")
    say(describe_splits(name, inspect_splits(splits)))
    with owned_write(file) as temporary:
        sheet(sheet_rows(splits), temporary, names=())
    say(f"Wrote {file}")


def _describe_form(dataset, data_root, record):
    """Return in words which form of masks a data set has; record: any of its records."""
    if isinstance(record.mask, LabelMask):
        return "label maps, whose class numbers dataset.json names"
    if dataset == "demo" or _locate(dataset, data_root)[1]:
        return "masks and prompts of annotation files"
    if record.class_word:
        return "binary masks, in a folder for each class"
    return "binary masks, without classes"


def prepare(name, source, data_root, anns, descriptions, overwrite):
    """Make a data set's folder of its raw download; see `vlsm.raw.prepare`."""
    from vlsm.raw import prepare as raw

    if name not in DATASETS:
        raise ValueError(f"--prepare '{name}' is not known. Choose one of: {', '.join(DATASETS)}.")
    if not source:
        raise ValueError("--prepare needs the download, folder or zip archive: --src DOWNLOAD.")
    folder = DATASETS[name].folder
    if anns:  # MedVLSM's data folder, the data set's folder in it, or that one's anns
        for subfolder in (f"{folder}/anns", folder):
            if (Path(anns) / subfolder).is_dir():
                anns = Path(anns) / subfolder
                break
    texts = raw.read_descriptions(descriptions) if descriptions else ()
    raw.prepare(name, source, Path(data_root) / folder, anns, texts, overwrite)
    say(f"Look at it with: python datasets.py --check {name} --data-root {data_root}")


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Data sets for train.py and evaluate.py.")
    add = parser.add_argument
    add("--list", action="store_true", help="list the known data sets and where to download them")
    add("--prepare", metavar="NAME", help="make a data set's folder of its download, --src")
    add("--src", metavar="DOWNLOAD", help="folder or zip archive, as published; nothing is written there")
    add("--data-root", default="data", help="folder that holds the data sets' folders (default: data)")
    add("--anns", metavar="DIR", help="published annotation files: MedVLSM's data folder, or a data set's")
    add("--describe", metavar="FILE.json", help="list of descriptions of the class, for prompts p7 to p9")
    add("--overwrite", action="store_true", help="replace files that this program did not write")
    add("--check", metavar="NAME|PATH", help="print statistics and the form of masks (label map, ...)")
    add("--split-seed", type=int, default=0, help="of the 80/10/10 split of your own folder (default: 0)")
    add("--out", metavar="FILE.png", help="contact sheet of --check (default: NAME-check.png)")
    args = parser.parse_args(argv)
    if args.prepare:
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
