"""The record of a data set, annotation files, prompts, and the error that lists unusable records."""

import dataclasses
import re
import signal
from collections import defaultdict
from pathlib import Path

import numpy as np

from vlsm.data.images import LabelMask, MaskUnion
from vlsm.system.console import first_few
from vlsm.system.files import leaves_folder
from vlsm.system.schema import field, fits, read_json

PROMPT_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
# of a name with a letter, as the file system takes it; bytes that are no UTF-8 come as \udc80 to \udcff
FILE_NAME = re.compile(r"(?s)(?=.*[^./])[^\0\ud800-\udc7f\udd00-\udfff]{1,1000}")


@dataclasses.dataclass
class Record:
    """One (image, mask, prompts) triple.

    image, mask: a path, or the pixels (uint8 `[H, W, 3]`, bool `[H, W]`); a mask may be a `LabelMask` or a
    `MaskUnion`. group: of images that stay in one split, such as the patient. spacing: millimetres from row
    to row, and from column to column, if they are known.
    """

    name: str  # of the image's file, for messages and results
    mask_name: str
    image: object
    mask: object
    prompts: dict = dataclasses.field(default_factory=dict)  # key (p0..p9) -> text, or list of texts
    class_word: str | None = None
    problem: str | None = None  # why it cannot be used, if that is known before its files are read
    absent: tuple = ()  # class words of the split that are not in the image
    several_colours: bool = False  # an annotation file tells what the colours of its mask are together
    group: str | None = None
    spacing: tuple | None = None

    def name_class(self, word, texts=None):
        """Set the class, and prompts that name it: the word, or texts for it."""
        self.class_word = word
        self.prompts = {"p0": "", "p1": texts or word}

    @property
    def mask_source(self):
        """What is read for the mask: the label map of several classes, else the mask itself."""
        return self.mask.file if isinstance(self.mask, LabelMask) else self.mask

    @property
    def files(self):
        """The image's and the mask's paths, or pixels."""
        if isinstance(self.mask, MaskUnion):
            return [self.image, *self.mask.files]
        return [self.image, self.mask_source]


class DataError(ValueError):
    """Records that cannot be used, grouped in one message. bad: their indices, sorted."""

    def __init__(self, problems, total):
        """problems: {kind of problem: [(index of the record, name), ...]}. total: number of all records."""
        self.problems = problems
        indices = set()
        lines = []
        for problem, hits in problems.items():
            indices.update(i for i, _ in hits)
            names = dict.fromkeys(name for _, name in hits)
            lines.append(f"  {len(names)} x {problem}: {first_few(names)}")
        self.bad = sorted(indices)
        heading = f"{len(self.bad)} of {total} records cannot be used:"
        super().__init__("\n".join([heading, *lines]))


def search_name(pattern, name):
    """Search a pattern of --group in an image's name. Raises ValueError if it takes a second of computing."""

    def give_up(*_):
        raise ValueError(
            f"--group '{pattern}' takes too long to search in '{name}'. Write it without a repeat of "
            "repeats, such as (a+)+."
        )

    try:
        signal.signal(signal.SIGVTALRM, give_up)
    except (AttributeError, ValueError):  # on Windows, or in another thread than the first: no limit
        return re.search(pattern, name)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1)
    try:
        return re.search(pattern, name)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def group_of(name, pattern=None):
    """Return the group of an image's name: what `pattern`, or its first group, matches; else the name."""
    match = search_name(pattern, name) if pattern else None
    return match[min(1, match.re.groups)] if match else name


def group_names(records, pattern=None):
    """Return the group of each record: what `pattern` finds in its name, else its own, else its name.

    Raises ValueError if the pattern is found in no name.
    """
    if not pattern:
        return [record.group or record.name for record in records]
    refuse_idle_pattern(pattern, records)
    return [group_of(record.name, pattern) for record in records]


def refuse_idle_pattern(pattern, records):
    """Raise ValueError if a pattern of --group is found in no image's name."""
    names = [record.name for record in records]
    if names and not any(search_name(pattern, name) for name in names):
        raise ValueError(f"--group '{pattern}' is found in no image's name, such as '{names[0]}'.")


def describe_groups(records, pattern=None):
    """Say what the groups of `group_names` are."""
    if pattern:
        return f"match of '{pattern}' in an image's name"
    return "patient or folder" if any(record.group for record in records) else "image"


def index_images(records):
    """Return (index of each image's first record, each record's image number); records may share an image."""
    rows = {}  # an image's key -> its row
    first = []
    image_of = []
    for i, record in enumerate(records):
        key = source_key(record.image)
        if key not in rows:
            rows[key] = len(first)
            first.append(i)
        image_of.append(rows[key])
    return first, image_of


def mark_absent(records, words=()):
    """Set `absent` of each record of a split: the class words of which its image has no record.

    words: of the data set, if it may have classes that no image of this split holds.
    """
    present = defaultdict(set)  # image -> class words in lower case, as the tokenizer reads them
    words = {word.casefold(): word for word in words}  # in lower case -> as it is written
    for record in records:
        if record.class_word:
            words[record.class_word.casefold()] = record.class_word
            present[source_key(record.image)].add(record.class_word.casefold())
    for record in records:
        missing = sorted(words.keys() - present[source_key(record.image)])
        record.absent = tuple(words[word] for word in missing)
    return records


def source_key(source):
    """Return a key of a file, or of pixels in memory: equal keys are the same source."""
    return str(source) if isinstance(source, (str, Path)) else id(source)


def read_annotations(path):
    """Return the entries of an annotation file: dictionaries of img_name, mask_name and prompts.

    Raises ValueError, which names the file and the record, for an entry that lacks one of these.
    """
    entries = read_json(path, list, "a list of records")
    for i, entry in enumerate(entries):
        for key in ("img_name", "mask_name"):
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                entry[key] = entry[key].replace("\\", "/")  # as programs on Windows write folders
        _check_entry(entry, f"{path}, record {i}")
    return entries


def _check_entry(entry, source):
    """Raise ValueError, which names `source`, unless an annotation file's entry is a record."""
    for key in ("img_name", "mask_name"):
        name = field(source, entry, key, kind=FILE_NAME, words="a file's name")
        if leaves_folder(name):
            raise ValueError(f"'{source}': the file name '{name}' leaves the data set's folder.")
    prompts = field(source, entry, "prompts", kind=dict, words="an object")
    for key, value in prompts.items():
        if not PROMPT_KEY.fullmatch(key):  # --all-prompts makes a folder of it
            raise ValueError(
                f"'{source}': the prompt's key '{key}' should be letters, digits, - and _ alone."
            )
        check_texts(source, key, value)


def check_texts(source, key, value):
    """Raise ValueError, which names source and key, unless a prompt is a text or a list of texts."""
    if value == [] or not fits(value, str) and not fits(value, [str]):
        raise ValueError(f"'{source}': prompt '{key}' is neither a text nor a list of texts.")


# Prompts


# The anatomical place after the class in MedVLSM's p1: "Myocardium of the heart."
PLACE = re.compile(
    r"\s+(in|of)\s+(the|a)\s+(heart|cardiac ultrasound|chest x-?ray|breast ultrasound image).*$", re.I
)


def choose_prompt(record, mode, *seed):
    """Return a prompt of a record; equal numbers `seed` draw equal prompts.

    mode: "random", a key drawn uniformly from all but the first (p0, the empty prompt), then one of its
    texts; "class", the class word; a key (p0..p9); any other text is itself the prompt. Raises ValueError if
    the record has no such prompt.
    """
    prompts = record.prompts
    rng = np.random.default_rng(seed)
    if mode == "class":
        if not record.class_word:
            raise ValueError(
                "--prompts class: these records have no class word (no prompt p1). Give the word itself: "
                '--prompts "polyp".'
            )
        return record.class_word
    if mode == "random":
        keys = list(prompts)[1:] or list(prompts)
        if not keys:
            raise ValueError(
                '--prompts random: these images came without prompts. Give one for all: --prompts "a polyp".'
            )
        key = keys[rng.integers(len(keys))]
    elif not is_text(mode):
        key = mode
        if key not in prompts:
            known = ", ".join(prompts) or "none"
            raise ValueError(
                f'--prompts {mode}: there is no such key. Known here: {known}; or "random", "class", or a '
                "text of your own."
            )
    else:
        return mode
    value = prompts[key]
    if isinstance(value, str):
        return value
    return value[rng.integers(len(value))]


def is_text(mode):
    """Tell whether a mode of `choose_prompt` is itself the prompt."""
    return mode not in ("random", "class") and not re.fullmatch(r"p\d+", mode)


def prompt_texts(record):
    """Return all texts of a record's prompts."""
    texts = []
    for value in record.prompts.values():
        if isinstance(value, str):
            texts.append(value)
        else:
            texts += value
    return texts


def class_word(prompts):
    """Return the class that p1 names, without its place ("Myocardium of the heart." -> "Myocardium"), or None
    without p1.
    """
    value = prompts.get("p1")
    if not value:
        return None
    text = value if isinstance(value, str) else value[0]
    return PLACE.sub("", text).strip(" .") or None
