"""Files that survive a crash: each is written under a temporary name, flushed to disk, then renamed.

Also: writing JSON and CSV, the protection of a user's files from being overwritten, a lock on a folder.
Temporary files of processes that died are removed where this program writes.
"""

import csv
import hashlib
import io
import json
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
OURS = ".vlsm-"  # beginning of the names of the ledger and of temporary files
TEMPORARY = re.compile(rf"\{OURS}{HOST}-(\d+)-.*\.tmp")
LEDGER = f"{OURS}written"  # in each folder: digest and name of every file that this program wrote there
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the text of safetensors' errors
_inputs = set()  # real paths of the files that this command has read; they are never replaced
_checked = set()  # real paths of targets that `check_targets` has allowed and nobody has written since
_held = {}  # folder of `locked` -> its open handle


def note_input(path):
    """Note that this command reads a file, which `owned_write` then never replaces; returns the path."""
    _inputs.add(os.path.realpath(path))
    return path


def forget_inputs():
    """Begin a command: what an earlier one in the same process has read may be replaced."""
    _inputs.clear()


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, which then takes the name `path`.

    On any error the temporary file is removed and `path` stays as it was. Missing parent folders are made.
    Raises OSError that names `path`.
    """
    path = Path(path)
    _refuse_moved(path)
    temporary = temporary_beside(path)
    try:
        make_room(path.parent)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        _refuse_moved(path)
        if error.errno and str(error.filename or temporary) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        number = _system_error(error)
        if number:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        if temporary.exists():  # unlink of a missing file fails on a file system that cannot be written
            temporary.unlink()


def _system_error(error):
    """Return the number of the system's error behind that of a writer, or None.

    safetensors tells it in its text, torch.save to a Python file keeps it as the context.
    """
    number = OS_ERROR.search(str(error))
    return int(number[1]) if number else getattr(error.__context__, "errno", None)


def _refuse_moved(path):
    """Raise FileNotFoundError if a locked folder above `path` was renamed or deleted meanwhile."""
    for folder, handle in _held.items():
        if folder in path.absolute().parents:
            if not folder.exists() or not os.path.samestat(os.fstat(handle), os.stat(folder)):
                raise FileNotFoundError(
                    f"The folder '{folder}' was renamed or deleted while it is written to. What was finished "
                    "before is whole; a run goes on from its folder's new name with --resume."
                )


def make_room(folder):
    """Make a folder if it is missing, and remove what dead processes left there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep_temporary(folder)


def temporary_beside(path):
    """Return a path beside `path` whose name holds the machine and the process."""
    short = digest(os.fsencode(path.name), 6)  # the name itself may be too long to be lengthened
    return path.with_name(f"{OURS}{HOST}-{os.getpid()}-{short}.tmp")


@cache
def sweep_temporary(folder):
    """Remove the temporary files in a folder whose processes, of this machine, are gone; once a process."""
    for path in Path(folder).glob(f"{OURS}*.tmp"):
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


def reserve(path, nbytes):
    """Lengthen a file by `nbytes` of reserved disk space, so that writing to mapped memory cannot fail later.

    Raises OSError, which names `path`, if there is no room.
    """
    with open(path, "r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


# What may be overwritten


def check_targets(targets, inputs=(), overwrite=False):
    """Refuse to write over a user's files, before any work is done.

    targets: paths to be written. inputs: paths that are read; they are never replaced. overwrite: replace
    files that this program did not write, or that were changed since. Raises FileExistsError, or ValueError
    for two equal targets.
    """
    for file in inputs:
        if isinstance(file, (str, Path)):
            note_input(file)
    ledger_of = cache(_ledger)
    seen = set()
    foreign = []
    for target in map(Path, targets):
        place = os.path.realpath(target)
        if place in seen:
            raise ValueError(f"Several images would be written to '{target}': rename those with equal stems.")
        seen.add(place)
        _refuse_input(target)
        if not overwrite and os.path.lexists(target) and not _is_own(target, ledger_of(target.parent)):
            foreign.append(target)
    if foreign:
        raise FileExistsError(
            f"'{foreign[0]}' exists, and was not written by this program, or was changed since. Rename it, "
            f"name another place, or pass --overwrite. ({len(foreign)} such files)"
        )
    _checked.update(seen)


def _refuse_input(path):
    """Raise FileExistsError for a file that this command has read."""
    if os.path.realpath(path) in _inputs:
        raise FileExistsError(f"'{path}' is itself read, so it is not written to. Name another place.")


def _ledger_file(folder):
    """Return the path of a folder's ledger. Raises FileExistsError for a link, which is not followed."""
    file = folder / LEDGER
    if file.is_symlink():
        raise FileExistsError(f"'{file}' is a link, and would be written through. Remove it.")
    return file


def _ledger(folder):
    """Return the set of lines of a folder's ledger. Raises as `_ledger_file`."""
    file = _ledger_file(folder)
    if not file.is_file():
        return set()
    return set(file.read_text("utf-8", "surrogateescape").split("\n"))


def _is_own(path, ledger):
    """Tell whether a file is as this program wrote it, by the lines of its folder's ledger."""
    if path.is_symlink() or not path.is_file():
        return False
    return _ledger_line(path, path.name) in ledger


def _ledger_line(path, name):
    """Return the ledger's line on a file's content, under the name that it has or will have."""
    return f"{digest(path.read_bytes())} {name}".replace("\n", "\\n")


@contextmanager
def owned_write(path):
    """Write as `atomic_write` does, and add the file's digest to the folder's ledger.

    Raises as `check_targets` for a path that this has not allowed before.
    """
    path = Path(path)
    place = os.path.realpath(path)
    if place not in _checked:
        check_targets([path])
    _checked.discard(place)
    _refuse_input(path)  # it may have been read since
    with atomic_write(path) as temporary:
        yield temporary
        line = "\n" + _ledger_line(temporary, path.name)  # the line before it may have been cut off
        with open(_ledger_file(path.parent), "ab") as ledger:  # short appends of several processes stay whole
            ledger.write(line.encode(errors="surrogateescape"))


def delete_owned(folder):
    """Delete the files below a folder that are as this program wrote them, and then every empty folder.

    Links are neither followed nor deleted. Returns the paths of all files and links that are left.
    """
    folder = Path(folder)
    if folder.is_symlink():
        return [folder]
    sweep_temporary(folder)
    ledger = _ledger(folder)
    left = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LEDGER, path)):  # the ledger last
        if path.is_dir():
            left += delete_owned(path)
        elif path.name == LEDGER or _is_own(path, ledger):
            path.unlink()
        else:
            left.append(path)
    if not any(folder.iterdir()):
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
    place = folder.absolute()
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"Another process {activity} '{folder}' at this moment.") from None
        _held[place] = handle
        yield
    finally:
        _held.pop(place, None)
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


def refuse_changed(path):
    """Raise FileExistsError for a file that this program wrote and somebody has changed since."""
    ledger = _ledger(path.parent)
    names = {line.partition(" ")[2] for line in ledger}
    if path.name in names and path.exists() and not _is_own(path, ledger):
        raise FileExistsError(
            f"'{path}' was changed since this program wrote it, and would be replaced. Rename the changed "
            "file."
        )


def leaves_folder(name):
    """Tell whether a relative file name leads out of its folder, on any system."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in str(name)


def names_folder(word):
    """Tell whether a word can be the name of a folder."""
    return bool(word) and word.isprintable() and not leaves_folder(word)


def is_filled(folder):
    """Tell whether a path exists and is not a folder without files, but for our temporary ones."""
    folder = Path(folder)
    return folder.exists() and not all(path.name.startswith(OURS) for path in folder.iterdir())
