"""The command line: errors as sentences, output of the first process alone, progress bars, leaving on a
signal.
"""

import errno
import os
import signal
import sys
from contextlib import contextmanager

from tqdm import tqdm

_printed = set()  # keys of `say_once`
# Advice on the system's errors; others keep the system's own words.
ADVICE = {
    errno.ENOSPC: "no space left on the disk: files written before are whole; free some space, and --resume",
    errno.EROFS: "the file system is read-only; name another folder",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.ENOTDIR: "a file has the name of a folder that is needed",
    errno.EEXIST: "a file has the name of a folder that is needed",
    errno.EISDIR: "a folder has the name of a file that is needed",
    errno.EACCES: "permission is denied",
}
ADVICE[errno.EDQUOT] = ADVICE[errno.ENOSPC]


def process_rank():
    """Return this process's rank, as torchrun has put it into the environment; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def say(*lines, **settings):
    """Print, in the first process alone; flushed, so that a log file shows it at once."""
    if not process_rank():
        print(*lines, flush=True, **settings)


def say_once(key, line):
    """Print a line on stderr, once a process for each key."""
    if key not in _printed:
        _printed.add(key)
        print(line, file=sys.stderr, flush=True)


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
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal, or a file name that is no UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as when `head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        if os.environ.get("VLSM_TRACEBACK"):
            raise
        who = f"process {process_rank()}: " if process_rank() else ""
        print(f"{who}error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _sentence(error):
    """Return an error as a sentence for the user."""
    if isinstance(error, OSError) and error.errno:
        advice = ADVICE.get(error.errno, error.strerror or "")
        return advice.capitalize() + (f" ('{error.filename}')." if error.filename else ".")
    return str(error)


def progress(work, label, unit="img"):
    """Return a tqdm progress bar over an iterable, or over a number of steps (None: unknown) to `update`.

    It is hidden if stderr is no terminal, and in every process but the first.
    """
    size = dict(total=work) if work is None or isinstance(work, int) else dict(iterable=work)
    hidden = bool(process_rank()) or not sys.stderr.isatty()
    return tqdm(**size, desc=label, unit=unit, leave=False, disable=hidden, dynamic_ncols=True)


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
            print(f"\n{message}", file=sys.stderr)
            sys.exit(128 + self.signal)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
