"""95 % bootstrap intervals of means over records: percentiles of 10,000 seeded draws of whole groups.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3. A group is what was
drawn as one: a patient, a video, or the records of one image.
"""

import re

import numpy as np

DRAWS, SEED = 10_000, 0
CHUNK = 1 << 22  # numbers drawn at a time


def group_name(name, pattern=None):
    """Return the group of a record of that name: what `pattern` finds in it, else the name itself."""
    found = re.search(pattern, name) if pattern else None
    return found[0] if found else name


def group_names(records, pattern=None):
    """Return the group of each record, by its image's name."""
    return [group_name(r.name, pattern) for r in records]


def in_brackets(ends, factor=100, sign=""):
    """Return an interval as it is printed, "[1.20, 3.40]", times a factor; nothing for None."""
    return "" if ends is None else "[{:{s}.2f}, {:{s}.2f}]".format(*(factor * end for end in ends), s=sign)


def bootstrap_intervals(values, groups=None, draws=DRAWS, seed=SEED):
    """Return {name: [low, high]}, the 95 % interval of each mean; None for fewer than two groups.

    values: {name: [n]}, NaN where a record has no value. groups: a name for each record (default: each is its
    own). A mean is the sum over the drawn groups' records by their number, so that large groups count more.
    """
    names, n = list(values), len(next(iter(values.values())))
    table = np.array([values[name] for name in names], float).reshape(len(names), n).T  # [n, M]
    which = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    G = which.max() + 1 if n else 0
    if G < 2:
        return dict.fromkeys(names)
    sums, counts = np.zeros((2, G, len(names)))
    np.add.at(sums, which, np.nan_to_num(table))
    np.add.at(counts, which, ~np.isnan(table))
    rng, means = np.random.default_rng(seed), []
    for start in range(0, draws, max(1, CHUNK // G)):
        size = min(max(1, CHUNK // G), draws - start)
        drawn = rng.integers(0, G, (size, G)) + G * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * G).reshape(size, G).astype(float)
        n_defined = times @ counts
        means.append(np.where(n_defined > 0, times @ sums / np.maximum(n_defined, 1), np.nan))
    known = counts.sum(0) > 0
    ends = np.full((2, len(names)), np.nan)
    ends[:, known] = np.nanpercentile(np.concatenate(means)[:, known], [2.5, 97.5], axis=0)
    return {name: ends[:, k].tolist() if known[k] else None for k, name in enumerate(names)}
