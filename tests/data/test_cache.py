"""The decode-once cache: its key is of contents, its pixels have a checksum, and runs share it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from tests.conftest import ROOT
from tests.data.test_data import open_all
from vlsm.data.cache import chunks, open_split
from vlsm.data.records import DataError, Record
from vlsm.system.files import HOST, owned_write
from vlsm.training.frozen_cache import mapped_tensor


def exchange(path, pixels):
    """Replace a picture by another of equal size and time, as unzip and `cp -p` do."""
    stat = path.stat()
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


@pytest.fixture
def records(tmp_path):
    """Four records, whose files have a size that does not depend on their pixels."""
    for part, mode, pixel in (("images", "RGB", (60, 70, 80)), ("masks", "L", 255)):
        (tmp_path / "set" / part).mkdir(parents=True)
        for i in range(4):
            picture = Image.new(mode, (40, 40))
            picture.paste(pixel, (8, 8, 20 + i, 20 + i))
            picture.save(tmp_path / "set" / part / f"{i}.bmp")
    root = tmp_path / "set"
    return [
        Record(f"{i}.bmp", f"{i}.bmp", root / f"images/{i}.bmp", root / f"masks/{i}.bmp") for i in range(4)
    ]


def test_cache_is_used_and_made_anew_when_broken_or_stale(folder, tmp_path):
    found, cache = datasets.records(str(folder), "train"), tmp_path / "cache"
    first = open_split(found, 32, cache, "disks train")
    (file,) = cache.iterdir()
    assert isinstance(first.images, np.memmap)
    pixels, masks, checksum = first.images.copy(), first.masks.copy(), first.checksum
    written = file.stat().st_ino
    os.utime(found[1].image, ns=(1, 1))  # touched, and of the same content
    again = open_split(found, 32, cache, "disks train")
    assert file.stat().st_ino == written and again.checksum == checksum, "read, not written"
    whole = file.read_bytes()
    for broken in (whole[:-1], b"", whole[:-9000] + bytes([whole[-9000] ^ 1]) + whole[-8999:]):
        file.unlink()
        file.write_bytes(broken)
        written = file.stat().st_ino
        again = open_split(found, 32, cache, "disks train")
        assert (again.images == pixels).all() and (again.masks == masks).all()
        assert file.read_bytes() == whole and file.stat().st_ino != written
    del first, again
    Image.new("RGB", (60, 44), (9, 9, 9)).save(found[0].image)
    changed = open_split(found, 32, cache, "disks train")
    assert (changed.images[0] == 9).all() and changed.checksum != checksum
    assert not file.exists() and len(list(cache.iterdir())) == 1, "the stale file is gone"


@pytest.mark.parametrize("content", ["image", "mask"])
def test_files_exchanged_with_equal_size_and_time_are_seen(records, tmp_path, content):
    before = open_split(records, 40, tmp_path / "cache", "x").batch([2])
    path = Path(getattr(records[2], content))
    exchange(path, 255 - np.asarray(Image.open(path)))
    after = open_split(records, 40, tmp_path / "cache", "x").batch([2])
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [content == "mask", content == "image"]


def test_a_missing_file_is_told_in_place_of_its_cached_pixels(records, tmp_path):
    open_split(records, 40, tmp_path / "cache", "x")
    Path(records[1].image).unlink()
    with pytest.raises(DataError, match="image without file: 1.bmp"):
        open_split(records, 40, tmp_path / "cache", "x")


def test_what_was_read_is_not_replaced_though_it_came_from_the_cache(records, tmp_path, monkeypatch):
    open_split(records, 40, tmp_path / "cache", "x")
    monkeypatch.setattr("vlsm.system.files._inputs", set())
    open_split(records, 40, tmp_path / "cache", "x")
    (tmp_path / "link.bmp").symlink_to(records[0].mask)
    with pytest.raises(FileExistsError, match="is itself read"), owned_write(tmp_path / "link.bmp"):
        raise AssertionError


def test_files_in_use_stay_and_others_go(records, tmp_path):
    cache = tmp_path / "cache"
    held = open_split(records, 40, cache, "x")  # the one that wrote it
    (file,) = cache.iterdir()
    reader = open_split(records, 40, cache, "x")
    del held
    old = cache / f"{file.name[: file.name.rindex('-')]}-0123.images.npy"  # of an earlier format
    old.touch()
    part = open_split(records[:2], 40, cache, "x")
    assert file.exists() and not old.exists() and len(list(cache.iterdir())) == 2
    del reader
    other = open_split(records[1:], 40, cache, "x")
    assert not file.exists() and len(list(cache.iterdir())) == 2
    before = part.images.copy(), other.images.copy()
    shutil.rmtree(cache)
    assert (part.images == before[0]).all() and (other.images == before[1]).all()
    again = open_split(records[:2], 40, cache, "x")
    assert (again.images == before[0]).all()


def test_a_filled_cache_folder_may_be_read_only(records, tmp_path, monkeypatch):
    open_split(records, 40, tmp_path / "cache", "x")
    monkeypatch.setattr("vlsm.data.cache.atomic_write", None)
    monkeypatch.setattr("vlsm.data.cache._delete_unused", None)
    assert len(open_split(records, 40, tmp_path / "cache", "x")) == 4


SHARE = """
import random, sys
import numpy as np
from pathlib import Path
from vlsm.data.cache import chunks, open_split
from vlsm.data.records import Record
root = Path(sys.argv[1])
for k in range(int(sys.argv[2])):
    names = [f"{i}.bmp" for i in range(random.choice([1, 2, 3, 4]))]
    records = [Record(name, name, root / "images" / name, root / "masks" / name) for name in names]
    split = open_split(records, 40, root / "cache", "x")
    assert (split.masks.sum((1, 2)) == [(12 + i) ** 2 for i in range(len(names))]).all()
"""


@pytest.mark.slow
def test_processes_share_a_cache_folder(records, tmp_path):
    command = [sys.executable, "-c", SHARE, tmp_path / "set", "600"]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [subprocess.Popen(command, cwd=ROOT, **streams) for _ in range(3)]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0 and not said, said


def test_cache_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="cannot be written .* --cache-dir"):
        open_all(folder, ["val"], cache_dir=tmp_path / "file")


def test_cache_in_parallel_equals_one_thread(folder, monkeypatch):
    found, splits = datasets.records(str(folder), "train"), []
    for threads in (1, 4):
        monkeypatch.setattr("vlsm.data.cache.READERS", threads)
        splits.append(open_split(found, 32, None, "x"))
    one, four = splits
    assert (one.images == four.images).all() and (one.masks == four.masks).all()
    found[3].image = folder / "nothing.png"
    with pytest.raises(DataError, match="image without file: d3.png"):
        open_split(found, 32, None, "x")


def test_activations_leave_no_file_and_a_killed_process_s_is_swept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".vlsm-{HOST}-{gone.pid}-0123.tmp"
    left.touch()
    first, second = (mapped_tensor((2, 3), torch.float32, tmp_path) for _ in range(2))
    first.fill_(1)
    assert second.shape == (2, 3) and not second.any(), "two files, though of one name one after the other"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "count, size, lengths",
    [(0, 4, []), (1, 4, [1]), (5, 4, [5]), (6, 4, [4, 2]), (8, 4, [4, 4]), (9, 4, [4, 5]), (3, 1, [1, 1, 1])],
)
def test_no_batch_ends_with_a_single_image(count, size, lengths):
    parts = chunks(list(range(count)), size)
    assert [len(part) for part in parts] == lengths and sum(parts, []) == list(range(count))
    assert [len(part) for part in chunks(range(count), size)] == lengths
