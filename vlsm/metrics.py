"""DSC, IoU and HD95 of binary masks, one value an image, in torch on the device where the masks are.

Masks are bool (or 0/1 of any type): threshold first. `[N, H, W]`, or lists of `[H, W]` masks of different sizes. Where masks are empty:

| pair         | DSC, IoU | HD95                                                                   |
| both empty   | 1        | 0                                                                      |
| one is empty | 0        | undefined: nan, and counted in `summarise`, never averaged or dropped silently |
"""

import math

import torch

CHUNK = 1 << 22  # elements of the largest temporary in the distance search (int32: 16 MiB)


def _batches(pred, target):
    """The masks as pairs of bool `[n, H, W]` tensors, checked: one pair for a batch, one a mask for lists."""
    if len(pred) != len(target):
        raise ValueError(f"{len(pred)} predictions came with {len(target)} targets.")
    if torch.is_tensor(pred) and torch.is_tensor(target):
        pairs = [(pred, target)]
    else:
        pairs = [(torch.as_tensor(p)[None], torch.as_tensor(t)[None]) for p, t in zip(pred, target)]
    for i, (p, t) in enumerate(pairs):
        if p.shape != t.shape or p.dim() != 3:
            raise ValueError(
                f"Masks {i}: prediction {list(p.shape)} and target {list(t.shape)} must be equal, and [H, W] each; nothing is broadcast."
            )
    return [(_as_bool(p), _as_bool(t)) for p, t in pairs]


def _as_bool(masks):
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            "A mask holds values other than 0 and 1; threshold it first (grey masks: > 127, probabilities: > 0.5, logits: > 0)."
        )
    return masks.bool()


def _ratio(pred, target, numerator, denominator):
    """numerator/denominator of (|P∧T|, |P|, |T|) in float64, counted in integers; 1 where both masks are empty."""
    batches = _batches(pred, target)
    counts = [torch.stack([m.sum((1, 2)) for m in (p & t, p, t)]) for p, t in batches]  # [3, n] each
    both, p, t = torch.cat(counts, 1) if counts else torch.zeros(3, 0, dtype=torch.int64)
    top, bottom = numerator(both, p, t).double(), denominator(both, p, t).double()
    return torch.where(bottom == 0, 1.0, top / bottom.clamp(min=1))


def dsc(pred, target):
    """Dice similarity coefficient 2|P∧T| / (|P|+|T|) of each pair, float64 `[N]` in [0, 1]. Raises ValueError for unequal shapes."""
    return _ratio(pred, target, lambda both, p, t: 2 * both, lambda both, p, t: p + t)


def iou(pred, target):
    """Intersection over union |P∧T| / |P∨T| of each pair, float64 `[N]` in [0, 1]. Raises ValueError for unequal shapes."""
    return _ratio(pred, target, lambda both, p, t: both, lambda both, p, t: p + t - both)


def hd95(pred, target):
    """95th-percentile Hausdorff distance of each pair in pixels, float64 `[N]`: the larger of both directions' percentiles.

    Boundary: mask pixels with one of four neighbours outside the mask or the image. Distances: Euclidean, from each boundary pixel
    to the other boundary's nearest, exact. Percentile: linear interpolation, its rank in integers. This is MONAI's definition;
    medpy pools both directions and differs by pixels.
    """
    values = [_hd95(p, t) for ps, ts in _batches(pred, target) for p, t in zip(ps, ts)]
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def boundary(mask):
    """Pixels of a bool mask `[..., H, W]` with at least one of four neighbours outside the mask; beyond the edge is outside."""
    inner = mask.clone()
    inner[..., 1:, :] &= mask[..., :-1, :]
    inner[..., :-1, :] &= mask[..., 1:, :]
    inner[..., :, 1:] &= mask[..., :, :-1]
    inner[..., :, :-1] &= mask[..., :, 1:]
    inner[..., [0, -1], :] = False
    inner[..., :, [0, -1]] = False
    return mask & ~inner


def _hd95(pred, target):
    if not pred.any() or not target.any():
        undefined = bool(pred.any()) != bool(target.any())
        return torch.tensor(math.nan if undefined else 0.0, dtype=torch.float64, device=pred.device)
    a, b = boundary(pred), boundary(target)
    rows, cols = (a | b).any(1).nonzero(), (a | b).any(0).nonzero()  # both boundaries' box: the rest changes nothing
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1))
    a, b = a[box], b[box]
    return torch.maximum(_percentile95(_squared_distances(a, b)), _percentile95(_squared_distances(b, a)))


def _squared_distances(points, to):
    """Squared distance of each true pixel of `points` to the nearest one of `to` (both `[H, W]`), int32 `[n]`, exact.

    First the distance g to the nearest pixel of `to` in the same column, for every pixel at once; then, for the points alone,
    the minimum over columns of (dx)^2 + g^2: n * W steps, where all pairs of points would be n * m.
    """
    H, W = to.shape
    far = H + W  # beyond any distance in the image
    row = torch.arange(H, device=to.device, dtype=torch.int32)[:, None]
    above = torch.where(to, row, -far).cummax(0).values  # the last row of `to` at or above
    below = torch.where(to, row, 2 * far).flip(0).cummin(0).values.flip(0)
    g2 = torch.minimum(row - above, below - row).clamp(max=far).square()  # [H, W]
    column = torch.arange(W, device=to.device, dtype=torch.int32)
    dx2 = (column[:, None] - column).square()  # [W, W]
    y, x = points.nonzero().unbind(1)
    step = max(1, CHUNK // W)
    return torch.cat([(g2[y[i : i + step]] + dx2[x[i : i + step]]).amin(1) for i in range(0, len(y), step)])


def _percentile95(squared):
    """95th percentile, linear, of the roots of integer squares: rank 0.95 (n-1), taken in integers so that it is exact."""
    ordered = squared.sort().values
    k, rest = divmod(19 * (len(ordered) - 1), 20)
    low, high = (ordered[i].double().sqrt() for i in (k, min(k + 1, len(ordered) - 1)))
    return low + rest / 20 * (high - low)


def summarise(dsc_values, iou_values, hd95_values, diagonals, target_empty, pred_empty):
    """Means over images, as a dictionary ready for JSON; all arguments `[N]`.

    `dsc`, `iou`, `hd95`: mean, std (population) and n. For hd95 n counts the defined pairs; `n_undefined` those with exactly one empty
    mask, and `mean_with_diagonal` puts the image's diagonal in their place. `dsc_nonempty`: over images whose truth is not empty;
    `empty_correct`: the share of empty truths predicted exactly empty. Where nothing is to be averaged the value is None.
    """

    def stats(values):
        values = torch.as_tensor(values, dtype=torch.float64)
        if not len(values):
            return dict(mean=None, std=None, n=0)
        return dict(mean=values.mean().item(), std=values.std(correction=0).item(), n=len(values))

    d, h = torch.as_tensor(dsc_values, dtype=torch.float64), torch.as_tensor(hd95_values, dtype=torch.float64)
    diagonals = torch.as_tensor(diagonals, dtype=torch.float64)
    empty, pred_empty = torch.as_tensor(target_empty, dtype=torch.bool), torch.as_tensor(pred_empty, dtype=torch.bool)
    defined = ~h.isnan()
    hd = stats(h[defined])
    hd["n_undefined"] = int((~defined).sum())
    hd["mean_with_diagonal"] = stats(torch.where(defined, h, diagonals))["mean"]
    return dict(
        dsc=stats(d),
        iou=stats(iou_values),
        hd95=hd,
        dsc_nonempty=stats(d[~empty]),
        empty_correct=stats(pred_empty[empty].double()),
    )
