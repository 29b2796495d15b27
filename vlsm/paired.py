"""Whether two methods differ on the same records: Wilcoxon's signed-rank test.

Source: Wilcoxon, "Individual Comparisons by Ranking Methods" (1945); zeros left out, normal approximation with correction for ties.
"""

import math

import numpy as np


def signed_rank(a, b):
    """Two-sided p of the paired scores a and b, and the number of pairs that differ. (1.0, 0) where none does.

    The normal approximation, without continuity correction; for fewer than ten differing pairs it is rough.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    d = d[d != 0]
    n = len(d)
    if not n:
        return 1.0, 0
    sizes, place, ties = np.unique(np.abs(d), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]  # equal sizes share their mean rank
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    z = (ranks[d > 0].sum() - n * (n + 1) / 4) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2)), n
