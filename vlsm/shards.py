"""A cache of decoded pictures spread over the processes of a run, for a data set that no single disk holds.

Each process decodes and keeps every n-th picture; a batch's pictures travel to where they are wanted. The batches are those of one process.
"""

import math
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist

from . import parallel
from .cache import DataError, image_index, open_cached, refuse_empty


class Sharded:
    """A split like `cache.Decoded`, of whose pictures this process holds its share; `batch` and `pictures` are called by all together.

    records: all of them; image_of: the image of each; share: `Decoded`, of the records whose images are this process's.
    """

    resident, nbytes = None, math.inf  # never copied to a GPU: the pixels are other processes' as well

    def __init__(self, records, image_of, share):
        self.records, self.image_of, self.share = records, np.asarray(image_of), share
        self.first = np.unique(self.image_of, return_index=True)[1]  # a record of each image
        self.count, self.side = len(self.first), share.side
        self.owner = owners(self.image_of)
        self.place = np.empty(len(records), np.int64)  # of a record in its owner's share
        for rank in range(parallel.world()):
            self.place[self.owner == rank] = np.arange((self.owner == rank).sum())
        self.group = dist.new_group(backend="gloo")  # bytes between CPUs, from a thread that reads ahead of the steps

    def __len__(self):
        return len(self.records)

    def batch(self, indices, with_pixels=True):
        """`Decoded.batch` of this process's own indices, which may be none; every process calls it at the same time."""
        wanted = parallel.every(list(indices), self.group)
        mine = [[i for i in part if self.owner[i] == parallel.rank()] for part in wanted]
        pixels, masks = self.share.batch(self.place[[i for part in mine for i in part]], with_pixels)
        sent = torch.cat([pixels, masks], 1) if with_pixels else masks
        owner = self.owner[indices]
        counts = [int((owner == rank).sum()) for rank in range(parallel.world())]
        came = sent.new_empty(len(indices), *sent.shape[1:])
        dist.all_to_all_single(came, sent, counts, [len(part) for part in mine], self.group)
        came = torch.from_numpy(came.numpy()[np.argsort(np.argsort(owner, kind="stable"))])  # it came by owners
        return (came[:, :3], came[:, 3:]) if with_pixels else (None, came)

    def pictures(self, rows):
        """`Decoded.pictures`; every process calls it at the same time."""
        return self.batch(self.first[rows.start : rows.stop])[0]

    def least(self, n):
        return min(parallel.every(n))

    def rounds(self, parts):
        """The parts and, where another process has more of them, empty ones: all take part in every exchange."""
        most = max(parallel.every(len(parts)))
        return [*parts, *[[]] * (most - len(parts))]


def owners(image_of):
    """The process that holds each record: its image's number tells."""
    return np.asarray(image_of) % parallel.world()


def open_share(records, size, folder, label):
    """`open_split` by all processes together, each of which decodes and caches its share. Raises as it does, the same in each."""
    _, image_of = image_index(records)
    mine = np.flatnonzero(owners(image_of) == parallel.rank())
    name = f"{label} {parallel.rank() + 1} of {parallel.world()}"
    share, problems, trouble, together = None, {}, None, defaultdict(list)
    try:
        share = open_cached([records[i] for i in mine], size, folder, name)
    except DataError as error:
        problems = {kind: [(int(mine[i]), name) for i, name in hits] for kind, hits in error.problems.items()}
    except ValueError as error:
        trouble = str(error)
    for found, said in parallel.every((problems, trouble)):  # what one cannot do, none goes on with
        if said:
            raise ValueError(said)
        for kind, hits in found.items():
            together[kind] += hits
    if together:
        raise DataError({kind: sorted(hits) for kind, hits in together.items()}, len(records))
    refuse_empty(any(parallel.every(share.foreground())), len(records), label)
    return Sharded(records, image_of, share)
