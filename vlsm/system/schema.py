"""What a file may hold: JSON, the type and range of each value; mistakes are sentences with file and key."""

import json
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

LARGEST = 1e300  # of the numbers in a file: infinity and NaN are none of them
# Entries of schemas, see `check_fields`
NUMBER = ((int, float), "a number")
TEXT = (str, "a text")
OBJECT = (dict, "an object")
SWITCH = (bool, "true or false")


def read_json(path, kind=dict, words="a JSON object"):
    """Return the value of type `kind` (in words: `words`) that a JSON file holds.

    Raises FileNotFoundError if the file is missing, ValueError as `parse_json`.
    """
    return parse_json(Path(path).read_bytes(), path, kind, words)


def parse_json(data, path, kind=dict, words="a JSON object"):
    """Return the value of type `kind` (in words: `words`) in the bytes `data` of a JSON file.

    Raises ValueError, which names `path`, if they are no JSON or hold another type.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"'{path}' is saved in UTF-16; save it in UTF-8.") from None
        raise ValueError(
            f"'{path}' is not valid JSON ({error}). Was it cut off, or saved as another format?"
        ) from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' should hold {words}, and holds a {type(value).__name__}.")
    return value


def _distinct(pairs):
    """Return the dictionary of a JSON object's pairs of key and value. Raises ValueError for equal keys."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return value


def fits(value, kind, low=-LARGEST, high=LARGEST):
    """Tell whether a value that was read from a file has a type and, of numbers, is from `low` to `high`.

    kind: a type, or several; [type]: a list of such items, [type] * 3: of three; a regular expression: a text
    that it matches; `re.Pattern`: a regular expression itself. true and false are no numbers.
    """
    if isinstance(kind, list):
        if not isinstance(value, (list, tuple)) or len(kind) not in (1, len(value)):
            return False
        return all(fits(item, kind[0], low, high) for item in value)
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and bool(kind.fullmatch(value))
    if kind is re.Pattern:
        try:
            re.compile(value)
        except (re.error, TypeError, OverflowError, RecursionError):
            return False
        return isinstance(value, str)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) and (not isinstance(value, (int, float)) or low <= value <= high)


def item_of(value, keys):
    """Return the item under nested keys of a value, None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def field(source, value, *keys, kind=(int, float), words="a number", low=-LARGEST, high=LARGEST):
    """Return the item under nested keys of a value that was read from `source`.

    Raises ValueError, which names source and keys, unless it `fits`; words: what it should be.
    """
    value = item_of(value, keys)
    if not fits(value, kind, low, high):
        raise ValueError(f"'{source}': '{'.'.join(keys)}' should be {words}, and is {value!r:.200}.")
    return value


def check_fields(source, value, schema):
    """Check by `field` each item that a schema names, of a value that was read from `source`.

    schema: {keys, with dots between: (kind, words, or these with low and high)}; what a ? follows may be
    missing or null. Raises ValueError, which names source and keys.
    """
    for name, (kind, words, *limits) in schema.items():
        keys = name.rstrip("?").split(".")
        if not name.endswith("?") or item_of(value, keys) is not None:
            field(source, value, *keys, kind=kind, words=words, **dict(zip(("low", "high"), limits)))


@contextmanager
def naming(file):
    """Turn errors of values in a file that are of a wrong type into a ValueError, which names the file."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"'{file}' holds a value that cannot be there, or lacks one ({error!r:.300})."
        ) from error
