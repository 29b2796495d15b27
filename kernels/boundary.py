"""Distances between the boundaries of two masks, or between any two sets of pixels: the base of HD95 and NSD.

Exact, without a table of all pairs in memory.

A mask's boundary: its pixels with one of four neighbours outside the mask; everything beyond the image counts
as outside. On a GPU:

  1. `columns_kernel` finds the boundary of every mask and, for each pixel, the gap to the nearest boundary
     pixel in its column: two sweeps over the rows, by running maximum and minimum. It reads one byte per
     pixel and writes three (a flag, and a gap of 16 bits).
  2. `nearest_kernel` takes one boundary pixel (x, y) of a mask and finds the minimum over columns c of
     (c - x)^2 + gap(y, c)^2 in the other mask's gaps. gap(y, x) itself bounds the result, so only columns
     within that distance are read: few where masks agree.

On a CPU the distances of all pairs come from matrix products over chunks of points (integers in float64:
exact), or, where boundaries are so long that this would be more work (noise), from SciPy's distance
transform.
"""

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from .dispatch import launch, runs_triton, tl, triton

COLUMNS = dict(BLOCK_H=32, BLOCK_W=32, num_warps=4)  # launch sizes
NEAREST = dict(BLOCK=128, num_warps=1)
LIMIT = 1 << 15  # of height + width: gaps fit into 16 bits, squares into 32
CHUNK = 1 << 18  # elements of the largest temporary on a CPU: it fits into the cache
PIXEL_COST = 20  # the distance transform takes as long for a pixel as the product for this many pairs


def boundary(mask):
    """Return the boundary pixels of bool masks `[..., H, W]`, as such masks."""
    outside = F.pad(~mask, (1, 1, 1, 1), value=True)
    above_or_below = outside[..., :-2, 1:-1] | outside[..., 2:, 1:-1]
    left_or_right = outside[..., 1:-1, :-2] | outside[..., 1:-1, 2:]
    return mask & (above_or_below | left_or_right)


def surface_distances_torch(pred, target, whole=False):
    """Compute `surface_distances` with torch and SciPy on the CPU, pair by pair, of masks `[B, H, W]`."""
    squared_of_pred = []
    squared_of_target = []
    for pred_mask, target_mask in zip(pred.cpu(), target.cpu()):
        of_pred, of_target = _distances_of_pair(pred_mask, target_mask, whole)
        squared_of_pred.append(of_pred)
        squared_of_target.append(of_target)
    squared = squared_of_pred + squared_of_target
    counts = torch.tensor([len(values) for values in squared]).view(2, -1)
    return torch.cat(squared).to(pred.device), counts.to(pred.device)


def _distances_of_pair(pred, target, whole):
    """Return squared distances of pred's points and of target's; zeros where either mask is empty."""
    # a maximum of bytes is many times faster than `any` of bool
    either = (pred | target).view(torch.uint8)  # [H, W]
    rows = either.amax(1).nonzero()
    columns = either.amax(0).nonzero()
    if len(rows):
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        pred = pred[box]
        target = target[box]
    if not whole:
        pred = boundary(pred)
        target = boundary(target)
    a = pred.nonzero()  # [n, 2]
    b = target.nonzero()  # [m, 2]
    n = len(a)
    m = len(b)
    if not n or not m:
        return torch.zeros(n, dtype=torch.int32), torch.zeros(m, dtype=torch.int32)
    if n * m > PIXEL_COST * pred.numel():
        return _by_transform(a, target), _by_transform(b, pred)
    return _by_pairs(a, b)


def _by_pairs(a, b):
    """Return each side's minima of all squared distances between points `[n, 2]` and `[m, 2]`, in chunks.

    `torch.cdist` would take the roots of all pairs, in two to three times the time.
    """
    a = a.double()
    b = b.double()
    a_squared = a.square().sum(1, keepdim=True)
    b_squared = b.square().sum(1, keepdim=True)
    left = torch.cat([-2 * a, a_squared, torch.ones_like(a_squared)], 1)  # [n, 4]
    right = torch.cat([b, torch.ones_like(b_squared), b_squared], 1)  # [m, 4]
    right = right.t().contiguous()
    of_a = []
    of_b = torch.full((len(b),), torch.inf, dtype=torch.float64)
    for rows in left.split(max(1, CHUNK // len(b))):
        squared = rows @ right  # |a|^2 - 2ab + |b|^2
        of_a.append(squared.amin(1))
        of_b = torch.minimum(of_b, squared.amin(0))
    return torch.cat(of_a).int(), of_b.int()


def _by_transform(points, mask):
    """Return squared distances of points `[n, 2]` to the nearest pixel of a mask `[H, W]`.

    SciPy's Euclidean distance transform is exact, and gives each pixel's nearest one as whole numbers.
    """
    indices = distance_transform_edt(~mask.numpy(), return_distances=False, return_indices=True)
    y, x = points.unbind(1)
    nearest = torch.from_numpy(indices)[:, y, x]  # [2, n]
    return (points.t() - nearest).square().sum(0).int()


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b)


@triton.jit
def _tile(plane, rows, cols, H, W):
    """Return (places, mask of those inside the image) of a tile of the image that begins at `plane`."""
    at = plane + rows[:, None].to(tl.int64) * W + cols[None, :]
    inside = (rows < H)[:, None] & (cols < W)[None, :]
    return at, inside


@triton.jit
def columns_kernel(
    masks, edge, gap, H, W, FAR, WHOLE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Find the boundary (WHOLE: all pixels) and the gaps of some columns of one mask.

    FAR is larger than any distance in the image.
    """
    plane = tl.program_id(0).to(tl.int64) * H * W
    cols = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    last = tl.zeros([BLOCK_W], tl.int32) - FAR
    for start in range(0, H, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        at, inside = _tile(plane, rows, cols, H, W)
        here = tl.load(masks + at, mask=inside, other=0)
        if WHOLE:
            point = here
        else:
            above = tl.load(masks + at - W, mask=inside & (rows > 0)[:, None], other=0)
            below = tl.load(masks + at + W, mask=inside & (rows < H - 1)[:, None], other=0)
            left = tl.load(masks + at - 1, mask=inside & (cols > 0)[None, :], other=0)
            right = tl.load(masks + at + 1, mask=inside & (cols < W - 1)[None, :], other=0)
            point = here & (1 - (above & below & left & right))  # masks hold 0 and 1
        tl.store(edge + at, point, mask=inside)
        seen = tl.where(point != 0, rows[:, None], -FAR)
        seen = tl.maximum(tl.associative_scan(seen, 0, _max), last[None, :])
        last = tl.max(seen, 0)
        tl.store(gap + at, tl.minimum(rows[:, None] - seen, FAR), mask=inside)
    tl.debug_barrier()  # the second sweep reads what the first one wrote
    coming = tl.zeros([BLOCK_W], tl.int32) + 2 * FAR
    for start in range(0, H, BLOCK_H):
        rows = (tl.cdiv(H, BLOCK_H) - 1) * BLOCK_H - start + tl.arange(0, BLOCK_H)
        at, inside = _tile(plane, rows, cols, H, W)
        point = tl.load(edge + at, mask=inside, other=0)
        seen = tl.where(point != 0, rows[:, None], 2 * FAR)
        seen = tl.minimum(tl.associative_scan(seen, 0, _min, reverse=True), coming[None, :])
        coming = tl.min(seen, 0)
        known = tl.load(gap + at, mask=inside, other=0).to(tl.int32)
        tl.store(gap + at, tl.minimum(known, seen - rows[:, None]), mask=inside)


@triton.jit
def nearest_kernel(points, gap, squared, pixels, half, W, FAR, BLOCK: tl.constexpr):
    """Find the squared distance of one boundary pixel, given by its place among all masks, to the other
    mask's boundary.
    """
    point = tl.load(points + tl.program_id(0))
    other = tl.where(point < half, point + half, point - half)
    x = ((point % pixels) % W).to(tl.int32)
    row = gap + (other - x)
    bound = tl.load(row + x).to(tl.int32)
    best = bound * bound
    first = tl.maximum(x - bound, 0)
    end = tl.minimum(x + bound + 1, W)
    for start in range(first, end, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        g = tl.load(row + cols, mask=cols < W, other=FAR).to(tl.int32)
        best = tl.minimum(best, tl.min((cols - x) * (cols - x) + g * g, 0))
    tl.store(squared + tl.program_id(0), best)


def _surface_distances_triton(pred, target, whole):
    """Compute `surface_distances` of contiguous bool masks `[B, H, W]` on a GPU."""
    pairs, H, W = pred.shape
    masks = torch.stack([pred, target]).view(torch.uint8)  # [2, B, H, W]
    far = H + W
    edge = torch.empty_like(masks)
    gap = torch.empty_like(masks, dtype=torch.int16)
    column_blocks = triton.cdiv(W, COLUMNS["BLOCK_W"])
    grid = 2 * pairs, column_blocks  # only the first of a grid's sizes may exceed 65,535
    launch(columns_kernel, grid, masks, edge, gap, H, W, far, WHOLE=whole, **COLUMNS)
    points = edge.flatten().nonzero().flatten()
    n = len(points)
    squared = torch.empty(n, dtype=torch.int32, device=pred.device)
    if n:
        launch(nearest_kernel, (n,), points, gap, squared, H * W, pairs * H * W, W, far, **NEAREST)
    return squared, edge.sum((2, 3))


@torch.library.custom_op("vlsm::surface_distances", mutates_args=())
def _surface_distances(pred: Tensor, target: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Choose the kernels or the twin; an op, so that `torch.compile` takes it as one step."""
    if runs_triton(pred):
        return _surface_distances_triton(pred, target, whole)
    return surface_distances_torch(pred, target, whole)


@_surface_distances.register_fake
def _(pred, target, whole):
    n = torch.library.get_ctx().new_dynamic_size()
    squared = pred.new_empty(n, dtype=torch.int32)
    counts = pred.new_empty((2, len(pred)), dtype=torch.int64)
    return squared, counts


def surface_distances(pred, target, whole=False):
    """Compute squared distances from every boundary pixel of a mask to the other mask's nearest one, for bool
    masks `[H, W]` or `[B, H, W]`; whole: from every pixel to the nearest pixel.

    Returns (squared int32 `[n]`, counts int64 `[2, B]`): first the boundary pixels of the B predictions, then
    those of the targets, in reading order; `counts` are the numbers of pixels of each mask. Where one mask of
    a pair is empty, the other's values mean nothing. Raises ValueError for other shapes or types, an empty
    batch, or sides that together reach 32768 pixels.
    """
    if pred.dtype != torch.bool or target.dtype != torch.bool:
        raise ValueError(f"Masks must be bool, not {pred.dtype} and {target.dtype}; threshold them first.")
    if pred.shape != target.shape or pred.dim() not in (2, 3) or not pred.numel():
        raise ValueError(
            f"Masks {list(pred.shape)} and {list(target.shape)} must be equal in shape, [H, W] or [B, H, W], "
            "and not empty."
        )
    H, W = pred.shape[-2:]
    if H + W >= LIMIT:
        raise ValueError(f"Masks of {H} x {W} are too large: height + width must stay below {LIMIT} pixels.")
    pred = pred.reshape(-1, H, W).contiguous()
    target = target.reshape(-1, H, W).contiguous()
    return _surface_distances(pred, target, whole)
