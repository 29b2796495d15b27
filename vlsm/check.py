"""A data set at a glance: counts, sizes, mask areas, empty masks, pictures that two splits share or nearly do, prompts; a contact sheet."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from . import pictures
from .cache import image_index
from .checkpoint import replacing
from .console import progress
from .images import read_image, read_mask

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ON_THE_SHEET = 8
THUMBNAIL, ALIKE = 16, 0.99  # side of the thumbnails, and their correlation from which on two pictures are taken for frames of one video


def look(splits):
    """{split: what its records hold}, of {split: records}; pictures are read once each. What cannot be read is counted, not raised."""
    found = {}
    for part, records in splits.items():
        first, _ = image_index(records)
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
            except OSError:
                seen["unreadable"].append(record.name)
            for key, value in record.prompts.items():
                seen["prompts"][key] += 1
                seen["words"] += [len(text.split()) for text in ([value] if isinstance(value, str) else value)]
        found[part] = seen
    return found


def shared(found):
    """Pairs of splits with the names of pictures that are the same in both, pixel for pixel."""
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


def _thumbnail(image):
    """A picture's colours on a coarse grid, of mean 0 and length 1: the product of two is their correlation. One colour: zeros."""
    small = np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel()
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-6)


def alike(found):
    """{(split, earlier split): [(name, the other's most like it), ...]}, the most alike first; without those that are the same."""
    same, parts, out = shared(found), list(found), {}
    for k, part in enumerate(parts):
        for other in parts[:k]:
            twice = {name for _, name in same.get((other, part), [])}
            mine = [(name, small) for name, small in found[part]["thumbnails"] if name not in twice]
            if not mine or not found[other]["thumbnails"]:
                continue
            theirs, those = zip(*found[other]["thumbnails"])
            those, pairs = np.stack(those).T, []
            for first in range(0, len(mine), 512):
                names, these = zip(*mine[first : first + 512])
                product = np.stack(these) @ those
                best = zip(product.max(1).tolist(), names, product.argmax(1).tolist())
                pairs += [(value, name, theirs[i]) for value, name, i in best if value > ALIKE]
            if pairs:
                out[part, other] = [(name, like) for _, name, like in sorted(pairs, reverse=True)]
    return out


def in_words(name, found):
    """The fingerprint as text; leakage is said last."""
    lines = []
    for part, seen in found.items():
        areas = np.array(seen["areas"] or [np.nan])
        full = areas[areas > 0]
        lines.append(f"{name} {part}: {seen['records']} records of {seen['images']} images")
        sizes = ", ".join(f"{w} x {h} ({n})" for (w, h), n in seen["sizes"].most_common(4))
        lines.append(f"  sizes: {sizes or 'none'}{', ...' if len(seen['sizes']) > 4 else ''}")
        if len(full):
            share = ", ".join(f"{100 * v:.1f}" for v in np.quantile(full, QUANTILES))
            lines.append(f"  mask area in % of the image (5, 25, 50, 75, 95 % of the masks): {share}")
        lines.append(f"  empty masks: {int((areas == 0).sum())}")
        if seen["prompts"]:
            keys = ", ".join(f"{key} ({n})" if n < seen["records"] else key for key, n in seen["prompts"].items())
            lines.append(f"  prompts: {keys}; {np.mean(seen['words']):.1f} words on average, {max(seen['words'])} at most")
        if seen["unreadable"]:
            lines.append(f"  UNREADABLE: {len(seen['unreadable'])} ({', '.join(seen['unreadable'][:3])}, ...)")
    for (part, other), names in shared(found).items():
        some = ", ".join(a if a == b else f"{a} = {b}" for a, b in names[:3])
        more = ", ..." if len(names) > 3 else ""
        lines.append(f"WARNING: {len(names)} pictures are in {part} and in {other} ({some}{more}): results would leak.")
    for (part, other), names in alike(found).items():
        some = ", ".join(f"{a} ~ {b}" for a, b in names[:3])
        more = ", ..." if len(names) > 3 else ""
        total = found[part]["images"]
        lines.append(
            f"NOTE: {len(names)} of {total} pictures in {part} look nearly like one in {other} ({some}{more}): frames of one video, or one "
            "patient's? Scores on them flatter."
        )
    return "\n".join(lines)


def contact_sheet(splits, path):
    """Write a sheet of records spread evenly over the splits: image and mask, name and longest prompt."""
    rows = []
    for part, records in splits.items():
        count = min(len(records), max(1, ON_THE_SHEET // len(splits)))
        for i in np.linspace(0, len(records) - 1, count).round().astype(int):
            record = records[i]
            try:
                image, truth = read_image(record.image), read_mask(record.mask)
            except OSError:
                continue
            texts = [t for value in record.prompts.values() for t in ([value] if isinstance(value, str) else value)]
            rows.append((image, truth, [], max(texts, key=len, default=""), f"{part}: {record.mask_name}"))
    with replacing(Path(path)) as temporary:
        pictures.sheet(rows, temporary, names=())
