"""Devices, and several processes of one run, as torchrun starts them: their shares of the work, their sums.

A step reduces one buffer of gradients: the trained parameters are few, and frozen ones have no gradients.
Without torchrun every function works for a single process.
"""

import ctypes
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=6)  # the others wait while the first process downloads weights or decodes images
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


def join_processes(device):
    """Join the processes that torchrun has started, if it has.

    device: the `--device` option. Returns the device of this process: its own GPU where there is one. Raises
    ValueError for one GPU named for all.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return device
    if sys.platform == "linux":  # a killed torchrun takes its processes along
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and device not in ("auto", "cuda"):
        raise ValueError(
            f"--device {device}: each of several processes takes a GPU of its own. Use --device cuda."
        )
    own = torch.device("cuda", local_rank()) if cuda else None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=own)
    return str(own) if cuda else device


def shut_down():
    """Wait for the other processes, whose threads may still read from the connections, and close these."""
    if world_size() > 1:
        barrier()
        dist.destroy_process_group()


def world_size():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return this process's rank; 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank():
    """Return this process's rank on its machine; torchrun puts it into the environment."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size():
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def barrier():
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def local_first():
    """Let the machine's first process do something (a download, a cache) before the others."""
    if local_rank():
        barrier()
    try:
        yield
    finally:
        if not local_rank():
            barrier()


def own_batches(batches):
    """Return the batches of this process as (index, batch); each batch goes to one process."""
    return list(enumerate(batches))[rank() :: world_size()]


class Share(NamedTuple):
    """The part of a batch that a process computes at a time.

    indices: its records; a process without any computes the batch's first with weight 0. count: the number
    of its records. weight: factor on their mean loss; the weighted gradients, summed over a process's parts
    and averaged over all processes, are the gradient of the batch's mean loss. part: the slice of the batch.
    batch_size: records of the whole batch.
    """

    indices: list
    count: int
    weight: float
    part: slice
    batch_size: int


def share_batch(batch, parts=1):
    """Return this process's `Share`s of a batch, a list of record indices, in so many `parts` or fewer."""
    shares = []
    parts = min(parts, -(-len(batch) // world_size()))  # no part is empty in every process
    for k in range(parts):
        places = slice(rank() + k * world_size(), None, parts * world_size())
        count = len(batch[places])
        if not count:
            places = slice(0, 1)
        weight = count * world_size() / len(batch)
        shares.append(Share(batch[places], count, weight, places, len(batch)))
    return shares


def all_reduce_mean(tensors):
    """Replace tensors by their mean over all processes, in one reduction."""
    tensors = list(tensors)
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, (flat / world_size()).split([t.numel() for t in tensors])):
        tensor.copy_(mean.view_as(tensor))


def all_reduce_sum(numbers, device):
    """Sum numbers over all processes, in float64."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather_sorted(items):
    """Return the (index, ...) tuples of all processes, sorted by index."""
    if world_size() > 1:
        items_of = [None] * world_size()  # by rank
        dist.all_gather_object(items_of, items)
        items = chain.from_iterable(items_of)
    return sorted(items, key=lambda item: item[0])


# Devices


AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_device(device, amp):
    """Return (torch.device, autocast dtype or None) for the options `--device` and `--amp`.

    Raises ValueError for a device that is not available, for fp16 on a CPU, and for bf16 on a GPU that only
    emulates it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.ones(1, device=device).add_(1).cpu()  # computed: this torch may hold no code for an old GPU
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} is not available ({reason}). Try --device cpu.") from error
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "auto":
        amp = "off"
        if device.type == "cuda":
            amp = "bf16" if has_bf16 else "fp16"
    if amp == "bf16" and not has_bf16:
        raise ValueError(f"--amp bf16: {torch.cuda.get_device_name()} only emulates it; use fp16 or off.")
    if device.type == "cpu" and amp == "fp16":
        raise ValueError("--amp fp16 needs a GPU; on a CPU use bf16 or off.")
    return device, AMP_DTYPES[amp]


def autocast(device, dtype):
    """Return the autocast context of a dtype, or one that does nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
