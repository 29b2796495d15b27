"""A reader for each data set: a function of a `Download` that yields its images and masks as `Sample`s.

Readers never write; what they cannot use they hand to `skip(name, reason)`.
"""

import json
import re
from collections import defaultdict
from pathlib import PurePosixPath

import numpy as np

from vlsm.raw.download import Sample
from vlsm.raw.formats import decode_mask, read_mhd, read_nifti

CAMUS = {1: "left ventricular cavity", 2: "myocardium", 3: "left atrium cavity"}
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20:
    "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27:
    "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def _samples(d, pairs, word, split=None):
    """Yield a `Sample` of one mask for each (stem, image, mask)."""
    for _, image, mask in pairs:
        with d.skipping(mask):
            masks = [(f"{PurePosixPath(mask).stem}.png", d.mask(mask), word)]
            yield Sample(PurePosixPath(image).name, image, masks, split)


PICTURE = r"[^/]+\.(?:jpe?g|png|tiff?|bmp)"


def kvasir(d):
    return _samples(d, d.pairs(rf"images/{PICTURE}", rf"masks/{PICTURE}"), "polyp")


def clinicdb(d):
    """Read PNGs or TIFs, whose folders may both be there; TIFs become PNGs."""
    kind = r"[^/]+\.png" if d.find(r"Original/[^/]+\.png") else r"[^/]+\.tiff?"
    for sample in _samples(d, d.pairs(rf"Original/{kind}", rf"Ground[ _]Truth/{kind}"), "polyp"):
        with d.skipping(sample.name):
            if not sample.name.lower().endswith(".png"):
                sample.name, sample.image = f"{PurePosixPath(sample.name).stem}.png", d.image(sample.image)
            yield sample


def bkai(d):
    """Read masks in red (neoplastic) and green (other) as polyps, all of them."""
    images, masks = rf"(?:train/)?train/{PICTURE}", rf"(?:train_gt/)?train_gt/{PICTURE}"
    return _samples(d, d.pairs(images, masks), "polyp")


def isic(d):
    for part, split in (("Training", None), ("Test", "test")):
        images = d.by_stem(rf"ISBI2016_ISIC_Part1_{part}_Data/{PICTURE}")
        masks = rf"ISBI2016_ISIC_Part1_{part}_GroundTruth/(?P<stem>[^/]+)_Segmentation\.png"
        yield from _samples(d, d.join(images, d.by_stem(masks)), "skin lesion", split)


def dfu(d):
    below = r"(?:DFUC2022_train_)?"
    pairs = d.pairs(rf"{below}images/{PICTURE}", rf"{below}(?:masks|labels)/{PICTURE}")
    return _samples(d, pairs, "foot ulcer")


def busi(d):
    """Read benign/, malignant/ and normal/: "benign (3).png" with "benign (3)_mask.png", "_mask_1.png", ...,
    one lesion a file, all in one mask.
    """
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


def camus(d):
    """Read patient0001/patient0001_2CH_ED.nii.gz (or .mhd) with ..._gt; three classes.

    Patients below testing/ are the test split.
    """
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


def chexlocalize(d):
    """Read gt_segmentations_{val,test}.json: {"patient1_study1_view1_frontal": {"Edema": {"size",
    "counts"}}}; images in CheXpert's folders.
    """
    images = {
        "_".join(m.groups()): name
        for name, m in d.find(r"(patient\d+)/(study\d+)/(view\d+_(?:frontal|lateral))\.jpg")
    }
    for name, _ in d.find(r"gt_segmentations_(?:val|test)\.json"):
        for key, classes in sorted(_segmentations(d, name).items()):
            if key not in images:
                d.skip(key, "segmentation without image")
                continue
            masks = []
            with d.skipping(key):
                for word, run in sorted(classes.items()):
                    try:
                        mask, words = decode_mask(run["counts"], run["size"]), word.lower()
                    except (ValueError, KeyError, TypeError) as error:  # one class of several
                        d.skip(f"{key} {word}", str(error))
                        continue
                    if mask.any():
                        masks.append((f"{key}_{words.replace(' ', '_')}.png", mask, words))
                if masks:
                    yield Sample(f"{key}.jpg", images[key], masks, group=key.split("_")[0])


def _segmentations(d, name):
    """Return the dictionaries of a segmentation file. Raises ValueError, which names the file and the key."""
    try:
        found = json.loads(d.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{name}' is not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{name}' should hold a dictionary of pictures.")
    wrong = next((k for k, v in found.items() if not isinstance(v, dict)), None)
    if wrong is not None:
        raise ValueError(f"'{name}', key '{wrong}': expected a dictionary of classes with size and counts.")
    return found


def _test_polyps(folder):
    def reader(d):
        pairs = d.pairs(rf"{folder}/images/{PICTURE}", rf"{folder}/masks/{PICTURE}")
        return _samples(d, pairs, "polyp", "test")

    return reader


def _present(labels, words, stem):
    """Return a mask for each class that a picture of class numbers holds."""
    found = set(np.unique(labels).tolist())
    return [(f"{word}/{stem}.png", labels == k, word) for k, word in words.items() if k in found]


def cityscapes(d):
    """Read leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/...gtFine_labelIds.png; a mask for each
    of 19 classes that is there.
    """
    for part, split in (("train", None), ("val", "test")):
        images = d.by_stem(rf"{part}/[^/]+/(?P<stem>[^/]+)_leftImg8bit\.png")
        truths = d.by_stem(rf"{part}/[^/]+/(?P<stem>[^/]+)_gtFine_labelIds\.png")
        for stem, image, truth in d.join(images, truths):
            with d.skipping(truth):
                yield Sample(f"{stem}.png", image, _present(d.labels(truth), CITYSCAPES, stem), split)


def voc(d):
    """Read SegmentationClass's palette indices, 255 the void border; a mask for each class that is there; the
    splits are ImageSets' lists.
    """
    images, truths = d.by_stem(r"JPEGImages/[^/]+\.jpg"), d.by_stem(r"SegmentationClass/[^/]+\.png")
    for part, split in (("train", None), ("val", "test")):
        for name, _ in d.find(rf"ImageSets/Segmentation/{part}\.txt"):
            for stem in d.read(name).decode().split():
                if stem not in images or stem not in truths:
                    d.skip(stem, "listed, but without image or mask")
                    continue
                with d.skipping(truths[stem]):
                    masks = _present(d.labels(truths[stem]), dict(enumerate(VOC, 1)), stem)
                    yield Sample(f"{stem}.jpg", images[stem], masks, split)


def etis(d):
    """Read what PraNet's authors ship, or its publisher: ETIS-LaribPolypDB/1.tif, Ground Truth/p1.tif."""
    yield from _test_polyps("ETIS-LaribPolypDB")(d)
    images = d.by_stem(r"ETIS-LaribPolypDB/\d+\.tiff?")
    masks = d.by_stem(r"Ground[ _]Truth/p(?P<stem>\d+)\.tiff?")
    for stem, image, mask in d.join(images, masks):
        with d.skipping(image):
            yield Sample(f"{stem}.png", d.image(image), [(f"{stem}.png", d.mask(mask), "polyp")], "test")


READERS = {
    "kvasir": kvasir, "clinicdb": clinicdb, "bkai": bkai, "isic": isic, "dfu": dfu, "camus": camus,
    "busi": busi,
    "chexlocalize": chexlocalize, "cvc300": _test_polyps("CVC-300"), "colondb": _test_polyps("CVC-ColonDB"),
    "etis": etis, "cityscapes": cityscapes, "voc": voc,
}  # fmt: skip
