"""What training cannot change is computed once: activations of images, features of prompts.

Which encoder is frozen is not declared by the tuning methods but found out: its outputs require no gradient.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from . import parallel, runtime
from .console import progress
from .images import normalise

SHARE = 0.5  # of the memory that is free, at most
GB = 1 << 30


def free_memory():
    """Bytes of RAM that are free, as Linux and a container's limit have it; 0 where that cannot be read."""
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


def room(device, folder):
    """Where activations may lie, fastest first, and how many bytes are free there: a dictionary."""
    places = {"GPU": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    places["RAM"] = free_memory()
    parent = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.is_dir())
    places["disk"] = shutil.disk_usage(parent).free if os.access(parent, os.W_OK) else 0
    return places


class Store:
    """Tensors of some `shapes` for each of the first so many images of a split, spread over the places that have room for them.

    On disk they take half precision; what fits nowhere (`held` of `count` images do) is for the caller to compute again.
    """

    def __init__(self, count, shapes, dtype, device, places, folder):
        self.device, self.dtype, self.shapes, self.held, self.parts = device, dtype, shapes, 0, {}
        for place, free in places.items():
            kind = torch.float16 if place == "disk" and dtype == torch.float32 else dtype
            n = min(count - self.held, int(free // (sum(map(math.prod, shapes)) * kind.itemsize)))
            if n > 0:
                where = device if place == "GPU" else torch.device("cpu")
                sizes = [(n, *shape) for shape in shapes]
                make = [_on_disk(s, kind, folder) if place == "disk" else torch.empty(s, dtype=kind, device=where) for s in sizes]
                self.parts[place] = self.held, n, make
                self.held += n

    def bytes(self):
        return {place: sum(t.numel() * t.element_size() for t in tensors) for place, (_, _, tensors) in self.parts.items()}

    def put(self, first, values):
        """Keep the rows from `first` on, of values `[n, *shape]`, one for each shape."""
        for start, count, tensors in self.parts.values():
            low, high = max(first, start), min(first + len(values[0]), start + count)
            for kept, value in zip(tensors, values) if low < high else ():
                kept[low - start : high - start] = value[low - first : high - first].to(kept)

    def get(self, rows):
        """`[n, *shape]` for each shape, of some rows (int64 tensor on the CPU), all of them below `held`, on the device."""
        out = [torch.empty(len(rows), *shape, dtype=self.dtype, device=self.device) for shape in self.shapes]
        for start, count, tensors in self.parts.values():
            mine = ((rows >= start) & (rows < start + count)).nonzero()[:, 0]
            if len(mine):
                wanted, at = (rows[mine] - start).to(tensors[0].device), mine.to(self.device)
                for target, kept in zip(out, tensors):
                    target.index_copy_(0, at, kept.index_select(0, wanted).to(self.device, self.dtype))
        return out


def _on_disk(size, dtype, folder):
    """A tensor backed by a file without a name: it is gone when the program is, however that ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file, name = tempfile.mkstemp(prefix="activations-", dir=folder)
    os.close(file)
    tensor = torch.from_file(name, shared=True, size=math.prod(size), dtype=dtype).view(size)
    os.unlink(name)
    return tensor


def _interleave(first, a, b):
    """`[n + m, ...]`: a `[n, ...]` where `first` (bool `[n + m]`) says so, b `[m, ...]` elsewhere."""
    out = a.new_empty(len(first), *a.shape[1:])
    out[first], out[~first] = a, b.to(a.dtype)
    return out


def _joined(activations, features):
    """What an image encoder returns, as one list."""
    return [*activations, *([] if features is None else [features])]


class Frozen:
    """A model's forward pass on the records of a split, without computing twice what training cannot change.

    cache_gb: GB that images' activations may take in all; 0: none are kept; None: half of what is free in each place, but in float32
    none on disk. `images` and `prompts` say whether the encoder's output is frozen.
    """

    def __init__(self, model, tokenizer, device, dtype, cache_gb=None, folder="."):
        self.model, self.tokenizer, self.device, self.dtype = model, tokenizer, device, dtype
        self.cache_gb, self.folder, self.stores, self.texts = cache_gb, folder, {}, {}
        self.memory = torch.empty(0, device=device)
        # sizes of one would be compiled apart
        with torch.enable_grad(), runtime.autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            side, contexts = model.base.config.stride, model.tuner.contexts()
            activations, features = model.base.encode_image(torch.zeros(1, 3, side, side, device=device), model.tuner, contexts.vision)
            text = model.base.encode_prompts(*tokenizer([""]), model.tuner, contexts.text, features)
        self.images = not model.moving and not any(t.requires_grad for t in _joined(activations, features))
        self.prompts = not any(t.requires_grad for t in text)

    @torch.no_grad()
    def fill(self, name, data, batch_size):
        """Encode the images of a split once, in their order; a sentence on what is kept where, or None where images are not frozen.

        The order is fixed, and so are the batches, that a resumed run gets the same bits.
        """
        if not self.images or self.cache_gb == 0:
            return None
        count = data.count
        found = _joined(*self._encode(data, range(min(batch_size, count))))
        share = {"GPU": SHARE, "RAM": SHARE / parallel.on_this_machine(), "disk": SHARE / parallel.on_this_machine()}
        places = {place: share[place] * free for place, free in room(self.device, self.folder).items()}
        if self.cache_gb is None and self.dtype is None:
            places.pop("disk", None)  # would round what float32 computes, which nobody asked for
        left = math.inf if self.cache_gb is None else self.cache_gb * GB - sum(sum(s.bytes().values()) for s in self.stores.values())
        for place in places:
            places[place] = min(places[place], max(left, 0))
            left -= places[place]
        self.stores[name] = store = Store(
            count, [t.shape[1:] for t in found], self.dtype or torch.float32, self.device, places, self.folder
        )
        store.held = data.least(store.held)
        with progress(store.held, f"encoding {name}") as bar:
            for first in range(0, store.held, batch_size):
                rows = range(first, min(first + batch_size, store.held))
                store.put(first, _joined(*self._encode(data, rows)) if first else found)
                bar.update(rows.stop - first)
        kept = ", ".join(f"{n / GB:.2g} GB {'on' if place == 'disk' else 'in'} {place}" for place, n in store.bytes().items())
        rounded = "disk" in store.parts and self.dtype is None
        note = "; those on disk are rounded to half precision" if rounded else ""
        return f"{name}: the frozen image encoder's output is kept for {store.held} of {count} images ({kept or 'no room'}){note}"

    def _encode(self, data, rows):
        pixels = data.pictures(rows).to(self.device)
        with runtime.autocast(self.device, self.dtype):
            return self.model.base.encode_image(self._normalise(pixels), self.model.tuner)

    def needs_pixels(self, name, data):
        return self.model.base.reads_pixels or name not in self.stores or self.stores[name].held < data.count

    def _normalise(self, pixels):
        """In memory that the next batch overwrites: the backward pass of this one is over by then."""
        if self.memory.numel() < pixels.numel():
            self.memory = torch.empty(pixels.numel(), device=self.device)
        return normalise(pixels, self.memory[: pixels.numel()].view(pixels.shape), self.model.base.mean, self.model.base.std)

    def _images(self, name, data, indices, pixels, changed, contexts):
        """(activations, features) of some records; kept ones where there are, but not for images that are `changed`."""
        base, tuner = self.model.base, self.model.tuner
        kept = torch.zeros(len(indices), dtype=torch.bool)
        if name in self.stores:
            store, rows = self.stores[name], torch.as_tensor(data.image_of[indices])
            kept = rows < store.held if changed is None else (rows < store.held) & ~changed
        if not kept.any():
            return base.encode_image(pixels, tuner, contexts)
        found = store.get(rows[kept])
        if not kept.all():
            fresh = _joined(*base.encode_image(pixels[~kept], tuner, contexts))
            found = [_interleave(kept, a, b) for a, b in zip(found, fresh)]
        return (found[:-1], found[-1]) if tuner.reads_features else (found, None)

    def _text(self, prompts, contexts, features):
        base, tuner = self.model.base, self.model.tuner
        if not self.prompts:
            return base.encode_prompts(*self.tokenizer(prompts), tuner, contexts, features)
        for prompt in set(prompts) - set(self.texts):  # one by one, that its bits do not depend on its neighbours
            with torch.no_grad():
                text = base.encode_prompts(*self.tokenizer([prompt]), tuner)
            self.texts[prompt] = [t[0] for t in text]
        return tuple(pad_sequence(rows, batch_first=True) for rows in zip(*(self.texts[p] for p in prompts)))

    def logits(self, name, data, indices, prompts, pixels, changed=None):
        """Logits `[B, 1, S, S]` of some records.

        pixels: uint8 or float 0..255 `[B, 3, S, S]`, None where `needs_pixels` says so; changed: bool `[B]` on the CPU, images that
        augmentation has altered.
        """
        size, base, tuner = data.side, self.model.base, self.model.tuner
        with runtime.autocast(self.device, self.dtype):
            contexts = tuner.contexts()
            pixels = None if pixels is None else self._normalise(pixels)
            activations, features = self._images(name, data, indices, pixels, changed, contexts.vision)
            text = self._text(prompts, contexts.text, features)
            return base.decode(activations, text, (size, size), tuner, pixels)
