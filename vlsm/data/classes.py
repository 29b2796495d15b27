"""Classes of a user's own folder: of label maps, named by dataset.json, or of a folder of masks for each.

Each class that an image holds becomes a record.
"""

import dataclasses
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from vlsm.data.images import LABELS_FORM, READERS, ImageError, LabelMask, MaskUnion, read_labels, read_mask
from vlsm.data.records import check_texts
from vlsm.system.console import first_few
from vlsm.system.files import hash_of, names_folder
from vlsm.system.schema import field, read_json

LENGTHS = [(int, float)] * 2  # from row to row, and from column to column


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of label maps, as a dataset.json names them.

    numbers: {class word: its number in the maps}. ignore: the number of pixels that do not count, or None.
    prompts: {class word: text, or list of texts}.
    """

    file: Path
    numbers: dict
    ignore: int | None
    prompts: dict


def read_dataset_json(*folders):
    """Return (path, content) of the first dataset.json in the folders; without one (None, {})."""
    for folder in folders:
        file = folder / "dataset.json"
        if file.is_file():
            return file, read_json(file)
    return None, {}


def find_labels(file, content):
    """Return the `Labels` in a dataset.json, or None. Raises as `parse_labels`."""
    if not file or "labels" not in content and {"spacing", "group"} & content.keys():
        return None
    return parse_labels(content, file)


def find_group(file, content):
    """Return the "group" of a dataset.json, as --group is written, or None. Raises ValueError."""
    if "group" not in content:
        return None
    return field(file, content, "group", kind=re.Pattern, words="a regular expression")


def add_spacing(records, file, content):
    """Set the `spacing` of records that a dataset.json tells, of all or by name.

    Its "spacing" is millimetres from row to row and from column to column: a pair, or one for each image's
    name or folder. Raises ValueError, which names file and key.
    """
    spacing = content.get("spacing")
    if spacing is None:
        return
    by_name = spacing if isinstance(spacing, dict) else {".": spacing}
    for name in by_name:
        keys = ("spacing", name) if by_name is spacing else ("spacing",)
        field(file, content, *keys, kind=LENGTHS, words="two lengths in mm", low=1e-9, high=1e6)
    for record in records:
        path = PurePosixPath(record.name)
        for place in (path, *path.parents):
            if str(place) in by_name:
                record.spacing = tuple(by_name[str(place)])
                break


def parse_labels(content, file):
    """Return the `Labels` in the content of a dataset.json. Raises ValueError, which names file and key."""
    numbers = dict(field(file, content, "labels", kind=dict, words=f"an object, as in {LABELS_FORM}"))
    for word in numbers:
        words = f"a class number, 0 to 65535, as in {LABELS_FORM}"
        field(file, content, "labels", word, kind=int, words=words, low=0, high=65535)
        if not names_folder(word):
            raise ValueError(f"'{file}': 'labels' names a class '{word}'; it should be a word.")
    if len(set(numbers.values())) < len(numbers):
        raise ValueError(f"'{file}': 'labels' gives one number to two classes.")
    if numbers.pop("background", None) != 0:
        raise ValueError(f"'{file}': 'labels' should hold \"background\": 0, as in {LABELS_FORM}.")
    ignore = numbers.pop("ignore", None)
    if not numbers:
        raise ValueError(f"'{file}': 'labels' names no class beside the background, as in {LABELS_FORM}.")
    prompts = {}
    if "prompts" in content:
        prompts = field(file, content, "prompts", kind=dict, words="an object of the classes' texts")
    for word, texts in prompts.items():
        if word not in numbers:
            raise ValueError(
                f"'{file}': 'prompts' has texts for '{word}', which 'labels' does not name; it names "
                f"{first_few(numbers)}."
            )
        check_texts(file, word, texts)
    return Labels(file, numbers, ignore, prompts)


def label_records(records, labels):
    """Return a record for each class of each label map, from records whose mask is the map's path.

    An image without a map gets one record, with its empty mask.
    """
    rows = []
    for record in records:
        union = isinstance(record.mask, MaskUnion)
        if union and record.mask.files:
            record.problem = record.problem or "several label maps of one image"
        if record.problem:
            rows.append(record)
            continue
        words = list(labels.numbers)
        for word in [words[hash_of(record.name) % len(words)]] if union else words:
            row = dataclasses.replace(record, mask_name=f"{word}/{record.mask_name}")
            row.name_class(word, labels.prompts.get(word))
            if not union:
                row.mask = LabelMask(record.mask, labels.numbers[word], labels.ignore)
            rows.append(row)
    return rows


def present_records(records, labels=None):
    """Return the records whose class is in the image; records: of all classes.

    Of an image without any class one record is returned, and all records if no image holds a class (healthy
    controls). Raises ValueError for a number in a map that no label names.
    """
    numbers = _numbers_of_files(records)
    if labels:
        _refuse_unnamed(numbers, labels)
    by_image = defaultdict(list)
    present = []
    for record in records:
        by_image[record.name].append(record)
        value = record.mask.value if isinstance(record.mask, LabelMask) else 1
        in_file = numbers.get(record.mask_source)
        # if the file cannot be used, the cache reports why, with all others
        if in_file is None or value in in_file:
            present.append(record)
    healthy = by_image.keys() - {record.name for record in present}
    if not present:
        return records
    for name in healthy:  # an empty mask of one class, the same each time
        of_image = by_image[name]
        present.append(of_image[hash_of(name) % len(of_image)])
    return sorted(present, key=lambda record: record.name)


def _refuse_unnamed(numbers, labels):
    """Raise ValueError for a number in a map that no label names."""
    named = {0, labels.ignore, *labels.numbers.values()}
    for file, in_file in numbers.items():
        unnamed = sorted((in_file or set()) - named)
        if unnamed:
            raise ValueError(
                f"'{labels.file}': 'labels' names no class of number {unnamed[0]}, which '{file}' holds. "
                '(Pixels that should not count are named "ignore".)'
            )


def _numbers_of_files(records):
    """Return {mask file: numbers in it, None if it cannot be read}; of a binary mask: 1, if anywhere."""
    readers = {}
    for record in records:
        if not record.problem:
            reader = read_labels if isinstance(record.mask, LabelMask) else read_mask
            readers[record.mask_source] = reader, record.files[1:]

    def read(source):
        reader, files = readers[source]
        try:
            changed = tuple(os.stat(file).st_mtime_ns for file in files)
            return _numbers_in(source, changed, reader)
        except (ImageError, OSError):  # the cache reports why
            return None

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(readers, pool.map(read, readers)))


@lru_cache(maxsize=1 << 20)  # a folder is read once for each of its splits, and to list them
def _numbers_in(source, changed, reader):
    """Return the numbers that a mask or label map, whose files were last changed at some times, holds."""
    counts = np.bincount(reader(source).ravel())
    return frozenset(counts.nonzero()[0].tolist())
