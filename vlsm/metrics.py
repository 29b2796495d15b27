"""DSC, IoU, HD95 and NSD of binary masks, one value per image, in torch on the device of the masks.

Masks are bool (or 0/1 of any type): threshold first. `[N, H, W]`, or lists of `[H, W]` masks of different
sizes. A target may be uint8 with 255 where pixels are ignored: there both masks count as background. Where
masks are empty:

| pair         | DSC, IoU, NSD | HD95           |
| both empty   | 1             | 0              |
| one is empty | 0             | undefined: nan |

In the terms of Metrics Reloaded (Maier-Hein et al. 2024): DSC and IoU are overlap-based, NSD and HD95
boundary-based; each has a value per image, and means are taken over images. HD95 is MONAI's: the percentile
in each direction, then the larger of the two. The boundaries of NSD run between pixels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import kernels

ALARM = 1e-3  # a mask of what is not there that covers more of the image is a false alarm
IGNORED = 255  # of a uint8 target: the pixel counts as background in prediction and target
ROUNDING = 1 + 1e-12  # of a squared tolerance: 10 pixels of 0.2 mm are within 2 mm


def dsc(pred, target):
    """Compute the Dice similarity coefficient 2|P∧T| / (|P|+|T|) of each pair, float64 `[N]` in [0, 1].

    Raises ValueError for unequal shapes, or masks that hold other values than 0 and 1.
    """
    both, p, t = _pixel_counts(pred, target)
    return _ratio(2 * both, p + t)


def iou(pred, target):
    """Compute the intersection over union |P∧T| / |P∨T| of each pair, float64 `[N]` in [0, 1].

    Raises ValueError as `dsc`.
    """
    both, p, t = _pixel_counts(pred, target)
    return _ratio(both, p + t - both)


def hd95(pred, target, spacing=None):
    """Compute the 95th-percentile Hausdorff distance of each pair, float64 `[N]`: the larger of both
    directions' percentiles; in pixels, or in millimetres with a spacing (from row to row, column to column).

    Boundary: mask pixels with one of four neighbours outside the mask or the image. Distances: Euclidean,
    from each boundary pixel to the other boundary's nearest, exact. Percentile: linear interpolation, its
    rank in integers. This is MONAI's definition; medpy pools both directions and differs by pixels. Raises
    ValueError as `dsc`, and for a spacing that is not positive.
    """
    _check_spacing(spacing)
    return _joined([_hd95(p, t, spacing) for p, t in _checked_pairs(pred, target)])


def nsd(pred, target, tolerance=2.0, spacing=None):
    """Compute the normalised surface distance of each pair, float64 `[N]` in [0, 1]: the share of both masks'
    contours within `tolerance` of the other's; in pixels, or in millimetres with a spacing, as `hd95` has it.

    As DeepMind's surface-distance defines it in two dimensions (Nikolov et al. 2018): the contour runs
    between pixels, through the corners where the four pixels differ; a corner counts with the length of the
    contour there (`_contour_lengths`). HD95 measures between boundary pixels instead, so the distances
    are computed anew, in the same exact way. Raises ValueError as `hd95`, and for a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"The tolerance of NSD is a distance, 0 or more; it is {tolerance}.")
    _check_spacing(spacing)
    return _joined([_nsd(p, t, tolerance, spacing) for p, t in _checked_pairs(pred, target)])


def is_alarm(masks):
    """Tell which masks bool `[N, H, W]` of what is not there are false alarms, bool `[N]`."""
    return masks.flatten(1).double().mean(1) > ALARM


def counted_pixels(pred, target):
    """Return bool masks and their target as bool tensors, both False where the target is 255 (ignored).

    The metrics take them as they are; of a uint8 target they check the values, for which the device waits.
    """
    return pred & (target != IGNORED), target == 1


def _checked_pairs(pred, target):
    """Return pairs of bool `[n, H, W]` tensors: one pair for tensors, pairs of n = 1 for lists."""
    if len(pred) != len(target):
        raise ValueError(f"{len(pred)} predictions came with {len(target)} targets.")
    stacked = torch.is_tensor(pred) and torch.is_tensor(target)
    pairs = []
    for p, t in [(pred, target)] if stacked else zip(pred, target):
        p = _as_bool(p)
        t, ignored = _split_target(t)
        if not stacked:
            p = p[None]
            t = t[None]
        if p.shape != t.shape or p.dim() != 3:
            raise ValueError(
                f"Masks {len(pairs)}: prediction {list(p.shape)} and target {list(t.shape)} must be equal, "
                "[N, H, W] or [H, W] each; nothing is broadcast."
            )
        if ignored is not None:
            p = p & ~ignored
        pairs.append((p, t))
    return pairs


def _split_target(target):
    """Return (target as a bool tensor without ignored pixels, bool tensor of these or None)."""
    target = torch.as_tensor(target)
    if target.dtype != torch.uint8:
        return _as_bool(target), None
    ignored = target == IGNORED
    return _as_bool(target.masked_fill(ignored, 0)), ignored


def _as_bool(masks):
    """Return masks as a bool tensor. Raises ValueError for values other than 0 and 1."""
    masks = torch.as_tensor(masks)
    if masks.dtype == torch.bool:
        return masks
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            "A mask holds values other than 0 and 1; threshold it first (grey masks: > 127, probabilities: > "
            "0.5, logits: > 0)."
        )
    return masks.bool()


def _joined(values):
    """Return the values of all pairs as one tensor, float64 `[N]`."""
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat(values)


def _pixel_counts(pred, target):
    """Return |P∧T|, |P|, |T| of each pair, int64 `[3, N]`: float32 would be inexact from 2^24 pixels on."""
    pairs = _checked_pairs(pred, target)
    if not pairs:
        return torch.zeros(3, 0, dtype=torch.int64)
    counts = []
    for p, t in pairs:
        masks = torch.stack([p & t, p, t])  # [3, n, H, W]
        counts.append(masks.sum((2, 3)))
    return torch.cat(counts, 1)


def _ratio(numerator, denominator):
    """Return numerator/denominator in float64; 1 where both masks are empty."""
    ratio = numerator.double() / denominator.double().clamp(min=1)
    return torch.where(denominator == 0, 1.0, ratio)


def _check_spacing(spacing):
    """Raise ValueError for a spacing that is not positive and finite."""
    if spacing is not None and not (0 < min(spacing) and max(spacing) < math.inf):
        raise ValueError(f"The spacing of pixels is two distances in millimetres, above 0; it is {spacing}.")


def _squared_distances(pred, target, spacing, whole=False):
    """Compute `kernels.surface_distances`, in square millimetres (float64) with a spacing."""
    if spacing and spacing[0] != spacing[1]:
        return _unequal_spacing(pred, target, spacing, whole)
    squared, counts = kernels.surface_distances(pred, target, whole)
    if spacing:
        squared = squared.double() * spacing[0] ** 2
    return squared, counts


def _unequal_spacing(pred, target, spacing, whole):
    """Compute `_squared_distances` with SciPy: the kernels know square pixels alone."""
    from scipy.ndimage import distance_transform_edt

    from kernels.boundary import boundary  # it imports Triton

    masks = torch.stack([pred, target])  # [2, B, H, W]
    points = masks if whole else boundary(masks)
    points = points.flatten(0, 1).cpu().numpy()  # [2B, H, W]
    y, x = points.any(0).nonzero()
    if len(y):  # the box around all points is enough
        points = points[:, y.min() : y.max() + 1, x.min() : x.max() + 1]
    squared = []
    for mask, other in zip(points, np.roll(points, len(pred), 0)):
        distances = distance_transform_edt(~other, sampling=spacing)
        squared.append(torch.from_numpy(distances[mask]).square())
    counts = torch.from_numpy(points.sum((1, 2))).view(2, -1)
    return torch.cat(squared).to(pred.device), counts.to(pred.device)


def _hd95(pred, target, spacing):
    """Compute HD95 of masks `[B, H, W]`, float64 `[B]`.

    The percentile interpolates between roots of squares, which are integers in pixels, and its rank
    0.95 (n - 1) is computed in integers: exact.
    """
    squared, counts = _squared_distances(pred, target, spacing)
    ordered = _sort_lists(squared, _list_index(counts, len(squared)))
    ordered = torch.cat([ordered, ordered.new_zeros(1)])  # empty lists at the end point here
    first = counts.flatten().cumsum(0).view(2, -1) - counts
    last = (counts - 1).clamp(min=0)
    rank = 19 * last // 20
    next_rank = torch.minimum(rank + 1, last)
    low = ordered[first + rank].double().sqrt()
    high = ordered[first + next_rank].double().sqrt()
    twentieths = 19 * last % 20
    percentile = low + twentieths.double() / 20 * (high - low)  # [2, B]
    return _fill_empty(percentile.amax(0), counts, one=math.nan, both=0.0)


def _sort_lists(squared, list_index):
    """Return the values of all 2B lists, each list sorted."""
    if squared.is_floating_point():  # millimetres
        order = squared.argsort()
        order = order[list_index[order].argsort(stable=True)]
        return squared[order]
    # a single sort: the list's index as the upper 32 bits keeps each list together
    keys = list_index << 32 | squared
    return keys.sort().values & 0xFFFFFFFF


def _list_index(counts, total):
    """Return for each of `total` values the index of its list, of lists with `counts` values `[2, B]`."""
    index = torch.arange(counts.numel(), device=counts.device)
    return index.repeat_interleave(counts.flatten(), output_size=total)


def _fill_empty(values, counts, one, both):
    """Return values `[B]` with `one` where one mask of the pair is empty and `both` where both are."""
    empty = counts == 0  # [2, B]: of predictions and targets
    values = values.masked_fill(empty.any(0), one)
    return values.masked_fill(empty.all(0), both)


def _contour_lengths(row, column):
    """Return the contour's length at a corner by which of its four pixels, `row` high and `column` wide, are
    inside: bits 8 4 / 2 1, upper left first.
    """
    crossed = math.hypot(row, column)  # two opposite corners are cut off
    cut = crossed / 2
    return [
        0, cut, cut, column, cut, row, crossed, cut,
        cut, crossed, row, cut, column, cut, cut, 0,
    ]  # fmt: skip


def _corner_codes(masks):
    """Return which pixels around each corner are inside, uint8 `[B, H + 1, W + 1]`: indices of
    `_contour_lengths`.
    """
    padded = F.pad(masks.byte(), (1, 1, 1, 1))  # everything beyond the image is outside
    beside = 2 * padded[..., :-1] + padded[..., 1:]  # two bits, left and right: [B, H + 2, W + 1]
    return 4 * beside[:, :-1] + beside[:, 1:]


def _nsd(pred, target, tolerance, spacing):
    """Compute NSD of masks `[B, H, W]`, float64 `[B]`."""
    pred_codes = _corner_codes(pred)
    target_codes = _corner_codes(target)
    pred_contour = pred_codes % 15 > 0  # neither 0 nor 15: the four pixels differ
    target_contour = target_codes % 15 > 0
    squared, counts = _squared_distances(pred_contour, target_contour, spacing, whole=True)
    codes = torch.cat([pred_codes[pred_contour], target_codes[target_contour]])
    row, column = spacing or (1, 1)
    contour = torch.tensor(_contour_lengths(row, column), dtype=torch.float64, device=pred.device)
    lengths = contour[codes.long()]
    near = squared.double() <= tolerance**2 * ROUNDING
    list_index = _list_index(counts, len(squared))
    zeros = lengths.new_zeros(counts.numel())
    total = zeros.index_add(0, list_index, lengths).view(2, -1).sum(0)
    within = zeros.index_add(0, list_index, lengths * near).view(2, -1).sum(0)
    return _fill_empty(within / total, counts, one=0.0, both=1.0)
