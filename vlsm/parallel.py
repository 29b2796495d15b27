"""Several processes, one run, as torchrun starts them: which share of the work is this process's, and what is summed over all.

A step reduces one buffer of gradients: what is trained is small, and the frozen base needs no traffic at all. Without torchrun every
function is what a single process needs, and costs nothing.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start(device):
    """Join the processes that torchrun has started, if it has; the device option for this one. All but the first say nothing on stdout."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return device
    cuda = device != "cpu" and torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")
    return f"cuda:{local_rank()}" if cuda and device in ("auto", "cuda") else device


def leave():
    """At the end of a program: wait for the others and close the connections, on which their threads may still be reading."""
    if world() > 1:
        barrier()
        dist.destroy_process_group()


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world() > 1 else 0


def local_rank():
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def on_this_machine():
    """How many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def barrier():
    if world() > 1:
        dist.barrier()


@contextmanager
def first_here():
    """The machine's first process does something (a download, a cache), then the others, who find it done."""
    if local_rank():
        barrier()
    try:
        yield
    finally:
        if not local_rank():
            barrier()


def own(parts):
    """Those of some batches that this process takes, as (number, batch): each goes to one process, and none is taken twice."""
    return list(enumerate(parts))[rank() :: world()]


def share(part):
    """(this process's rows of a batch, which may be empty; their weight in a mean over the batch, times the number of processes)."""
    mine = part[rank() :: world()]
    return mine, len(mine) * world() / len(part)


def average(tensors):
    """Replace tensors by their mean over all processes, in one reduction."""
    tensors = list(tensors)
    if world() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, (flat / world()).split([t.numel() for t in tensors])):
        tensor.copy_(mean.view_as(tensor))


def total(numbers, device):
    """Numbers summed over all processes, in float64."""
    if world() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def every(value, group=None):
    """What each process gives here, by their numbers. group: a connection of their own, for another thread."""
    if world() == 1:
        return [value]
    found = [None] * world()
    dist.all_gather_object(found, value, group)
    return found


def gather(items):
    """What all processes have found, (number, ...) each, in the order of the numbers."""
    return sorted((item for part in every(items) for item in part), key=lambda item: item[0])
