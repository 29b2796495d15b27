"""A cache of decoded images spread over the processes of a run, for a data set that no single disk holds.

Each process decodes and keeps every n-th image; a batch's images travel to where they are wanted. The batches
are those of one process.
"""

import math
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist

from vlsm.data.cache import open_cached, refuse_empty
from vlsm.data.records import DataError, index_images
from vlsm.system import parallel


class ShardedSplit:
    """A split like `CachedSplit` of whose images this process holds its share.

    `batch` and `image_range` are called by all processes together. records: all of them; image_of: the image
    of each; share: `CachedSplit` of the records whose images are this process's.
    """

    on_device, nbytes = None, math.inf  # never copied to a GPU: the pixels are other processes' as well

    def __init__(self, records, image_of, share):
        self.records, self.image_of, self.share = records, np.asarray(image_of), share
        self.first = np.unique(self.image_of, return_index=True)[1]  # a record of each image
        self.image_count, self.side = len(self.first), share.side
        self.owner = owning_ranks(self.image_of)
        self.row = np.empty(len(records), np.int64)  # of a record in its owner's share
        for rank in range(parallel.world_size()):
            self.row[self.owner == rank] = np.arange((self.owner == rank).sum())
        self.group = dist.new_group(backend="gloo")  # between CPUs, from a thread that reads ahead

    def __len__(self):
        return len(self.records)

    def batch(self, indices, with_images=True):
        """Return `CachedSplit.batch` of this process's indices, which may be none; all processes call it
        together.
        """
        wanted = parallel.all_gather(list(indices), self.group)
        mine = [[i for i in part if self.owner[i] == parallel.rank()] for part in wanted]
        images, masks = self.share.batch(self.row[[i for part in mine for i in part]], with_images)
        sent = torch.cat([images, masks], 1) if with_images else masks
        owner = self.owner[indices]
        counts = [int((owner == rank).sum()) for rank in range(parallel.world_size())]
        received = sent.new_empty(len(indices), *sent.shape[1:])
        dist.all_to_all_single(received, sent, counts, [len(part) for part in mine], self.group)
        by_owner = np.argsort(np.argsort(owner, kind="stable"))
        received = torch.from_numpy(received.numpy()[by_owner])
        return (received[:, :3], received[:, 3:]) if with_images else (None, received)

    def image_range(self, rows):
        """Return `CachedSplit.image_range`; all processes call it together."""
        return self.batch(self.first[rows.start : rows.stop])[0]

    def min_over_ranks(self, n):
        """Return the least of a number over all processes."""
        return min(parallel.all_gather(n))

    def equalise_batches(self, batches):
        """Return the batches and, where another process has more, empty ones: all take part in every
        exchange.
        """
        most = max(parallel.all_gather(len(batches)))
        return [*batches, *[[]] * (most - len(batches))]


def owning_ranks(image_of):
    """Return the rank that holds each record: its image's number tells."""
    return np.asarray(image_of) % parallel.world_size()


def open_share(records, size, folder, label):
    """Do as `open_split` by all processes together, each of which decodes and caches its share.

    Raises what `open_split` raises, the same in each process.
    """
    _, image_of = index_images(records)
    mine = np.flatnonzero(owning_ranks(image_of) == parallel.rank())
    name = f"{label} {parallel.rank() + 1} of {parallel.world_size()}"
    share, problems, trouble, together = None, {}, None, defaultdict(list)
    try:
        share = open_cached([records[i] for i in mine], size, folder, name)
    except DataError as error:
        problems = {kind: [(int(mine[i]), name) for i, name in hits] for kind, hits in error.problems.items()}
    except ValueError as error:
        trouble = str(error)
    for found, message in parallel.all_gather((problems, trouble)):  # what one cannot do, none goes on with
        if message:
            raise ValueError(message)
        for kind, hits in found.items():
            together[kind] += hits
    if together:
        raise DataError({kind: sorted(hits) for kind, hits in together.items()}, len(records))
    refuse_empty(any(parallel.all_gather(share.has_foreground())), len(records), label)
    return ShardedSplit(records, image_of, share)
