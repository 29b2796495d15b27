"""The command line: errors as sentences, output of the first process alone, progress bars, leaving on a
signal.
"""

import errno
import os
import signal
import sys
from contextlib import contextmanager

from tqdm import tqdm


def process_rank():
    """Return this process's rank, as torchrun has put it into the environment; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def say(*lines, **options):
    """Print, in the first process alone; flushed, so that a log file shows it at once."""
    if not process_rank():
        print(*lines, flush=True, **options)


@contextmanager
def friendly_errors():
    """Turn a user's mistake into a sentence on stderr and exit code 2.

    With VLSM_TRACEBACK=1 in the environment the traceback comes instead.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        message = _sentence(error)
        if message is None or os.environ.get("VLSM_TRACEBACK"):
            raise
        who = f"process {process_rank()}: " if process_rank() else ""
        print(f"{who}error: {message}", file=sys.stderr)
        sys.exit(2)


def _sentence(error):
    """Return what to tell the user of an error, or None for one that is no user's mistake."""
    if isinstance(error, (ValueError, FileNotFoundError, FileExistsError, PermissionError)):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "while writing"
        return (
            f"No space is left on the disk ({where}). What was written before is whole; "
            "free some space and use --resume."
        )
    return None


def progress(work, what, unit="img"):
    """Return a progress bar over an iterable, or over a number of things to `update`.

    There is none where stderr is no terminal, nor in any process but the first.
    """
    size = dict(total=work) if work is None or isinstance(work, int) else dict(iterable=work)
    hidden = bool(process_rank()) or not sys.stderr.isatty()
    return tqdm(**size, desc=what, unit=unit, leave=False, disable=hidden, dynamic_ncols=True)


class Interrupt:
    """A context in which Ctrl-C and SIGTERM are noted, and acted on by `leave`; a second Ctrl-C stops at
    once.
    """

    def __enter__(self):
        self.signal = None
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
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
