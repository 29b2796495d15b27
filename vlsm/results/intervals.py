"""95 % bootstrap intervals of means over records: percentiles of 10,000 seeded draws of whole groups.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3. A group is sampled as
one: a patient, a video, or the records of one image.
"""

import re

import numpy as np

DRAWS = 10_000
SEED = 0
CHUNK = 1 << 22  # numbers drawn at a time


def group_name(name, pattern=None):
    """Return the group of a record: what `pattern` matches in its image's name, else the name itself."""
    match = re.search(pattern, name) if pattern else None
    return match[0] if match else name


def group_names(records, pattern=None):
    """Return the group of each record."""
    return [group_name(record.name, pattern) for record in records]


def in_brackets(ends, factor=100, sign=""):
    """Format an interval times a factor, "[1.20, 3.40]"; "" for None. sign: "+" prints the sign always."""
    if ends is None:
        return ""
    low, high = ends
    return f"[{factor * low:{sign}.2f}, {factor * high:{sign}.2f}]"


def bootstrap_intervals(values, groups=None, draws=DRAWS, seed=SEED):
    """Return {name: [low, high]}, the 95 % interval of each mean; None for fewer than two groups.

    values: {name: [N]}, NaN where a record has no value. groups: a name for each record (default: each is its
    own). A mean is the sum over the drawn groups' records by their number, so that large groups count more.
    """
    names = list(values)
    table = np.stack([np.asarray(column, float) for column in values.values()], 1)  # [N, M]
    group_of = np.arange(len(table))
    if groups is not None:
        _, group_of = np.unique(groups, return_inverse=True)
    n_groups = len(np.unique(group_of))
    if n_groups < 2:
        return dict.fromkeys(names)
    sums = np.zeros((n_groups, len(names)))
    counts = np.zeros((n_groups, len(names)))
    np.add.at(sums, group_of, np.nan_to_num(table))
    np.add.at(counts, group_of, ~np.isnan(table))

    means = np.concatenate(list(_draw_means(sums, counts, draws, seed)))  # [draws, M]
    intervals = {}
    for k, name in enumerate(names):
        intervals[name] = None
        if counts[:, k].any():
            intervals[name] = np.nanpercentile(means[:, k], [2.5, 97.5]).tolist()
    return intervals


def _draw_means(sums, counts, draws, seed):
    """Yield the means `[n, M]` of chunks of draws; sums, counts: of each group's values, `[G, M]`."""
    rng = np.random.default_rng(seed)
    n_groups = len(sums)
    at_a_time = max(1, CHUNK // n_groups)
    for start in range(0, draws, at_a_time):
        n = min(at_a_time, draws - start)
        drawn = rng.integers(0, n_groups, (n, n_groups))
        drawn += n_groups * np.arange(n)[:, None]  # draw k counts in its own range of bins
        times = np.bincount(drawn.ravel(), minlength=n * n_groups)
        times = times.reshape(n, n_groups).astype(float)
        n_defined = times @ counts
        yield np.where(n_defined > 0, times @ sums / np.maximum(n_defined, 1), np.nan)
