"""Raw downloads, imitated file by file: what is read, written and skipped; splits; published annotation files; the look at a data set."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import datasets
from tests.raw.layouts import LAYOUTS, Layout
from tests.raw.test_formats import strips
from vlsm.data.images import read_image, read_mask
from vlsm.raw.prepare import draw_splits
from vlsm.results import figures

RECORDS = dict(
    kvasir=(8, 1, 1),
    clinicdb=(8, 1, 1),
    bkai=(8, 1, 1),
    isic=(9, 1, 3),
    dfu=(8, 1, 1),
    camus=(9 * 6, 1 * 6, 2 * 6),
    busi=(8, 1, 1),
    chexlocalize=(24, 8, 8),
    cvc300=(0, 0, 3),
    colondb=(0, 0, 3),
    etis=(0, 0, 3),
    cityscapes=(27, 3, 9),
    voc=(18, 2, 6),
)


@pytest.fixture
def prepared(cli, tmp_path):
    """Imitate a download, prepare it; (layout, data set's folder, what was said)."""

    def make(name, *more, zipped=False, spoil=lambda layout: None):
        layout = Layout()
        LAYOUTS[name](layout)
        spoil(layout)
        source = layout.zip(tmp_path / "raw.zip") if zipped else layout.write(tmp_path / "raw")
        code, said, err = cli(
            "datasets", "--prepare", name, "--src", source, "--data-root", tmp_path / "data", *more
        )
        assert code == 0, err
        return layout, tmp_path / "data" / datasets.DATASETS[name].folder, said

    return make


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_download_becomes_a_data_set(prepared, tmp_path, name, zipped):
    layout, root, said = prepared(name, zipped=zipped)
    masks = {p.relative_to(root / "masks").as_posix(): read_mask(p) for p in (root / "masks").rglob("*.png")}
    assert masks.keys() == layout.truth.keys()
    for file, truth in layout.truth.items():
        assert (masks[file] == truth).all(), file
    parts = datasets.read_splits(name, tmp_path / "data")
    found = {part: datasets.records(name, part, tmp_path / "data") for part in parts}
    assert tuple(len(found.get(part, ())) for part in ("train", "val", "test")) == RECORDS[name]
    assert f"{len(layout.truth)} masks" in said and "0 unchanged" in said and "(made here)" in said
    for part in parts:
        assert all(r.prompts["p0"] == "" and r.class_word for r in found[part])
        datasets.open_dataset(name, [part], 32, tmp_path / "data", prompts="class")
    if name in ("kvasir", "chexlocalize", "cityscapes"):  # byte for byte
        source = next(
            data
            for file, data in layout.files.items()
            if "mages" in file or "CheXpert/" in file or "leftImg8bit/" in file
        )
        assert any(p.read_bytes() == source for p in (root / "images").iterdir())


def test_again_writes_nothing_and_the_source_stays(prepared, tmp_path):
    _, root, said = prepared("busi")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path).rglob("*") if p.is_file()}
    _, _, again = prepared("busi", spoil=lambda x: None)
    source = tmp_path / "raw"
    changed = [p for p, t in stamps.items() if p.stat().st_mtime_ns != t and source not in p.parents]
    assert not changed and " 0 written, 23 unchanged" in again


def test_what_is_skipped_is_said(prepared):
    def spoil(x):
        del x.files["Kvasir-SEG/masks/cju3.jpg"]
        x.files["Kvasir-SEG/images/cju4.jpg"] = x.files["Kvasir-SEG/images/cju4.jpg"][:300]
        x.picture("Kvasir-SEG/images/cju5.jpg", np.zeros((9, 9, 3), np.uint8))

    layout, root, said = prepared("kvasir", spoil=spoil)
    assert "7 images and 7 masks" in said
    assert "skipped, image without mask: 1 (Kvasir-SEG/images/cju3.jpg)" in said
    assert "image and mask differ in size, (9, 9) and (20, 28)" in said and "skipped, unusable (" in said
    assert not (root / "masks" / "cju4.png").exists()


@pytest.mark.parametrize(
    "name, file, records",
    [
        ("kvasir", "Kvasir-SEG/masks/cju2.jpg", 9),
        ("bkai", "train_gt/train_gt/2a.png", 9),
        ("isic", "ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_Te0001_Segmentation.png", 12),
        ("cvc300", "TestDataset/CVC-300/masks/1.png", 2),
        ("busi", "Dataset_BUSI_with_GT/benign/benign (2)_mask_1.png", 9),
        ("camus", "training/patient0002/patient0002_2CH_ED.zraw", 69),
        ("camus", "training/patient0003/patient0003_4CH_ES_gt.mhd", 69),
        ("cityscapes", "gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png", 36),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000003.png", 24),
    ],
)
def test_a_damaged_mask_costs_its_own_records_alone(prepared, name, file, records):
    def spoil(x):
        x.files[file] = x.files[file][: len(x.files[file]) // 2]

    _, _, said = prepared(name, spoil=spoil)
    assert f"and {records} masks from" in said and "skipped, unusable (" in said


def test_splits_keep_patients_together(prepared, tmp_path):
    for name, key in (
        ("camus", lambda r: r.name.split("_")[0]),
        ("chexlocalize", lambda r: r.name.split("_")[0]),
    ):
        prepared(name)
        of = {
            part: {key(r) for r in datasets.records(name, part, tmp_path / "data")}
            for part in ("train", "val")
        }
        assert not of["train"] & of["val"]


@pytest.mark.parametrize(
    "name, count, want",
    [("kvasir", 1000, (800, 100, 100)), ("clinicdb", 612, (490, 61, 61)), ("busi", 780, (624, 78, 78))],
)
def test_splits_have_the_published_sizes(name, count, want):
    entries = [dict(split=None, group=str(i)) for i in range(count)]
    found = draw_splits(name, entries)
    assert tuple(len(found[part]) for part in ("train", "val", "test")) == want
    assert {e["group"] for rows in found.values() for e in rows} == {str(i) for i in range(count)}
    assert draw_splits(name, entries[::-1])["val"] == found["val"]


def test_prompts_and_descriptions(prepared, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(["an abnormal growth", "a lump"]))
    prepared("kvasir", "--describe", tmp_path / "d.json")
    record = datasets.records("kvasir", "train", tmp_path / "data")[0]
    assert (
        record.prompts["p7"] == ["polyp which is an abnormal growth", "polyp which is a lump"]
        and len(record.prompts) == 10
    )
    assert record.prompts["p6"].startswith("one ") and "located in" in record.prompts["p6"]


def test_published_annotations(prepared, cli, tmp_path):
    """They are used as they are; records without a file are an error."""
    anns = tmp_path / "medvlsm" / "kvasir_polyp"
    anns.mkdir(parents=True)
    for part, ids in (("train", range(7)), ("val", [7]), ("test", [8])):
        rows = [
            dict(img_name=f"cju{i}.jpg", mask_name=f"cju{i}.jpg", prompts=dict(p0="", p1="polyp"), cat=0)
            for i in ids
        ]
        (anns / f"{part}.json").write_text(json.dumps(rows, indent=2))
    _, root, said = prepared("kvasir", "--anns", tmp_path / "medvlsm")
    assert "7 train, 1 val, 1 test (published)" in said
    assert (root / "anns" / "train.json").read_bytes() == (anns / "train.json").read_bytes()
    datasets.open_dataset("kvasir", ["train", "val", "test"], 32, tmp_path / "data")
    (anns / "val.json").write_text(json.dumps([dict(img_name="x.jpg", mask_name="x.jpg", prompts={})]))
    code, _, err = cli(
        "datasets",
        "--prepare",
        "kvasir",
        "--src",
        tmp_path / "raw",
        "--data-root",
        tmp_path / "data",
        "--anns",
        anns,
    )
    assert code == 2 and "1 of the published records have no image or mask in the download: x.jpg" in err


def test_mistakes(cli, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "readme.txt").write_text("x")
    for argv, message in (
        (["--prepare", "kvasirr", "--src", "x"], "Choose one of: kvasir, clinicdb"),
        (["--prepare", "kvasir"], "--src DOWNLOAD"),
        (["--prepare", "kvasir", "--src", tmp_path / "none.zip"], "is neither a folder nor a zip archive"),
        (["--prepare", "kvasir", "--src", tmp_path / "raw"], "does not look like kvasir's download"),
        (
            ["--prepare", "kvasir", "--src", tmp_path / "raw", "--data-root", tmp_path / "raw"],
            "where nothing is written",
        ),
        (["--check", tmp_path / "raw"], "should hold images/ and masks/"),
    ):
        code, _, err = cli("datasets", *argv)
        assert code == 2 and message in err and "Traceback" not in err, err
    assert [p.name for p in (tmp_path / "raw").iterdir()] == ["readme.txt"]


def test_clinicdb_as_tiffs_that_pillow_refuses(prepared, tmp_path):
    """Two entries of BitsPerSample for three channels: Pillow gives up, the strips are plain."""
    pictures = {}

    def spoil(x):
        for name in [n for n in x.files if n.startswith("CVC-ClinicDB/PNG/")]:
            pixels = np.asarray(Image.open(io.BytesIO(x.files.pop(name))).convert("RGB"))
            odd = strips(np.ascontiguousarray(pixels), bits=(8, 8))
            with pytest.raises((OSError, KeyError, SyntaxError)):
                Image.open(io.BytesIO(odd)).load()
            x.files[name.replace("/PNG/", "/TIF/").replace(".png", ".tif")] = odd
            pictures[name] = pixels

    layout, root, _ = prepared("clinicdb", spoil=spoil)
    for name, pixels in pictures.items():
        if "Original" in name:
            assert (read_image(root / "images" / name.rsplit("/", 1)[1]) == pixels).all()
    assert all((read_mask(root / "masks" / n) == m).all() for n, m in layout.truth.items())


def test_names_in_a_download_cannot_leave_the_folder(cli, tmp_path):
    layout = Layout()
    LAYOUTS["chexlocalize"](layout)
    file = "CheXlocalize/gt_segmentations_val.json"
    found = json.loads(layout.files[file])
    first = next(iter(found.values()))
    first["../../../escaped"] = first["Edema"]
    first["Cut"] = dict(first["Edema"], counts="04")
    layout.files[file] = json.dumps(found).encode()
    code, said, err = cli(
        "datasets",
        "--prepare",
        "chexlocalize",
        "--src",
        layout.write(tmp_path / "raw"),
        "--data-root",
        tmp_path / "data",
    )
    assert (
        code == 0
        and "leaves the data set's folder" in said
        and "run lengths that do not fill 28 x 20 pixels" in said
    ), err
    assert not list(tmp_path.glob("*escaped*")) and not list((tmp_path / "data").rglob("*escaped*"))


def test_the_look_at_a_data_set(prepared, cli, tmp_path):
    _, root, _ = prepared("busi")
    train = json.loads((root / "anns" / "train.json").read_text())
    val = json.loads((root / "anns" / "val.json").read_text())
    test = json.loads((root / "anns" / "test.json").read_text())
    (root / "images" / test[0]["img_name"]).write_bytes((root / "images" / train[0]["img_name"]).read_bytes())
    (root / "images" / train[2]["img_name"]).write_bytes(b"x")
    nearly = read_image(root / "images" / train[1]["img_name"]).copy()
    nearly[:2, :2] ^= 8
    Image.fromarray(nearly).save(root / "images" / val[0]["img_name"])
    out = tmp_path / "sheet.png"
    code, said, err = cli("datasets", "--check", "busi", "--data-root", tmp_path / "data", "--out", out)
    assert code == 0, err
    assert max(map(len, said.splitlines()[:-2])) <= 80
    lines = said.splitlines()
    said = " ".join(said.split())
    assert (
        "busi train: records 8, images 8" in said and "28 x 20 (7)" in said and "prompts: p0, p1, p2" in said
    )
    equal = f"({train[0]['img_name']} = {test[0]['img_name']})"
    assert f"WARNING: images both in train and in test: 1 {equal}" in said
    similar = f"({val[0]['img_name']} ~ {train[1]['img_name']})"
    assert f"NOTE: images in val that look nearly like one in train: 1 of 1 {similar}" in said
    assert said.count("NOTE") == 1  # an equal image has its warning
    assert f"UNUSABLE: 1 ({train[2]['img_name']}" in said
    empty = sum(int(line.split(":")[1]) for line in lines if "empty masks" in line)
    width = round(200 * (figures.GAP + 2 * (figures.CELL + figures.GAP)))
    assert empty in (0, 1) and Image.open(out).width == width
    pairs = np.asarray(Image.open(tmp_path / "sheet-pairs.png").convert("RGB")).astype(int)
    top = round(200 * figures.GAP) + 40  # pixels, within the pair of images
    left, right = pairs[top + 40 : top + 200, 30:430], pairs[top + 40 : top + 200, 486:886]
    assert pairs.shape[1] == width and np.abs(left - right).mean() < 3 and left.std() > 10
    assert cli("datasets", "--check", "demo", "--out", out)[0] == 0
