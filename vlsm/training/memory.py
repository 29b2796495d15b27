"""What a run needs of memory, measured on two small steps and extended to any batch: `train.py --dry-run`.

The peak of a step is a + b x batch: weights, what is trained and its optimizer's state (on a CPU the whole
process), then activations.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import vlsm
from vlsm.system.device import autocast

GB = 1 << 30
CARDS = (8, 16, 24, 80)  # GB
TRIED = (2, 6)  # images of the steps that are measured
RESERVED = 0.08  # of a card: the driver's context and what its allocator cannot use


@dataclass
class Need:
    """Bytes that a run takes. fixed: weights and what does not grow with the batch; each: an image of a step
    more; kept: what is kept of an image for all epochs.
    """

    fixed: float
    each: float
    kept: int

    def peak(self, batch):
        """Return the bytes at the peak of a step."""
        return self.fixed + self.each * batch

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


def step_peak(job, side, batch):
    """Return the bytes at the peak of a training step on `batch` images of `side` pixels."""
    model, options = job.model.train(), job.options
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=job.device)
    target = torch.zeros(batch, 1, side, side, dtype=torch.uint8, device=job.device)
    target[..., : side // 2] = 1
    ids = job.tokenizer(["one small red object, located in top left of the image"] * batch)
    reset_peak(job.device)
    pixel_values = job.normalise(images)
    with autocast(job.device, job.dtype):
        kept = job.frozen.part_for_step(pixel_values)
        logits = model(pixel_values, *ids, image_features=kept)
    vlsm.dice_bce_loss(logits, target, **options.loss()).backward()
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(job.device)


def estimate(job, side):
    """Return the `Need` of a run whose `Job` is there, before its data are; what is trained has changed."""
    small, large = (max(step_peak(job, side, n) for _ in range(2)) for n in TRIED)
    each = max((large - small) / (TRIED[1] - TRIED[0]), 1.0)
    return Need(small - TRIED[0] * each, each, job.frozen.bytes_kept(side))


def describe(need, options, images):
    """Return a `Need` in words; images: of the training and validation splits together."""
    batch = -(-options.batch_size // options.accumulate)
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
