"""Files that survive a crash: each is written under a temporary name, flushed to disk, then renamed.

JSON and CSV.
"""

import csv
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path, PurePosixPath


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, which then takes the name `path`.

    On any error the temporary file is removed and `path` stays as it was. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1))


def write_csv(path, rows):
    """Write rows of values, the first of which are the columns' names."""
    write_text(path, csv_text(rows))


def csv_text(rows):
    """Format rows of values as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_json(path, kind=dict, words="a JSON object"):
    """Read a JSON file that holds a value of type `kind`, which `words` names.

    Raises ValueError where the file is no JSON or holds another type, FileNotFoundError where there is none.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"'{path}' is not valid JSON ({error}). Was it cut off, or saved as another format?"
        ) from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' should hold {words}, and holds a {type(value).__name__}.")
    return value


def leaves_folder(name):
    """Tell whether a relative file name from an annotation file or a download leads out of its folder, on any
    system.
    """
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in str(name)


def is_filled(folder):
    """Tell whether a path exists and is not an empty folder."""
    folder = Path(folder)
    return folder.exists() and any(folder.iterdir())
