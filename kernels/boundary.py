"""Distances between the boundaries of two masks, or any two sets of pixels: what HD95 and NSD are made of.

Exact, and never a table of all pairs in memory.

A mask's boundary: its pixels with one of four neighbours outside the mask; what lies beyond the image is
outside. On a GPU:

  1. `columns_kernel` finds the boundary of every mask and, for each pixel, the gap to the nearest boundary
     pixel in its column: two sweeps over the rows, by running maximum and minimum. It reads a byte a pixel
     and writes three (a flag, and a gap of 16 bits).
  2. `nearest_kernel` takes one boundary pixel (x, y) of a mask and finds the minimum over columns c of
     (c - x)^2 + gap(y, c)^2 in the other mask's gaps. gap(y, x) itself bounds the answer, so only columns
     that near are read: few where masks agree.

On a CPU the distances of all pairs come from matrix products over chunks of points (integers in float64:
exact), or, where boundaries are so long that this would be more work (noise), column by column as above.
"""

import torch

from .dispatch import runs_triton, tl, triton

COLUMNS, NEAREST = dict(BLOCK_H=32, BLOCK_W=32, num_warps=4), dict(BLOCK=128, num_warps=1)  # launch sizes
LIMIT = 1 << 15  # height and width together: gaps fit 16 bits, squares 32
CHUNK = 1 << 18  # elements of the largest temporary on a CPU: stays in the cache
COLUMN_COST = 6  # a step of the search by columns costs as much as so many pairs


def boundary(mask):
    """Return the boundary pixels of bool masks `[..., H, W]`, as such masks."""
    inner = mask.clone()
    inner[..., 1:, :] &= mask[..., :-1, :]
    inner[..., :-1, :] &= mask[..., 1:, :]
    inner[..., :, 1:] &= mask[..., :, :-1]
    inner[..., :, :-1] &= mask[..., :, 1:]
    inner[..., [0, -1], :] = False
    inner[..., :, [0, -1]] = False
    return mask & ~inner


def reference(pred, target):
    """Return (of pred's points, of target's) int64 squared distances of masks `[H, W]`, by definition."""
    a, b = boundary(pred).nonzero(), boundary(target).nonzero()
    squared = (a[:, None] - b).square().sum(2)
    return squared.amin(1), squared.amin(0)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b)


@triton.jit
def columns_kernel(
    masks, edge, gap, H, W, FAR, WHOLE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Find the boundary (WHOLE: all pixels) and the gaps of some columns of one mask.

    FAR is beyond any distance in the image.
    """
    plane = tl.program_id(1).to(tl.int64) * H * W
    cols = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    last = tl.zeros([BLOCK_W], tl.int32) - FAR
    for start in range(0, H, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        at = plane + rows[:, None].to(tl.int64) * W + cols[None, :]
        inside = (rows < H)[:, None] & (cols < W)[None, :]
        here = tl.load(masks + at, mask=inside, other=0)
        if WHOLE:
            found = here
        else:
            above = tl.load(masks + at - W, mask=inside & (rows > 0)[:, None], other=0)
            below = tl.load(masks + at + W, mask=inside & (rows < H - 1)[:, None], other=0)
            left = tl.load(masks + at - 1, mask=inside & (cols > 0)[None, :], other=0)
            right = tl.load(masks + at + 1, mask=inside & (cols < W - 1)[None, :], other=0)
            found = here & (1 - (above & below & left & right))  # masks hold 0 and 1
        tl.store(edge + at, found, mask=inside)
        seen = tl.where(found != 0, rows[:, None], -FAR)
        seen = tl.maximum(tl.associative_scan(seen, 0, _max), last[None, :])
        last = tl.max(seen, 0)
        tl.store(gap + at, tl.minimum(rows[:, None] - seen, FAR), mask=inside)
    tl.debug_barrier()  # the second sweep reads what the first one wrote
    coming = tl.zeros([BLOCK_W], tl.int32) + 2 * FAR
    for start in range(0, H, BLOCK_H):
        rows = (tl.cdiv(H, BLOCK_H) - 1) * BLOCK_H - start + tl.arange(0, BLOCK_H)
        at = plane + rows[:, None].to(tl.int64) * W + cols[None, :]
        inside = (rows < H)[:, None] & (cols < W)[None, :]
        found = tl.load(edge + at, mask=inside, other=0)
        seen = tl.where(found != 0, rows[:, None], 2 * FAR)
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
    for start in range(tl.maximum(x - bound, 0), tl.minimum(x + bound + 1, W), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        g = tl.load(row + cols, mask=cols < W, other=FAR).to(tl.int32)
        best = tl.minimum(best, tl.min((cols - x) * (cols - x) + g * g, 0))
    tl.store(squared + tl.program_id(0), best)


def _on_gpu(pred, target, whole):
    pairs, H, W = pred.shape
    masks = torch.stack([pred, target]).view(torch.uint8)  # [2, B, H, W]
    far = H + W
    edge, gap = torch.empty_like(masks), torch.empty_like(masks, dtype=torch.int16)
    columns_kernel[triton.cdiv(W, COLUMNS["BLOCK_W"]), 2 * pairs](
        masks, edge, gap, H, W, far, WHOLE=whole, **COLUMNS
    )
    points = edge.flatten().nonzero().flatten()
    squared = torch.empty(len(points), dtype=torch.int32, device=pred.device)
    if len(points):
        nearest_kernel[len(points),](points, gap, squared, H * W, pairs * H * W, W, far, **NEAREST)
    return squared, edge.sum((2, 3))


def _pairs(a, b):
    """Return each side's minima of all squared distances between points `[n, 2]` and `[m, 2]`, in chunks."""
    (n, m), centre = (len(a), len(b)), a[:1]
    a, b = (a - centre).double(), (b - centre).double()
    left = torch.cat([-2 * a, a.square().sum(1, keepdim=True), torch.ones(n, 1)], 1)
    right = torch.cat([b, torch.ones(m, 1), b.square().sum(1, keepdim=True)], 1).t().contiguous()
    of_a, of_b = [], torch.full((m,), torch.inf, dtype=torch.float64)
    for rows in left.split(max(1, CHUNK // m)):
        squared = rows @ right  # |a|^2 - 2ab + |b|^2
        of_a.append(squared.amin(1))
        of_b = torch.minimum(of_b, squared.amin(0))
    return torch.cat(of_a).int(), of_b.int()


def _by_columns(points, to, shape):
    """Return squared distances of points `[n, 2]` to the nearest of `to`, in an image of that shape."""
    H, W = shape
    far = H + W
    there = torch.zeros(shape, dtype=torch.bool)
    there[to[:, 0], to[:, 1]] = True
    row = torch.arange(H, dtype=torch.int32)[:, None]
    above = torch.where(there, row, -far).cummax(0).values
    below = torch.where(there, row, 2 * far).flip(0).cummin(0).values.flip(0)
    gap2 = torch.minimum(row - above, below - row).clamp(max=far).square()  # [H, W]
    column = torch.arange(W, dtype=torch.int32)
    dx2 = (column[:, None] - column).square()  # [W, W]
    return torch.cat(
        [(gap2[y] + dx2[x]).amin(1) for y, x in (p.unbind(1) for p in points.split(max(1, CHUNK // W)))]
    )


def _on_cpu(pred, target, whole):
    """Return squared distances of one pair: of pred's points, of target's; zeros where either is empty."""
    # bytes: their largest value is found many times faster than `any` of bool
    either = (pred | target).view(torch.uint8)
    y, x = (either.amax(dim).nonzero() for dim in (1, 0))
    if len(y):
        box = slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)
        pred, target = pred[box], target[box]
    a, b = (mask.nonzero() if whole else boundary(mask).nonzero() for mask in (pred, target))
    if not len(a) or not len(b):
        return torch.zeros(len(a), dtype=torch.int32), torch.zeros(len(b), dtype=torch.int32)
    if len(a) * len(b) > COLUMN_COST * (len(a) + len(b)) * pred.shape[1]:
        return _by_columns(a, b, pred.shape), _by_columns(b, a, pred.shape)
    return _pairs(a, b)


@torch.library.custom_op("vlsm::surface_distances", mutates_args=())
def _surface_distances(
    pred: torch.Tensor, target: torch.Tensor, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(pred):
        return _on_gpu(pred, target, whole)
    device = pred.device
    found = [_on_cpu(p, t, whole) for p, t in zip(pred.cpu(), target.cpu())]
    sides = list(zip(*found))
    counts = torch.tensor([[len(s) for s in side] for side in sides])
    return torch.cat([s for side in sides for s in side]).to(device), counts.to(device)


@_surface_distances.register_fake
def _(pred, target, whole):
    n = torch.library.get_ctx().new_dynamic_size()
    return pred.new_empty(n, dtype=torch.int32), pred.new_empty((2, len(pred)), dtype=torch.int64)


def surface_distances(pred, target, whole=False):
    """Compute squared distances from every boundary pixel of a mask to the other mask's nearest one, for bool
    masks `[H, W]` or `[B, H, W]`; whole: from every pixel to the nearest pixel.

    Returns (squared int32 `[n]`, counts int64 `[2, B]`): first the boundary pixels of the B predictions, then
    those of the targets, in reading order; `counts` says how many each has. Where one mask of a pair is
    empty, the other's values mean nothing. Raises ValueError for other shapes or types, an empty batch, or
    sides that together reach 32768 pixels.
    """
    if pred.dtype != torch.bool or target.dtype != torch.bool:
        raise ValueError(
            f"Masks must be bool; these are {pred.dtype} and {target.dtype}. Threshold them first."
        )
    if pred.shape != target.shape or pred.dim() not in (2, 3) or not pred.numel():
        raise ValueError(
            f"Masks {list(pred.shape)} and {list(target.shape)} must be equal, and [H, W] or [B, H, W] with "
            "something inside."
        )
    H, W = pred.shape[-2:]
    if H + W >= LIMIT:
        raise ValueError(
            f"Masks of {H} x {W} are too large: height and width together must stay below {LIMIT} pixels."
        )
    return _surface_distances(
        pred.reshape(-1, H, W).contiguous(), target.reshape(-1, H, W).contiguous(), whole
    )
