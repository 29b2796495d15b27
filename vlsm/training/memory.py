"""What a run needs of memory, from two steps, extended to any batch: `train.py --dry-run`.

The peak of a step is a + b x batch: weights, what is trained and its optimizer's state (on a CPU the whole
process), then activations.
"""

import re
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vlsm
from vlsm.system.device import autocast

GB = 1 << 30
CARDS = (8, 16, 24, 80)  # GB
LEAST = 2  # images of a step: statistics of a batch need two values
TRIED = (2, 6)  # images of the steps that are measured on a GPU
HEAP = 32 << 20  # bytes up to which glibc takes a block from its heap: larger ones are given back at once
GAPS = 0.65  # of the bytes on the heap: the room between blocks that cannot be used (fitted on ten peaks)
RESERVED = 0.08  # of a card: the driver's context and what its allocator cannot use


@dataclass
class Need:
    """Bytes that a run takes. fixed: weights and what does not grow with the batch; each: an image of a step
    more; kept: what is kept of an image for all epochs; gaps: of the heap, at the run's own batch.
    """

    fixed: float
    each: float
    kept: int
    gaps: float = 0

    def peak(self, batch):
        """Return the bytes at the peak of a step."""
        return self.fixed + self.each * batch + self.gaps

    def largest_batch(self, size):
        """Return how many images a step on a card of `size` bytes takes at most."""
        return max(0, int((size * (1 - RESERVED) - self.fixed) // self.each))


def reset_peak(device):
    """Begin to measure the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no Linux: the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device):
    """Return the bytes allocated on a GPU, or resident in RAM, at the peak since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, while they live: `now`, and at most `peak`.

    heap: those in small blocks; kept: of these, what is not freed within a step, and leaves no gaps.
    with_gaps: the peak with the gaps between the others.
    """

    def __init__(self):
        super().__init__()
        self.now = self.heap = self.kept = self.peak = self.with_gaps = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # no view, and not in place
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, storage.nbytes(), -1)
        return out

    def begin_step(self, gradients):
        """Take what lives now, and so many bytes of gradients, for what a step does not free."""
        self.kept, self.with_gaps = self.heap + gradients, 0

    def _count(self, size, sign=1):
        self.now += sign * size
        self.heap += sign * size if size <= HEAP else 0
        self.peak = max(self.peak, self.now)
        self.with_gaps = max(self.with_gaps, self.now + GAPS * (self.heap - self.kept))


def run_step(job, optimizer, side, batch):
    """Run a training step on `batch` images of `side` pixels."""
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=job.device)
    target = torch.zeros(batch, 1, side, side, dtype=torch.uint8, device=job.device)
    target[..., : side // 2] = 1
    ids = job.tokenizer(["one small red object, located in top left of the image"] * batch)
    pixel_values = job.normalise(images)
    with autocast(job.device, job.dtype):
        kept = job.frozen.part_for_step(pixel_values)
        logits = job.model(pixel_values, *ids, image_features=kept)
    vlsm.dice_bce_loss(logits, target, **job.options.loss()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured_peak(job, side, batch):
    """Return the bytes at the peak of a training step that is run; what is trained has changed."""
    peaks = []
    for _ in range(2):  # the optimizer's state is there in the second
        reset_peak(job.device)
        run_step(job, job.optimizer, side, batch)
        peaks.append(peak_bytes(job.device))
    return max(peaks)


def forget_values(model):
    """Replace a model's tensors, in place, by ones that have shapes, and no values to compute with."""
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(shapes.from_tensor(p.detach()), p.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, shapes.from_tensor(buffer))


def counted_peak(job, side, batch):
    """Return the bytes of a training step's tensors at its peak, without weights, after `forget_values`.

    Twice: as they are, and with the gaps of the heap.
    """
    tuned = job.model.tuned_parameters().values()
    gradients = sum(p.nbytes for p in tuned if p.nbytes <= HEAP)
    optimizer = torch.optim.AdamW(tuned)
    with LiveBytes() as live, torch.compiler.set_stance("force_eager"):
        run_step(job, optimizer, side, batch)
        live.begin_step(gradients)  # the optimizer's state is there from now on
        run_step(job, optimizer, side, batch)
    return live.peak, live.with_gaps


def estimate(job, side):
    """Return the `Need` of a run whose `Job` is there, before its data are; its model is of no use after.

    On a GPU two steps are measured. On a CPU, whose heap has gaps, one small step is, for the process; the
    rest is counted from the shapes of the run's own batch, and of twice as many images.
    """
    job.model.train()
    process = gaps = 0
    if job.device.type == "cuda":
        batches = TRIED
        small, large = (measured_peak(job, side, n) for n in batches)
    else:
        least, batch = job.model.network.smallest_side(), job.options.part_size()
        process = measured_peak(job, least, LEAST)
        job.model.place_on(job.device, None, "torch", "off")  # an interpreted kernel would read values
        forget_values(job.model)
        process -= counted_peak(job, least, LEAST)[0]
        batches = batch, 2 * batch
        (small, with_gaps), (large, _) = (counted_peak(job, side, n) for n in batches)
        gaps = with_gaps - small
    each = max((large - small) / (batches[1] - batches[0]), 1.0)
    return Need(process + small - batches[0] * each, each, job.frozen.bytes_kept(side), gaps)


def describe(need, options, images):
    """Return a `Need` in words; images: of the training and validation splits together."""
    batch = options.part_size()
    cards = ", ".join(f"{size} GB: {need.largest_batch(size * GB)}" for size in CARDS)
    lines = [
        f"memory: {need.fixed / GB:.2f} GB for weights and the like, {need.each / GB:.3f} GB for each image "
        f"of a step, {need.peak(batch) / GB:.2f} GB at {batch} images a part",
        f"largest --batch-size (with --accumulate, of a part): {cards}",
    ]
    if need.kept:
        size, all_of_them = need.kept / (1 << 20), need.kept * images / GB
        lines.append(f"kept once for all epochs: {size:.1f} MiB an image, {all_of_them:.2f} GB in all")
    return "\n".join(lines)
