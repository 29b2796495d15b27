"""Files that survive a crash: each is written under a temporary name, flushed to disk, then renamed.

Also: JSON and CSV, the protection of a user's files from being overwritten, a lock on a folder.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath


def digest(data, size=8):
    """Return a hash of bytes as text: `size` bytes of BLAKE2, in hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def hash_of(text):
    """Return a hash of a text, which need not be UTF-8, as a number below 2^64."""
    return int(digest(text.encode(errors="surrogateescape")), 16)


HOST = digest(socket.gethostname().encode(), 4)
TEMPORARY = re.compile(rf"\.vlsm-{HOST}-(\d+)-.*\.tmp")
LEDGER = ".vlsm-written"  # a file in each folder: digest and name of every file that this program wrote there
FULL = 1 << 20  # bytes; with fewer left, a writer's error without a reason means that the disk is full


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, which then takes the name `path`.

    On any error the temporary file is removed and `path` stays as it was. Missing parent folders are made.
    Raises OSError that names `path`.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:  # safetensors' and torch's writers have errors of their own
        if temporary.exists() and shutil.disk_usage(temporary.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        if temporary.exists():  # unlink of a missing file fails on a file system that cannot be written
            temporary.unlink()


def temporary_beside(path):
    """Return a path beside `path` whose name holds the machine and the process."""
    short = digest(os.fsencode(path.name), 6)  # the name itself may be too long to be lengthened
    return path.with_name(f".vlsm-{HOST}-{os.getpid()}-{short}.tmp")


def sweep_temporary(folder):
    """Remove the temporary files and folders in a folder whose processes, of this machine, are gone."""
    for path in Path(folder).glob(".vlsm-*.tmp"):
        owner = TEMPORARY.fullmatch(path.name)
        if owner and not _is_alive(int(owner[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid):
    """Tell whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return True


def reserve(path, nbytes, offset=0):
    """Lengthen a file by `nbytes` of reserved disk space, so that writing to mapped memory cannot fail later.

    Raises OSError, which names `path`, if there is no room.
    """
    with open(path, "r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), offset, nbytes)
            else:
                file.truncate(offset + nbytes)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


# What may be overwritten


def check_targets(targets, inputs=(), overwrite=False):
    """Refuse to write over a user's files, before any work is done.

    targets: paths to be written. inputs: paths that are read; they are never replaced. overwrite: replace
    files that this program did not write, or that were changed since. Raises FileExistsError, or ValueError
    for two equal targets.
    """
    read = {os.path.realpath(file) for file in inputs if isinstance(file, (str, Path))}
    ledger_of = cache(_ledger)
    seen = set()
    foreign = []
    for target in map(Path, targets):
        if target in seen:
            raise ValueError(f"Several images would be written to '{target}': rename those with equal stems.")
        seen.add(target)
        if os.path.realpath(target) in read:
            raise FileExistsError(f"'{target}' is itself read, so it is not written to. Name another folder.")
        if not overwrite and os.path.lexists(target) and not _is_own(target, ledger_of(target.parent)):
            foreign.append(target)
    if foreign:
        raise FileExistsError(
            f"'{foreign[0]}' exists, and was not written by this program, or was changed since. Name another "
            f"place, or pass --overwrite. ({len(foreign)} such files)"
        )


def _ledger(folder):
    """Return the set of lines of a folder's ledger."""
    file = folder / LEDGER
    if not file.is_file():
        return set()
    return set(file.read_text("utf-8", "surrogateescape").splitlines())


def _is_own(path, ledger):
    """Tell whether a file is as this program wrote it, by the lines of its folder's ledger."""
    if path.is_symlink() or not path.is_file():
        return False
    return _ledger_line(path, path.name) in ledger


def _ledger_line(path, name):
    """Return the ledger's line on a file's content, under the name that it has or will have."""
    return f"{digest(path.read_bytes())} {name}"


@contextmanager
def owned_write(path):
    """Write as `atomic_write` does, and add the file's digest to the folder's ledger."""
    path = Path(path)
    with atomic_write(path) as temporary:
        yield temporary
        line = _ledger_line(temporary, path.name) + "\n"
        with open(path.parent / LEDGER, "ab") as ledger:  # short appends of several processes stay whole
            ledger.write(line.encode(errors="surrogateescape"))


def delete_owned(folder):
    """Delete the files below a folder that are as this program wrote them, and then every empty folder.

    Links are neither followed nor deleted. Returns the paths of all files and links that are left.
    """
    folder = Path(folder)
    if folder.is_symlink():
        return [folder]
    ledger = _ledger(folder)
    left = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            left += delete_owned(path)
        elif path.name == LEDGER or _is_own(path, ledger):
            path.unlink()
        else:
            left.append(path)
    if not is_filled(folder):
        folder.rmdir()
    return left


@contextmanager
def locked(folder, activity):
    """Hold a folder's lock, which ends with the process at the latest.

    activity: what a holder does, for the message ("is writing a run into"). Raises FileExistsError if another
    process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself, so that no lock file is left
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"Another process {activity} '{folder}' at this moment.") from None
        yield
    finally:
        os.close(handle)


def write_text(path, text, write=owned_write):
    """Write text in UTF-8, other bytes of file names escaped, by `owned_write` or `atomic_write`."""
    with write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value, write=owned_write):
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1), write)


def write_csv(path, rows, write=owned_write):
    """Write rows of values as CSV; the first row holds the names of the columns."""
    write_text(path, csv_text(rows), write)


# Before a text that a spreadsheet would run as a formula (=, +, -, @ first, and no number), or an escaped one
FORMULA = re.compile(r"\A(?![-+][\d.]+(e[-+]?\d+)?\Z)(?='*[-=+@\t\r\n])")


def csv_text(rows):
    """Format rows of values as CSV; an apostrophe, which `read_csv` removes, goes before formulas."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # so that a text with \r is quoted
    for row in rows:
        writer.writerow([FORMULA.sub("'", cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue().replace("\r\n", "\n")


def read_csv(path):
    """Return the rows of a file of `write_csv`, the names of the columns first."""
    with open(path, encoding="utf-8", newline="") as text:
        return [[re.sub(r"\A'(?='*[-=+@\t\r\n])", "", cell) for cell in row] for row in csv.reader(text)]


def read_lines(path):
    """Return the lines of a text file that are not blank. Raises ValueError unless it is in UTF-8."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is no text in UTF-8; save it so.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_owned(path):
    """Tell whether a file is as this program wrote it."""
    return _is_own(path, _ledger(path.parent))


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
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"'{path}' is saved in UTF-16; save it in UTF-8.") from None
        raise ValueError(
            f"'{path}' is not valid JSON ({error}). Was it cut off, or saved as another format?"
        ) from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' should hold {words}, and holds a {type(value).__name__}.")
    return value


def field(source, value, *keys, kind=(int, float), words="a number"):
    """Return the item under nested keys of a value that was read from `source`.

    Raises ValueError, which names source and keys, if it is missing, of another type or not finite.
    """
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    infinite = isinstance(value, float) and not math.isfinite(value)
    other_type = not isinstance(value, kind) or isinstance(value, bool) and kind is not bool
    if other_type or infinite:
        raise ValueError(f"'{source}': '{'.'.join(keys)}' should be {words}, and is {value!r}.")
    return value


def leaves_folder(name):
    """Tell whether a relative file name leads out of its folder, on any system."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in str(name)


def is_filled(folder):
    """Tell whether a path exists and is not an empty folder."""
    folder = Path(folder)
    return folder.exists() and any(folder.iterdir())
