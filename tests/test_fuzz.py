"""Damaged files end in a result or a sentence; the program that makes them, `tests.fuzz`, sees what does not."""

import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests import fuzz
from tests.conftest import ROOT
from tests.fuzz_inputs import KINDS, OF_A_RUN, Kind, cvat_files, encode, zipped
from tests.fuzz_mutations import VALUES, structure
from vlsm.data.images import ImageError, orientation, read_image, read_labels, read_mask
from vlsm.data.resize import resize_mask
from vlsm.raw.download import Download
from vlsm.raw.formats import cvat
from vlsm.raw.formats.label_maps import checked_class
from vlsm.results.figures import sheet
from vlsm.results.predict import MaskWriter, predict_folder

FILES = sorted(set(KINDS) - set(OF_A_RUN) - {"prepare", "dataset", "base"})


def run_fuzz(tmp_path, count, kinds, seed=28):
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--count",
        count,
        "--seed",
        seed,
        "--out",
        tmp_path / "finds",
    ]
    done = subprocess.run([*map(str, command), "--only", *kinds], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "count, kinds",
    [(60, FILES), (15, ["prepare", "dataset", "base", "state", "checkpoint", "config", "results"])],
    ids=["files", "folders and runs"],
)
def test_mutated_files_end_in_a_result_or_a_sentence(count, kinds, tmp_path):
    run_fuzz(tmp_path, count, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files_and_command_lines(kind, tmp_path):
    run_fuzz(
        tmp_path,
        40 if kind in ("commands", "prepare", "dataset", "base", "state") else 200,
        [kind],
        29,
    )


# The program itself


def test_what_it_finds(monkeypatch):
    monkeypatch.setattr(fuzz, "HANG", 1)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 30)

    def other_error(folder):
        raise KeyError("x")

    def foreign_text(folder):
        int("x")

    def own_sentence(folder):
        raise ValueError("a sentence")

    def busy(folder):
        while True:
            pass

    bad = {
        "KeyError": other_error,
        "ValueError": foreign_text,
        "outside": lambda folder: (folder.parent / "x").write_text("x"),
        "os.remove": lambda folder: (folder.parent / "keep/notes.txt").unlink(),
        "subprocess.Popen": lambda folder: subprocess.run(["true"]),
        "MemoryError": lambda folder: bytearray(3 << 30),
        "no end": busy,
        "code 15": lambda folder: os.kill(os.getpid(), 15),
    }
    reasons = {}
    for name, read in bad.items():
        watch = fuzz.Watch(name, Kind([{"x.png": b"x" * 99}], read), 0)
        watch.run_process(range(2), 1e18)
        reasons[name] = " ".join(watch.finds)
        assert watch.counts["find"] == 1 and watch.next == 1, (name, watch.finds)
    assert "Forbidden open" in reasons.pop("outside")
    for name, reason in reasons.items():
        assert name in reason
    for read in (lambda folder: None, own_sentence):
        watch = fuzz.Watch("x", Kind([{"x.png": b"x" * 99}], read), 0)
        watch.run_process(range(5), 1e18)
        assert not watch.finds and watch.counts.total() == 5 and watch.next == 5


def test_a_case_follows_from_its_number(tmp_path):
    kind = KINDS["png"]()
    one, two, other = (fuzz.make_case(kind, "png", 3, number) for number in (5, 5, 6))
    assert one == two != other
    values = repr(VALUES)
    for seed in range(3000):
        structure(b'{"a": [1, {"b": []}], "c": null}', random.Random(seed))
    assert repr(VALUES) == values
    watch = fuzz.Watch("png", kind, 3)
    watch.add(5, "KeyError", "its traceback")
    watch.write_finds(tmp_path)
    [folder] = tmp_path.iterdir()
    assert (folder / "input/x.png").read_bytes() == one[0]["x.png"]
    assert "--only png --seed 3 --at 5" in (folder / "find.txt").read_text()


# What it found


def tiff_without_rows():
    """A TIFF whose tag of the height is 0."""
    data = bytearray(encode(np.zeros((2, 1), np.uint8), "TIFF"))
    place = data.index((257).to_bytes(2, "little"))
    data[place + 8 : place + 12] = bytes(4)
    return bytes(data)


DAMAGED = {
    "no_rows.tif": (tiff_without_rows(), "it has no pixels"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no image"),
    "header.png": (b"\x89PNG\r\n\x1a\n" + bytes([0, 0, 0, 2]) + b"IHDR\0\0" + bytes(4), ""),
    "maximum.pgm": (b"P5\n2 2\n0\n\0\0\0\0", ""),
    "number.pgm": (b"P2\n2\xff 2\n9\n0 0 0 0", ""),
    "giant.pgm": (b"P5\n65536 65536\n255\n", "megapixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures(name, tmp_path):
    data, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    assert orientation(tmp_path / name) == 1
    for reader in (read_image, read_mask, read_labels):
        with pytest.raises(ImageError, match=f"{name}.*{reason}"):
            reader(tmp_path / name)


@pytest.mark.parametrize("word", ["x\0", "x\ud800", "x\x1b[2J", "a\nb"])
def test_a_class_that_can_name_no_folder(word):
    with pytest.raises(ValueError, match="cannot name a folder"):
        checked_class(word)
    assert checked_class(" Läsion 2 ") == "Läsion 2"


class Nothing:
    """A predictor of 32 pixels whose masks are empty."""

    size = 32

    def logits(self, images, prompts):
        return torch.full((len(prompts), 1, 32, 32), -1.0)


def test_one_damaged_picture_costs_its_own_mask_alone(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tif").write_bytes(tiff_without_rows())
    for name, size in (("b", (8, 8)), ("strip", (10, 20_000)), ("line", (3000, 1))):
        Image.new("RGB", size).save(tmp_path / f"in/{name}.png")
    writer = MaskWriter(["a"], tmp_path / "out", overlays=True)
    count, errors = predict_folder(Nothing(), tmp_path / "in", writer)
    assert count == 3 and len(errors) == 1 and "a.tif" in errors[0]
    for name, size in (("b", (8, 8)), ("strip", (10, 20_000)), ("line", (3000, 1))):
        assert Image.open(tmp_path / f"out/{name}.png").size == size


@pytest.mark.parametrize("shape", [(20_000, 10), (10, 20_000), (1, 3000)])
def test_strips_keep_their_lesion_and_fit_on_a_sheet(shape, tmp_path):
    mask = np.zeros(shape, bool)
    mask[shape[0] // 2, shape[1] // 2] = True
    assert resize_mask(mask, 32).sum() == 1
    image = np.zeros((*shape, 3), np.uint8)
    sheet(
        [([(image, None, ""), (image, mask, "")], "caption", "text")],
        [("a", "#ffffff"), ("b", "#009e73")],
        tmp_path / "s.png",
    )
    width, height = Image.open(tmp_path / "s.png").size
    assert width * height < 2e6


def test_damaged_archives(tmp_path):
    whole = zipped({"a.txt": b"x" * 500, "b.txt": b"y"})
    directory = whole.index(b"PK\1\2")
    (tmp_path / "list.zip").write_bytes(whole[:directory] + b"PK\0\0" + whole[directory + 4 :])
    with pytest.raises(ValueError, match="list.zip' is a damaged zip archive"):
        Download(tmp_path / "list.zip")
    nameless = bytearray(whole)  # the length of the first name becomes that of a comment
    nameless[directory + 28], nameless[directory + 32] = 0, len("a.txt")
    (tmp_path / "name.zip").write_bytes(nameless)
    with pytest.raises(ValueError, match="name.zip' is a damaged zip archive"):
        Download(tmp_path / "name.zip")
    for name, damaged in (("bits", whole[:36] + b"\xff" * 4 + whole[40:]), ("head", b"PX" + whole[2:])):
        (tmp_path / f"{name}.zip").write_bytes(damaged)
        download = Download(tmp_path / f"{name}.zip")
        with pytest.raises(ValueError, match=f"'a.txt' in '.*{name}.zip' cannot be unpacked"):
            download.read("a.txt")
        assert download.read("b.txt") == b"y"


def test_a_locked_archive(tmp_path):
    """Of a member that needs a password zipfile raises RuntimeError."""
    data = bytearray(zipped({"a.txt": b"x"}))
    for place in (6, data.index(b"PK\1\2") + 8):
        data[place] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be unpacked .*password"):
        Download(tmp_path / "locked.zip").read("a.txt")


def test_texts_of_other_encodings_name_their_file(tmp_path):
    files = cvat_files() | {"labelmap.txt": b"polyp\xff:250,50,83::"}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="'labelmap.txt' is no text in UTF-8"):
        list(cvat.read(Download(tmp_path / "x.zip")))
