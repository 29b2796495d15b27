"""The command line: errors as sentences, output of the first process alone, progress bars, leaving on a
signal.
"""

import errno
import os
import re
import signal
import sys
from contextlib import contextmanager
from difflib import get_close_matches

from tqdm.auto import tqdm

_printed = set()  # keys of `say_once`
LEANER = (
    "Options that need less: a smaller --batch-size; of train.py also --accumulate 4, "
    "--checkpoint-activations, --cache-gb 0."
)
NO_MEMORY = re.compile("MemoryError|out of memory|allocate memory", re.I)  # in an error's name or text
# Characters of names that would move the cursor, colour the terminal or reorder a line; \n and \t stay.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Advice on the system's errors; others keep the system's own words.
ADVICE = {
    errno.ENOSPC: "no space left on the disk: files written before are whole; free some space, and --resume",
    errno.EROFS: "the file system is read-only; name another folder",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.ENOTDIR: "a file has the name of a folder that is needed",
    errno.EEXIST: "a file has the name of a folder that is needed",
    errno.EISDIR: "a folder has the name of a file that is needed",
    errno.EACCES: "permission is denied",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f)",
    errno.EMFILE: "too many files are open (ulimit -n)",
}
ADVICE[errno.EDQUOT] = ADVICE[errno.ENOSPC]


def process_rank():
    """Return this process's rank, as torchrun has put it into the environment; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def printable(text):
    """Return a text with control characters as escapes, such as \\x1b; line breaks and tabs stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def write_line(text, file=None):
    """Print a text above the progress bars, in every process; flushed, so that log files show it at once."""
    file = file or sys.stdout
    tqdm.write(printable(text), file=file)
    file.flush()


def say(text, file=None):
    """Print a text, in the first process alone."""
    if not process_rank():
        write_line(text, file)


def say_once(key, line):
    """Print a line on stderr, once a process for each key."""
    if key not in _printed:
        _printed.add(key)
        write_line(line, sys.stderr)


def did_you_mean(word, names):
    """Return " Did you mean 'NAME'?" for the name that is most like a word; "" if none is."""
    near = get_close_matches(str(word), map(str, names), 1)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_few(texts, most=3):
    """Join the first `most` texts by commas, with dots in place of the others."""
    texts = list(texts)
    dots = ["..."] if len(texts) > most else []
    return ", ".join(texts[:most] + dots)


@contextmanager
def friendly_errors():
    """Turn a user's mistake into a sentence on stderr and exit code 2.

    With VLSM_TRACEBACK=1 in the environment the traceback comes instead.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal, or a file name that is no UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        write_line("\nInterrupted.", sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as when `head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        is_bug = isinstance(error, RuntimeError) and not NO_MEMORY.search(repr(error))
        if is_bug or os.environ.get("VLSM_TRACEBACK"):
            raise
        who = f"process {process_rank()}: " if process_rank() else ""
        write_line(f"{who}error: {_sentence(error)}", sys.stderr)
        sys.exit(2)


def _sentence(error):
    """Return an error as a sentence for the user."""
    if NO_MEMORY.search(repr(error)):
        return f"There is not enough memory ({str(error)[:200]}). End other programs that use it. {LEANER}"
    if isinstance(error, OSError) and error.errno:
        advice = ADVICE.get(error.errno, error.strerror or "")
        return advice.capitalize() + (f" ('{error.filename}')." if error.filename else ".")
    return str(error)


def progress(work, label, unit="img"):
    """Return a tqdm progress bar over an iterable, or over a number of steps to `update`.

    It is hidden in every process but the first, and if stderr is neither a terminal nor a notebook's.
    """
    size = dict(total=work) if isinstance(work, int) else dict(iterable=work)
    hidden = bool(process_rank()) or not ("ipykernel" in sys.modules or sys.stderr.isatty())
    return tqdm(**size, desc=printable(label), unit=unit, leave=False, disable=hidden, dynamic_ncols=True)


class Interrupt:
    """A context in which Ctrl-C and SIGTERM wait for `leave`; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.signal = None  # number of the signal that came
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        """Handle a signal: keep its number, and let the next Ctrl-C stop at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave(self, message):
        """Print the message and exit with 128 + the signal's number (130 for Ctrl-C), if a signal came."""
        if self.signal:
            write_line(f"\n{message}", sys.stderr)
            sys.exit(128 + self.signal)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
