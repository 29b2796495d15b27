"""Files that survive a crash: each is written under a temporary name, flushed to disk, then renamed.

JSON and CSV; what may be overwritten; a lock on a folder.
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
from pathlib import Path, PurePosixPath

HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
TEMPORARY = re.compile(rf"\.vlsm-{HOST}-(\d+)-.*\.tmp")
LEDGER = ".vlsm-written"  # in a folder: a line for each file that this program wrote there, digest and name
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
    """Return a path beside `path` whose name says which process of which machine it belongs to."""
    short = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    return path.with_name(f".vlsm-{HOST}-{os.getpid()}-{short}.tmp")


def sweep_temporary(folder):
    """Remove the temporary files and folders in a folder whose processes, of this machine, are gone."""
    for path in Path(folder).glob(".vlsm-*.tmp"):
        owner = TEMPORARY.fullmatch(path.name)
        if owner and not _is_alive(int(owner[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def reserve(path, nbytes, offset=0):
    """Lengthen a file by `nbytes` that are its own on the disk already: a mapped write cannot fail later.

    Raises OSError where there is no room.
    """
    with open(path, "r+b") as file:
        if not hasattr(os, "posix_fallocate"):
            file.truncate(offset + nbytes)
        elif nbytes:
            try:
                os.posix_fallocate(file.fileno(), offset, nbytes)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error


# What may be overwritten


def check_targets(targets, inputs=(), overwrite=False):
    """Refuse to write over a user's files, before any work is done.

    targets: paths to be written. inputs: paths that are read. overwrite: replace files that this program did
    not write, too; inputs never. Raises FileExistsError, ValueError for two targets of one name.
    """
    targets = [Path(t) for t in targets]
    twice = next((t for t in targets if len(targets) > len(set(targets)) and targets.count(t) > 1), None)
    if twice:
        raise ValueError(f"Several pictures would be written to '{twice}': rename those with equal stems.")
    read = {os.path.realpath(i) for i in inputs if isinstance(i, (str, Path))}
    for target in targets:
        if os.path.realpath(target) in read:
            raise FileExistsError(f"'{target}' is itself read, so it is not written to. Name another folder.")
    if overwrite:
        return
    ledgers = {folder: _ledger(folder) for folder in {t.parent for t in targets}}
    foreign = [t for t in targets if os.path.lexists(t) and not is_own(t, ledgers[t.parent])]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise FileExistsError(
            f"'{foreign[0]}'{more} exists, and was not written by this program, or was changed since. Name "
            "another place, or pass --overwrite."
        )


def _ledger(folder):
    """Return the lines of a folder's ledger."""
    file = folder / LEDGER
    return set(file.read_text("utf-8", "surrogateescape").splitlines()) if file.is_file() else set()


def is_own(path, ledger):
    """Tell whether a file is as this program wrote it, by the lines of its folder's ledger."""
    return not path.is_symlink() and path.is_file() and f"{_digest(path)} {path.name}" in ledger


def _digest(path):
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


@contextmanager
def owned_write(path):
    """Do as `atomic_write`, and note in the folder's ledger that the file is this program's."""
    path = Path(path)
    with atomic_write(path) as temporary:
        yield temporary
        line = f"{_digest(temporary)} {path.name}\n".encode(errors="surrogateescape")
        with open(path.parent / LEDGER, "ab") as ledger:  # short appends of several processes stay whole
            ledger.write(line)


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
        elif path.name == LEDGER or is_own(path, ledger):
            path.unlink()
        else:
            left.append(path)
    if not is_filled(folder):
        folder.rmdir()
    return left


@contextmanager
def locked(folder, what):
    """Hold a folder's lock, which ends with the process at the latest.

    Raises FileExistsError where another process holds it; `what` says what it does then.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: nothing of ours is left there
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"Another process {what} '{folder}' at this moment.") from None
        yield
    finally:
        os.close(handle)


def write_text(path, text, write=owned_write):
    """Write text in UTF-8 (of file names that are none, the bytes escaped), by `write` or `atomic_write`."""
    with write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value, write=owned_write):
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1), write)


def write_csv(path, rows, write=owned_write):
    """Write rows of values, the first of which are the columns' names."""
    write_text(path, csv_text(rows), write)


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
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is not valid JSON ({error}). Was it cut off, or saved as another format?"
        ) from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' should hold {words}, and holds a {type(value).__name__}.")
    return value


def field(source, value, *keys, kind=(int, float), words="a number"):
    """Return what stands under nested keys of a value that was read from `source`.

    Raises ValueError, naming source and keys, where it is missing, of another type or not finite.
    """
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    unsuited = not isinstance(value, kind) or isinstance(value, bool) and kind is not bool
    if unsuited or isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"'{source}': '{'.'.join(keys)}' should be {words}, and is {value!r}.")
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
