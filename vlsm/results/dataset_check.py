"""A data set at a glance: counts, sizes, mask areas, empty masks, prompts; images that two splits share, or
nearly do.

And a contact sheet.
"""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from vlsm.data.images import ImageError, read_image, read_mask
from vlsm.data.prompts import prompt_texts
from vlsm.data.records import index_images
from vlsm.results import figures
from vlsm.system.console import progress
from vlsm.system.files import owned_write

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ON_THE_SHEET = 8
THUMBNAIL = 16  # side
ALIKE = 0.99  # correlation of thumbnails from which on two images are taken for frames of one video


def inspect_splits(splits):
    """Return {split: what its records hold}, of {split: records}; images are read once each.

    What cannot be read is counted, not raised.
    """
    return {part: _inspect(part, records) for part, records in splits.items()}


def _inspect(part, records):
    first, _ = index_images(records)
    seen = dict(records=len(records), images=len(first), sizes=Counter(), areas=[], hashes={}, unreadable=[])
    seen.update(prompts=Counter(), words=[], thumbnails=[])
    owners = set(first)
    for i, record in enumerate(progress(records, f"looking at {part}")):
        try:
            if i in owners:
                image = read_image(record.image)
                seen["sizes"][image.shape[1], image.shape[0]] += 1
                seen["hashes"][hashlib.blake2b(image.tobytes(), digest_size=16).digest()] = record.name
                seen["thumbnails"].append((record.name, _thumbnail(image)))
            seen["areas"].append(float(read_mask(record.mask).mean()))
        except (ImageError, OSError):
            seen["unreadable"].append(record.name)
        seen["prompts"].update(record.prompts.keys())
        seen["words"] += [len(text.split()) for text in prompt_texts(record)]
    return seen


def _thumbnail(image):
    """Return an image's colours on a coarse grid, of mean 0 and length 1: the product of two is their
    correlation.

    Of an image of one colour: zeros.
    """
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    small = np.asarray(small, np.float32).ravel()
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-6)


def shared_images(found):
    """Return {(split, other split): [(name, name there), ...]} of images that are equal."""
    where = defaultdict(list)
    for part, seen in found.items():
        for digest, name in seen["hashes"].items():
            where[digest].append((part, name))
    twice = defaultdict(list)
    for places in where.values():
        for k, (part, name) in enumerate(places):
            for other, same in places[k + 1 :]:
                twice[part, other].append((name, same))
    return dict(twice)


def similar_images(found):
    """Return {(split, earlier split): [(name, the most like it there), ...]}, the most alike first.

    Images that are the same are left out.
    """
    same, parts, out = shared_images(found), list(found), {}
    for k, part in enumerate(parts):
        for other in parts[:k]:
            twice = {name for _, name in same.get((other, part), [])}
            mine = [(name, small) for name, small in found[part]["thumbnails"] if name not in twice]
            theirs = found[other]["thumbnails"]
            pairs = sorted(_closest(mine, theirs), reverse=True) if mine and theirs else []
            if pairs:
                out[part, other] = [(name, like) for _, name, like in pairs]
    return out


def _closest(mine, theirs):
    """Yield (correlation, name, the other's name) of thumbnails whose most alike one is nearly the same."""
    names, others = zip(*theirs)
    others = np.stack(others).T
    for first in range(0, len(mine), 512):
        own_names, own = zip(*mine[first : first + 512])
        product = np.stack(own) @ others
        for value, name, i in zip(product.max(1).tolist(), own_names, product.argmax(1).tolist()):
            if value > ALIKE:
                yield value, name, names[i]


def describe(name, found):
    """Return the fingerprint as text; leakage comes last."""
    lines = [line for part, seen in found.items() for line in _describe_split(name, part, seen)]

    def examples(pairs, sign):
        some = ", ".join(a if a == b else f"{a} {sign} {b}" for a, b in pairs[:3])
        return some + (", ..." if len(pairs) > 3 else "")

    for (part, other), pairs in shared_images(found).items():
        some = examples(pairs, "=")
        lines.append(
            f"WARNING: {len(pairs)} pictures are in {part} and in {other} ({some}): results would leak."
        )
    for (part, other), pairs in similar_images(found).items():
        lines.append(
            f"NOTE: {len(pairs)} of {found[part]['images']} pictures in {part} look nearly like one in "
            f"{other} ({examples(pairs, '~')}): frames of one video, or one patient's? Scores on them "
            "flatter."
        )
    return "\n".join(lines)


def _describe_split(name, part, seen):
    areas = np.array(seen["areas"] or [np.nan])
    full = areas[areas > 0]
    yield f"{name} {part}: {seen['records']} records of {seen['images']} images"
    sizes = ", ".join(f"{w} x {h} ({n})" for (w, h), n in seen["sizes"].most_common(4))
    yield f"  sizes: {sizes or 'none'}{', ...' if len(seen['sizes']) > 4 else ''}"
    if len(full):
        share = ", ".join(f"{100 * v:.1f}" for v in np.quantile(full, QUANTILES))
        yield f"  mask area in % of the image (5, 25, 50, 75, 95 % of the masks): {share}"
    yield f"  empty masks: {int((areas == 0).sum())}"
    if seen["prompts"]:
        keys = ", ".join(f"{k} ({n})" if n < seen["records"] else k for k, n in seen["prompts"].items())
        words = seen["words"]
        yield f"  prompts: {keys}; {np.mean(words):.1f} words on average, {max(words)} at most"
    if seen["unreadable"]:
        yield f"  UNREADABLE: {len(seen['unreadable'])} ({', '.join(seen['unreadable'][:3])}, ...)"


def contact_sheet(splits, path):
    """Write a sheet of records spread over {split: records}: image and mask, name and longest prompt."""
    rows = []
    for part, records in splits.items():
        count = min(len(records), max(1, ON_THE_SHEET // len(splits)))
        for i in np.linspace(0, len(records) - 1, count).round().astype(int):
            record = records[i]
            try:
                image, truth = read_image(record.image), read_mask(record.mask)
            except (ImageError, OSError):
                continue
            prompt = max(prompt_texts(record), key=len, default="")
            rows.append((image, truth, [], prompt, f"{part}: {record.mask_name}"))
    with owned_write(Path(path)) as temporary:
        figures.sheet(rows, temporary, names=())
