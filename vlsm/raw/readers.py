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


def _pairs(d, images, masks, word, split=None):
    """Samples of two sets of files with equal stems, one mask each."""
    for stem, image, mask in d.pairs(images, masks):
        with d.skipping(mask):
            yield Sample(PurePosixPath(image).name, image, [(f"{stem}.png", d.mask(mask), word)], split)


PICTURE = r"[^/]+\.(?:jpe?g|png|tiff?|bmp)"


def kvasir(d):
    return _pairs(d, rf"images/{PICTURE}", rf"masks/{PICTURE}", "polyp")


def clinicdb(d):
    """PNG and TIF may both be there; TIFs become PNGs."""
    kind = r"[^/]+\.png" if d.find(r"Original/[^/]+\.png") else r"[^/]+\.tiff?"
    for sample in _pairs(d, rf"Original/{kind}", rf"Ground[ _]Truth/{kind}", "polyp"):
        with d.skipping(sample.name):
            if not sample.name.lower().endswith(".png"):
                sample.name, sample.image = f"{PurePosixPath(sample.name).stem}.png", d.image(sample.image)
            yield sample


def bkai(d):
    """Red for neoplastic, green for other polyps: polyps, all of them."""
    return _pairs(d, rf"(?:train/)?train/{PICTURE}", rf"(?:train_gt/)?train_gt/{PICTURE}", "polyp")


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
                yield Sample(
                    PurePosixPath(image).name,
                    image,
                    [(f"{stem}_Segmentation.png", mask, "skin lesion")],
                    split,
                )


def dfu(d):
    return _pairs(
        d,
        rf"(?:DFUC2022_train_)?images/{PICTURE}",
        rf"(?:DFUC2022_train_)?(?:masks|labels)/{PICTURE}",
        "foot ulcer",
    )


def busi(d):
    """benign/, malignant/, normal/: "benign (3).png" with "benign (3)_mask.png", "_mask_1.png", ...: one
    lesion a file, all in one mask.
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
    """patient0001/patient0001_2CH_ED.nii.gz (or .mhd) with ..._gt; three classes.

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
    """gt_segmentations_{val,test}.json: {"patient1_study1_view1_frontal": {"Edema": {"size", "counts"}}};
    images in CheXpert's folders.
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
        return _pairs(d, rf"{folder}/images/{PICTURE}", rf"{folder}/masks/{PICTURE}", "polyp", "test")

    return reader


def _present(labels, words, stem):
    """A mask for each class that a picture of class numbers holds."""
    found = set(np.unique(labels).tolist())
    return [(f"{word}/{stem}.png", labels == k, word) for k, word in words.items() if k in found]


def cityscapes(d):
    """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/...gtFine_labelIds.png; a mask for each of
    19 classes that is there.
    """
    truths = {m[2]: name for name, m in d.find(r"(?:gtFine/)?(train|val)/[^/]+/([^/]+)_gtFine_labelIds\.png")}
    for name, match in d.find(r"(train|val)/[^/]+/([^/]+)_leftImg8bit\.png"):
        if match[2] not in truths:
            d.skip(name, "image without mask")
            continue
        with d.skipping(truths[match[2]]):
            masks = _present(d.labels(truths[match[2]]), CITYSCAPES, match[2])
            yield Sample(f"{match[2]}.png", name, masks, "test" if match[1].lower() == "val" else None)


def voc(d):
    """SegmentationClass's palette indices, 255 the void border; a mask for each class that is there; the
    lists are ImageSets' own.
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
    """As PraNet's authors ship it, or its publisher: ETIS-LaribPolypDB/1.tif, Ground Truth/p1.tif."""
    yield from _test_polyps("ETIS-LaribPolypDB")(d)
    images, masks = d.by_stem(r"ETIS-LaribPolypDB/\d+\.tiff?"), d.by_stem(r"Ground[ _]Truth/p\d+\.tiff?")
    for stem, image in images.items():
        if f"p{stem}" not in masks:
            d.skip(image, "image without mask")
            continue
        with d.skipping(image):
            mask = d.mask(masks[f"p{stem}"])
            yield Sample(f"{stem}.png", d.image(image), [(f"{stem}.png", mask, "polyp")], "test")


READERS = {
    "kvasir": kvasir, "clinicdb": clinicdb, "bkai": bkai, "isic": isic, "dfu": dfu, "camus": camus,
    "busi": busi,
    "chexlocalize": chexlocalize, "cvc300": _test_polyps("CVC-300"), "colondb": _test_polyps("CVC-ColonDB"),
    "etis": etis, "cityscapes": cityscapes, "voc": voc,
}  # fmt: skip
