"""Disks that are full or cannot be written, processes that died: sentences, and nothing left behind."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT
from vlsm.checkpoint import save_state
from vlsm.system import files
from vlsm.system.console import friendly_errors


def test_temporary_files_of_the_dead_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".vlsm-{files.HOST}-{pid}-ab.tmp" for pid in (dead.pid, os.getpid())]
    for name in names:
        (tmp_path / name).touch()
    files.sweep_temporary(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == names[1:]


def test_a_full_disk_is_a_sentence(tmp_path):
    """On a real small file system, where one may be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (small / "x").write_bytes(b"before")
        with pytest.raises(OSError, match="No space left"):
            files.reserve(small / "x", 4 << 20)
        for save in (
            lambda file: save_file({"a": torch.zeros(1 << 20)}, file),
            lambda file: file.write_bytes(bytes(1 << 22)),
        ):
            with pytest.raises(OSError) as caught, files.atomic_write(small / "y"):
                with files.atomic_write(small / "z") as temporary:
                    save(temporary)
            assert caught.value.errno == 28 and caught.value.filename == str(small / "z")
            assert not list(small.glob(".*.tmp"))
        with pytest.raises(OSError) as caught:
            save_state(small / "state.pt", {"a": torch.zeros(1 << 20)})
        assert caught.value.errno == 28 and caught.value.filename == str(small / "state.pt")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda d: files.write_text(d / ("n" * 300), "x"), "name is too long"),
        (lambda d: files.write_text(d / "file" / "x", "x"), "a file has the name of a folder"),
        (
            lambda d: files.write_text(d / "folder", "x", files.atomic_write),
            "a folder has the name of a file",
        ),
    ],
)
def test_the_systems_errors_are_sentences(make, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as left, friendly_errors():
        make(tmp_path)
    assert left.value.code == 2 and said in capsys.readouterr().err.lower()


def test_a_file_system_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "ro").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(tmp_path / "ro")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(SystemExit), friendly_errors():
            files.write_json(tmp_path / "ro" / "x.json", {}, files.atomic_write)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "ro")], check=True)
    assert "read-only" in (err := capsys.readouterr().err) and "ro/x.json" in err


def test_a_pipe_that_closes_and_an_ascii_terminal(tmp_path):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    listing = subprocess.Popen(
        [sys.executable, "datasets.py", "--list"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )
    listing.stdout.close()
    assert listing.stderr.read() == b"" and listing.wait() in (0, 141)
    name = os.fsdecode("nö\udcff".encode("utf-8", "surrogateescape"))
    done = subprocess.run(
        [sys.executable, "datasets.py", "--check", str(tmp_path / name)],
        cwd=ROOT,
        env=env,
        capture_output=True,
    )
    assert done.returncode == 2 and b"nor the path of a folder" in done.stderr and done.stderr.isascii()
