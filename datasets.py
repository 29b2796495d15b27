"""Find the files, prompts and splits of every data set.

`python datasets.py --prepare NAME --src DOWNLOAD` makes a data set's folder of its raw download, `--check
NAME` prints its statistics and writes a contact sheet.

Layout (MedVLSM's): DATA_ROOT/<folder>/images/..., masks/..., anns/{train,val,test}.json. A user's own folder
needs images/ and masks/ only, or train/ val/ test/ with these inside; its masks may be label maps, with class
numbers named in dataset.json, or lie in a folder for each class. vlsm/data/README.md shows the forms.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from vlsm.data.folders import DEFAULT_RULES, SplitRules, divide, folder_splits, split_rules
from vlsm.data.images import LabelMask
from vlsm.data.pairing import NO_MASK, ImageFolder
from vlsm.data.records import (
    DataError,
    Record,
    choose_prompt,
    class_word,
    group_of,
    mark_absent,
    read_annotations,
)
from vlsm.system.arguments import Parser, add_split_rules, number
from vlsm.system.console import did_you_mean, first_few, friendly_errors, say
from vlsm.system.files import check_targets, owned_write

EXAMPLES = """examples:
  python datasets.py --check my-folder
  python datasets.py --import coco export.zip --out my-folder
  python datasets.py --import nnunet Dataset001_Liver --out liver --window -160 240
  python datasets.py --prepare kvasir --src kvasir-seg.zip --anns medvlsm/data"""
# Options that have no effect beside others, as `Parser` refuses them.
RULES = (
    ("src anns describe", "with", "prepare", ""),
    ("group no_mask_is_empty split_seed", "with", "check", ""),
    ("templates axis keep_empty window classes", "with", "import", ""),
)
SPLITS = ("train", "val", "test")


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


def read_splits(dataset, data_root="data", rules=DEFAULT_RULES, wanted=SPLITS):
    """Return {split: records} of the wanted splits that have any, in a fixed order.

    dataset: "demo", a key of `DATASETS`, or the path of a folder. Raises ValueError for an unknown data set
    or another layout, FileNotFoundError for a missing folder.
    """
    if dataset == "demo":
        from vlsm.mini import demo

        if rules.fold:
            raise ValueError("--fold: the demo's splits are fixed; folds are for other data sets.")
        splits = {split: demo.records(split) for split in wanted}
    else:
        root, source = _locate(dataset, data_root)
        if not source:
            return folder_splits(root, rules, wanted)
        if rules.no_mask_is_empty:
            raise ValueError(f"--no-mask-is-empty: '{root}' has annotation files, which name each mask.")
        splits = _annotated_splits(root, source, rules, wanted)
    return {split: mark_absent(rows) for split, rows in splits.items()}


def records(dataset, split, data_root="data", rules=DEFAULT_RULES):
    """Return the records of a split. Raises as `read_splits`, FileNotFoundError for a missing file."""
    splits = read_splits(dataset, data_root, rules, [split])
    return _of_split(splits, split, dataset, data_root)


def _of_split(splits, split, dataset, data_root):
    """Return the records of a split that was asked for. Raises FileNotFoundError for a missing file."""
    if split not in splits and dataset != "demo":
        root, source = _locate(dataset, data_root)
        if source and not _annotation_file(root, split).is_file():
            raise FileNotFoundError(_describe_missing(root, split))
    return splits.get(split, [])


def _locate(dataset, data_root):
    """Return (folder, its `Source`, or None for a folder without annotation files)."""
    if dataset in DATASETS:
        source = DATASETS[dataset]
        root = Path(data_root).expanduser() / source.folder
        if not root.is_dir():
            raise FileNotFoundError(_describe_steps(dataset, data_root, root, source))
        return root, source
    root = Path(dataset).expanduser()
    if not root.is_dir():
        known = ["demo", *DATASETS]
        raise ValueError(
            f"Data set '{dataset}' is neither known ({', '.join(known)}) nor the path of a folder, seen from "
            f"'{Path.cwd()}'.{did_you_mean(dataset, known)} If a run names it, it was trained "
            "elsewhere: pass --dataset PATH."
        )
    if (root / "anns").is_dir():
        return root, Source(root.name, "")
    return root, None


def _describe_steps(dataset, data_root, root, source):
    """Say that a known data set's folder is missing, and how to make it."""
    own = f" (The folder of your own is --dataset ./{dataset}.)" if Path(dataset).is_dir() else ""
    return (
        f"There is no folder '{root}' for data set '{dataset}'.\n"
        f"  1. Download the images and masks from {source.url}\n"
        "  2. Get MedVLSM's prompts and splits: git clone https://github.com/naamiinepal/medvlsm\n"
        f"  3. python datasets.py --prepare {dataset} --src DOWNLOAD --anns medvlsm/data --data-root "
        f"{data_root}\n"
        f"If you have it already, pass --data-root with the folder that holds it.{own}"
    )


def _annotated_splits(root, source, rules, wanted):
    """Return {split: records} of a folder with annotation files; splits without records are left out."""
    pattern = rules.group or source.group
    parts = {}
    for split in SPLITS if rules.fold else wanted:
        if _annotation_file(root, split).is_file():
            parts[split] = _annotated_records(root, split, source, pattern)
    if rules.fold:
        parts = divide(parts, replace(rules, group=pattern), root)
    return {split: parts[split] for split in wanted if parts.get(split)}


def _annotation_file(root, split):
    return root / "anns" / f"{split}.json"


def _describe_missing(root, split):
    """Say that a split's annotation file is missing, and what is there."""
    present = first_few(sorted(file.name for file in (root / "anns").glob("*.json")))
    return (
        f"There is no '{_annotation_file(root, split)}'. Expected {root}/images, {root}/masks and "
        f"{root}/anns/{{train,val,test}}.json; anns/ holds {present or 'nothing'}."
    )


def _annotated_records(root, split, source, pattern):
    """Return the records that an annotation file lists; pattern: of the group in an image's name."""
    subfolder = source.subfolders[split] if source.subfolders else ""
    images = ImageFolder(root / "images" / subfolder)
    masks = ImageFolder(root / "masks" / subfolder)
    rows = []
    for entry in read_annotations(_annotation_file(root, split)):
        name = entry["img_name"]
        mask_name = entry["mask_name"]
        prompts = entry["prompts"]
        word = source.word or class_word(prompts)
        record = Record(name, mask_name, images.find(name), masks.find(mask_name), prompts, word)
        record.group = group_of(name, pattern) if pattern else None
        record.several_colours = True
        rows.append(record)
    return rows


# Opening


def open_dataset(
    dataset, wanted, size, data_root="data", cache_dir=None, rules=DEFAULT_RULES, prompts="random",
    skip_bad=False, limit_train=1.0, need_foreground=("train", "val"), splits=None,
):  # fmt: skip
    """Return `{split: CachedSplit}` of the wanted splits at `size` pixels: checked, resized, cached.

    skip_bad: drop records that cannot be used, and print how many; None: it cannot be asked for. limit_train:
    fraction of the training records to take; it is fixed which ones, and smaller fractions are subsets of
    larger ones.
    need_foreground: splits that are refused if all their masks are empty. splits: what `read_splits`
    returned, if it was called before. Raises ValueError, which lists the problems of all splits.
    """
    from vlsm.system import parallel  # it imports torch, for which --list need not wait

    data = {}
    problems = []
    kinds = set()
    with parallel.local_first():
        splits = splits or read_splits(dataset, data_root, rules, wanted)
        for split in wanted:
            label = f"{Path(dataset).name} {split}"
            try:
                rows = _of_split(splits, split, dataset, data_root)
                rows = _chosen_records(rows, f"{split} split of '{dataset}'", prompts, limit_train)
                needed = split in need_foreground
                data[split] = _open_usable(rows, size, cache_dir, label, skip_bad, needed)
            except DataError as error:
                problems.append(f"{label}: {error}")
                kinds.update(error.problems)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
    if kinds and skip_bad is False:
        problems.append("Mend the files, or pass --skip-bad to go on without these records.")
    if NO_MASK in kinds and skip_bad is not None:
        problems.append("If the images without a mask show nothing of the class, pass --no-mask-is-empty.")
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
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


def _chosen_records(rows, place, prompts, limit_train):
    """Return the records of a split, which `place` names, to use.

    Raises ValueError if it is empty, or a record lacks the chosen prompt.
    """
    if not rows:
        raise ValueError(f"The {place} is empty: there are no images for it.")
    if place.startswith("train") and limit_train < 1:
        order = random.Random(0).sample(range(len(rows)), len(rows))
        count = max(1, round(limit_train * len(rows)))
        rows = [rows[i] for i in sorted(order[:count])]
    for i, record in enumerate(rows):
        if not record.problem:
            choose_prompt(record, prompts, 0, i)  # reject a missing key now, not in the middle of an epoch
    return rows


def open_run_split(
    metadata, split="test", dataset=None, data_root=None, prompts=None, seed=None, cache_dir=None
):
    """Return (`CachedSplit`, one prompt for each record) of a split, as the run with this metadata read it.

    metadata: a checkpoint's. dataset, data_root, prompts, seed: those of the run unless given; the run's
    rules are of its own data set alone, which may have moved. Raises as `open_dataset`.
    """
    rules = split_rules(metadata)
    if dataset and Path(dataset).name != Path(metadata["dataset"]).name:
        rules = SplitRules(rules.seed)
    dataset = dataset or metadata["dataset"]
    data_root = data_root or metadata["data_root"]
    prompts = prompts or metadata["prompts"]
    if seed is None:
        seed = metadata["recipe"]["seed"]
    size = metadata["image_size"]
    skip_bad = metadata.get("skip_bad") or None
    splits = open_dataset(
        dataset, [split], size, data_root, cache_dir, rules, prompts, skip_bad, need_foreground=()
    )
    data = splits[split]
    texts = [choose_prompt(record, prompts, seed, i) for i, record in enumerate(data.records)]
    return data, texts


# The command line


def check(dataset, data_root, rules, out, overwrite=False):
    """Print a data set's statistics; write a contact sheet, and one of nearly equal images if there are any.

    Raises as `read_splits` does.
    """
    from vlsm.data.check import describe_splits, inspect_splits, pair_rows, sheet_rows, similar_splits
    from vlsm.results.figures import sheet
    from vlsm.system import plots

    splits = read_splits(dataset, data_root, rules)
    inputs = []
    for rows in splits.values():
        for record in rows:
            inputs += record.files
    if not splits:
        raise ValueError(
            f"'{dataset}' has no records to check: expected anns/train.json, val.json or test.json, or "
            "images/ and masks/ with files of equal stems."
        )
    name = Path(dataset).name
    file = Path(out or f"{name}-check.png")
    pairs_file = file.with_stem(f"{file.stem}-pairs")
    check_targets([file, pairs_file], inputs, overwrite)
    say(f"{name}: {_describe_form(dataset, data_root, next(iter(splits.values()))[0])}")
    summaries = inspect_splits(splits)
    similar = similar_splits(summaries)
    say(describe_splits(name, summaries, similar))
    for path, rows, second in (
        (file, sheet_rows(splits), ("ground truth", plots.GREEN)),
        (pairs_file, pair_rows(similar), ("nearly equal image", "white")),
    ):
        if rows:
            with owned_write(path) as temporary:
                sheet(rows, [("image", "white"), second], temporary)
            say(f"Wrote {path}")


def _describe_form(dataset, data_root, record):
    """Return in words which form of masks a data set has; record: any of its records."""
    if isinstance(record.mask, LabelMask):
        return "label maps, a number for each class"
    if dataset == "demo" or _locate(dataset, data_root)[1]:
        return "masks and prompts of annotation files"
    if record.class_word:
        return "binary masks, in a folder for each class"
    return "binary masks, without classes"


def prepare(name, source, data_root, anns, descriptions, overwrite):
    """Make a data set's folder of its raw download; see `vlsm.raw.prepare`."""
    from vlsm.raw import prepare as raw

    if name not in DATASETS:
        guess = did_you_mean(name, DATASETS)
        raise ValueError(f"--prepare '{name}' is not known.{guess} Choose one of: {', '.join(DATASETS)}.")
    if not source:
        raise ValueError("--prepare needs the download, a folder or a zip archive: --src DOWNLOAD.")
    folder = DATASETS[name].folder
    if anns:  # MedVLSM's data folder, the data set's folder in it, or that one's anns
        for subfolder in (f"{folder}/anns", folder):
            if (Path(anns) / subfolder).is_dir():
                anns = Path(anns) / subfolder
                break
    texts = raw.read_descriptions(descriptions) if descriptions else ()
    raw.prepare(name, source, Path(data_root) / folder, anns, texts, overwrite)
    say(f"Look at it with:\n  python datasets.py --check {name} --data-root {data_root}")


def import_options(args):
    """Return the options of a format that were given, by name."""
    from vlsm.raw.formats.colours import parse_classes

    given = {name: getattr(args, name) for name in ("axis", "keep_empty", "window")}
    given["classes"] = parse_classes(args.classes) if args.classes else None
    return {name: value for name, value in given.items() if value is not None}


def main(argv=None):
    """Run the command line."""
    parser = Parser("Data sets for train.py and evaluate.py.", EXAMPLES, RULES)
    add = parser.add_argument_group("the papers' data sets").add_argument
    add("--list", action="store_true", help="list the known data sets and where to download them")
    add("--prepare", metavar="NAME", help="make a data set's folder of its download, --src")
    add("--src", metavar="DOWNLOAD", help="folder or zip archive, as published; nothing is written there")
    add("--data-root", default="data", help="folder that holds the data sets' folders (default: data)")
    add("--anns", metavar="DIR", help="published annotation files: MedVLSM's data folder, or a data set's")
    add("--describe", metavar="FILE.json", help="list of descriptions of the class, for prompts p7 to p9")
    add = parser.add_argument_group("statistics").add_argument
    add("--check", metavar="NAME|PATH", help="print statistics and the form of masks (label map, ...)")
    add_split_rules(add)
    add = parser.add_argument_group("other programs' formats").add_argument
    add(
        "--import",
        nargs=2,
        metavar=("FORMAT", "SRC"),
        help="bring a folder or zip archive into the folder --out: coco, labelme, yolo, cvat, label-studio, "
        "nnunet, nifti, dicom, masks-from-colours",
    )
    add("--templates", action="store_true", help="write MedVLSM's prompts p0 to p6 of each mask")
    add("--axis", type=int, choices=[0, 1, 2], help="of the slices of volumes (default: 2, axial)")
    add("--keep-empty", type=number(float, 0, 1), help="share of the slices without a class (default 0.1)")
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="values that become black and white")
    add("--classes", metavar="NAMES", help='of masks-from-colours: "polyp=255,0,0;tool=0,255,0"')
    add = parser.add_argument_group("output").add_argument
    add("--out", help="folder of --import; contact sheet of --check (default: NAME-check.png)")
    add("--overwrite", action="store_true", help="replace files that this program did not write")
    args = parser.parse_args(argv)
    format_and_source = getattr(args, "import")
    if args.prepare:
        prepare(args.prepare, args.src, args.data_root, args.anns, args.describe, args.overwrite)
    elif format_and_source:
        from vlsm.raw.formats.importing import import_dataset

        if not args.out:
            raise ValueError("--import needs the folder to write: --out DIR.")
        options = import_options(args)
        import_dataset(*format_and_source, args.out, args.templates, args.overwrite, **options)
    elif args.check:
        rules = split_rules(vars(args))
        check(args.check, args.data_root, rules, args.out, args.overwrite)
    elif args.list:
        for name, source in DATASETS.items():
            say(f"{name:13} {source.folder:15} {source.url}")
    else:
        parser.print_help()


if __name__ == "__main__":
    with friendly_errors():
        main()
