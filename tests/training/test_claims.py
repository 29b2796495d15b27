"""Claims of runs: one process has each, until it ends however it ends."""

import os
import subprocess
import sys
from contextlib import contextmanager

from tests.conftest import ROOT
from vlsm.training.claims import claim, in_turn, open_claims

HOLD = """
import sys
from pathlib import Path
from vlsm.training.claims import claim, in_turn
folder = Path(sys.argv[1])
if sys.argv[2] == "claim":
    assert claim(folder)
    print("held", flush=True)
    sys.stdin.read()
for _ in range(int(sys.argv[3])):
    with in_turn(folder):
        file = folder / "count"
        count = int(file.read_text()) if file.exists() else 0
        file.write_text(str(count + 1))
"""


def another(folder, *words, **pipes):
    command = [sys.executable, "-c", HOLD, folder, *words]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, **pipes)


def free(folder):
    """Free what this process has claimed in a folder, as its end would."""
    os.close(open_claims(folder))
    open_claims.cache_clear()


@contextmanager
def claimed(run):
    """Let another process claim a run; it is killed at the end."""
    with another(run, "claim", 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.kill()


def test_a_claim_ends_with_its_process(tmp_path):
    group = tmp_path / "group"
    with claimed(group / "seed1"):
        assert not claim(group / "seed1")
        assert claim(group / "seed2") and claim(group / "seed2") and claim(tmp_path / "seed1")
        with in_turn(group):  # a claim is no turn
            pass
    assert claim(group / "seed1")


def test_processes_take_turns(tmp_path):
    """Without turns some of the counts would be lost."""
    processes = [another(tmp_path, "count", 300) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "900"
