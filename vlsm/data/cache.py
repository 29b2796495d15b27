"""The decode-once cache: every image is read, checked and resized once, into memory-mapped uint8 arrays.

An entry of the cache is one file of planes `[S, S]`: three for each image of a split, one for each mask, and
one that begins with their checksum. Also: batches on the device.
"""

import glob
import hashlib
import json
import math
import os
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from vlsm.data.images import (
    READERS,
    ImageError,
    LabelMask,
    class_target,
    orientation,
    read_image,
    read_labels,
    read_mask,
    read_target,
)
from vlsm.data.records import DataError, index_images, source_key
from vlsm.data.resize import (
    describe_inverted,
    describe_smaller,
    least_side,
    resize_image,
    resize_mask,
    touches_corners,
)
from vlsm.system.console import progress, say, say_once
from vlsm.system.files import atomic_write, digest, note_input, reserve

FORMAT = 4  # increased whenever a reader or a resizer gives other pixels: old cache files are then ignored


def default_cache():
    """Return the folder of the decode-once cache, unless --cache-dir names one."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return str(Path(base).expanduser() / "vlsm")


class CachedSplit:
    """The records of a split, and their pixels at the model's size.

    images: uint8 `[M, 3, S, S]`; masks: uint8 `[N, S, S]`, 0, 1, and 255 where pixels are ignored. Both are
    numpy arrays, or tensors after `move_to`.
    image_of: `[N]`, the image of each record (several may share one).
    """

    def __init__(self, records, images, masks, image_of):
        self.records = records
        self.images = images
        self.masks = masks
        self.image_of = np.asarray(image_of)
        self.side = masks.shape[-1]

    def __len__(self):
        return len(self.records)

    @cached_property
    def checksum(self):
        """Return 16 letters that change when a pixel does, wherever the files lie.

        Every start computes them: CRC-32 is several times faster than `digest`.
        """
        return f"{zlib.crc32(self.images.reshape(-1)):08x}{zlib.crc32(self.masks.reshape(-1)):08x}"

    def batch(self, indices, with_images=True):
        """Return (images uint8 `[B, 3, S, S]` or None, masks uint8 `[B, 1, S, S]`) of some records."""
        images = _rows(self.images, self.image_of[indices]) if with_images else None
        masks = _rows(self.masks, indices)
        return images, masks[:, None]

    def image_range(self, rows):
        """Return uint8 `[n, 3, S, S]` of a range of images (not records)."""
        return _rows(self.images, list(rows))

    def move_to(self, device):
        """Copy all pixels to a GPU, if they take at most an eighth of its free memory."""
        nbytes = self.images.nbytes + self.masks.nbytes
        if device.type != "cuda" or nbytes > torch.cuda.mem_get_info(device)[0] / 8:
            return
        self.images = torch.from_numpy(np.array(self.images)).to(device)
        self.masks = torch.from_numpy(np.array(self.masks)).to(device)


def _rows(pixels, indices):
    """Return rows of a numpy array, or of a tensor, as a tensor on the same device."""
    if isinstance(pixels, np.ndarray):
        return torch.from_numpy(pixels[indices])
    return pixels[torch.as_tensor(indices).to(pixels.device, non_blocking=True)]


def chunks(order, size):
    """Split a list or range into parts of `size`; the last one may be shorter.

    A last one of a single item joins the part before: `torch.compile` would build every graph anew for it.
    """
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    if size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [order[-size - 1 :]]
    return parts


def prefetch(read, batches):
    """Yield (batch, read(batch)) of each batch; a thread reads the next one while one is in use."""
    if not batches:
        return
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read, batches[0])
        for k, batch in enumerate(batches):
            content = reading.result()
            if k + 1 < len(batches):
                reading = reader.submit(read, batches[k + 1])
            yield batch, content


def device_batches(data, batches, device, with_images=True):
    """Yield (indices, images, masks) of each batch of a split on the device, shaped as `CachedSplit.batch`.

    The next batch is read while one is in use.
    """

    def read(indices):
        tensors = data.batch(indices, with_images)
        if device.type != "cuda":
            return tensors
        # pinned memory is copied while the GPU computes; pixels that are on the GPU need no copy
        return [t.pin_memory() if t is not None and t.device.type == "cpu" else t for t in tensors]

    for indices, (images, masks) in prefetch(read, batches):
        if images is not None:
            images = images.to(device, non_blocking=True)
        yield indices, images, masks.to(device, non_blocking=True)


# Decoding


class _BadRecord(Exception):
    """A record that cannot be used. args: (problem, name to print)."""


def _read_pair(record):
    """Return (image uint8 `[H, W, 3]`, mask bool `[H, W]`, or the numbers of its label map) of a record.

    Raises _BadRecord.
    """
    if record.problem:
        raise _BadRecord(record.problem, record.name)
    image = _read(read_image, record.image, "image", record.name)
    reader = read_labels
    if not isinstance(record.mask, LabelMask):
        reader = partial(read_mask, one_colour=not record.several_colours)
    mask = _read(reader, record.mask_source, "mask", record.mask_name)
    if image.shape[:2] != mask.shape:
        height, width, _ = image.shape
        mask_height, mask_width = mask.shape
        sizes = f"{width} x {height}, mask {mask_width} x {mask_height}"
        problem = "image and mask of different size"
        if (width, height) == (mask_height, mask_width) and orientation(record.image) != 1:
            problem = "photo that its EXIF orientation turns, and mask that is not turned; turn the mask"
        raise _BadRecord(problem, f"{record.name} ({sizes})")
    if orientation(record.image) != orientation(record.files[-1]):
        say_once(
            "orientation",
            f"'{record.name}' is turned upright by its EXIF orientation, and its mask has another: look with "
            "python datasets.py --check whether masks match (said once).",
        )
    return image, mask


def _read(reader, source, content, name):
    """Return what `reader` reads of a file with this content ("image" or "mask"). Raises _BadRecord."""
    try:
        return reader(source)
    except FileNotFoundError:
        raise _BadRecord(f"{content} without file", name) from None
    except Exception as error:  # an unexpected error drops only this record, too
        reason = error.reason if isinstance(error, ImageError) else type(error).__name__
        raise _BadRecord(f"{content} that cannot be used ({reason})", name) from error


def decode(records, images, masks, label):
    """Read, check and resize all records into the arrays, in several threads.

    images: uint8 `[M, 3, S, S]`; masks: uint8 `[N, S, S]`. Raises DataError, which lists all problems.
    """
    first_rows, image_of = index_images(records)
    owners = set(first_rows)
    groups = _same_files(records)
    size = masks.shape[-1]

    def decode_group(indices):
        """Read an image and its mask once for all records of both; return what is wrong, or None."""
        first = indices[0]
        try:
            image, mask = _read_pair(records[first])
        except _BadRecord as error:
            return error.args
        for i in indices:
            source = records[i].mask
            target = class_target(mask, source) if isinstance(source, LabelMask) else mask
            masks[i] = resize_mask(target, size)
        if first in owners:
            images[image_of[first]] = resize_image(image, size).transpose(2, 0, 1)
        return None

    problems = defaultdict(list)
    with ThreadPoolExecutor(READERS) as pool, progress(len(records), f"reading {label}") as bar:
        for indices, problem in zip(groups, pool.map(decode_group, groups)):
            bar.update(len(indices))
            if problem:
                description, name = problem
                problems[description] += [(i, name) for i in indices]
    if problems:
        raise DataError(problems, len(records))


def _same_files(records):
    """Return lists of indices: the classes of one label map together, other records alone."""
    groups = {}
    for i, record in enumerate(records):
        key = i
        if isinstance(record.mask, LabelMask) and not record.problem:
            key = tuple(source_key(file) for file in record.files)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


# The files


def open_split(records, size, folder, label, need_foreground=True):
    """Return the `CachedSplit` of records: from the cache in `folder` if it fits, else decoded and cached.

    folder: None for no cache. need_foreground: refuse a split without any. Raises DataError for records that
    cannot be used, ValueError if no mask has foreground at this size, OSError if the folder cannot be
    written.
    """
    images = {source_key(record.image) for record in records}
    shape = (3 * len(images) + len(records) + 1, size, size)
    if folder is None or isinstance(records[0].image, np.ndarray):
        split = _fill_entry(np.empty(shape, np.uint8), records, label)
    else:
        split = _cached_split(records, shape, Path(folder), label)
    if need_foreground:
        _check_foreground(records, split.masks, label)
    return split


def _check_foreground(records, masks, label):
    """Tell of masks without background, and of lesions below a pixel. Raises ValueError if all are empty."""
    areas = np.array([(mask == 1).sum() for mask in masks])
    if not areas.any():
        raise ValueError(
            f"Every mask of {label} is empty ({len(records)} masks), so nothing can be learnt. Foreground is "
            "white (255), or 1 in a file of 0 and 1."
        )
    size = masks.shape[-1]
    inverted = sum(touches_corners(mask) for mask in masks)
    if inverted > len(areas) / 2:
        say(f"{label}: {describe_inverted(inverted, len(areas))}")
    sides = [least_side(read_target(records[i].mask)) for i in np.flatnonzero(areas == 1)]
    smaller = [side for side in sides if side > size]
    if smaller:
        say(f"{label}: {describe_smaller(smaller, len(areas), size)}")


def _cached_split(records, shape, folder, label):
    """Return the `CachedSplit` mapped from its file of `shape`; write a missing or broken file anew."""
    first_folder = Path(records[0].image).parent
    source = digest(str(first_folder).encode(), 4)  # data sets of one name in two folders stay apart
    stem = f"{label.replace('/', '-').replace(' ', '-')}-{source}-{shape[-1]}"
    file = folder / f"{stem}-{_cache_key(records, label)}.pixels"
    split = _open_entry(file, shape, records)
    if split is None:
        split = _write_entry(file, shape, records, label)
        for old in folder.glob(f"{glob.escape(stem)}-*"):  # of earlier states
            if old != file:
                _delete_unused(old)
    return split


def _cache_key(records, label):
    """Return a hash of every file's path and content, whatever its time says, and of how masks are read."""
    files = dict.fromkeys(file for record in records for file in record.files)  # records may share one
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(progress(pool.map(_content, files), f"comparing {label}"))
    stamps = [(record.problem, str(record.image), str(record.mask)) for record in records]
    return digest(json.dumps([FORMAT, stamps, contents]).encode())


def _content(path):
    """Return the digest of a file; None for a missing one, which is reported later, when it is decoded."""
    try:
        return hashlib.sha256(Path(note_input(path)).read_bytes()).hexdigest()  # faster than `digest`
    except OSError:
        return None


def _entry_split(entry, records):
    """Return the `CachedSplit` that is a view of an entry's planes."""
    first, image_of = index_images(records)
    images, masks, _ = np.split(entry, [3 * len(first), -1])
    return CachedSplit(records, images.reshape(-1, 3, *masks.shape[1:]), masks, image_of)


def _fill_entry(entry, records, label):
    """Decode the records into an entry's planes; returns their `CachedSplit`."""
    split = _entry_split(entry, records)
    decode(records, split.images, split.masks, label)
    entry[-1].flat[:16] = list(split.checksum.encode())
    return split


def _open_entry(file, shape, records):
    """Return the `CachedSplit` of a file; None if it is missing, too short or changed."""
    try:
        entry = _map_file(file, "r", shape)
    except (OSError, ValueError):
        return None
    split = _entry_split(entry, records)
    return split if bytes(entry[-1].flat[:16]) == split.checksum.encode() else None


def _write_entry(file, shape, records, label):
    """Decode the records into a new file; returns their `CachedSplit`.

    Raises OSError, which names the folder.
    """
    nbytes = math.prod(shape)
    try:
        with atomic_write(file) as temporary:
            reserve(temporary, nbytes)
            entry = _map_file(temporary, "r+", shape)
            split = _fill_entry(entry, records, label)
            entry.flush()
    except OSError as error:
        raise OSError(
            f"The cache folder '{file.parent}' cannot be written ({error.strerror or error}). It needs "
            f"{nbytes:,} bytes more. Name another with --cache-dir."
        ) from error
    return split


def _map_file(path, mode, shape):
    """Return a file's bytes, mapped to memory; while they are mapped the file stays in the cache."""
    with open(path, mode + "b") as file:
        with suppress(ImportError, OSError):  # without locks nothing is deleted, see `_delete_unused`
            import fcntl

            fcntl.flock(file, fcntl.LOCK_SH)  # the mapping keeps a copy of the handle, and with it the lock
        return np.memmap(file, mode=mode, shape=shape)


def _delete_unused(path):
    """Delete a file of the cache that no process has mapped; else a later start tries again."""
    with suppress(ImportError, OSError):
        import fcntl

        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
