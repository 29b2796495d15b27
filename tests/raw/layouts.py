"""Raw downloads, imitated file by file, as their publishers ship them."""

import io
import json
import zipfile
import zlib

import numpy as np
from PIL import Image

from tests.raw.test_formats import counts_string

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
