"""Read each data set's download: a function of a `Download` yields its images and masks as `Sample`s.

Readers never write. A file that they cannot use goes to `Download.skip`, with the reason.
"""

import re
from collections import defaultdict
from pathlib import PurePosixPath

import numpy as np

from vlsm.data.images import to_eight_bits
from vlsm.raw.download import Sample, decode_run_lengths, read_mhd, read_nifti
from vlsm.system.schema import field, parse_json

IMAGE = r"[^/]+\.(?:jpe?g|png|tiff?|bmp)"  # a file's name
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


# Data sets of one mask for each image


def _samples(download, pairs, word, split=None, as_png=False):
    """Yield a `Sample` of one mask for each (stem, image, mask).

    as_png: the image becomes a PNG, and its mask has the same name.
    """
    for _, image, mask in pairs:
        with download.skipping(mask):
            name = PurePosixPath(image).name
            mask_name = f"{PurePosixPath(mask).stem}.png"
            if as_png:
                name = mask_name = f"{PurePosixPath(image).stem}.png"
                image = download.image(image)
            yield Sample(name, image, [(mask_name, download.mask(mask), word)], split)


def kvasir(download):
    """Read images/ and masks/ with equal stems."""
    pairs = download.pairs(rf"images/{IMAGE}", rf"masks/{IMAGE}")
    return _samples(download, pairs, "polyp")


def clinicdb(download):
    """Read PNGs, else TIFs, which become PNGs; the download may hold both."""
    has_pngs = download.find(r"Original/[^/]+\.png")
    file = r"[^/]+\.png" if has_pngs else r"[^/]+\.tiff?"
    pairs = download.pairs(rf"Original/{file}", rf"Ground[ _]Truth/{file}")
    return _samples(download, pairs, "polyp", as_png=not has_pngs)


def bkai(download):
    """Read masks in red (neoplastic) and green (other); both are polyps."""
    pairs = download.pairs(rf"(?:train/)?train/{IMAGE}", rf"(?:train_gt/)?train_gt/{IMAGE}")
    return _samples(download, pairs, "polyp")


def isic(download):
    """Read the folders of ISBI 2016, part 1; Test is the test split."""
    for folder, split in (("Training", None), ("Test", "test")):
        prefix = f"ISBI2016_ISIC_Part1_{folder}"
        images = download.by_stem(rf"{prefix}_Data/{IMAGE}")
        masks = download.by_stem(rf"{prefix}_GroundTruth/(?P<stem>[^/]+)_Segmentation\.png")
        yield from _samples(download, download.join(images, masks), "skin lesion", split)


def dfu(download):
    """Read the training images of DFUC 2022 with masks/ or labels/."""
    prefix = r"(?:DFUC2022_train_)?"
    pairs = download.pairs(rf"{prefix}images/{IMAGE}", rf"{prefix}(?:masks|labels)/{IMAGE}")
    return _samples(download, pairs, "foot ulcer")


def _test_polyps(folder):
    """Return a reader of one of the test sets that PraNet's authors ship together."""

    def reader(download):
        """Read images/ and masks/ of the test set."""
        pairs = download.pairs(rf"{folder}/images/{IMAGE}", rf"{folder}/masks/{IMAGE}")
        return _samples(download, pairs, "polyp", "test")

    return reader


def etis(download):
    """Read PraNet's version, or the publisher's: ETIS-LaribPolypDB/1.tif with Ground Truth/p1.tif."""
    yield from _test_polyps("ETIS-LaribPolypDB")(download)
    images = download.by_stem(r"ETIS-LaribPolypDB/\d+\.tiff?")
    masks = download.by_stem(r"Ground[ _]Truth/p(?P<stem>\d+)\.tiff?")
    yield from _samples(download, download.join(images, masks), "polyp", "test", as_png=True)


def busi(download):
    """Read benign/, malignant/ and normal/: "benign (3).png" with "benign (3)_mask.png", "_mask_1.png", ...

    Each mask file holds one lesion; the union of an image's files is its mask.
    """
    mask_files = defaultdict(list)
    for name, match in download.find(r"(benign|malignant|normal)/(\1 \(\d+\))_mask(?:_\d+)?\.png"):
        mask_files[match[2].lower()].append(name)
    for name, match in download.find(r"(benign|malignant|normal)/(\1 \((\d+)\))\.png"):
        with download.skipping(name):
            lesions = [download.mask(file) for file in mask_files[match[2].lower()]]
            if not lesions:
                download.skip(name, "image without mask")
            elif any(lesion.shape != lesions[0].shape for lesion in lesions):
                download.skip(name, "masks of different size")
            else:
                target = f"{match[3]}_{match[1].lower()}.png"
                yield Sample(target, name, [(target, np.any(lesions, 0), "tumor")])


# Data sets of several classes


def camus(download):
    """Read patient0001/patient0001_2CH_ED.nii.gz (or .mhd) with ..._gt; three classes.

    Patients below testing/ are the test split.
    """
    readers = {"mhd": read_mhd, "nii": read_nifti, "nii.gz": read_nifti}
    for name, match in download.find(r"(patient\d+_[24]CH_E[DS])\.(mhd|nii(?:\.gz)?)"):
        truth = re.sub(r"\.(mhd|nii(\.gz)?)$", r"_gt.\1", name)
        if truth not in download.names:
            download.skip(name, "image without mask")
            continue
        with download.skipping(name):
            read = readers[match[2].lower()]
            image = np.squeeze(read(download, name))
            labels = np.squeeze(read(download, truth))
            image = to_eight_bits(image, name)
            stem = match[1]
            masks = [(f"mask_{k}/{stem}_gt.png", labels == k, word) for k, word in CAMUS.items()]
            test = re.search(r"(^|/)test(ing)?/", name, re.I)
            split = "test" if test else None
            yield Sample(f"{stem}.png", image, masks, split, stem.split("_")[0], split or "train")


def chexlocalize(download):
    """Read gt_segmentations_{val,test}.json and the images in CheXpert's folders.

    The files' content: {"patient1_study1_view1_frontal": {"Edema": {"size", "counts"}}}.
    """
    images = {}
    for name, match in download.find(r"(patient\d+)/(study\d+)/(view\d+_(?:frontal|lateral))\.jpg"):
        images["_".join(match.groups())] = name
    for name, _ in download.find(r"gt_segmentations_(?:val|test)\.json"):
        for key, classes in sorted(_segmentations(download, name).items()):
            if key not in images:
                download.skip(key, "segmentation without image")
                continue
            masks = []
            for word, run_lengths in sorted(classes.items()):
                with download.skipping(f"{key} {word}"):
                    mask = decode_run_lengths(run_lengths["counts"], run_lengths["size"], name)
                    if mask.any():
                        word = word.lower()
                        masks.append((f"{key}_{word.replace(' ', '_')}.png", mask, word))
            if masks:
                yield Sample(f"{key}.jpg", images[key], masks, group=key.split("_")[0])


def _segmentations(download, name):
    """Return {image: {class: run lengths}} of a segmentation file.

    Raises ValueError, which names the file and the key, for another content.
    """
    segmentations = parse_json(download.read(name), name, dict, "an object of images")
    for key in segmentations:
        field(name, segmentations, key, kind=dict, words="an object of classes")
    return segmentations


def _class_masks(labels, words, stem):
    """Return [(file name, mask, class)] of the classes {number: word} that a label image `[H, W]` holds."""
    masks = []
    for number, word in words.items():
        mask = labels == number
        if mask.any():
            masks.append((f"{word}/{stem}.png", mask, word))
    return masks


def cityscapes(download):
    """Read leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/...gtFine_labelIds.png: 19 classes."""
    for folder, split in (("train", None), ("val", "test")):
        images = download.by_stem(rf"{folder}/[^/]+/(?P<stem>[^/]+)_leftImg8bit\.png")
        truths = download.by_stem(rf"{folder}/[^/]+/(?P<stem>[^/]+)_gtFine_labelIds\.png")
        for stem, image, truth in download.join(images, truths):
            with download.skipping(truth):
                masks = _class_masks(download.labels(truth), CITYSCAPES, stem)
                yield Sample(f"{stem}.png", image, masks, split)


def voc(download):
    """Read SegmentationClass's palette indices, 255 the void border; the splits are ImageSets' lists."""
    images = download.by_stem(r"JPEGImages/[^/]+\.jpg")
    truths = download.by_stem(r"SegmentationClass/[^/]+\.png")
    words = dict(enumerate(VOC, 1))
    for folder, split in (("train", None), ("val", "test")):
        for name, _ in download.find(rf"ImageSets/Segmentation/{folder}\.txt"):
            for stem in download.text(name).split():
                if stem not in images or stem not in truths:
                    download.skip(stem, "listed, but without image or mask")
                    continue
                with download.skipping(truths[stem]):
                    masks = _class_masks(download.labels(truths[stem]), words, stem)
                    yield Sample(f"{stem}.jpg", images[stem], masks, split)


READERS = {
    "kvasir": kvasir, "clinicdb": clinicdb, "bkai": bkai, "isic": isic, "dfu": dfu, "camus": camus,
    "busi": busi, "chexlocalize": chexlocalize, "cvc300": _test_polyps("CVC-300"),
    "colondb": _test_polyps("CVC-ColonDB"), "etis": etis, "cityscapes": cityscapes, "voc": voc,
}  # fmt: skip
