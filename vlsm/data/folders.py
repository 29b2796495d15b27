"""A folder of one's own: its images and masks, their classes, and how they are split."""

import re
from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import PurePosixPath

from vlsm.data.classes import (
    add_spacing,
    find_group,
    find_labels,
    label_records,
    present_records,
    read_dataset_json,
)
from vlsm.data.images import image_files, left_out, say_left_out
from vlsm.data.judge import judge_masks
from vlsm.data.pairing import ImageFolder, paired_records, records_without_mask, stem_of
from vlsm.data.records import group_names, group_of, mark_absent, refuse_idle_pattern
from vlsm.system.console import first_few, say_once
from vlsm.system.files import hash_of, read_lines

SPLIT_NAMES = {  # of folders, and of lists of files
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "holdout"),
}
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "gt")
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
FEW_GROUPS = 60  # fewer are split by rank; of so many each keeps its split when others are added
SUBFOLDERS = 5  # so many subfolders of images/ or more are patients, each of which stays in one split
# The group in an image's name: its first folder below that of the split, or all its folders
FIRST_FOLDER = "(?:(?:train|val|test)/)?([^/]+)/"  # as an import writes it: of a volume
IN_SPLIT = rf"(?i:^(?:{'|'.join(name for names in SPLIT_NAMES.values() for name in names)})/)?"
FOLDER_GROUPS = {f"{IN_SPLIT}([^/]+)/": "folders", f"{IN_SPLIT}(.+)/": "folders in folders"}
FORMATS = {  # what lies in a folder without masks/ -> the format of --import that reads it
    "imagesTr": "nnunet", "**/*.nii.gz": "nifti", "**/*.nii": "nifti", "**/*.dcm": "dicom",
    "**/labelmap.txt": "cvat", "**/labels/**/*.txt": "yolo", "**/*.json": "labelme, coco or label-studio",
}  # fmt: skip


@dataclass(frozen=True)
class SplitRules:
    """How the images of a data set become its splits.

    seed: of the split by names. group: a regular expression of what an image's name tells of the patient, who
    stays in one split; without it the subfolder below images/, if there are several, else the image. fold:
    (k, n) holds out the k-th of n parts. no_mask_is_empty: an image without a mask shows nothing of the
    class.
    """

    seed: int = 0
    group: str | None = None
    fold: tuple | None = None
    no_mask_is_empty: bool = False


DEFAULT_RULES = SplitRules()


def split_rules(settings):
    """Return the `SplitRules` in a run's options or metadata; earlier runs have the seed alone."""
    return SplitRules(
        settings["split_seed"],
        settings.get("group"),
        parse_fold(settings["fold"]) if settings.get("fold") else None,
        settings.get("no_mask_is_empty", False),
    )


def parse_fold(text):
    """Return (k, n) of a fold "k/n". Raises ValueError for another text."""
    match = re.fullmatch(r"([1-9]\d?)/([1-9]\d?)", text)
    if not match or not int(match[1]) <= int(match[2]) > 1:
        raise ValueError(f"--fold {text}: a fold is written such as 2/5, the second of five.")
    return int(match[1]), int(match[2])


def folder_splits(root, rules, wanted=tuple(SHARES)):
    """Return {split: records} of the wanted splits of a folder; splits without records are left out.

    Raises ValueError for another layout, a wrong dataset.json, or groups that cannot be split.
    """
    folders = {split: _split_folder(root, split) for split in SHARES}
    if folders["train"]:
        parts = {}
        for split, folder in folders.items():
            if folder:
                parts[split] = _folder_records(folder, rules.no_mask_is_empty)
    else:
        rows = _folder_records(root, rules.no_mask_is_empty)
        parts = named_splits(rows, _listed_splits(root, rows), root)
    read = cache(read_dataset_json)  # once, if the splits share it
    described = {split: read(folder or folders["train"] or root, root) for split, folder in folders.items()}
    labels = {split: find_labels(*file_and_content) for split, file_and_content in described.items()}
    every = [record for rows in parts.values() for record in rows]
    if not any(labels.values()):
        for word in {record.class_word for record in every}:
            judge_masks([record for record in every if record.class_word == word])
    splits = {}
    rules = replace(rules, group=rules.group or find_group(*read(root, root)))
    for split, rows in divide(parts, rules, root).items():
        if rows and (split in wanted or "train" in wanted):
            splits[split] = _with_classes(rows, labels[split])
            add_spacing(splits[split], *described[split])
    if labels["train"] and "train" in wanted:
        _refuse_unused_labels(labels["train"], splits)
    return {split: splits[split] for split in wanted if split in splits}


def _with_classes(rows, labels):
    """Return the records of the classes that images hold: of folders for each class, or of label maps."""
    if labels and not any(record.class_word for record in rows):
        return mark_absent(present_records(label_records(rows, labels), labels), labels.numbers)
    words = {record.class_word for record in rows} - {None}
    return mark_absent(present_records(rows), words) if words else rows


def _refuse_unused_labels(labels, splits):
    """Raise ValueError if a label of a dataset.json has no pixel in any split."""
    words = {record.class_word for rows in splits.values() for record in rows}
    unused = [word for word in labels.numbers if word not in words]
    if unused and words:
        raise ValueError(
            f"'{labels.file}': 'labels' names {first_few(unused)}, of which no map holds a pixel; "
            "correct the number, or remove the class."
        )


# Files


def _subfolder(folder, names):
    """Return the subfolder with one of these names, in any case, or None."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.casefold() in names and path.is_dir():
            return path
    return None


def _split_folder(root, split):
    """Return the folder of a split that holds images, or None."""
    folder = _subfolder(root, SPLIT_NAMES[split])
    return folder if folder and _subfolder(folder, IMAGE_FOLDERS) else None


def _folder_records(folder, no_mask_is_empty):
    """Return the records of a folder of images and masks, also of masks in a folder for each class.

    Files without a partner become records with `problem` set. Raises ValueError for another layout.
    """
    image_root = _subfolder(folder, IMAGE_FOLDERS)
    mask_root = _subfolder(folder, MASK_FOLDERS)
    images = ImageFolder(image_root) if image_root else None
    mask_files = image_files(mask_root) if mask_root else []
    if not images or not images.by_name or not mask_files:
        raise ValueError(_describe_layout(folder, image_root, mask_root))
    for place in (image_root, mask_root):
        say_left_out(place)
    words = _class_folders(image_root, mask_root, mask_files)
    if not words:
        return paired_records(images, mask_root, no_mask_is_empty=no_mask_is_empty)
    rows = []
    for word in words:
        rows += paired_records(images, mask_root, word)
    stems = {stem_of(record.name) for record in rows}
    for record in records_without_mask(images, mask_root, stems, no_mask_is_empty):
        record.name_class(words[hash_of(record.name) % len(words)])
        rows.append(record)
    return sorted(rows, key=lambda record: record.name)


def _describe_layout(folder, images, masks):
    """Say which layout is read, what a folder holds instead, and what brings that in."""
    for place in (images, masks):
        if place and not image_files(place) and left_out(place):
            content = f"'{place}' holds {left_out(place)} files and no images that are read"
            break
    else:
        names = first_few(sorted(path.name for path in folder.iterdir()), 8)
        content = f"it holds {names or 'nothing'}"
    line = (
        f"'{folder}' should hold images/ and masks/ (equal stems), or train/, val/ and test/ with these "
        f"inside, or anns/ beside them; {content}."
    )
    for pattern, name in FORMATS.items():
        if next(folder.glob(pattern), None):
            command = f"python datasets.py --import {name.split(',')[0]} {folder} --out DIR"
            return f"{line} If it holds annotations of {name}, bring them in: {command}"
    return line


def _class_folders(images, masks, mask_files):
    """Return the names of the folders in masks/ if each holds the masks of one class, else [].

    That is so if all masks lie in folders, of whose names images/ has none. Raises ValueError for folders
    named as splits are.
    """
    names = set()
    for file in mask_files:
        name, *inner = file.relative_to(masks).parts
        if not inner or (images / name).is_dir():
            return []
        names.add(name)
    for split_names in SPLIT_NAMES.values():
        if {name.casefold() for name in names} & set(split_names):
            raise ValueError(f"'{masks}' has folders of splits, which '{images}' has not; sort them alike.")
    say_once(f"classes {masks}", f"'{masks}': a folder for each class: {first_few(sorted(names), 8)}.")
    return sorted(names)


# Splits


def named_splits(rows, split_of=None, root=""):
    """Return {split: records} by {image's name: split}, else by subfolders' names, else {"": records}."""
    if not split_of:
        split_of = {}
        for record in rows:
            first, *inner = PurePosixPath(record.name).parts
            for split, names in SPLIT_NAMES.items():
                if inner and first.casefold() in names:
                    split_of[record.name] = split
    if not split_of:
        return {"": rows}
    parts = defaultdict(list)
    outside = set()
    for record in rows:
        if record.name in split_of:
            parts[split_of[record.name]].append(record)
        else:
            outside.add(record.name)
    if outside:
        names = first_few(sorted(outside))
        say_once(
            f"outside {root}", f"'{root}': {len(outside)} images are in no split ({names}) and left out."
        )
    return dict(parts)


def _listed_splits(root, rows):
    """Return {image's name: split} of train.txt, val.txt and test.txt in a folder; {} without a list.

    Raises ValueError for a line that names no image, and for an image in two lists.
    """
    stems = {stem_of(record.name): record.name for record in rows}
    split_of = {}
    for file in sorted([*root.glob("*.[tT][xX][tT]"), *root.glob("splits/*.txt")]):
        for split, names in SPLIT_NAMES.items():
            for line in read_lines(file) if file.stem.casefold() in names else ():
                name = _listed_image(line, stems)
                if name is None:
                    raise ValueError(f"'{file}' names '{line}', which is no image here; correct the line.")
                if split_of.setdefault(name, split) != split:
                    raise ValueError(f"'{file}' names '{line}', which the list of {split_of[name]} has, too.")
    return split_of


def _listed_image(line, stems):
    """Return the image that a line of a list names, with or without folders before it and its ending."""
    parts = PurePosixPath(line.replace("\\", "/")).parts
    for k in range(len(parts)):
        path = "/".join(parts[k:])
        for stem in (path.casefold(), stem_of(path)):
            if stem in stems:
                return stems[stem]
    return None


def divide(parts, rules, place):
    """Return {split: records} of the user's parts; {"": all records} is split here, by groups.

    A tenth of the training groups validates where no part does. A held-out fold tests and the next one
    validates; beside a test part it validates. Raises ValueError if there are too few groups for the folds.
    """
    every = [record for rows in parts.values() for record in rows]
    pattern = rules.group or default_group(every)
    for record in every:
        record.group = group_of(record.name, pattern) if pattern else None
    if rules.group:
        refuse_idle_pattern(pattern, every)
    if rules.seed and not rules.fold and "" not in parts and "val" in parts:
        say_once(f"seed {place}", f"'{place}' has a split of its own: --split-seed has no effect.")
    if rules.fold:
        splits = _held_out(parts, rules, place)
    elif "" in parts:
        splits = _shared_out(parts[""], SHARES, rules.seed)
    elif "val" not in parts and "train" in parts:
        splits = parts | _shared_out(parts["train"], {"val": 0.1, "train": 0.9}, rules.seed)
    else:
        splits = parts
    if pattern:
        _tell_of_groups(splits, pattern, place)
    return splits


def default_group(records):
    """Return the pattern of an image's group, its folder, if there are several of these; else None."""
    for pattern in FOLDER_GROUPS:
        groups = {match[1] for match in (re.match(pattern, record.name) for record in records) if match}
        if len(groups) >= SUBFOLDERS:
            return pattern
    if len(groups) > 1:
        names = first_few(sorted(groups))
        say_once(
            f"groups {names}",
            f"Images lie in {len(groups)} folders ({names}), too few to be patients for certain; --group "
            "'^[^/]+' keeps each in one split.",
        )
    return None


def _ordered_groups(records, seed):
    """Return the names of the records' groups, ordered by a hash."""
    return sorted(set(group_names(records)), key=lambda name: _unit_hash(name, seed))


def _shared_out(records, shares, seed):
    """Split records by groups, {split: share}; few groups by rank, so that no split is empty."""
    names = _ordered_groups(records, seed)
    split_of = _by_hash(names, shares, seed)
    if len(names) < FEW_GROUPS or set(split_of.values()) != set(shares):
        split_of = _by_rank(names, shares)
    splits = {split: [] for split in shares}
    _add_records(splits, records, split_of)
    return splits


def _add_records(splits, records, split_of):
    """Add records to `splits` by {group: split}."""
    for record, name in zip(records, group_names(records)):
        splits[split_of[name]].append(record)


def _by_hash(names, shares, seed):
    """Return {name: split} by each name's own hash."""
    bounds = list(accumulate(shares.values()))[:-1]
    splits = list(shares)
    return {name: splits[bisect(bounds, _unit_hash(name, seed))] for name in names}


def _by_rank(names, shares):
    """Return {name: split} by their order, at least one for each split as long as there are enough."""
    main = max(shares, key=shares.get)
    counts = {}
    for split in shares:
        left = len(names) - 1 - sum(counts.values())
        if split != main:
            counts[split] = max(0, min(left, max(1, round(shares[split] * len(names)))))
    counts[main] = len(names) - sum(counts.values())
    splits = []
    for split in shares:
        splits += [split] * counts[split]
    return dict(zip(names, splits))


def _held_out(parts, rules, place):
    """Return the splits of a fold, see `divide`."""
    held, count = rules.fold
    pool = [record for split, rows in parts.items() if split != "test" for record in rows]
    names = _ordered_groups(pool, rules.seed)
    if count > len(names) or count < 3 and "test" not in parts:
        raise ValueError(
            f"--fold {held}/{count}: '{place}' has {len(names)} groups. A fold needs one, and without a test "
            "split of its own there must be 3 folds: one tests, the next one validates."
        )
    role_of = {held - 1: "test", held % count: "val"}
    splits = {"train": [], "val": [], "test": []}
    if "test" in parts:
        role_of = {held - 1: "val"}
        splits["test"] = parts["test"]
    split_of = {name: role_of.get(rank % count, "train") for rank, name in enumerate(names)}
    _add_records(splits, pool, split_of)
    return splits


def _tell_of_groups(splits, pattern, place):
    """Say once how many groups the splits have, and of groups in several of them."""
    splits_of = defaultdict(list)
    counts = []
    for split, records in splits.items():
        groups = set(group_names(records))
        counts.append(f"{len(groups)} {split}")
        for group in groups:
            splits_of[group].append(split)
    words = {**FOLDER_GROUPS, FIRST_FOLDER: "folders"}.get(pattern, f"matches of '{pattern}'")
    line = f"'{place}': split by groups, {words}: {', '.join(counts)}."
    shared = sorted(f"{group} in {' and '.join(of)}" for group, of in splits_of.items() if len(of) > 1)
    if shared:
        line += f" WARNING: {len(shared)} are in two splits ({first_few(shared)}): scores would be too good."
    say_once(f"groups {place}", line)


def _unit_hash(name, seed):
    """Return a number in 0..1 from a name alone, so that it keeps its split when others are added."""
    return hash_of(f"{seed}:{name}") / 2**64
