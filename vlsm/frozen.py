"""What training cannot change is computed once: activations of images, features of prompts.

Which encoder is frozen is not declared by the tuning methods but found out: its outputs require no gradient.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from . import runtime
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
    """Tensors `[L, *shape]` of the first so many images of a split, spread over the places that have room for them.

    On disk they take half precision; what fits nowhere (`held` of `count` images do) is for the caller to compute again.
    """

    def __init__(self, count, layers, shape, dtype, device, places, folder):
        self.device, self.dtype, self.shape, self.held, self.parts = device, dtype, (layers, *shape), 0, {}
        for place, free in places.items():
            kind = torch.float16 if place == "disk" and dtype == torch.float32 else dtype
            each = math.prod(self.shape) * kind.itemsize
            n = min(count - self.held, int(free // each))
            if n > 0:
                where = device if place == "GPU" else torch.device("cpu")
                size = (layers, n, *shape)
                self.parts[place] = (
                    self.held,
                    _on_disk(size, kind, folder) if place == "disk" else torch.empty(size, dtype=kind, device=where),
                )
                self.held += n

    def bytes(self):
        return {place: part.numel() * part.element_size() for place, (_, part) in self.parts.items()}

    def put(self, first, values):
        """Keep the rows from `first` on, of values `[L, n, *shape]`."""
        for start, part in self.parts.values():
            low, high = max(first, start), min(first + values.shape[1], start + part.shape[1])
            if low < high:
                part[:, low - start : high - start] = values[:, low - first : high - first].to(part)

    def get(self, rows):
        """`[L, n, *shape]` of some rows (int64 tensor on the CPU), all of them below `held`, on the device."""
        out = torch.empty(self.shape[0], len(rows), *self.shape[1:], dtype=self.dtype, device=self.device)
        for start, part in self.parts.values():
            mine = ((rows >= start) & (rows < start + part.shape[1])).nonzero()[:, 0]
            if len(mine):
                wanted, at = (rows[mine] - start).to(part.device), mine.to(self.device)
                for layer in range(len(out)):
                    out[layer].index_copy_(0, at, part[layer].index_select(0, wanted).to(self.device, self.dtype))
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
    """`[L, n + m, ...]`: a `[L, n, ...]` where `first` (bool `[n + m]`) says so, b `[L, m, ...]` elsewhere."""
    out = a.new_empty(len(a), len(first), *a.shape[2:])
    out[:, first], out[:, ~first] = a, b.to(a.dtype)
    return out


class Frozen:
    """A model's forward pass on the records of a split, without computing twice what training cannot change.

    cache_gb: GB that images' activations may take in all; 0: none are kept; None: half of what is free in each place, but in float32
    none on disk. `images` and `prompts` say whether the encoder's output is frozen.
    """

    def __init__(self, model, tokenizer, device, dtype, cache_gb=None, folder="."):
        self.model, self.tokenizer, self.device, self.dtype = model, tokenizer, device, dtype
        self.cache_gb, self.folder, self.stores, self.features, self.texts = cache_gb, folder, {}, {}, {}
        self.memory = torch.empty(0, device=device)
        config = model.base.config
        # sizes of one would be compiled apart
        with torch.enable_grad(), runtime.autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            side = config.vision.patch_size
            contexts = model.tuner.contexts()
            activations, features = model.base.encode_image(torch.zeros(1, 3, side, side, device=device), model.tuner, contexts.vision)
            cond, states = model.base.encode_prompts(*tokenizer([""]), model.tuner, contexts.text, features)
        self.images = not any(t.requires_grad for t in (*activations, *([] if features is None else [features])))
        self.prompts = not any(t.requires_grad for t in (cond, *states))

    @torch.no_grad()
    def fill(self, name, data, batch_size):
        """Encode the images of a split once, in their order; a sentence on what is kept where, or None where images are not frozen.

        The order is fixed, and so are the batches, that a resumed run gets the same bits.
        """
        if not self.images or self.cache_gb == 0:
            return None
        count, size, config = len(data.images), data.images.shape[-1], self.model.base.config
        shape = ((size // config.vision.patch_size) ** 2 + 1, config.vision.hidden_size)
        places = {place: SHARE * free for place, free in room(self.device, self.folder).items()}
        if self.cache_gb is None and self.dtype is None:
            places.pop("disk", None)  # would round what float32 computes, which nobody asked for
        left = math.inf if self.cache_gb is None else self.cache_gb * GB - sum(sum(s.bytes().values()) for s in self.stores.values())
        for place in places:
            places[place] = min(places[place], max(left, 0))
            left -= places[place]
        layers = len(config.extract_layers)
        store, features = Store(count, layers, shape, self.dtype or torch.float32, self.device, places, self.folder), []
        with progress(store.held, f"encoding {name}") as bar, runtime.autocast(self.device, self.dtype):
            for first in range(0, store.held, batch_size):
                rows = slice(first, min(first + batch_size, store.held))
                pixels = torch.from_numpy(np.array(data.images[rows])).to(self.device)
                activations, feature = self.model.base.encode_image(normalise(pixels), self.model.tuner)
                store.put(first, torch.stack(activations))
                features += [] if feature is None else [feature]
                bar.update(rows.stop - first)
        self.stores[name] = store
        if features:
            self.features[name] = torch.cat(features)  # [held, P]
        kept = ", ".join(f"{n / GB:.2g} GB {'on' if place == 'disk' else 'in'} {place}" for place, n in store.bytes().items())
        rounded = "disk" in store.parts and self.dtype is None
        note = "; those on disk are rounded to half precision" if rounded else ""
        return f"{name}: the frozen image encoder's output is kept for {store.held} of {count} images ({kept or 'no room'}){note}"

    def needs_pixels(self, name, data):
        return name not in self.stores or self.stores[name].held < len(data.images)

    def _normalise(self, pixels):
        """In memory that the next batch overwrites: the backward pass of this one is over by then."""
        if self.memory.numel() < pixels.numel():
            self.memory = torch.empty(pixels.numel(), device=self.device)
        return normalise(pixels, self.memory[: pixels.numel()].view(pixels.shape))

    def _images(self, name, data, indices, pixels, changed, contexts):
        """(activations, features) of some records; kept ones where there are, but not for images that are `changed`."""
        base, tuner = self.model.base, self.model.tuner
        kept = torch.zeros(len(indices), dtype=torch.bool)
        if name in self.stores:
            store, rows, features = self.stores[name], torch.as_tensor(data.image_of[indices]), self.features.get(name)
            kept = rows < store.held if changed is None else (rows < store.held) & ~changed
        if not kept.any():
            return base.encode_image(pixels, tuner, contexts)
        held = store.get(rows[kept])
        features = None if features is None else features[rows[kept].to(features.device)]
        if kept.all():
            return list(held), features
        fresh, fresh_features = base.encode_image(pixels[~kept], tuner, contexts)
        activations = list(_interleave(kept, held, torch.stack(fresh)))
        return activations, None if features is None else _interleave(kept, features[None], fresh_features[None])[0]

    def _text(self, prompts, contexts, features):
        base, tuner = self.model.base, self.model.tuner
        if not self.prompts:
            return base.encode_prompts(*self.tokenizer(prompts), tuner, contexts, features)
        for prompt in set(prompts) - set(self.texts):  # one by one, that its bits do not depend on its neighbours
            with torch.no_grad():
                cond, states = base.encode_prompts(*self.tokenizer([prompt]), tuner)
            self.texts[prompt] = (cond, *states)
        cond, *states = (torch.cat(rows) for rows in zip(*(self.texts[p] for p in prompts)))
        return cond, states

    def logits(self, name, data, indices, prompts, pixels, changed=None):
        """Logits `[B, 1, S, S]` of some records.

        pixels: uint8 or float 0..255 `[B, 3, S, S]`, None where `needs_pixels` says so; changed: bool `[B]` on the CPU, images that
        augmentation has altered.
        """
        size, base, tuner = data.masks.shape[-1], self.model.base, self.model.tuner
        with runtime.autocast(self.device, self.dtype):
            contexts = tuner.contexts()
            pixels = None if pixels is None else self._normalise(pixels)
            activations, features = self._images(name, data, indices, pixels, changed, contexts.vision)
            return base.decode(activations, *self._text(prompts, contexts.text, features), base.grid(size, size), tuner)
