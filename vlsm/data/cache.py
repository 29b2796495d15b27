"""The decode-once cache: every image is read, checked and resized once, into memory-mapped uint8 arrays.

Also: batches on the device.
"""

import glob
import json
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vlsm.data.images import (
    READERS,
    ImageError,
    LabelMask,
    MaskUnion,
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
from vlsm.system.console import ADVICE, progress, say, say_once
from vlsm.system.files import atomic_write, digest, reserve, sweep_temporary

FORMAT = 3  # increased whenever a reader or a resizer gives other pixels: old cache files are then ignored


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
    """Split a list or range into parts of `size`; the last one may be shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


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
    cannot be used, ValueError if no mask has foreground at this size or the folder cannot be written.
    """
    first, image_of = index_images(records)
    shapes = [(len(first), 3, size, size), (len(records), size, size)]
    in_memory = any(isinstance(record.image, np.ndarray) for record in records)
    if folder is None or in_memory:
        images, masks = (np.empty(shape, np.uint8) for shape in shapes)
        decode(records, images, masks, label)
    else:
        images, masks = _cached_arrays(records, shapes, Path(folder), label)
    if need_foreground:
        _check_foreground(records, masks, label)
    return CachedSplit(records, images, masks, image_of)


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


def _cached_arrays(records, shapes, folder, label):
    """Return (images, masks) mapped from cache files of `shapes`; write missing or broken files anew."""
    size = shapes[0][-1]
    first_folder = Path(records[0].image).parent
    source = digest(str(first_folder).encode(), 4)  # data sets of one name in two folders stay apart
    stem = f"{label.replace('/', '-').replace(' ', '-')}-{source}-{size}"
    key = _cache_key(records, size)
    files = [folder / f"{stem}-{key}.{content}.npy" for content in ("images", "masks")]
    arrays = _open_arrays(files, shapes)
    if arrays is None:
        _write_arrays(files, shapes, records, label)
        for old in folder.glob(f"{glob.escape(stem)}-*.npy"):  # of earlier states of the same files
            if old not in files:
                old.unlink(missing_ok=True)
        arrays = _open_arrays(files, shapes)
    return arrays


def _cache_key(records, size):
    """Return a hash of the size and of every file's path, length and modification time."""
    stamps = []
    for record in records:
        stamp = [record.problem, *map(_stamp, record.files)]
        if isinstance(record.mask, LabelMask):
            stamp += [record.mask.value, record.mask.ignore]
        if isinstance(record.mask, MaskUnion):
            stamp.append(record.mask.any_value)
        stamps.append(stamp)
    text = json.dumps([FORMAT, size, stamps])
    return digest(text.encode())


def _stamp(path):
    """Return values that change when a file does; a missing file is reported later, when it is read."""
    try:
        stat = os.stat(path)
    except OSError:
        return [str(path), -1, -1]
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _write_arrays(files, shapes, records, label):
    """Decode the records into cache files, all or none. Raises ValueError, which names the folder."""
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporary(folder)
        with atomic_write(files[0]) as image_file, atomic_write(files[1]) as mask_file:
            images = _array_on_disk(image_file, shapes[0])
            masks = _array_on_disk(mask_file, shapes[1])
            decode(records, images, masks, label)
            images.flush()
            masks.flush()
    except OSError as error:
        reason = ADVICE.get(error.errno) or error.strerror
        nbytes = sum(math.prod(shape) for shape in shapes)
        raise ValueError(
            f"The cache folder '{folder}' cannot be written ({reason}). It needs {nbytes:,} bytes more. Name "
            "another with --cache-dir."
        ) from error


def _array_on_disk(file, shape):
    """Return a uint8 array mapped to a new .npy file whose blocks are all reserved on the disk."""
    array = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    reserve(file, array.nbytes, array.offset)
    return array


def _open_arrays(files, shapes):
    """Return the arrays mapped from files, or None if one is missing, broken or of another shape."""
    arrays = []
    for file, shape in zip(files, shapes):
        try:
            array = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        if array.shape != shape or array.dtype != np.uint8:
            return None
        arrays.append(array)
    return arrays
