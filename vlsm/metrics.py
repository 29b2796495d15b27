"""DSC, IoU, NSD and HD95 of binary masks, one value an image, in torch on the device where the masks are.

Masks are bool (or 0/1 of any type): threshold first. `[N, H, W]`, or lists of `[H, W]` masks of different
sizes. Where masks are empty:

| pair         | DSC, IoU, NSD | HD95                                                            |
| both empty   | 1             | 0                                                               |
| one is empty | 0             | undefined: nan; counted by `summarise`, never averaged silently |

In the terms of Metrics Reloaded (Maier-Hein et al. 2024): DSC and IoU are overlap-based, NSD and HD95
boundary-based; each has a value an image, and means run over images. HD95 is MONAI's: the percentile in each
direction, then the larger of the two. Where one mask is empty there is no distance; `mean_with_diagonal` puts
the image's diagonal there, the largest one possible. NSD's boundaries run between pixels.
"""

import math

import torch
import torch.nn.functional as F

import kernels


def _batches(pred, target):
    """Return checked pairs of bool `[n, H, W]` tensors: one pair of a batch, one for each mask of lists."""
    if len(pred) != len(target):
        raise ValueError(f"{len(pred)} predictions came with {len(target)} targets.")
    if torch.is_tensor(pred) and torch.is_tensor(target):
        pairs = [(pred, target)]
    else:
        pairs = [(torch.as_tensor(p)[None], torch.as_tensor(t)[None]) for p, t in zip(pred, target)]
    for i, (p, t) in enumerate(pairs):
        if p.shape != t.shape or p.dim() != 3:
            raise ValueError(
                f"Masks {i}: prediction {list(p.shape)} and target {list(t.shape)} must be equal, and [H, W] "
                "each; nothing is broadcast."
            )
    return [(_as_bool(p), _as_bool(t)) for p, t in pairs]


def _as_bool(masks):
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            "A mask holds values other than 0 and 1; threshold it first (grey masks: > 127, probabilities: > "
            "0.5, logits: > 0)."
        )
    return masks.bool()


def _ratio(pred, target, numerator, denominator):
    """Return numerator/denominator of (|P∧T|, |P|, |T|) in float64, counted in integers; 1 where both masks
    are empty.
    """
    batches = _batches(pred, target)
    counts = [torch.stack([m.sum((1, 2)) for m in (p & t, p, t)]) for p, t in batches]  # [3, n] each
    both, p, t = torch.cat(counts, 1) if counts else torch.zeros(3, 0, dtype=torch.int64)
    top, bottom = numerator(both, p, t).double(), denominator(both, p, t).double()
    return torch.where(bottom == 0, 1.0, top / bottom.clamp(min=1))


def dsc(pred, target):
    """Compute the Dice similarity coefficient 2|P∧T| / (|P|+|T|) of each pair, float64 `[N]` in [0, 1].

    Raises ValueError for unequal shapes.
    """
    return _ratio(pred, target, lambda both, p, t: 2 * both, lambda both, p, t: p + t)


def iou(pred, target):
    """Compute the intersection over union |P∧T| / |P∨T| of each pair, float64 `[N]` in [0, 1].

    Raises ValueError for unequal shapes.
    """
    return _ratio(pred, target, lambda both, p, t: both, lambda both, p, t: p + t - both)


def hd95(pred, target):
    """Compute the 95th-percentile Hausdorff distance of each pair in pixels, float64 `[N]`: the larger of
    both directions' percentiles.

    Boundary: mask pixels with one of four neighbours outside the mask or the image. Distances: Euclidean,
    from each boundary pixel to the other boundary's nearest, exact. Percentile: linear interpolation, its
    rank in integers. This is MONAI's definition; medpy pools both directions and differs by pixels.
    """
    values = [_hd95(p, t) for p, t in _batches(pred, target)]
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def _hd95(pred, target):
    """Compute HD95 of masks `[B, H, W]`.

    Percentile: linear, of the roots of integer squares, its rank 0.95 (n-1) taken in integers: exact.
    """
    squared, counts = kernels.surface_distances(pred, target)
    counts = counts.flatten()  # [2B]
    # one sort for all lists: each keeps its place, as the higher digits
    of = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(squared))
    ordered = torch.cat([(of << 32 | squared).sort().values & 0xFFFFFFFF, squared.new_zeros(1).long()])
    first, last = counts.cumsum(0) - counts, (counts - 1).clamp(min=0)
    rank, rest = 19 * last // 20, 19 * last % 20
    low, high = (ordered[first + k].double().sqrt() for k in (rank, torch.minimum(rank + 1, last)))
    percentile = (low + rest.double() / 20 * (high - low)).view(2, -1)
    empty = (counts == 0).view(2, -1)
    value = percentile.amax(0).masked_fill(empty.any(0), float("nan"))
    return value.masked_fill(empty.all(0), 0.0)


def nsd(pred, target, tolerance=2.0):
    """Compute the normalised surface distance of each pair, float64 `[N]` in [0, 1]: the share of both masks'
    contours that lies within `tolerance` pixels of the other's.

    As DeepMind's surface-distance defines it in two dimensions (Nikolov et al. 2018): the contour runs
    between pixels, through the corners where the four pixels differ; a corner counts with the length of the
    contour there (`CONTOUR`). Corners, not boundary pixels, are what HD95 does not look at, so the distances
    are computed anew, by the same exact kernel. Raises ValueError as `dsc`, and for a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"The tolerance of NSD is a distance in pixels, 0 or more; it is {tolerance}.")
    values = [_nsd(p, t, tolerance) for p, t in _batches(pred, target)]
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


# Length of the contour at a corner, by which of its four pixels are inside: bits 8 4 / 2 1, upper left first.
_DIAGONAL = math.sqrt(2) / 2
CONTOUR = [
    0, _DIAGONAL, _DIAGONAL, 1, _DIAGONAL, 1, 2 * _DIAGONAL, _DIAGONAL,
    _DIAGONAL, 2 * _DIAGONAL, 1, _DIAGONAL, 1, _DIAGONAL, _DIAGONAL, 0,
]  # fmt: skip


def _nsd(pred, target, tolerance):
    """Compute NSD of masks `[B, H, W]`."""
    padded = (F.pad(masks.byte(), (1, 1, 1, 1)) for masks in (pred, target))  # beyond the image is outside
    # [B, H + 1, W + 1] each
    codes = [8 * m[:, :-1, :-1] + 4 * m[:, :-1, 1:] + 2 * m[:, 1:, :-1] + m[:, 1:, 1:] for m in padded]
    corners = [(code > 0) & (code < 15) for code in codes]
    squared, counts = kernels.surface_distances(*corners, whole=True)
    code = torch.cat([c[at] for c, at in zip(codes, corners)]).long()
    lengths = torch.tensor(CONTOUR, dtype=torch.float64, device=pred.device)[code]
    of = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts.flatten())
    near = squared.double() <= tolerance**2
    total, within = (lengths.new_zeros(counts.numel()).index_add(0, of, v) for v in (lengths, lengths * near))
    total, within = (v.view(2, -1).sum(0) for v in (total, within))
    empty = counts == 0
    value = (within / total.clamp(min=1)).masked_fill(empty.any(0), 0.0)
    return value.masked_fill(empty.all(0), 1.0)


def summarise(dsc_values, iou_values, hd95_values, diagonals, target_empty, pred_empty, **others):
    """Return means over images, as a dictionary ready for JSON; all arguments `[N]`.

    `dsc`, `iou`, `hd95`, and each of `others` (nsd=...): mean, std (population) and n. For hd95 n counts the
    defined pairs, `n_undefined` those with exactly one empty mask, and `mean_with_diagonal` puts the image's
    diagonal in their place. `dsc_nonempty`: over images whose truth is not empty; `empty_correct`: the share
    of empty truths predicted exactly empty. Where nothing is to be averaged the value is None.
    """

    def stats(values):
        values = torch.as_tensor(values, dtype=torch.float64)
        if not len(values):
            return dict(mean=None, std=None, n=0)
        return dict(mean=values.mean().item(), std=values.std(correction=0).item(), n=len(values))

    d, h = torch.as_tensor(dsc_values, dtype=torch.float64), torch.as_tensor(hd95_values, dtype=torch.float64)
    diagonals = torch.as_tensor(diagonals, dtype=torch.float64)
    empty, pred_empty = (torch.as_tensor(t, dtype=torch.bool) for t in (target_empty, pred_empty))
    defined = ~h.isnan()
    hd = stats(h[defined])
    hd["n_undefined"] = int((~defined).sum())
    hd["mean_with_diagonal"] = stats(torch.where(defined, h, diagonals))["mean"]
    return dict(
        dsc=stats(d),
        iou=stats(iou_values),
        hd95=hd,
        **{name: stats(values) for name, values in others.items()},
        dsc_nonempty=stats(d[~empty]),
        empty_correct=stats(pred_empty[empty].double()),
    )
