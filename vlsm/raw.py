"""Raw downloads as their publishers ship them, folder or zip: a reader for each data set yields its images and masks.

A reader is a function of a `Download` that yields `Sample`s. It never writes; what it cannot use it hands to `skip(name, reason)`.
"""

import gzip
import io
import json
import re
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .tiff import read_tiff

CAMUS = {1: "left ventricular cavity", 2: "myocardium", 3: "left atrium cavity"}
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
MHD_TYPES = {"MET_UCHAR": "u1", "MET_CHAR": "i1", "MET_USHORT": "u2", "MET_SHORT": "i2", "MET_FLOAT": "f4"}


@dataclass
class Sample:
    """An image and its masks.

    name: that of the image's file to be; image: a file of the download, or the pixels; masks: of each the name of its file to be, the
    pixels (bool) and the class in words; split: where the publisher fixes it; group: what a split must not tear apart (a patient);
    below: the folder of its split's files, where the layout has one.
    """

    name: str
    image: object
    masks: list
    split: str | None = None
    group: str | None = None
    below: str = ""


class NeedsPackage(ValueError):
    """A file that only an optional package reads."""


class Download:
    """The files of a folder or of a zip archive, by their paths within it; nothing is ever written there. Raises FileNotFoundError."""

    def __init__(self, path):
        self.path = Path(path).expanduser()
        self.archive, self.skipped = None, defaultdict(list)
        if self.path.is_dir():
            names = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        elif self.path.is_file() and zipfile.is_zipfile(self.path):
            self.archive = zipfile.ZipFile(self.path)
            names = (i.filename for i in self.archive.infolist() if not i.is_dir())
        else:
            raise FileNotFoundError(f"'{self.path}' is neither a folder nor a zip archive. Name the download with --src.")
        self.names = sorted(n for n in names if not PurePosixPath(n).name.startswith("."))  # such as macOS adds to archives

    def read(self, name):
        return self.archive.read(name) if self.archive else (self.path / name).read_bytes()

    def find(self, pattern):
        """(name, match) of the files whose path ends in a pattern, at a folder's boundary; sorted."""
        wanted = re.compile(rf"(?:^|/){pattern}$", re.I)
        return [(name, match) for name in self.names if (match := wanted.search(name))]

    def by_stem(self, pattern):
        """{stem: name} of the files that match; of equal stems the first counts."""
        found = {}
        for name, _ in self.find(pattern):
            if found.setdefault(PurePosixPath(name).stem, name) != name:
                self.skip(name, "a second file of that stem")
        return found

    def skip(self, name, reason):
        self.skipped[reason].append(name)

    @contextmanager
    def skipping(self, name):
        """Skip a file where what is done with it finds it damaged, and go on with the next."""
        try:
            yield
        except NeedsPackage:
            raise
        except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
            self.skip(name, f"unusable ({str(error) or type(error).__name__})")

    def pixels(self, name):
        """A picture as Pillow has it, palette indices and label ids untouched; TIFFs that Pillow refuses are read strip by strip."""
        data = self.read(name)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return np.asarray(picture)
        except (OSError, KeyError, SyntaxError):
            if data[:2] not in (b"II", b"MM"):
                raise
            return read_tiff(data)

    def mask(self, name):
        """bool `[H, W]`: any channel above 127 (of four, the last is transparency)."""
        values = self.pixels(name)
        values = values.astype(np.uint8) * 255 if values.dtype == bool else values
        return values > 127 if values.ndim == 2 else values[..., :3].max(2) > 127


def _pairs(d, images, masks, word, split=None):
    """Samples of two sets of files with equal stems, one mask each."""
    images, masks = d.by_stem(images), d.by_stem(masks)
    for stem in sorted(set(images) | set(masks)):
        if stem not in masks or stem not in images:
            d.skip(images.get(stem) or masks[stem], "image without mask" if stem in images else "mask without image")
            continue
        with d.skipping(masks[stem]):
            yield Sample(PurePosixPath(images[stem]).name, images[stem], [(f"{stem}.png", d.mask(masks[stem]), word)], split)


PICTURE = r"[^/]+\.(?:jpe?g|png|tiff?|bmp)"


def kvasir(d):
    return _pairs(d, rf"images/{PICTURE}", rf"masks/{PICTURE}", "polyp")


def clinicdb(d):
    """PNG and TIF may both be there; TIFs become PNGs."""
    kind = r"[^/]+\.png" if d.find(r"Original/[^/]+\.png") else r"[^/]+\.tiff?"
    for sample in _pairs(d, rf"Original/{kind}", rf"Ground[ _]Truth/{kind}", "polyp"):
        with d.skipping(sample.name):
            if not sample.name.lower().endswith(".png"):
                sample.name, sample.image = f"{PurePosixPath(sample.name).stem}.png", d.pixels(sample.image)
            yield sample


def bkai(d):
    """Red for neoplastic, green for other polyps: polyps, all of them."""
    return _pairs(d, rf"train/{PICTURE}", rf"train_gt/{PICTURE}", "polyp")


def isic(d):
    for part, split in (("Training", None), ("Test", "test")):
        images = d.by_stem(rf"ISBI2016_ISIC_Part1_{part}_Data/{PICTURE}")
        masks = d.by_stem(rf"ISBI2016_ISIC_Part1_{part}_GroundTruth/[^/]+_Segmentation\.png")
        for stem, image in images.items():
            if f"{stem}_Segmentation" not in masks:
                d.skip(image, "image without mask")
                continue
            with d.skipping(masks[f"{stem}_Segmentation"]):
                mask = d.mask(masks[f"{stem}_Segmentation"])
                yield Sample(PurePosixPath(image).name, image, [(f"{stem}_Segmentation.png", mask, "skin lesion")], split)


def dfu(d):
    return _pairs(d, rf"(?:DFUC2022_train_)?images/{PICTURE}", rf"(?:DFUC2022_train_)?(?:masks|labels)/{PICTURE}", "foot ulcer")


def busi(d):
    """benign/, malignant/, normal/: "benign (3).png" with "benign (3)_mask.png", "_mask_1.png", ...: one lesion a file, all in one mask."""
    masks = defaultdict(list)
    for name, match in d.find(r"(benign|malignant|normal)/(\1 \(\d+\))_mask(?:_\d+)?\.png"):
        masks[match[2].lower()].append(name)
    for name, match in d.find(r"(benign|malignant|normal)/(\1 \((\d+)\))\.png"):
        with d.skipping(name):
            parts = [d.mask(m) for m in masks[match[2].lower()]]
            if not parts or any(p.shape != parts[0].shape for p in parts):
                d.skip(name, "image without mask" if not parts else "masks of different size")
                continue
            out = f"{match[3]}_{match[1].lower()}.png"
            yield Sample(out, name, [(out, np.any(parts, 0), "tumor")])


def read_mhd(d, name):
    """The pixels of a MetaImage (.mhd with its .raw or .zraw), first axis last."""
    fields = dict(line.split("=", 1) for line in d.read(name).decode("ascii", "replace").splitlines() if "=" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    size, kind = [int(n) for n in fields["DimSize"].split()], MHD_TYPES[fields["ElementType"]]
    data = d.read((PurePosixPath(name).parent / PurePosixPath(fields["ElementDataFile"]).name).as_posix())
    if fields.get("CompressedData", "False").lower() == "true":
        data = zlib.decompress(data)
    order = ">" if fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true" else "<"
    return np.frombuffer(data, order + kind)[: int(np.prod(size))].reshape(size[::-1])


def read_nifti(d, name):
    """The pixels of a NIfTI file, rows first."""
    try:
        import nibabel
    except ImportError:
        raise NeedsPackage(
            f"'{name}' is a NIfTI file, which needs: pip install nibabel. (CAMUS's .mhd files are read without it.)"
        ) from None
    data = d.read(name)
    data = gzip.decompress(data) if name.endswith(".gz") else data
    return np.asarray(nibabel.Nifti1Image.from_bytes(data).dataobj).T


def camus(d):
    """patient0001/patient0001_2CH_ED.nii.gz (or .mhd) with ..._gt; three classes. Patients below testing/ are the test split."""
    read = {"mhd": read_mhd, "nii": read_nifti, "nii.gz": read_nifti}
    for name, match in d.find(r"(patient\d+_[24]CH_E[DS])\.(mhd|nii(?:\.gz)?)"):
        side = re.sub(r"\.(mhd|nii(\.gz)?)$", r"_gt.\1", name)
        if side not in d.names:
            d.skip(name, "image without mask")
            continue
        test = bool(re.search(r"(^|/)test(ing)?/", name, re.I))
        with d.skipping(name):
            image, labels = (np.squeeze(read[match[2].lower()](d, n)) for n in (name, side))
            stem = match[1]
            top = max(float(image.max()), 1.0)
            image = (image * (255 / top if top > 255 else 1)).astype(np.uint8)
            masks = [(f"mask_{k}/{stem}_gt.png", labels == k, word) for k, word in CAMUS.items()]
            below = "test" if test else "train"
            yield Sample(f"{stem}.png", image, masks, "test" if test else None, stem.split("_")[0], below)


def decode_counts(text):
    """The run lengths in a COCO string: numbers in groups of five bits, little end first, all but the first three as differences."""
    counts, at = [], 0
    while at < len(text):
        value = shift = 0
        while True:
            byte = ord(text[at]) - 48
            at += 1
            value |= (byte & 31) << shift
            shift += 5
            if not byte & 32:
                value -= (1 << shift) if byte & 16 else 0
                break
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def from_runs(counts, size):
    """bool `[H, W]` of run lengths, background first, down the columns. Raises ValueError where they do not fill the picture."""
    counts = decode_counts(counts) if isinstance(counts, str) else counts
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"run lengths that do not fill {size[1]} x {size[0]} pixels")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(size[1], size[0]).T


def chexlocalize(d):
    """gt_segmentations_{val,test}.json: {"patient1_study1_view1_frontal": {"Edema": {"size", "counts"}}}; images in CheXpert's folders."""
    images = {"_".join(m.groups()): name for name, m in d.find(r"(patient\d+)/(study\d+)/(view\d+_(?:frontal|lateral))\.jpg")}
    for name, _ in d.find(r"gt_segmentations_(?:val|test)\.json"):
        for key, classes in sorted(json.loads(d.read(name)).items()):
            if key not in images:
                d.skip(key, "segmentation without image")
                continue
            masks = []
            with d.skipping(key):
                for word, run in sorted(classes.items()):
                    try:
                        mask, words = from_runs(run["counts"], run["size"]), word.lower()
                    except ValueError as error:  # one class of several
                        d.skip(f"{key} {word}", str(error))
                        continue
                    if mask.any():
                        masks.append((f"{key}_{words.replace(' ', '_')}.png", mask, words))
                if masks:
                    yield Sample(f"{key}.jpg", images[key], masks, group=key.split("_")[0])


def _test_polyps(folder):
    def reader(d):
        return _pairs(d, rf"{folder}/images/{PICTURE}", rf"{folder}/masks/{PICTURE}", "polyp", "test")

    return reader


def _present(labels, words, stem):
    """A mask for each class that a picture of class numbers holds."""
    found = set(np.unique(labels).tolist())
    return [(f"{word}/{stem}.png", labels == k, word) for k, word in words.items() if k in found]


def cityscapes(d):
    """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/...gtFine_labelIds.png; a mask for each of 19 classes that is there."""
    truths = {m[2]: name for name, m in d.find(r"(?:gtFine/)?(train|val)/[^/]+/([^/]+)_gtFine_labelIds\.png")}
    for name, match in d.find(r"(train|val)/[^/]+/([^/]+)_leftImg8bit\.png"):
        if match[2] not in truths:
            d.skip(name, "image without mask")
            continue
        with d.skipping(truths[match[2]]):
            masks = _present(d.pixels(truths[match[2]]), CITYSCAPES, match[2])
            yield Sample(f"{match[2]}.png", name, masks, "test" if match[1].lower() == "val" else None)


def voc(d):
    """SegmentationClass's palette indices, 255 the void border; a mask for each class that is there; the lists are ImageSets' own."""
    images, truths = d.by_stem(r"JPEGImages/[^/]+\.jpg"), d.by_stem(r"SegmentationClass/[^/]+\.png")
    for part, split in (("train", None), ("val", "test")):
        for name, _ in d.find(rf"ImageSets/Segmentation/{part}\.txt"):
            for stem in d.read(name).decode().split():
                if stem not in images or stem not in truths:
                    d.skip(stem, "listed, but without image or mask")
                    continue
                with d.skipping(truths[stem]):
                    labels = d.pixels(truths[stem])
                    if labels.ndim != 2:
                        d.skip(truths[stem], "no palette picture")
                        continue
                    yield Sample(f"{stem}.jpg", images[stem], _present(labels, dict(enumerate(VOC, 1)), stem), split)


READERS = {
    "kvasir": kvasir, "clinicdb": clinicdb, "bkai": bkai, "isic": isic, "dfu": dfu, "camus": camus, "busi": busi,
    "chexlocalize": chexlocalize, "cvc300": _test_polyps("CVC-300"), "colondb": _test_polyps("CVC-ColonDB"),
    "etis": _test_polyps("ETIS-LaribPolypDB"), "cityscapes": cityscapes, "voc": voc,
}  # fmt: skip
