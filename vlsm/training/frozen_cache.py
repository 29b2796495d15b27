"""What training cannot change is computed once: image features, or those of an image encoder's first blocks;
text features.

Which encoder is frozen is not declared by the tuning methods but found out: its outputs require no gradient.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from vlsm.networks.base import FrozenBlocks, ImageFeatures
from vlsm.system import parallel
from vlsm.system.console import progress
from vlsm.system.device import autocast
from vlsm.system.files import reserve

SHARE = 0.5  # of the memory that is free, at most
GB = 1 << 30


def free_ram():
    """Return the bytes of RAM that are free, as Linux and a container's limit have it; 0 where that cannot be
    read.
    """
    free = 0
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:  # no Linux, or no such limit
        pass
    return max(free, 0)


def free_bytes(device, folder):
    """Return the bytes that are free in each tier, fastest first: GPU, RAM, disk."""
    tiers = {"GPU": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    tiers["RAM"] = free_ram()
    parent = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.is_dir())
    tiers["disk"] = shutil.disk_usage(parent).free if os.access(parent, os.W_OK) else 0
    return tiers


class TieredStore:
    """Tensors of some `shapes` for each of the first `held` of `count` images, spread over the tiers that
    have room.

    tiers: name -> bytes. On disk float32 is rounded to half precision. What fits nowhere is for the caller to
    compute again.
    """

    def __init__(self, count, shapes, dtype, device, tiers, folder):
        self.device, self.dtype, self.shapes, self.held, self.parts = device, dtype, shapes, 0, {}
        for tier, free in tiers.items():
            kind = torch.float16 if tier == "disk" and dtype == torch.float32 else dtype
            n = min(count - self.held, int(free // (sum(map(math.prod, shapes)) * kind.itemsize)))
            if n > 0:
                where = device if tier == "GPU" else torch.device("cpu")
                sizes = [(n, *shape) for shape in shapes]
                if tier == "disk":
                    tensors = [_disk_tensor(size, kind, folder) for size in sizes]
                else:
                    tensors = [torch.empty(size, dtype=kind, device=where) for size in sizes]
                self.parts[tier] = self.held, n, tensors
                self.held += n

    def nbytes(self):
        """Return the bytes that each tier holds."""
        return {
            tier: sum(t.numel() * t.element_size() for t in kept) for tier, (_, _, kept) in self.parts.items()
        }

    def put(self, first, values):
        """Keep the rows from `first` on, of values `[n, *shape]`, one for each shape."""
        for start, count, tensors in self.parts.values():
            low, high = max(first, start), min(first + len(values[0]), start + count)
            if low < high:
                for kept, value in zip(tensors, values):
                    kept[low - start : high - start] = value[low - first : high - first].to(kept)

    def get(self, rows):
        """Return `[n, *shape]` for each shape, on the device; rows: int64 on the CPU, all of them below
        `held`.
        """
        out = [torch.empty(len(rows), *shape, dtype=self.dtype, device=self.device) for shape in self.shapes]
        for start, count, tensors in self.parts.values():
            mine = ((rows >= start) & (rows < start + count)).nonzero()[:, 0]
            if len(mine):
                wanted, at = (rows[mine] - start).to(tensors[0].device), mine.to(self.device)
                for target, kept in zip(out, tensors):
                    target.index_copy_(0, at, kept.index_select(0, wanted).to(self.device, self.dtype))
        return out


def _disk_tensor(size, dtype, folder):
    """Return a tensor backed by a file without a name: it is gone when the program is, however that ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file, name = tempfile.mkstemp(prefix="activations-", dir=folder)
    os.close(file)
    try:
        reserve(name, math.prod(size) * dtype.itemsize)
        return torch.from_file(name, shared=True, size=math.prod(size), dtype=dtype).view(size)
    finally:
        os.unlink(name)


def _interleave(first, a, b):
    """Return `[n + m, ...]`: a `[n, ...]` where `first` (bool `[n + m]`) says so, b `[m, ...]` elsewhere."""
    out = a.new_empty(len(first), *a.shape[1:])
    out[first], out[~first] = a, b.to(a.dtype)
    return out


def _tensors(features):
    """Return all tensors of `ImageFeatures` or `FrozenBlocks` as one list."""
    if isinstance(features, FrozenBlocks):
        return [features.tokens, *features.activations]
    return [*features.activations, *([] if features.embedding is None else [features.embedding])]


class FrozenCache:
    """The features that training cannot change, kept by split and by prompt.

    normalise: from uint8 images on the device to pixel values. cache_gb: GB that image features may take in
    all; 0: none are kept; None: half of what is free in each tier, but in float32 none on disk, which would
    round them. `images_frozen` and `prompts_frozen` say whether an encoder's output is; `depth`, where the
    image encoder's is not, how many of its first blocks are.
    """

    def __init__(self, model, tokenizer, normalise, device, dtype, cache_gb=None, folder="."):
        self.model, self.tokenizer, self.normalise = model, tokenizer, normalise
        self.device, self.dtype, self.cache_gb, self.folder = device, dtype, cache_gb, folder
        self.splits, self.stores, self.texts = {}, {}, {}
        base, tuner, side = model.base, model.tuner, model.base.smallest_side()
        # sizes of one would be compiled apart
        with torch.enable_grad(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            contexts = tuner.contexts()
            image = base.encode_image(torch.zeros(1, 3, side, side, device=device), tuner, contexts.vision)
            text = base.encode_prompts(*tokenizer([""]), tuner, contexts.text, image.embedding)
            blocks = base.encode_blocks(torch.zeros(1, 3, side, side, device=device), tuner, contexts.vision)
        self.images_frozen = not model.updated_buffers and not any(t.requires_grad for t in _tensors(image))
        self.depth = 0 if blocks is None or model.updated_buffers or self.images_frozen else blocks.depth
        self.prompts_frozen = not any(t.requires_grad for t in text)

    # Filling

    def add_split(self, name, data, batch_size):
        """Encode the images of a split once, where they are frozen and there is room.

        Returns a sentence on what is kept where, or None where nothing is. The order and the batches are
        fixed, so that a resumed run gets the same bits.
        """
        self.splits[name] = data
        if not (self.images_frozen or self.depth) or self.cache_gb == 0:
            return None
        count = data.image_count
        first = _tensors(self._encode(data, range(min(batch_size, count))))
        shapes = [t.shape[1:] for t in first]
        dtype = self.dtype or torch.float32
        store = TieredStore(count, shapes, dtype, self.device, self._budget(), self.folder)
        self.stores[name] = store
        with progress(store.held, f"encoding {name}") as bar:
            for start in range(0, store.held, batch_size):
                rows = range(start, min(start + batch_size, store.held))
                store.put(start, _tensors(self._encode(data, rows)) if start else first)
                bar.update(len(rows))
        return f"{name}: {self._describe(store, count)}"

    def _budget(self):
        """Return the bytes that a store may take in each tier."""
        mine = SHARE / parallel.local_world_size()  # the machine's processes share RAM and disk
        tiers = free_bytes(self.device, self.folder)
        tiers = {tier: (SHARE if tier == "GPU" else mine) * free for tier, free in tiers.items()}
        if self.cache_gb is None:
            if self.dtype is None:
                tiers.pop("disk", None)
            return tiers
        left = self.cache_gb * GB - sum(sum(store.nbytes().values()) for store in self.stores.values())
        for tier in tiers:
            tiers[tier] = min(tiers[tier], max(left, 0))
            left -= tiers[tier]
        return tiers

    def _describe(self, store, count):
        where = (
            f"{n / GB:.2g} GB {'on' if tier == 'disk' else 'in'} {tier}" for tier, n in store.nbytes().items()
        )
        kept = ", ".join(where) or "no room"
        rounded = "disk" in store.parts and self.dtype is None
        note = "; those on disk are rounded to half precision" if rounded else ""
        what = "image encoder's output" if self.images_frozen else f"output of {self.depth} image blocks"
        return f"the frozen {what} is kept for {store.held} of {count} images ({kept}){note}"

    @torch.no_grad()
    def _encode(self, data, rows):
        images = data.image_range(rows).to(self.device)
        with autocast(self.device, self.dtype):
            return self._frozen_part(self.normalise(images))

    def _frozen_part(self, pixel_values):
        base, tuner = self.model.base, self.model.tuner
        if self.images_frozen:
            return base.encode_image(pixel_values, tuner)
        return base.encode_blocks(pixel_values, tuner, depth=self.depth)

    def part_for_step(self, pixel_values):
        """Return what a step takes of kept features, for images `[B, 3, S, S]`; None if nothing is kept."""
        if not (self.images_frozen or self.depth) or self.cache_gb == 0:
            return None
        with torch.no_grad():
            return self._frozen_part(pixel_values)

    def bytes_kept(self, side):
        """Return the bytes that are kept of an image of `side` pixels."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            kept = self.part_for_step(torch.zeros(1, 3, side, side, device=self.device))
        itemsize = (self.dtype or torch.float32).itemsize
        return 0 if kept is None else sum(t.numel() for t in _tensors(kept)) * itemsize

    # Reading

    def needs_pixels(self, name):
        """Tell whether batches of a split need their pixels, unless augmentation changes them."""
        kept = name in self.stores and self.stores[name].held == self.splits[name].image_count
        return self.model.base.decoder_reads_pixels or not kept

    def lookup(self, name, indices, prompts, pixel_values=None, changed=None):
        """Return what is kept of some records of a split, as keyword arguments of the model's forward pass.

        pixel_values: `[B, 3, S, S]`, None where `needs_pixels` says so. changed: bool `[B]` on the CPU, the
        images that augmentation has altered; these, and those that had no room, are encoded here.
        """
        with autocast(self.device, self.dtype):
            return dict(
                image_features=self._image_features(name, indices, pixel_values, changed),
                text_features=self._text_features(prompts) if self.prompts_frozen else None,
            )

    def _image_features(self, name, indices, pixel_values, changed):
        if name not in self.stores:
            return None
        store, data = self.stores[name], self.splits[name]
        rows = torch.as_tensor(data.image_of[indices])
        kept = rows < store.held if changed is None else (rows < store.held) & ~changed
        if not kept.any():
            return None
        found = store.get(rows[kept])
        if not kept.all():
            fresh = _tensors(self._frozen_part(pixel_values[~kept]))
            found = [_interleave(kept, a, b) for a, b in zip(found, fresh)]
        if self.depth:
            return FrozenBlocks(self.depth, found[0], found[1:], (data.side, data.side))
        embedding = found.pop() if self.model.tuner.needs_image_embedding else None
        return ImageFeatures(found, embedding, (data.side, data.side))

    def _text_features(self, prompts):
        base, tuner = self.model.base, self.model.tuner
        # one by one: a prompt's bits shall not depend on its neighbours
        for prompt in set(prompts) - set(self.texts):
            with torch.no_grad():
                text = base.encode_prompts(*self.tokenizer([prompt]), tuner)
            self.texts[prompt] = [t[0] for t in text]
        return tuple(pad_sequence(rows, batch_first=True) for rows in zip(*(self.texts[p] for p in prompts)))
