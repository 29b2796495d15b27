"""Downloads that are damaged, mixed or hostile; and real files, where `../shared/data/real_samples` has them."""

import json
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.raw.layouts import LAYOUTS, Layout
from vlsm.data.images import NeedsPackage, read_mask
from vlsm.raw import download
from vlsm.raw.prepare import prepare
from vlsm.system.files import HOST

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "real_samples"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def kvasir(count=6):
    x = Layout()
    for i in range(count):
        x.picture(f"Kvasir-SEG/images/{i}.png")
        x.truth[f"{i}.png"] = x.mask(f"Kvasir-SEG/masks/{i}.png")
    return x


def written(root):
    return sorted(p.relative_to(root).as_posix() for p in Path(root).rglob("*") if p.is_file())


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples are not here")
def test_real_files(tmp_path, capsys):
    prepare("kvasir", SAMPLES / "kvasir", tmp_path / "kvasir")
    for file in (tmp_path / "kvasir" / "masks").glob("*.png"):  # JPEG masks with noise at both ends
        levels = np.asarray(
            Image.open(SAMPLES / "kvasir" / "Kvasir-SEG" / "masks" / file.with_suffix(".jpg").name)
        )
        assert (read_mask(file) == (levels.max(2) > 127)).all() and 0 < read_mask(file).mean() < 1
    prepare("busi", SAMPLES / "busi", tmp_path / "busi")
    said = capsys.readouterr().out
    assert "skipped, masks of different size: 1 (Dataset_BUSI_with_GT/benign/benign (4).png)" in said
    masks = {file.name: read_mask(file) for file in (tmp_path / "busi" / "masks").glob("*.png")}
    assert sorted(masks) == ["14_malignant.png", "15_benign.png", "25_benign.png", "46_normal.png"]
    assert not masks["46_normal.png"].any()
    source = SAMPLES / "busi" / "Dataset_BUSI_with_GT" / "benign"
    parts = [read_mask(source / f"benign (25)_mask{k}.png") for k in ("", "_1")]
    assert (masks["25_benign.png"] == parts[0] | parts[1]).all() and parts[0].any() and parts[1].any()
    records = [r for f in (tmp_path / "busi" / "anns").glob("*.json") for r in json.loads(f.read_text())]
    words = {word for r in records for p in r["prompts"].values() for word in p.split()}
    assert not words & {"brown", "purple", "gray", "white", "black"}


def claims_too_much(path):
    """A TIFF whose one strip says that it holds 99 GB."""
    tags = [(256, 4, 1, 9000), (257, 4, 1, 9000), (258, 3, 1, 8), (259, 3, 1, 32773), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (278, 4, 1, 9000), (279, 16, 1, 200)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + body + bytes(64) + struct.pack("<Q", 99 << 30))


def test_a_tiff_that_claims_too_much(tmp_path):
    claims_too_much(tmp_path / "big.tif")
    with pytest.raises(download.ImageError, match="big.tif"):
        read_mask(tmp_path / "big.tif")


def change(archive, local, central, name):
    """Change bytes in both headers of a file in a zip archive: {offset: value} each."""
    data = bytearray(archive.read_bytes())
    for signature, at, fields in ((b"PK\3\4", 30, local), (b"PK\1\2", 46, central)):
        start = 0
        while (start := data.find(signature, start)) >= 0:
            if data[start + at : start + at + len(name)] == name.encode():
                for offset, value in fields.items():
                    data[start + offset] = value
            start += 4
    archive.write_bytes(data)


@pytest.mark.parametrize("kind", ["encrypted", "Deflate64", "damaged", "bomb", "pointer"])
def test_one_bad_file_of_an_archive_costs_its_own_record(kind, tmp_path, capsys, monkeypatch):
    x, name = kvasir(), "Kvasir-SEG/images/3.png"
    if kind == "pointer":
        x.files[name] = POINTER
    archive = x.zip(tmp_path / "d.zip")
    said = {"encrypted": "password", "Deflate64": "compression", "damaged": "", "pointer": "git LFS"}
    if kind == "encrypted":
        change(archive, {6: 1}, {8: 1}, name)
    elif kind == "Deflate64":
        change(archive, {8: 9}, {10: 9}, name)
    elif kind == "damaged":
        with zipfile.ZipFile(archive) as file:
            at = file.getinfo(name).header_offset + 30 + len(name) + 50
        data = bytearray(archive.read_bytes())
        data[at : at + 100] = bytes(100)
        archive.write_bytes(data)
    elif kind == "bomb":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for n, data in x.files.items():
                file.writestr(n, bytes(5 << 20) if n == name else data)
        assert archive.stat().st_size < 100_000
        monkeypatch.setattr(download, "LIMIT", 1 << 20)
    prepare("kvasir", archive, tmp_path / "out")
    out = capsys.readouterr().out
    assert "5 images and 5 masks" in out and "3.png)" in out and said.get(kind, "more than") in out
    assert not (tmp_path / "out" / "masks" / "3.png").exists()


def test_a_download_of_pointers_is_told_so(tmp_path):
    x = kvasir(3)
    x.files = dict.fromkeys(x.files, POINTER)
    with pytest.raises(ValueError, match="(?s)does not look like.*git lfs pull"):
        prepare("kvasir", x.write(tmp_path / "d"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_are_paired_within_one_place(tmp_path):
    x = Layout()
    for place in "ab":
        for i in range(3):
            x.picture(f"{place}/images/{i}.png")
            x.truth[place, i] = x.mask(f"{place}/masks/{i}.png")
    x.write(tmp_path / "d")
    with pytest.raises(ValueError, match="'d/a', 'd/b'.*Name one of them"):
        prepare("kvasir", tmp_path / "d", tmp_path / "out")
    prepare("kvasir", tmp_path / "d" / "b", tmp_path / "out")
    for i in range(3):
        assert (read_mask(tmp_path / "out" / "masks" / f"{i}.png") == x.truth["b", i]).all()
    x = Layout()  # a picture here, its namesake's mask there: no pair
    x.picture("a/images/0.png")
    x.mask("b/masks/0.png")
    with pytest.raises(ValueError, match="image without mask"):
        prepare("kvasir", x.write(tmp_path / "e"), tmp_path / "none")


def test_equal_pictures_stay_on_one_side(tmp_path):
    x = kvasir(40)
    for i in range(0, 40, 2):
        x.files[f"Kvasir-SEG/images/{i + 1}.png"] = x.files[f"Kvasir-SEG/images/{i}.png"]
    splits = prepare("kvasir", x.write(tmp_path / "d"), tmp_path / "out")
    side = {r["img_name"]: part for part, rows in splits.items() for r in rows}
    assert all(side[f"{i}.png"] == side[f"{i + 1}.png"] for i in range(0, 40, 2)) and len(splits) == 3


def test_annotations_left_from_before(tmp_path):
    """A self-made train.json beside published val and test would leak."""
    x, out = kvasir(20), tmp_path / "out"
    source = x.write(tmp_path / "d")
    prepare("kvasir", source, out)
    made = [json.loads((out / "anns" / f"{part}.json").read_text()) for part in ("train", "val", "test")]
    anns = tmp_path / "anns"
    anns.mkdir()
    for part, rows in zip(("val", "test"), ([made[0][0]], [made[0][1]])):
        (anns / f"{part}.json").write_text(json.dumps(rows))
    (out / "anns" / "train.json").write_text(json.dumps(made[0][2:]))  # by hand since: it is not deleted
    before = written(out)
    with pytest.raises(FileExistsError, match="train.json"):
        prepare("kvasir", source, out, anns)
    assert written(out) == before
    prepare("kvasir", source, out, anns, overwrite=True)
    assert not (out / "anns" / "train.json").exists()
    assert json.loads((out / "anns" / "val.json").read_text()) == [made[0][0]]


def test_failed_annotations_write_nothing(tmp_path):
    source = kvasir(4).write(tmp_path / "d")
    (tmp_path / "anns").mkdir()
    row = dict(img_name="none.png", mask_name="none.png", prompts={})
    for rows in ([row], [{}], [3]):
        (tmp_path / "anns" / "train.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="train.json|published records"):
            prepare("kvasir", source, tmp_path / "out", tmp_path / "anns")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".vlsm*"))


@pytest.mark.parametrize("corrected", [False, True])
def test_masks_corrected_by_hand_are_kept(corrected, tmp_path):
    source, out = kvasir(4).write(tmp_path / "d"), tmp_path / "out"
    prepare("kvasir", source, out)
    mask = out / "masks" / "1.png"
    Image.fromarray(np.eye(20, 28, dtype=np.uint8) * 255).save(mask)
    data = mask.read_bytes()
    if corrected:
        with pytest.raises(FileExistsError, match="1.png.*--overwrite"):
            prepare("kvasir", source, out)
        assert mask.read_bytes() == data
    else:
        prepare("kvasir", source, out, overwrite=True)
        assert mask.read_bytes() != data


def test_a_link_into_the_download_is_not_written_through(tmp_path):
    source, out = kvasir(4).write(tmp_path / "d"), tmp_path / "out"
    out.mkdir()
    (out / "anns").symlink_to(source / "Kvasir-SEG")
    before = written(source)
    with pytest.raises(ValueError, match="leads out of"):
        prepare("kvasir", source, out, overwrite=True)
    assert written(source) == before and written(out) == []


def test_etis_as_its_publisher_ships_it(tmp_path):
    truth, root = {}, tmp_path / "d" / "ETIS-LaribPolypDB"
    (root / "Ground Truth").mkdir(parents=True)
    x = Layout()
    for i in (1, 2, 10):
        Image.fromarray(x.rng.integers(0, 256, (20, 28, 3)).astype(np.uint8)).save(root / f"{i}.tif")
        truth[i] = x.blob()
        Image.fromarray(truth[i].astype(np.uint8) * 255).save(root / "Ground Truth" / f"p{i}.tif")
    for source in (root, root.parent):
        splits = prepare("etis", source, tmp_path / f"out-{source.name}")
        assert list(splits) == ["test"] and len(splits["test"]) == 3
        for i, mask in truth.items():
            assert (read_mask(tmp_path / f"out-{source.name}" / "masks" / f"{i}.png") == mask).all()


def test_a_killed_preparation_leaves_nothing_for_long(tmp_path):
    left = tmp_path / f".vlsm-{HOST}-4194305-x.tmp"  # above the largest process number
    left.mkdir()
    (left / "half").write_bytes(b"x")
    foreign = tmp_path / f".vlsm-{HOST}-{os.getppid()}-x.tmp"
    foreign.mkdir()
    prepare("kvasir", kvasir(4).write(tmp_path / "d"), tmp_path / "out")
    assert not left.exists() and foreign.exists()


def test_run_lengths_ask_for_their_reader(tmp_path, monkeypatch):
    layout = Layout()
    LAYOUTS["chexlocalize"](layout)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(NeedsPackage, match="pip install pycocotools"):
        prepare("chexlocalize", layout.write(tmp_path / "raw"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
