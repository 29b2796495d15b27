"""Training steps on empty images, where a run would train: to measure its memory, or to reserve it."""

import re
from contextlib import suppress
from pathlib import Path

import torch

from vlsm.system.parallel import autocast
from vlsm.training.frozen_cache import GB

CARDS = (8, 16, 24, 80)  # GB


def reset_peak(device):
    """Begin to measure the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not on Linux: the peak is that of the whole process so far
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device):
    """Return the bytes allocated on a GPU, or resident in RAM, at the peak since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def compute_gradients(model, cache, criterion, side, negatives, batch):
    """Compute the gradients of a step on `batch` images of `side` pixels, each with so many `negatives`."""
    device = cache.device
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=device)
    P = 1 + negatives
    target = torch.zeros(batch * P, 1, side, side, dtype=torch.uint8, device=device)
    prompts = ["one small red object, located in top left of the image"] * batch * P
    inputs = cache.model_inputs("", range(batch), images, prompts)
    pixel_values, input_ids, attention_mask, _, text_features = inputs
    with autocast(device, cache.dtype):
        image_features = None
        if cache.keeps_images:
            with torch.no_grad():
                image_features = cache.encode_frozen(pixel_values)
        logits = model(pixel_values, input_ids, attention_mask, image_features, text_features)
    criterion(logits, target).backward()


def rehearse(model, cache, criterion, side, negatives, batch):
    """Let PyTorch take a step's memory on a GPU, before kept features share what is left there."""
    if cache.device.type == "cuda" and cache.keeps_images:
        with torch.random.fork_rng([cache.device]):
            compute_gradients(model.train(), cache, criterion, side, negatives, batch)
        model.zero_grad()
        model.eval()


def describe_memory(model, cache, optimizer, criterion, side, negatives):
    """Return lines on the memory of weights and of each image, and the largest batch for some cards.

    The steps change the model.
    """
    model.train()
    least = 2 if model.updated_buffers else 1  # the statistics of a batch need two values
    peaks = []
    for batch in (least, least, least + 1):  # the first one allocates the optimizer's state
        reset_peak(cache.device)
        compute_gradients(model, cache, criterion, side, negatives, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peaks.append(peak_bytes(cache.device))
    each = max(peaks[2] - peaks[1], 1)  # bytes an image
    fixed = max(peaks[1] - least * each, 0)
    batches = []
    for size in CARDS:
        batches.append(f"{max(0, (size * GB - fixed) // each)} in {size} GB")
    return (
        f"Memory, as measured: {fixed / GB:.2f} GB for the model, {each / GB:.3f} GB for each image of a "
        "step\n"
        f"Largest --batch-size: {', '.join(batches)}\n"
        "(with --accumulate N: N times as many)"
    )
