"""What a data set is made of, and what can be wrong with it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from vlsm.system.files import leaves_folder, read_json

PROMPT_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Record:
    """One (image, mask, prompts) triple.

    image, mask: a path, or the pixels (uint8 `[H, W, 3]`, bool `[H, W]`).
    """

    name: str  # of the image, for people
    mask_name: str
    image: object
    mask: object
    prompts: dict = field(default_factory=dict)
    class_word: str | None = None
    problem: str | None = None  # why it cannot be used, where that is known before its files are read


class DataError(ValueError):
    """All that is wrong with a data set, grouped, in one message.

    `bad`: indices of the records it concerns.
    """

    def __init__(self, problems, total):
        self.problems = problems  # kind of problem -> [(index of the record, name)]
        self.bad = sorted({i for hits in problems.values() for i, _ in hits})
        lines = [f"{len(self.bad)} of {total} records cannot be used:"]
        for kind, hits in problems.items():
            names = list(dict.fromkeys(name for _, name in hits))
            lines.append(
                f"  {len(names)} x {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )
        super().__init__("\n".join(lines))


def index_images(records):
    """Find records that share an image: (the first record of each image, the image of each record)."""
    rows, image_of, first = {}, [], []
    for i, r in enumerate(records):
        key = str(r.image) if isinstance(r.image, (str, Path)) else id(r.image)
        if key not in rows:
            rows[key] = len(first)
            first.append(i)
        image_of.append(rows[key])
    return first, image_of


def read_annotations(path):
    """Return the entries of an annotation file: dictionaries of img_name, mask_name and prompts.

    Raises ValueError, which names the file and the record, for what is no entry.
    """
    entries = read_json(path, list, "a list of records")
    for i, entry in enumerate(entries):
        _check_entry(entry, f"'{path}', record {i}")
    return entries


def _check_entry(entry, where):
    """Raise ValueError unless an annotation file's entry is a record."""
    for key, kind in (("img_name", str), ("mask_name", str), ("prompts", dict)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            expected = "text" if kind is str else "object"
            raise ValueError(f"{where}: the key '{key}' is missing or is no {expected}.")
    for name in (entry["img_name"], entry["mask_name"]):
        if leaves_folder(name):
            raise ValueError(
                f"{where}: the file name '{name}' leaves the data set's folder; that is refused."
            )
    for key, value in entry["prompts"].items():
        if not PROMPT_KEY.fullmatch(key):  # --all-prompts makes a folder of it
            raise ValueError(f"{where}: the prompt's key '{key}' should be letters, digits, - and _ alone.")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{where}: prompt '{key}' is neither a text nor a list of texts.")
