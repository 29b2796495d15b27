"""Faults injected everywhere: see tests/faults.py, whose program goes through the cases here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="paths of descriptors are read in /proc"
)


def go_through(*options):
    """Run a part of the cases in a process of its own, which forks: there must be no threads."""
    command = [sys.executable, "-m", "tests.faults", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("scenarios", [["train"], ["prepare", "again", "evaluate"]])
def test_every_seventh_call_may_fail_or_be_the_last(scenarios):
    """What a sweep and a group add to a run takes longer."""
    go_through(*scenarios, "--step", 7, "--one", "--part", 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_every_call_may_fail_or_be_the_last(part):
    go_through("--part", part, 2)


@pytest.mark.slow
def test_every_fifth_file_may_refuse_to_be_opened():
    go_through("train", "evaluate", "prepare", "again", "--reads", "--step", 5, "--one")


LAYER = """
import os, sys
from pathlib import Path
from tests.faults import Layer
folder = Path(sys.argv[1])
layer = Layer(folder, int(sys.argv[2]), sys.argv[3])
layer.install()
os.mkdir(folder / "made")
(folder.parent / "elsewhere").write_text("not counted")
os.chdir(folder)
with open(os.pipe()[1], "w") as pipe:
    pipe.write("not counted either")
with open(folder / "made" / "a", "w") as file:
    file.write("12345678")
    os.fsync(file.fileno())
os.replace(folder / "made" / "a", folder / "b")
os.unlink(folder / "b")
os.rmdir(folder / "made")
print(*layer.calls, sep="\\n")
"""


@pytest.mark.parametrize(
    "at, fault, code, left",
    [
        (0, "", 0, []),
        (1, "EACCES", 1, []),
        (3, "short", 1, ["made", "made/a"]),
        (3, "kill", -9, ["made", "made/a"]),
        (5, "EIO", 1, ["made", "made/a"]),
        (6, "full", 0, []),  # deleting needs no room
    ],
)
def test_the_layer_counts_each_call_and_disturbs_one(tmp_path, at, fault, code, left):
    folder = tmp_path / "counted"
    folder.mkdir()
    command = [sys.executable, "-c", LAYER, folder, str(at), fault]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == left
    if left and at == 3:
        assert (folder / "made" / "a").read_text() == "1234", "half of the bytes"
    if not at:
        names = [line.split()[0] for line in done.stdout.splitlines()]
        assert names == ["mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"]
