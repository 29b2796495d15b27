"""The classes of label maps, as dataset.json names them, and the masks of a map."""

import numpy as np

from vlsm.data.images import LABELS_FORM
from vlsm.system.console import say_once
from vlsm.system.files import names_folder
from vlsm.system.schema import field, parse_json


def checked_class(word, source="its"):
    """Return a class's word without blanks around it. Raises ValueError unless it can name a folder."""
    text = word.strip() if isinstance(word, str) else ""
    if "/" in text or not names_folder(text):
        raise ValueError(f"{source} class {word!r} cannot name a folder; rename the class")
    return text


def read_classes(download):
    """Return {class: its numbers} of a download's dataset.json, as nnU-Net has it; None without such a file.

    {"background": 0, "liver": 1, "organ": [1, 2]}, or {"0": "background", "1": "liver"}. Raises ValueError.
    """
    file = download.only(r"dataset\.json")
    if not file:
        say_once("classes", f"No dataset.json names the classes, as in {LABELS_FORM}: class1, class2, ...")
        return None
    content = parse_json(download.read(file), file)
    labels = field(file, content, "labels", kind=dict, words=f"an object, as in {LABELS_FORM}")
    classes = {}
    for word, numbers in labels.items():
        if word.isdigit():  # of version 1
            word, numbers = numbers, word
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not all(str(number).isdigit() for number in numbers):
            raise ValueError(f"'{file}': 'labels' should be as in {LABELS_FORM}; it has {numbers}.")
        classes.setdefault(checked_class(word, f"'{file}':"), []).extend(map(int, numbers))
    classes.pop("background", None)
    return classes


def name_numbers(name, numbers, classes):
    """Return `classes`; if they are None, class1, class2, ... Raises ValueError for a number of no class."""
    present = np.bincount(numbers.ravel()).nonzero()[0].tolist()
    if classes is None:
        return {f"class{number}": [number] for number in present if number}
    unnamed = sorted(set(present).difference([0], *classes.values()))
    if unnamed:
        raise ValueError(f"'{name}' holds the numbers {unnamed}, which no class of dataset.json has")
    return classes


def class_masks(numbers, classes):
    """Return {class: mask bool `[H, W]`} of the classes that class numbers `[H, W]` hold."""
    masks = {}
    for word, values in classes.items():
        mask = np.isin(numbers, values)
        if mask.any():
            masks[word] = mask
    return masks
