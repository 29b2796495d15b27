"""A data set at a glance: counts, sizes, mask areas, empty masks, prompts; images that two splits share, or
that look nearly alike.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vlsm.data.images import ImageError, read_image, read_mask
from vlsm.data.records import first_few, index_images, prompt_texts
from vlsm.system.console import progress

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHEET_ROWS = 8
THUMBNAIL = 16  # side in pixels
ALIKE = 0.99  # correlation of thumbnails above which two images are taken for frames of one video


@dataclass
class Summary:
    """Statistics of a split; every image is read once. areas: fractions of the image."""

    records: int
    images: int
    sizes: Counter = field(default_factory=Counter)  # (width, height) -> number of images
    areas: list = field(default_factory=list)
    names: dict = field(default_factory=dict)  # digest of the pixels -> name of the image
    thumbnails: dict = field(default_factory=dict)  # name -> [768]
    prompts: Counter = field(default_factory=Counter)  # key -> number of records
    words: list = field(default_factory=list)  # number of words of every prompt
    unreadable: list = field(default_factory=list)  # names


def inspect_splits(splits):
    """Return {split: Summary} of {split: records}. Unreadable files are counted, not raised."""
    summaries = {}
    for split, records in splits.items():
        first, _ = index_images(records)
        summary = Summary(len(records), len(first))
        owners = set(first)
        for i, record in enumerate(progress(records, f"looking at {split}")):
            try:
                if i in owners:
                    _add_image(summary, record)
                summary.areas.append(float(read_mask(record.mask).mean()))
            except (ImageError, OSError):
                summary.unreadable.append(record.name)
            summary.prompts.update(record.prompts.keys())
            summary.words += [len(text.split()) for text in prompt_texts(record)]
        summaries[split] = summary
    return summaries


def _add_image(summary, record):
    image = read_image(record.image)
    height, width, _ = image.shape
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    summary.sizes[width, height] += 1
    summary.names[digest] = record.name
    summary.thumbnails[record.name] = _thumbnail(image)


def _thumbnail(image):
    """Return an image's colours on a coarse grid, `[768]` of mean 0 and length 1, or 0 for a single colour.

    The product of two thumbnails is their correlation.
    """
    grid = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    colours = np.asarray(grid, np.float32).ravel()
    colours -= colours.mean()
    return colours / max(np.linalg.norm(colours), 1e-6)


def shared_images(summaries):
    """Return {(split, later split): [(name, name there), ...]} of equal images."""
    places = defaultdict(list)
    for split, summary in summaries.items():
        for digest, name in summary.names.items():
            places[digest].append((split, name))
    shared = defaultdict(list)
    for copies in places.values():
        for k, (split, name) in enumerate(copies):
            for later_split, later_name in copies[k + 1 :]:
                shared[split, later_split].append((name, later_name))
    return dict(shared)


def similar_images(summaries):
    """Return {(split, earlier split): [(name, most similar name there), ...]}, the most similar first.

    Equal images are left out.
    """
    shared = shared_images(summaries)
    splits = list(summaries)
    similar = {}
    for k, split in enumerate(splits):
        for earlier in splits[:k]:
            thumbnails = dict(summaries[split].thumbnails)
            for _, name in shared.get((earlier, split), []):
                thumbnails.pop(name, None)
            pairs = _closest(thumbnails, summaries[earlier].thumbnails)
            if pairs:
                similar[split, earlier] = [(name, other) for _, name, other in pairs]
    return similar


def _closest(thumbnails, others):
    """Return [(correlation, name, most similar name among `others`)] above ALIKE, the highest first."""
    if not others:
        return []
    names = list(others)
    pixels = np.stack(list(others.values()))  # [n, 768]
    pairs = []
    for name, thumbnail in thumbnails.items():
        correlations = pixels @ thumbnail
        best = correlations.argmax()
        if correlations[best] > ALIKE:
            pairs.append((float(correlations[best]), name, names[best]))
    return sorted(pairs, reverse=True)


def describe_splits(name, summaries):
    """Return the fingerprint of a data set as text; images in two splits come last."""
    lines = []
    for split, summary in summaries.items():
        lines.append(f"{name} {split}: {summary.records} records of {summary.images} images")
        lines += _describe(summary)
    for (split, later), pairs in shared_images(summaries).items():
        lines.append(
            f"WARNING: {len(pairs)} images are in {split} and in {later} ({_examples(pairs, '=')}): test "
            "results would be too good."
        )
    for (split, earlier), pairs in similar_images(summaries).items():
        lines.append(
            f"NOTE: {len(pairs)} of {summaries[split].images} images in {split} look nearly like one in "
            f"{earlier} ({_examples(pairs, '~')}). If they are frames of one video or of one patient, scores "
            "on them are too good."
        )
    return "\n".join(lines)


def _describe(summary):
    """Return the lines on one split."""
    sizes = [f"{width} x {height} ({n})" for (width, height), n in summary.sizes.most_common()]
    lines = [f"  sizes: {first_few(sizes, 4) or 'none'}"]
    areas = np.array(summary.areas)
    filled = 100 * areas[areas > 0]
    if len(filled):
        percent = ", ".join(f"{area:.1f}" for area in np.quantile(filled, QUANTILES))
        lines.append(f"  mask area in % of the image (5, 25, 50, 75, 95 % of the masks): {percent}")
    lines.append(f"  empty masks: {len(areas) - len(filled)}")
    if summary.prompts:
        keys = []
        for key, count in summary.prompts.items():
            keys.append(key if count == summary.records else f"{key} ({count})")
        words = f"{np.mean(summary.words):.1f} words on average, {max(summary.words)} at most"
        lines.append(f"  prompts: {', '.join(keys)}; {words}")
    if summary.unreadable:
        lines.append(f"  UNREADABLE: {len(summary.unreadable)} ({first_few(summary.unreadable)})")
    return lines


def _examples(pairs, sign):
    """Return the first pairs of names as text."""
    return first_few(name if name == other else f"{name} {sign} {other}" for name, other in pairs)


def sheet_rows(splits):
    """Return rows of a contact sheet, as `figures.sheet` takes them, of records spread over all splits.

    A row: image uint8 `[H, W, 3]`, mask bool `[H, W]`, no predictions, the longest prompt, a caption.
    """
    rows = []
    most = max(1, SHEET_ROWS // len(splits))
    for split, records in splits.items():
        places = np.linspace(0, len(records) - 1, min(len(records), most)).round()
        for i in places.astype(int):
            record = records[i]
            try:
                image = read_image(record.image)
                mask = read_mask(record.mask)
            except (ImageError, OSError):
                continue
            prompt = max(prompt_texts(record), key=len, default="")
            rows.append((image, mask, [], prompt, f"{split}: {record.mask_name}"))
    return rows
