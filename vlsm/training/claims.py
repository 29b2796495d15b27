"""Runs shared out over processes, also of several machines that see the same folder.

A claim is a lock on a byte of one file beside the runs. The system frees it when its process ends, however it
ends: a run that was begun and is free belongs to nobody, and whoever claims it next continues it.
"""

import os
from contextlib import contextmanager
from functools import cache

from vlsm.system.files import OURS, hash_of

try:
    import fcntl
except ImportError:  # Windows has no such locks: a single process there
    fcntl = None

CLAIMS = f"{OURS}claims"  # an empty file in the folder of the runs
TURN = 0  # its byte that `in_turn` locks


@cache
def open_claims(folder):
    """Return the descriptor of a folder's claims. It stays open: closing it would free them."""
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def claim(run):
    """Claim the folder of a run until this process ends; returns False if another process has it."""
    if fcntl:
        byte = 1 + hash_of(run.name) // 4  # below 2^63, the end of the largest file
        try:
            fcntl.lockf(open_claims(run.parent), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except BlockingIOError:
            return False
    return True


@contextmanager
def in_turn(folder):
    """Wait until no other process is in such a block for the same folder."""
    if not fcntl:
        yield
        return
    handle = open_claims(folder)
    fcntl.lockf(handle, fcntl.LOCK_EX, 1, TURN)
    try:
        yield
    finally:
        fcntl.lockf(handle, fcntl.LOCK_UN, 1, TURN)
