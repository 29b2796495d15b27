"""Activation caching: the output of frozen encoders is computed once and read in every later epoch.

Cached are the features of a frozen image encoder, or of its first blocks where training changes later ones,
and the features of a frozen text encoder. Tuning methods do not declare which encoders they leave frozen: an
encoder is frozen if its output requires no gradient.
"""

import math
import os
import shutil
from itertools import islice
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from vlsm.data.cache import chunks
from vlsm.data.normalise import normalise
from vlsm.networks.base import FrozenBlocks, ImageFeatures
from vlsm.system import parallel
from vlsm.system.console import progress
from vlsm.system.files import make_room, reserve, temporary_beside
from vlsm.system.parallel import autocast

SHARE = 0.5  # largest fraction of the free memory or disk that is used
GB = 1 << 30
AHEAD = 16  # lists of prompts (one a step, or a part of a step) whose texts are encoded together
TEXTS = 256  # most texts in a batch of these


def free_bytes(device, folder):
    """Return the free bytes of the GPU (0 on a CPU) and of the disk that holds `folder`."""
    on_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    folder = Path(folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    on_disk = shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0
    return on_gpu, on_disk


class FeatureStore:
    """Tensors of some `shapes` for each of the first `held` of `count` images.

    On the GPU if all fit into `gpu_bytes`, else in a memory-mapped file of at most `disk_bytes`, which the
    system keeps in RAM as far as there is room. The features of further images must be computed again.
    """

    def __init__(self, count, shapes, dtype, device, gpu_bytes, disk_bytes, folder):
        self.device = device
        bytes_each = sum(map(math.prod, shapes)) * dtype.itemsize
        self.on_gpu = count * bytes_each <= gpu_bytes
        self.held = count if self.on_gpu else min(count, int(disk_bytes // bytes_each))
        self.complete = self.held == count
        self.nbytes = self.held * bytes_each
        self.tensors = []
        for shape in shapes:
            size = (self.held, *shape)
            if self.on_gpu:
                self.tensors.append(torch.empty(size, dtype=dtype, device=device))
            else:
                self.tensors.append(mapped_tensor(size, dtype, folder))

    def put(self, first, values):
        """Write `values`, a tensor `[n, *shape]` for each shape, into the rows from `first` on."""
        for tensor, value in zip(self.tensors, values):
            rows = tensor[first : first + len(value)]
            rows.copy_(value[: len(rows)])

    def get(self, rows):
        """Return `[n, *shape]` for each shape, on the device; rows: int64 on the CPU, all below `held`."""
        if self.on_gpu:
            rows = rows.to(self.device, non_blocking=True)
        tensors = [t.index_select(0, rows) for t in self.tensors]
        if self.device.type == "cuda" and not self.on_gpu:  # pinned: the GPU need not wait for the copy
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=True) for t in tensors]


def mapped_tensor(size, dtype, folder):
    """Return a tensor in a memory-mapped file without a name, which disappears with the process."""
    count = math.prod(size)
    if not count:
        return torch.empty(size, dtype=dtype)
    path = temporary_beside(Path(folder) / "activations")
    make_room(path.parent)
    path.touch()
    try:
        reserve(path, count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(size)
    finally:
        path.unlink()  # the mapping outlives the name


def tensors_of(features):
    """Return all tensors of `ImageFeatures` or `FrozenBlocks` as one list."""
    if isinstance(features, FrozenBlocks):
        return [features.tokens, *features.activations]
    if features.embedding is None:
        return list(features.activations)
    return [*features.activations, features.embedding]


def interleave(rows_a, a, rows_b, b):
    """Return `[n + m, ...]`: a `[n, ...]` in its rows `rows_a`, b `[m, ...]` in `rows_b`."""
    out = a.new_empty(len(a) + len(b), *a.shape[1:])
    return out.index_copy_(0, rows_a, a).index_copy_(0, rows_b, b.to(a.dtype))


class FrozenCache:
    """The features that training cannot change, cached by split and by prompt.

    cache_gb: GB for image features in all; 0: none are cached; None: half of the free memory. folder: where
    the memory-mapped file is made.

    Attributes: `images_frozen` and `prompts_frozen`, whether an encoder is frozen as a whole; `depth`, the
    number of the image encoder's first blocks that are frozen where it is not.
    """

    def __init__(self, model, device, dtype, cache_gb, folder):
        self.model = model
        self.tokenizer = model.tokenizer()
        self.device = device
        self.dtype = dtype
        self.cache_gb = cache_gb
        self.folder = folder
        self.splits = {}
        self.stores = {}
        self.texts = {}  # prompt -> its text features, without the batch dimension
        self.ahead = {}  # the same, of the next batches' other prompts
        network = model.network
        tuner = model.tuner
        side = network.smallest_side()
        probe = torch.zeros(1, 3, side, side, device=device)
        # Gradients show which encoders are trained. Eagerly: a batch of one would be compiled separately
        with torch.enable_grad(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            contexts = tuner.contexts()
            image = network.encode_image(probe, tuner, contexts.vision)
            text = network.encode_prompts(*self.tokenizer([""]), tuner, contexts.text, image.embedding)
            blocks = network.encode_blocks(probe, tuner, contexts.vision)
        trained = any(t.requires_grad for t in tensors_of(image))
        self.images_frozen = not model.updated_buffers and not trained
        self.prompts_frozen = not any(t.requires_grad for t in text)
        self.depth = 0
        if blocks is not None and not model.updated_buffers and not self.images_frozen:
            self.depth = blocks.depth
        self.keeps_images = (self.images_frozen or self.depth) and cache_gb != 0

    # Filling

    def add_split(self, name, data, batch_size):
        """Encode the images of a split (`CachedSplit`) once, as far as they are frozen and there is room.

        The order and the batches are fixed, so that a resumed run gets the same bits. Returns a line of text
        on the number of cached images and their place, or None if none are cached.
        """
        self.splits[name] = data
        if not self.keeps_images:
            return None
        count = len(data.images)
        first = tensors_of(self.encode_rows(data, chunks(range(count), batch_size)[0]))
        shapes = [t.shape[1:] for t in first]
        store = FeatureStore(
            count, shapes, self.dtype or torch.float32, self.device, *self.budget(), self.folder
        )
        self.stores[name] = store
        with progress(store.held, f"encoding {name}") as bar:
            for rows in chunks(range(store.held), batch_size):
                store.put(rows.start, tensors_of(self.encode_rows(data, rows)) if rows.start else first)
                bar.update(len(rows))
        frozen = "image encoder's output" if self.images_frozen else f"output of {self.depth} image blocks"
        place = "on the GPU" if store.on_gpu else "in a mapped file"
        return (
            f"{name}: the frozen {frozen} is kept for {store.held} of {count} images "
            f"({store.nbytes / GB:.2g} GB {place})"
        )

    def budget(self):
        """Return the bytes that the next store may take on the GPU, and on the disk."""
        on_gpu, on_disk = free_bytes(self.device, self.folder)
        on_gpu = int(SHARE * on_gpu)
        on_disk = int(SHARE * on_disk / parallel.local_world_size())  # the machine's processes share it
        if self.cache_gb is None:
            return on_gpu, on_disk
        used = sum(store.nbytes for store in self.stores.values())
        left = int(self.cache_gb * GB) - used
        return min(on_gpu, left), min(on_disk, left)

    @torch.no_grad()
    def encode_rows(self, data, rows):
        """Compute the frozen features of a range of images of a `CachedSplit`."""
        images = data.image_range(rows).to(self.device)
        with autocast(self.device, self.dtype):
            return self.encode_frozen(self.normalise(images))

    def encode_frozen(self, pixel_values):
        """Compute the frozen `ImageFeatures`, or `FrozenBlocks`, of `pixel_values` `[B, 3, S, S]`."""
        network = self.model.network
        tuner = self.model.tuner
        if self.images_frozen:
            return network.encode_image(pixel_values, tuner)
        return network.encode_blocks(pixel_values, tuner, depth=self.depth)

    def normalise(self, images):
        """Return the `pixel_values` of images with values from 0 to 255."""
        return normalise(images, self.model.network.mean, self.model.network.std)

    # Reading

    def needs_pixels(self, name):
        """Tell whether batches of a split need their images, unless augmentation changes these."""
        complete = name in self.stores and self.stores[name].complete
        return self.model.network.decoder_reads_pixels or not complete

    def encode_ahead(self, batches, right):
        """Yield lists of prompts unchanged, after encoding the texts of `AHEAD` lists together, if frozen.

        right: slice of each list with the prompts that come again: `model_inputs` keeps these.
        """
        batches = iter(batches)
        while group := list(islice(batches, AHEAD)):
            if self.prompts_frozen:
                texts = set().union(*(set(prompts) - set(prompts[right]) for prompts in group))
                self.ahead = {}
                for part in chunks(sorted(texts, key=lambda text: (len(text), text)), TEXTS):
                    self.ahead |= self.encode_texts(part)
            yield from group

    def model_inputs(self, name, indices, images, prompts, changed=None):
        """Return the arguments of the model's forward pass for B records of a split, with cached features.

        prompts: P for each record; the first of each P is kept in memory, as it comes again.
        images: uint8 or float `[B, 3, S, S]` from 0 to 255; None if cached features replace them, see
        `needs_pixels`. changed: bool `[B]` on the CPU, the images that augmentation has altered; these, and
        those whose features are not cached, are encoded now.
        """
        pixel_values = None if images is None else self.normalise(images)
        with autocast(self.device, self.dtype):
            image_features = self.image_features(name, indices, pixel_values, changed)
        text_features = None
        if self.prompts_frozen:
            text_features = self.text_features(prompts, prompts[:: len(prompts) // len(indices)])
        return pixel_values, *self.tokenizer(prompts), image_features, text_features

    def image_features(self, name, indices, pixel_values, changed):
        """Return the `ImageFeatures` or `FrozenBlocks` of records; None if none of them is cached."""
        if name not in self.stores:
            return None
        store = self.stores[name]
        data = self.splits[name]
        rows = torch.as_tensor(data.image_of[indices])
        cached = rows < store.held
        if changed is not None:
            cached &= ~changed
        if not cached.any():
            return None
        tensors = store.get(rows[cached])
        if not cached.all():
            # by numbers: to index by bools waits for a GPU
            kept, others = [m.nonzero()[:, 0].to(self.device, non_blocking=True) for m in (cached, ~cached)]
            fresh = tensors_of(self.encode_frozen(pixel_values[others]))
            tensors = [interleave(kept, a, others, b) for a, b in zip(tensors, fresh)]
        size = (data.side, data.side)
        if self.depth:
            return FrozenBlocks(self.depth, tensors[0], tensors[1:], size)
        embedding = tensors.pop() if self.model.tuner.needs_image_embedding else None
        return ImageFeatures(tensors, embedding, size)

    def text_features(self, prompts, kept):
        """Return the text features of prompts; rows of tokens are padded with zeros to the longest.

        kept: the prompts that come again, whose features are cached. Of the others, those that are not
        encoded ahead are encoded now, together.
        """
        kept = set(kept)
        for prompt in kept - set(self.texts):  # one by one: bit-identical whatever the batch
            self.texts[prompt] = self.encode_texts([prompt])[prompt]
        # not from self.texts: a resumed run has fewer there. Sorted: a set's order changes between processes
        others = sorted(set(prompts) - kept - set(self.ahead))
        fresh = self.ahead | (self.encode_texts(others) if others else {})
        by_prompt = [self.texts[prompt] if prompt in kept else fresh[prompt] for prompt in prompts]
        return tuple(pad_sequence(rows, batch_first=True) for rows in zip(*by_prompt))

    @torch.no_grad()
    def encode_texts(self, prompts):
        """Return {prompt: its text features, without the batch dimension}."""
        with autocast(self.device, self.dtype):
            features = self.model.network.encode_prompts(*self.tokenizer(prompts), self.model.tuner)
        return dict(zip(prompts, zip(*features)))
