"""The decode-once cache: every picture read, checked and resized one single time, into memory-mapped uint8 arrays."""

import glob
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .checkpoint import replacing
from .console import progress
from .images import read_image, read_mask, resize_image, resize_mask

FORMAT = 1


@dataclass
class Record:
    """One (image, mask, prompts) triple. image, mask: a path, or the pixels (uint8 `[H, W, 3]`, bool `[H, W]`)."""

    name: str  # of the image, for people
    mask_name: str
    image: object
    mask: object
    prompts: dict = field(default_factory=dict)
    class_word: str | None = None
    problem: str | None = None  # why it cannot be used, where that is known before its files are read


class DataError(ValueError):
    """All that is wrong with a data set, grouped, in one message. `bad`: indices of the records it concerns."""

    def __init__(self, problems, total):
        self.problems, self.bad = problems, sorted({i for hits in problems.values() for i, _ in hits})
        lines = [f"{len(self.bad)} of {total} records cannot be used:"]
        for kind, hits in problems.items():
            names = list(dict.fromkeys(name for _, name in hits))
            lines.append(f"  {len(names)} x {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        super().__init__("\n".join(lines))


class Decoded:
    """A split ready for training: `records`, and their pixels at the model's size.

    images: uint8 `[M, 3, S, S]`; masks: uint8 0/1 `[N, S, S]`; image_of: `[N]`, the image of each record (several may share one).
    """

    def __init__(self, records, images, masks, image_of):
        self.records, self.images, self.masks, self.image_of = records, images, masks, np.asarray(image_of)
        self.count, self.side, self.nbytes = len(images), masks.shape[-1], images.nbytes + masks.nbytes
        self.resident = None

    def __len__(self):
        return len(self.records)

    def pictures(self, rows):
        """uint8 `[n, 3, S, S]` of some images (not records): a range."""
        return torch.from_numpy(np.array(self.images[rows.start : rows.stop]))

    def foreground(self):
        """Whether any mask has some; as a rule the first one tells."""
        return any(mask.any() for mask in self.masks)

    def least(self, n):
        """The least of a number over the processes that call `pictures` together: here this one alone."""
        return n

    def rounds(self, parts):
        """What `batch` is to be called for, in turn, where this process wants these parts."""
        return parts

    def move(self, device):
        """Copy all pixels to a device, from where `batch` then takes them."""
        self.resident = [torch.from_numpy(np.array(a)).to(device) for a in (self.images, self.masks)]

    def batch(self, indices, with_pixels=True):
        """(pixels uint8 `[B, 3, S, S]`, or None; masks uint8 `[B, 1, S, S]`) of some records, where they lie."""
        rows = self.image_of[indices]
        if self.resident:
            images, masks = self.resident
            rows, indices = (torch.as_tensor(i).to(images.device, non_blocking=True) for i in (rows, indices))
            return images[rows] if with_pixels else None, masks[indices][:, None]
        return torch.from_numpy(self.images[rows]) if with_pixels else None, torch.from_numpy(self.masks[indices][:, None])


def parts_of(order, size):
    """A list or range in parts of `size`, the last one maybe shorter."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def ahead(read, parts):
    """(part, read(part)) of each part; a thread reads the next one while one is in use."""
    if not parts:
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, parts[0])
        for part, after in zip(parts, [*parts[1:], None]):
            present = coming.result()
            if after is not None:
                coming = reader.submit(read, after)
            yield part, present


def feed(data, parts, device, with_pixels=True):
    """(indices, pixels, masks) of each part of a split, as `Decoded.batch`, on the device; the next is read while one is in use."""

    def read(part):
        batch = data.batch(part, with_pixels)
        if device.type == "cuda" and not data.resident:  # pinned memory travels while the GPU computes
            batch = [t if t is None else t.pin_memory() for t in batch]
        return batch

    for part, batch in ahead(read, data.rounds(parts)):
        if part:
            yield part, *(t if t is None else t.to(device, non_blocking=True) for t in batch)


def image_index(records):
    """Records that share an image share its row: (one record per image, index of the image of each record)."""
    rows, image_of, first = {}, [], []
    for i, r in enumerate(records):
        key = str(r.image) if isinstance(r.image, (str, Path)) else id(r.image)
        if key not in rows:
            rows[key] = len(first)
            first.append(i)
        image_of.append(rows[key])
    return first, image_of


def _stamp(path):
    """What changes when a file does; a missing file has none (it is reported when it is read)."""
    try:
        stat = os.stat(path)
        return [str(path), stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [str(path), -1, -1]


def _decode(job):
    """One record: its index, and (image `[3, S, S]` or None, mask `[S, S]`), or (kind of problem, name)."""
    i, record, size, with_image = job
    if record.problem:
        return i, (record.problem, record.name)
    try:
        image = read_image(record.image)
    except FileNotFoundError:
        return i, ("image without file", record.name)
    except Exception as error:  # Pillow's decoders raise many types
        return i, (f"image that cannot be read ({_reason(error)})", record.name)
    try:
        mask = read_mask(record.mask)
    except FileNotFoundError:
        return i, ("mask without file", record.mask_name)
    except Exception as error:
        return i, (f"mask that cannot be read ({_reason(error)})", record.mask_name)
    if image.shape[:2] != mask.shape:
        (h, w), (mh, mw) = image.shape[:2], mask.shape
        return i, ("image and mask of different size", f"{record.name} ({w} x {h}, mask {mw} x {mh})")
    small = resize_image(image, size).transpose(2, 0, 1) if with_image else None
    return i, (small, resize_mask(mask, size))


def _reason(error):
    text = str(error)
    if "truncated" in text or "broken" in text:
        return "truncated or damaged"
    return "no picture" if "cannot identify" in text else type(error).__name__


def decode(records, images, masks, workers, label):
    """Read, check and resize all records into the arrays, in parallel processes. Raises DataError, all problems at once."""
    first, image_of = image_index(records)
    size = masks.shape[-1]
    owners, problems = set(first), defaultdict(list)
    jobs = [(i, r, size, i in owners) for i, r in enumerate(records)]
    with progress(len(jobs), f"reading {label}") as bar:
        for i, result in _parallel(jobs, workers):
            bar.update()
            if isinstance(result[0], str):
                problems[result[0]].append((i, result[1]))
                continue
            image, masks[i] = result
            if image is not None:
                images[image_of[i]] = image
    if problems:
        raise DataError(problems, len(records))


def refuse_empty(foreground, count, label):
    """Raise ValueError where none of so many masks has foreground."""
    if not foreground:
        raise ValueError(
            f"Every mask of {label} is empty ({count} masks): there is nothing to learn. Foreground must be brighter than 127; "
            "do the files hold 0 and 1 instead of 0 and 255?"
        )


def _parallel(jobs, workers):
    if workers < 2 or len(jobs) < 16:
        yield from map(_decode, jobs)
        return
    # a forked child needs no second import of torch; it runs Pillow and numpy only
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    quiet = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is the parent's to handle
    with ProcessPoolExecutor(workers, mp_context=context, **quiet) as pool:
        yield from pool.map(_decode, jobs, chunksize=8)


def open_split(records, size, folder, label, workers=None):
    """A `Decoded` split, from the cache in `folder` where it is there and fits, else decoded and (with a folder) cached.

    Raises DataError for records that cannot be used, ValueError where no mask has foreground at this size.
    """
    data = open_cached(records, size, folder, label, workers)
    refuse_empty(data.foreground(), len(data), label)
    return data


def open_cached(records, size, folder, label, workers=None):
    """`open_split` without its look at the masks; there may be no records.

    The key covers every file's name, size and modification time and the size asked for. A broken cache file is made anew.
    """
    workers = workers if workers is not None else min(16, os.cpu_count() or 1)
    _, image_of = image_index(records)
    shapes = [(max(image_of, default=-1) + 1, 3, size, size), (len(records), size, size)]
    if folder is None or not records or any(isinstance(r.image, np.ndarray) for r in records):  # no cache, or in memory already
        arrays = [np.empty(shape, np.uint8) for shape in shapes]
        decode(records, *arrays, workers, label)
        return Decoded(records, *arrays, image_of)
    stamps = [[_stamp(r.image), _stamp(r.mask)] for r in records]
    key = hashlib.blake2b(json.dumps([FORMAT, size, stamps]).encode(), digest_size=8).hexdigest()
    where = hashlib.blake2b(str(Path(records[0].image).parent).encode(), digest_size=4).hexdigest()
    stem = f"{label.replace('/', '-').replace(' ', '-')}-{where}-{size}"
    files = [Path(folder) / f"{stem}-{key}.{kind}.npy" for kind in ("images", "masks")]
    if _open_arrays(files, shapes) is None:
        try:
            with replacing(files[0]) as images, replacing(files[1]) as masks:
                arrays = [np.lib.format.open_memmap(f, "w+", np.uint8, shape) for f, shape in zip((images, masks), shapes)]
                decode(records, *arrays, workers, label)
                for array in arrays:
                    array.flush()
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"The cache folder '{folder}' cannot be written ({error.strerror}). Name another with --cache-dir.") from error
        for old in Path(folder).glob(f"{glob.escape(stem)}-*.npy"):  # of earlier states of the same files
            if old not in files:
                old.unlink(missing_ok=True)
    return Decoded(records, *_open_arrays(files, shapes), image_of)


def _open_arrays(files, shapes):
    try:
        arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    except (OSError, ValueError, EOFError):
        return None
    fits = all(a.shape == shape and a.dtype == np.uint8 for a, shape in zip(arrays, shapes))
    return arrays if fits else None
