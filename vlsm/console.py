"""What the command line has in common: errors as sentences, progress bars, leaving on a signal without cutting a file off."""

import errno
import os
import signal
import sys
from contextlib import contextmanager

from tqdm import tqdm

from . import parallel


@contextmanager
def speaking():
    """Turn a user's mistake into a sentence on stderr and exit code 2; with VLSM_TRACEBACK=1 the traceback comes too."""
    try:
        yield
        parallel.leave()
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError) as error:
        _leave(str(error))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = error.filename or "while writing"
        _leave(f"No space is left on the disk ({what}). What was written before is whole; free some space and use --resume.")


def progress(work, what, unit="img"):
    """A progress bar over an iterable, or over a number of things to `update`; none where stderr is not a terminal."""
    size = dict(total=work) if isinstance(work, int) else dict(iterable=work)
    return tqdm(**size, desc=what, unit=unit, leave=False, disable=bool(parallel.rank()) or not sys.stderr.isatty(), dynamic_ncols=True)


def _leave(message):
    if os.environ.get("VLSM_TRACEBACK"):
        raise
    print(f"{f'process {parallel.rank()}: ' if parallel.rank() else ''}error: {message}", file=sys.stderr)
    sys.exit(2)


class Interrupt:
    """Ctrl-C and SIGTERM, noted, and acted on by `leave` between two steps; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave(self, message):
        """Exit with 128 + the signal's number (130 for Ctrl-C), if one came."""
        if self.signal:
            print(f"\n{message}", file=sys.stderr)
            sys.exit(128 + self.signal)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
