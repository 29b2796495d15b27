"""The decode-once cache: every image read, checked and resized one single time, into memory-mapped uint8
arrays.
"""

import glob
import hashlib
import json
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vlsm.data.images import ImageError, read_image, read_mask, resize_image, resize_mask
from vlsm.data.records import DataError, index_images
from vlsm.system.console import ADVICE, progress
from vlsm.system.files import atomic_write, reserve, sweep_temporary

FORMAT = 2  # of what the readers make of a file
THREADS = min(16, os.cpu_count() or 1)  # that decode: Pillow and numpy let others run meanwhile


def default_cache():
    """Return the folder of the decode-once cache, unless --cache-dir names one."""
    return str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlsm")


class CachedSplit:
    """A split ready for training: `records`, and their pixels at the model's size.

    images: uint8 `[M, 3, S, S]`; masks: uint8 0/1 `[N, S, S]`; image_of: `[N]`, the image of each record
    (several may share one).
    """

    def __init__(self, records, images, masks, image_of):
        self.records, self.images, self.masks, self.image_of = records, images, masks, np.asarray(image_of)
        self.image_count, self.side, self.nbytes = len(images), masks.shape[-1], images.nbytes + masks.nbytes
        self.on_device = None  # copies of images and masks

    def __len__(self):
        return len(self.records)

    def batch(self, indices, with_images=True):
        """Return (images uint8 `[B, 3, S, S]`, or None; masks uint8 `[B, 1, S, S]`) of records, where they
        lie.
        """
        rows = self.image_of[indices]
        if self.on_device:
            images, masks = self.on_device
            rows, indices = (torch.as_tensor(i).to(images.device, non_blocking=True) for i in (rows, indices))
            return images[rows] if with_images else None, masks[indices][:, None]
        images = torch.from_numpy(self.images[rows]) if with_images else None
        return images, torch.from_numpy(self.masks[indices][:, None])

    def image_range(self, rows):
        """Return uint8 `[n, 3, S, S]` of a range of images (not records)."""
        return torch.from_numpy(np.array(self.images[rows.start : rows.stop]))

    def move_to(self, device):
        """Copy all pixels to a GPU, if they take at most an eighth of its free memory; `batch` uses them."""
        if device.type != "cuda" or self.nbytes > torch.cuda.mem_get_info(device)[0] / 8:
            return
        self.on_device = [torch.from_numpy(np.array(a)).to(device) for a in (self.images, self.masks)]

    def has_foreground(self):
        """Tell whether any mask has foreground; as a rule the first one does."""
        return any(mask.any() for mask in self.masks)

    def min_over_ranks(self, n):
        """Return the least of a number over the processes that call `batch` together: here this one alone."""
        return n

    def equalise_batches(self, batches):
        """Return the batches for which `batch` is to be called in turn, where this process wants these."""
        return batches


def chunks(order, size):
    """Split a list or range into parts of `size`, the last one maybe shorter."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def prefetch(read, batches):
    """Yield (batch, read(batch)) of each batch; a thread reads the next one while one is in use."""
    if not batches:
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, batches[0])
        for batch, after in zip(batches, [*batches[1:], None]):
            present = coming.result()
            if after is not None:
                coming = reader.submit(read, after)
            yield batch, present


def device_batches(data, batches, device, with_images=True):
    """Yield (indices, images, masks) of each batch of a split, as `CachedSplit.batch`, on the device.

    The next batch is read while one is in use.
    """

    def read(indices):
        tensors = data.batch(indices, with_images)
        if device.type == "cuda" and not data.on_device:  # pinned memory travels while the GPU computes
            tensors = [t if t is None else t.pin_memory() for t in tensors]
        return tensors

    for indices, tensors in prefetch(read, data.equalise_batches(batches)):
        if indices:
            yield indices, *(t if t is None else t.to(device, non_blocking=True) for t in tensors)


# Decoding


def _decode(job):
    """Decode one record.

    Returns its index, and (image `[3, S, S]` or None, mask `[S, S]`), or (kind of problem, name).
    """
    i, record, size, with_image = job
    if record.problem:
        return i, (record.problem, record.name)
    pixels = []
    for what, read in (("image", read_image), ("mask", read_mask)):
        name = record.name if what == "image" else record.mask_name
        try:
            pixels.append(read(getattr(record, what)))
        except FileNotFoundError:
            return i, (f"{what} without file", name)
        except Exception as error:  # what no reader foresaw costs its own record alone, too
            reason = error.reason if isinstance(error, ImageError) else type(error).__name__
            return i, (f"{what} that cannot be used ({reason})", name)
    image, mask = pixels
    if image.shape[:2] != mask.shape:
        (h, w), (mh, mw) = image.shape[:2], mask.shape
        return i, ("image and mask of different size", f"{record.name} ({w} x {h}, mask {mw} x {mh})")
    small = resize_image(image, size).transpose(2, 0, 1) if with_image else None
    return i, (small, resize_mask(mask, size))


def decode(records, images, masks, label):
    """Read, check and resize all records into the arrays, in several threads.

    Raises DataError, all problems at once.
    """
    first, image_of = index_images(records)
    size = masks.shape[-1]
    owners, problems = set(first), defaultdict(list)
    jobs = [(i, r, size, i in owners) for i, r in enumerate(records)]
    with ThreadPoolExecutor(THREADS) as pool, progress(len(jobs), f"reading {label}") as bar:
        for i, result in pool.map(_decode, jobs):
            bar.update()
            if isinstance(result[0], str):
                problems[result[0]].append((i, result[1]))
                continue
            image, masks[i] = result
            if image is not None:
                images[image_of[i]] = image
    if problems:
        raise DataError(problems, len(records))


def refuse_empty(has_foreground, count, label):
    """Raise ValueError where none of so many masks has foreground."""
    if not has_foreground:
        raise ValueError(
            f"Every mask of {label} is empty ({count} masks): there is nothing to learn. Foreground is white "
            "(255), or 1 in a file of 0 and 1."
        )


# The files


def open_split(records, size, folder, label):
    """Return the `CachedSplit`, from the cache in `folder` where it is there and fits, else decoded and
    cached.

    folder: None for no cache. Raises DataError for records that cannot be used, ValueError where no mask has
    foreground at this size, or the folder cannot be written.
    """
    data = open_cached(records, size, folder, label)
    refuse_empty(data.has_foreground(), len(data), label)
    return data


def open_cached(records, size, folder, label):
    """Do as `open_split`, but for its look at the masks; there may be no records.

    The key covers every file's name, size and modification time and the size asked for. A broken file is made
    anew.
    """
    _, image_of = index_images(records)
    shapes = [(max(image_of, default=-1) + 1, 3, size, size), (len(records), size, size)]
    in_memory = any(isinstance(r.image, np.ndarray) for r in records)
    if folder is None or not records or in_memory:
        arrays = [np.empty(shape, np.uint8) for shape in shapes]
        decode(records, *arrays, label)
        return CachedSplit(records, *arrays, image_of)
    stem, key = _cache_name(records, size, label)
    files = [Path(folder) / f"{stem}-{key}.{kind}.npy" for kind in ("images", "masks")]
    if _open_arrays(files, shapes) is None:
        _write_arrays(files, shapes, records, label)
        for old in Path(folder).glob(f"{glob.escape(stem)}-*.npy"):  # of earlier states of the same files
            if old not in files:
                old.unlink(missing_ok=True)
    return CachedSplit(records, *_open_arrays(files, shapes), image_of)


def _cache_name(records, size, label):
    """Return what the cache files of some records are called, and the key of the present state of their
    files.
    """
    stamps = [[_stamp(r.image), _stamp(r.mask)] for r in records]
    key = hashlib.blake2b(json.dumps([FORMAT, size, stamps]).encode(), digest_size=8).hexdigest()
    where = hashlib.blake2b(str(Path(records[0].image).parent).encode(), digest_size=4).hexdigest()
    return f"{label.replace('/', '-').replace(' ', '-')}-{where}-{size}", key


def _stamp(path):
    """Return what changes when a file does; a missing file has none (it is reported when it is read)."""
    try:
        stat = os.stat(path)
        return [str(path), stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [str(path), -1, -1]


def _write_arrays(files, shapes, records, label):
    try:
        Path(files[0]).parent.mkdir(parents=True, exist_ok=True)
        sweep_temporary(files[0].parent)
        with atomic_write(files[0]) as images, atomic_write(files[1]) as masks:
            arrays = [_array_on_disk(f, shape) for f, shape in zip((images, masks), shapes)]
            decode(records, *arrays, label)
            for array in arrays:
                array.flush()
    except OSError as error:
        reason = ADVICE.get(error.errno) or error.strerror
        raise ValueError(
            f"The cache folder '{files[0].parent}' cannot be written ({reason}). It is to hold "
            f"{sum(map(math.prod, shapes)):,} bytes more. Name another with --cache-dir."
        ) from error


def _array_on_disk(file, shape):
    """Return a uint8 array mapped to a .npy file, all of whose blocks are the disk's before it is written."""
    with open(file, "wb") as header:
        about = dict(descr="|u1", fortran_order=False, shape=tuple(shape))
        np.lib.format.write_array_header_1_0(header, about)
        offset = header.tell()
    reserve(file, math.prod(shape), offset)
    return np.memmap(file, np.uint8, "r+", offset, tuple(shape))


def _open_arrays(files, shapes):
    try:
        arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    except (OSError, ValueError, EOFError):
        return None
    fits = all(a.shape == shape and a.dtype == np.uint8 for a, shape in zip(arrays, shapes))
    return arrays if fits else None
