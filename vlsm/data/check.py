"""Statistics of a data set: counts, sizes, mask areas, empty masks, prompts; equal and similar images in two
splits (leakage).
"""

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from PIL import Image

from vlsm.data.images import ImageError, read_image, read_mask
from vlsm.data.records import index_images, prompt_texts
from vlsm.data.resize import describe_inverted, describe_smaller, least_side, touches_corners
from vlsm.system.console import first_few, progress
from vlsm.system.files import digest

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHEET_ROWS = 8
PAIRS = 4  # on a sheet, of two splits
COLUMNS = 80  # of the lines of text
SIDE = 352  # pixels, of CLIPSeg's images
THUMBNAIL = 16  # side in pixels
ALIKE = 0.99  # correlation of two thumbnails above which the images may be frames of one video


@dataclass
class Summary:
    """Statistics of a split; every image is read once. areas: fractions of the image."""

    records: int
    images: int
    sizes: Counter = field(default_factory=Counter)  # "WIDTH x HEIGHT" -> number of images
    areas: list = field(default_factory=list)
    # digest of the pixels -> (a record of the image, the image's thumbnail [768])
    contents: dict = field(default_factory=dict)
    prompts: Counter = field(default_factory=Counter)  # key -> number of records
    classes: Counter = field(default_factory=Counter)  # class word -> number of records
    words: list = field(default_factory=list)  # number of words of every prompt
    sides: list = field(default_factory=list)  # the `least_side` of every mask
    inverted: int = 0  # masks that cover all corners
    unreadable: list = field(default_factory=list)  # names


def inspect_splits(splits):
    """Return {split: Summary} of {split: records}. Unreadable files are counted, not raised."""
    summaries = {}
    for split, records in splits.items():
        first, image_of = index_images(records)
        shapes = {}  # of the images that could be read
        summary = Summary(len(records), len(first))
        owners = set(first)
        for i, record in enumerate(progress(records, f"checking {split}")):
            try:
                if record.problem:
                    raise ImageError(record.name, record.problem)
                if i in owners:
                    shapes[image_of[i]] = _add_image(summary, record)
                mask = read_mask(record.mask)
                if mask.shape != shapes.get(image_of[i], mask.shape):
                    raise ImageError(record.name, "image and mask of different size")
                summary.areas.append(float(mask.mean()))
                summary.sides.append(least_side(mask))
                summary.inverted += touches_corners(mask)
            except (ImageError, OSError) as error:
                reason = error.reason if isinstance(error, ImageError) else "missing"
                summary.unreadable.append(f"{record.name} ({reason})")
            summary.prompts.update(record.prompts.keys())
            if record.class_word:
                summary.classes[record.class_word] += 1
            summary.words += [len(text.split()) for text in prompt_texts(record)]
        summaries[split] = summary
    return summaries


def _add_image(summary, record):
    """Add a record's image to a summary; returns its (H, W). Raises ImageError or OSError if it cannot."""
    image = read_image(record.image)
    height, width, _ = image.shape
    key = digest(image.tobytes(), 16)
    summary.sizes[f"{width} x {height}"] += 1
    summary.contents[key] = record, _thumbnail(image)
    return height, width


def _thumbnail(image):
    """Return an image's colours on a coarse grid, `[768]` of mean 0 and length 1, or 0 for a single colour.

    The product of two thumbnails is their correlation.
    """
    grid = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    colours = np.asarray(grid, np.float32).ravel()
    colours -= colours.mean()
    return colours / max(np.linalg.norm(colours), 1e-6)


def shared_images(summary, later):
    """Return [(record, record of the later split)] of the images that are in both splits."""
    pairs = []
    for key, (record, _) in summary.contents.items():
        if key in later.contents:
            pairs.append((record, later.contents[key][0]))
    return pairs


def similar_images(summary, earlier):
    """Return [(record, that of the most similar image in the earlier split)], the most similar first.

    Pairs are correlated above ALIKE. Images that are in both splits are left out.
    """
    if not earlier.contents:
        return []
    others, thumbnails = zip(*earlier.contents.values())
    pixels = np.stack(thumbnails)  # [n, 768]
    pairs = []
    for key, (record, thumbnail) in summary.contents.items():
        correlations = pixels @ thumbnail  # [n]
        best = correlations.argmax()
        if key not in earlier.contents and correlations[best] > ALIKE:
            pairs.append((correlations[best], record, others[best]))
    pairs.sort(key=lambda pair: pair[0], reverse=True)
    return [(record, other) for _, record, other in pairs]


def similar_splits(summaries):
    """Return {(earlier split, split): pairs, as `similar_images` returns them}; slow for many images."""
    return {
        (earlier, split): similar_images(summaries[split], summaries[earlier])
        for earlier, split in combinations(summaries, 2)
    }


def describe_splits(name, summaries, similar):
    """Return the statistics of a data set as text; images in two splits come last.

    similar: of `similar_splits`.
    """
    lines = []
    for split, summary in summaries.items():
        lines.append(f"{name} {split}: records {summary.records}, images {summary.images}")
        lines += _describe(summary)
        for word in summaries.get("train", summary).classes:
            if word not in summary.classes:
                lines.append(f"  WARNING: no record of '{word}', which train has")
    for (earlier, split), alike in similar.items():
        pairs = shared_images(summaries[earlier], summaries[split])
        if pairs:
            lines.append(
                f"WARNING: images both in {earlier} and in {split}: {len(pairs)} ({_examples(pairs, '=')}). "
                "Test results would be too good."
            )
        if alike:
            lines.append(
                f"NOTE: images in {split} that look nearly like one in {earlier}: {len(alike)} of "
                f"{summaries[split].images} ({_examples(alike, '~')}). "
                "If they are frames of one video or of one patient, scores on them are too good."
            )
    wrapper = textwrap.TextWrapper(  # names stay whole, to be searched for and copied
        COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(map(wrapper.fill, lines))


def _describe(summary):
    """Return the lines of text on one split."""
    lines = [f"  sizes: {first_few(_with_counts(summary.sizes), 4) or 'none'}"]
    areas = np.array(summary.areas)
    filled = 100 * areas[areas > 0]
    if len(filled):
        percent = ", ".join(f"{area:.1f}" for area in np.quantile(filled, QUANTILES))
        lines.append(f"  mask area in % of the image (5, 25, 50, 75, 95 % of the masks): {percent}")
    lines.append(f"  empty masks: {len(areas) - len(filled)}")
    if summary.inverted > len(areas) / 2:
        lines.append(f"  WARNING: {describe_inverted(summary.inverted, len(areas))}")
    smaller = [side for side in summary.sides if side > SIDE]
    if smaller:
        lines.append(f"  WARNING: {describe_smaller(smaller, len(areas), SIDE)}")
    if summary.classes:
        lines.append(f"  classes: {', '.join(_with_counts(summary.classes))}")
    if summary.prompts:
        keys = []
        for key, count in summary.prompts.items():
            keys.append(key if count == summary.records else f"{key} ({count})")
        words = f"{np.mean(summary.words):.1f} words on average, {max(summary.words)} at most"
        lines.append(f"  prompts: {', '.join(keys)}; {words}")
    if summary.unreadable:
        lines.append(f"  UNUSABLE: {len(summary.unreadable)} ({first_few(summary.unreadable)})")
    return lines


def _with_counts(counter):
    """Return the counted names as texts "NAME (COUNT)", the most frequent first."""
    return [f"{name} ({count})" for name, count in counter.most_common()]


def _examples(pairs, sign):
    """Return the first pairs of names as text."""
    texts = []
    for record, other in pairs:
        texts.append(record.name if record.name == other.name else f"{record.name} {sign} {other.name}")
    return first_few(texts)


def pair_rows(similar):
    """Return rows for `figures.sheet` of nearly equal images side by side; similar: of `similar_splits`."""
    rows = []
    for (earlier, split), alike in similar.items():
        for record, other in alike[:PAIRS]:
            left = (read_image(other.image), None, f"{earlier}: {other.name}")
            right = (read_image(record.image), None, f"{split}: {record.name}")
            rows.append(([left, right], "", ""))
    return rows


def sheet_rows(splits):
    """Return rows for `figures.sheet` of records spread over all splits, each with its longest prompt."""
    rows = []
    most = max(1, SHEET_ROWS // len(splits))
    for split, records in splits.items():
        records = [record for record in records if not record.problem]
        places = np.linspace(0, len(records) - 1, min(len(records), most)).round()
        for i in places.astype(int):
            record = records[i]
            try:
                image = read_image(record.image)
                mask = read_mask(record.mask)
            except (ImageError, OSError):
                continue
            if mask.shape != image.shape[:2]:
                continue
            prompt = max(prompt_texts(record), key=len, default="")
            panels = [(image, None, ""), (image, mask, "")]
            rows.append((panels, f"{split}: {record.mask_name}", prompt))
    return rows
