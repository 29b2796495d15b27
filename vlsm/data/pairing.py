"""Pair images and masks by their names: equal stems, else stems of which one difference explains most."""

import re
from collections import Counter
from pathlib import PurePosixPath

from vlsm.data.images import MaskUnion, image_files
from vlsm.data.records import Record
from vlsm.system.console import first_few, say_once

FURTHER = re.compile(r"(.+)[_\-. ]\(?\d+\)?")  # of a further mask of an image: "x_1", "x (2)"
SEPARATOR = re.compile(r"[_\-. ]")
NEARLY_ALL = 0.8  # of the names left over: so many share an ending that is no part of what they name
MOST = 0.5  # of the names left over: so many must be paired by one difference, or none is
NO_MASK = "image without mask"


class ImageFolder:
    """Files below a folder, found by exact name, else by the one file of the same stem."""

    def __init__(self, root):
        self.root = root
        self.by_name = {}
        self.by_stem = {}
        for path in image_files(root):
            name = path.relative_to(root).as_posix()
            self.by_name[name] = path
            self.by_stem.setdefault(stem_of(name), []).append(path)

    def find(self, name):
        """Return the file of a name. A missing file is reported later, when it is read, with all others."""
        if name in self.by_name:
            return self.by_name[name]
        paths = self.by_stem.get(stem_of(name), [])
        if not paths:
            return self.root / name
        if len(paths) > 1:
            names = first_few(path.name for path in paths)
            raise ValueError(
                f"'{name}' is not in '{self.root}', and {len(paths)} files share its stem: {names}."
            )
        return paths[0]


def stem_of(name):
    """Return a relative name without its suffix, in lower case, by which images and masks are paired."""
    return str(PurePosixPath(name).with_suffix("")).casefold()


def paired_records(images, mask_root, class_word="", no_mask_is_empty=False):
    """Return a record for each image with a mask, sorted by name, and one with `problem` set for other files.

    images: an `ImageFolder`. class_word: of masks in the folder of this name below `mask_root`; then an image
    without a mask has no record. no_mask_is_empty: an image without a mask gets an empty one.
    """
    masks = ImageFolder(mask_root / class_word)
    pairs = match_names(images.by_stem.keys(), masks.by_stem.keys(), mask_root)
    rows = []
    paired = set()
    for stem, mask_stems in pairs.items():
        paired.update(mask_stems)
        files = [file for mask_stem in mask_stems for file in masks.by_stem[mask_stem]]
        several = len(images.by_stem[stem]) > 1 or len(files) > len(mask_stems)
        rows.append(_record(images, stem, files, mask_root, "stem with several files" if several else None))
    for stem in masks.by_stem.keys() - paired:
        name = masks.by_stem[stem][0].relative_to(masks.root).as_posix()
        rows.append(Record(name, name, images.root / name, masks.root / name, problem="mask without image"))
    if class_word:
        for record in rows:
            record.name_class(class_word)
    else:
        rows += records_without_mask(images, mask_root, pairs, no_mask_is_empty)
    return sorted(rows, key=lambda record: record.name)


def records_without_mask(images, mask_root, stems, no_mask_is_empty):
    """Return a record for each image whose stem is not in `stems`, of those that have a mask."""
    problem = None if no_mask_is_empty else NO_MASK
    rows = []
    for stem in images.by_stem:
        if stem not in stems:
            rows.append(_record(images, stem, [], mask_root, problem))
    return rows


def _record(images, stem, files, mask_root, problem):
    """Return the record of an image's stem and its mask's files."""
    image = images.by_stem[stem][0]
    name = image.relative_to(images.root).as_posix()
    mask_name = (
        files[0].relative_to(mask_root).as_posix() if files else str(PurePosixPath(name).with_suffix(".png"))
    )
    mask = files[0] if len(files) == 1 else MaskUnion(tuple(files), image)
    return Record(name, mask_name, image, mask, problem=problem)


def match_names(images, masks, place):
    """Return {image: [its masks]} of two collections of stems; place: of the masks, for messages.

    Equal stems are a pair. Those left over are paired where one difference of endings or beginnings
    ("_segmentation") explains most of them. A mask "x_1" beside the mask or the image "x" is a further one.
    """
    pairs = {stem: [stem] for stem in images if stem in masks}
    left_images = [stem for stem in images if stem not in pairs]
    left_masks = [stem for stem in masks if stem not in pairs and _base(stem) not in masks]
    image_ends = common_ends(left_images)
    mask_ends = common_ends(left_masks)
    cores = {_core(stem, mask_ends): stem for stem in left_masks}
    matched = {}
    for stem in left_images:
        core = _core(stem, image_ends)
        if core in cores:
            matched[stem] = [cores[core]]
    other_number = image_ends[0] != mask_ends[0] and re.search(r"\d", image_ends[0] + mask_ends[0])
    if len(matched) > MOST * min(len(left_images), len(left_masks)) and not other_number:
        pairs |= matched
        names = [f"'{'...'.join(ends)}'" for ends in (image_ends, mask_ends)]
        say_once(
            f"ends {place}",
            f"'{place}': {len(matched)} masks are named {names[1]} where their images are named {names[0]}; "
            "they are paired.",
        )
    _add_further(pairs, images, masks, place)
    paired = {mask for of_image in pairs.values() for mask in of_image}
    _tell_of_classes(images, masks - paired, place)
    return pairs


def _base(stem):
    """Return the stem "x" of "x_1", else None."""
    match = FURTHER.fullmatch(stem)
    return match[1] if match else None


def _add_further(pairs, images, masks, place):
    """Add to each image's masks the further ones: "x_1" and "x_2" of the mask "x", or of the image "x"."""
    owner = {mask: image for image, (mask,) in pairs.items()}
    numbered = {_base(stem) for stem in images}  # "scan" of an image "scan_2": then "scan_3" lacks its image
    added = []
    for stem in sorted(masks):
        base = _base(stem)
        image = owner.get(base, base)
        if image in images and base not in numbered and stem not in owner and stem not in images:
            pairs.setdefault(image, []).append(stem)
            added.append(stem)
    if added:
        say_once(
            f"further {place}",
            f"'{place}': {len(added)} masks are further ones of an image ({first_few(added)}); the masks of "
            "an image are united.",
        )


def common_ends(stems):
    """Return (beginning, ending) that most file names of several stems share, each up to a separator."""
    names = [PurePosixPath(stem).name for stem in stems]
    if len(names) < 2:
        return "", ""
    start = _shared([name[: place.end()] for place in SEPARATOR.finditer(name)] for name in names)
    rests = [name.removeprefix(start) for name in names]
    end = _shared([rest[place.start() :] for place in SEPARATOR.finditer(rest)] for rest in rests)
    return start, end


def _shared(texts_of_names):
    """Return the longest text that most names have, of lists of each name's texts, else ""."""
    lists = list(texts_of_names)
    counts = Counter(text for texts in lists for text in texts)
    shared = [text for text, count in counts.items() if count >= NEARLY_ALL * len(lists)]
    return max(shared, key=len, default="")


def _tell_of_classes(images, masks, place):
    """Say once that masks are named IMAGE_CLASS, if most of those left over are."""
    endings = Counter()
    for stem in masks:
        for place in SEPARATOR.finditer(stem):
            if stem[: place.start()] in images:
                endings[stem[place.end() :]] += 1
    common = [ending for ending, count in endings.most_common(8) if count > 1]
    if len(common) > 1 and sum(endings[ending] for ending in common) > MOST * len(masks):
        say_once(
            f"classes {place}",
            f"'{place}': masks are named IMAGE_{common[0]}, IMAGE_{common[1]}, ... Are these classes? A "
            f"folder for each is read: masks/{common[0]}/IMAGE.png.",
        )


def _core(stem, ends):
    """Return a stem without the beginning and the ending of its file name."""
    path = PurePosixPath(stem)
    name = path.name.removeprefix(ends[0]).removesuffix(ends[1])
    return str(path.with_name(name or path.name))
