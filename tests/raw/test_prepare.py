"""Raw downloads, imitated file by file: what is read, written and skipped; splits; published annotation files; the look at a data set."""

import io
import json
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

import datasets
from tests.raw.test_formats import counts_string, strips
from vlsm.data.images import read_image, read_mask
from vlsm.raw.prepare import split

SHAPE = (20, 28)


class Layout:
    """A download in the making: files by name."""

    def __init__(self, seed=0):
        self.rng, self.files, self.truth = np.random.default_rng(seed), {}, {}

    def picture(self, name, pixels=None):
        """A noisy picture (or these pixels) under a name whose ending says how it is stored."""
        pixels = self.rng.integers(0, 200, (*SHAPE, 3)).astype(np.uint8) if pixels is None else pixels
        data = io.BytesIO()
        kind = dict(jpg="JPEG", jpeg="JPEG", png="PNG")[name.rsplit(".", 1)[1].lower()]
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(data, format=kind)
        self.files[name] = data.getvalue()

    def blob(self):
        """A rectangle somewhere."""
        mask = np.zeros(SHAPE, bool)
        y, x = self.rng.integers(0, 10), self.rng.integers(0, 14)
        mask[y : y + 8, x : x + 10] = True
        return mask

    def mask(self, name):
        mask = self.blob()
        self.picture(name, mask.astype(np.uint8) * 255)
        return mask

    def write(self, root):
        for name, data in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return root

    def zip(self, path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in self.files.items():
                archive.writestr(name, data)
        return path


def kvasir(x):
    for i in range(10):
        x.picture(f"Kvasir-SEG/images/cju{i}.jpg")
        x.truth[f"cju{i}.png"] = x.mask(f"Kvasir-SEG/masks/cju{i}.jpg")
    x.files["Kvasir-SEG/kavsir_bboxes.json"] = b"{}"


def clinicdb(x):
    for i in range(1, 11):
        x.picture(f"CVC-ClinicDB/PNG/Original/{i}.png")
        x.truth[f"{i}.png"] = x.mask(f"CVC-ClinicDB/PNG/Ground Truth/{i}.png")
        x.files[f"CVC-ClinicDB/TIF/Original/{i}.tif"] = x.files[f"CVC-ClinicDB/TIF/Ground Truth/{i}.tif"] = (
            b"II*\0"
        )
    x.files["__MACOSX/CVC-ClinicDB/PNG/Original/._1.png"] = b"x"


def bkai(x):
    for i in range(10):
        x.picture(f"train/train/{i}a.jpeg")
        colours, mask = np.zeros((*SHAPE, 3), np.uint8), x.blob()
        colours[mask] = (255, 0, 0)
        colours[:3, :3] = (0, 255, 0)
        x.picture(
            f"train_gt/train_gt/{i}a.png", colours
        )  # the published files are JPEGs, whose noise the readers stand anyway
        x.truth[f"{i}a.png"] = mask | (np.indices(SHAPE) < 3).all(0)
    x.picture("test/test/z.jpeg")


def isic(x):
    for part, count in (("Training", 10), ("Test", 3)):
        for i in range(count):
            stem = f"ISIC_{part[:2]}{i:04}"
            x.picture(f"ISBI2016_ISIC_Part1_{part}_Data/{stem}.jpg")
            x.truth[f"{stem}_Segmentation.png"] = x.mask(
                f"ISBI2016_ISIC_Part1_{part}_GroundTruth/{stem}_Segmentation.png"
            )


def dfu(x):
    for i in range(10):
        x.picture(f"DFUC2022_train_release/DFUC2022_train_images/10{i}.jpg")
        x.truth[f"10{i}.png"] = x.mask(f"DFUC2022_train_release/DFUC2022_train_masks/10{i}.png")


def busi(x):
    for kind, n in (("benign", 6), ("malignant", 3), ("normal", 1)):
        for i in range(1, n + 1):
            stem = f"Dataset_BUSI_with_GT/{kind}/{kind} ({i})"
            x.picture(f"{stem}.png")
            mask = x.mask(f"{stem}_mask.png") if kind != "normal" else np.zeros(SHAPE, bool)
            if kind == "normal":
                x.picture(f"{stem}_mask.png", mask.astype(np.uint8))
            if i == 2:
                mask = mask | x.mask(f"{stem}_mask_1.png")
            x.truth[f"{i}_{kind}.png"] = mask


def mhd(x, stem, pixels, compressed=False):
    data = pixels.tobytes()
    size = f"{pixels.shape[1]} {pixels.shape[0]} 1"
    kind = {"u1": "MET_UCHAR", "u2": "MET_USHORT"}[pixels.dtype.str[1:]]
    file = stem.rsplit("/", 1)[1] + (".zraw" if compressed else ".raw")
    text = f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = {kind}\nCompressedData = {compressed}\nElementDataFile = {file}\n"
    x.files[f"{stem}.mhd"] = text.encode()
    x.files[f"{stem.rsplit('/', 1)[0]}/{file}"] = zlib.compress(data) if compressed else data


def camus(x):
    for part, patients in (("training", 10), ("testing", 2)):
        for p in range(1, patients + 1):
            for view in ("2CH_ED", "4CH_ES"):
                stem = f"{part}/patient{p:04}/patient{p:04}_{view}"
                labels = x.rng.integers(0, 4, SHAPE).astype(np.uint8)
                mhd(x, stem, x.rng.integers(0, 256, SHAPE).astype(np.uint8), compressed=p == 2)
                mhd(x, f"{stem}_gt", labels)
                below = "test" if part == "testing" else "train"
                x.truth.update(
                    {f"{below}/mask_{k}/patient{p:04}_{view}_gt.png": labels == k for k in (1, 2, 3)}
                )
        mhd(x, f"{part}/patient0001/patient0001_2CH_sequence", np.zeros(SHAPE, np.uint8))


def chexlocalize(x):
    for part in ("val", "test"):
        found = {}
        for p in range(10):
            key = f"patient{part}{p}_study1_view1_frontal".replace("val", "64").replace("test", "65")
            x.picture(f"CheXpert/{part}/{key.replace('_study1_', '/study1/')}.jpg")
            classes = {"Airspace Opacity": x.blob(), "Edema": x.blob(), "Pneumothorax": np.zeros(SHAPE, bool)}
            found[key] = {c: dict(size=list(SHAPE), counts=counts_string(m)) for c, m in classes.items()}
            names = {f"{key}_{c.lower().replace(' ', '_')}.png": m for c, m in classes.items() if m.any()}
            x.truth.update(names)
        found["patient99_study1_view1_frontal"] = found[key]
        x.files[f"CheXlocalize/gt_segmentations_{part}.json"] = json.dumps(found).encode()


def polyps(folder):
    def make(x):
        for i in range(3):
            x.picture(f"TestDataset/{folder}/images/{i}.png")
            x.truth[f"{i}.png"] = x.mask(f"TestDataset/{folder}/masks/{i}.png")
        x.picture("TestDataset/Kvasir/images/9.png")

    return make


def cityscapes(x):
    for part, city, count in (("train", "aachen", 10), ("val", "lindau", 3)):
        for i in range(count):
            stem = f"{city}_{i:06}_000019"
            labels = np.zeros(SHAPE, np.uint8)
            labels[:10], labels[10:, :5], labels[15:, 5:], labels[0, 0] = (
                7,
                26,
                4,
                19,
            )  # road, car, an ignored id, one pixel of a light
            x.picture(f"leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png")
            x.picture(f"gtFine/{part}/{city}/{stem}_gtFine_labelIds.png", labels)
            x.truth.update(
                {f"{w}/{stem}.png": labels == k for k, w in ((7, "road"), (26, "car"), (19, "traffic light"))}
            )


def voc(x):
    root, names = "VOCdevkit/VOC2012", {"train": [], "val": []}
    for i in range(13):
        stem, labels = f"2007_{i:06}", np.zeros(SHAPE, np.uint8)
        labels[2:9, 3:9], labels[12:, 12:], labels[9] = 15, 12, 255  # person, dog, the void border
        page = Image.fromarray(labels, mode=None).convert("P")
        page.putdata(labels.ravel().tolist())
        page.putpalette([(37 * k) % 256 for k in range(768)])
        x.picture(f"{root}/JPEGImages/{stem}.jpg")
        x.picture(f"{root}/SegmentationClass/{stem}.png", page)
        names["train" if i < 10 else "val"].append(stem)
        x.truth.update({f"person/{stem}.png": labels == 15, f"dog/{stem}.png": labels == 12})
    for part, stems in names.items():
        x.files[f"{root}/ImageSets/Segmentation/{part}.txt"] = "\n".join(
            stems + ["2007_999999"] * (part == "val")
        ).encode()


LAYOUTS = dict(
    kvasir=kvasir,
    clinicdb=clinicdb,
    bkai=bkai,
    isic=isic,
    dfu=dfu,
    camus=camus,
    busi=busi,
    chexlocalize=chexlocalize,
    cvc300=polyps("CVC-300"),
    colondb=polyps("CVC-ColonDB"),
    etis=polyps("ETIS-LaribPolypDB"),
    cityscapes=cityscapes,
    voc=voc,
)
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
    parts = datasets.available_splits(name, tmp_path / "data")
    found = {part: datasets.records(name, part, tmp_path / "data") for part in parts}
    assert tuple(len(found.get(part, ())) for part in ("train", "val", "test")) == RECORDS[name]
    assert f"{len(layout.truth)} masks" in said and "0 unchanged" in said and "(made here)" in said
    for part in parts:
        assert all(r.prompts["p0"] == "" and r.class_word for r in found[part])
        datasets.open_dataset(name, [part], 32, tmp_path / "data", None, 0, "class")
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
    found = split(name, entries)
    assert tuple(len(found[part]) for part in ("train", "val", "test")) == want
    assert {e["group"] for rows in found.values() for e in rows} == {str(i) for i in range(count)}
    assert split(name, entries[::-1])["val"] == found["val"]


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
    chexlocalize(layout)
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
        and "run lengths that do not fill 28 x 20 pixels: 1" in said
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
    assert (
        "busi train: 8 records of 8 images" in said
        and "28 x 20 (7)" in said
        and "prompts: p0, p1, p2" in said
    )
    assert (
        f"WARNING: 1 pictures are in train and in test ({train[0]['img_name']} = {test[0]['img_name']})"
        in said
    )
    assert (
        f"NOTE: 1 of 1 pictures in val look nearly like one in train ({val[0]['img_name']} ~ "
        f"{train[1]['img_name']})" in said
    )
    assert said.count("NOTE") == 1  # a picture that is the same has its warning
    assert f"UNREADABLE: 1 ({train[2]['img_name']}" in said
    empty = sum(int(line.split(":")[1]) for line in said.splitlines() if "empty masks" in line)
    assert empty in (0, 1) and Image.open(out).width == 2 * 228 + 8
    assert cli("datasets", "--check", "demo", "--out", out)[0] == 0
