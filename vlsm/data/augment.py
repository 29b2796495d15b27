"""TuneVLSeg's training augmentation on whole batches, in torch; image and mask move alike.

Affine with probability 0.2: scale 0.98..1.02 and shift -2..2 % of the side, both per axis, rotation -5..5
degrees, the border replicated. Brightness and contrast with probability 0.2: clip(alpha x + 255 beta), alpha
0.9..1.1, beta -0.1..0.1. No flips.
"""

import math

import torch
import torch.nn.functional as F

PROBABILITY = 0.2


def uniform(n, low, high, generator):
    """Draw n numbers from low to high."""
    return low + (high - low) * torch.rand(n, generator=generator)


def affine_matrices(n, generator):
    """Draw n maps `[n, 2, 3]` from output to input coordinates, as `affine_grid` takes them."""
    limit = math.radians(5)
    angle = uniform(n, -limit, limit, generator)
    scale_x = uniform(n, 0.98, 1.02, generator)
    scale_y = uniform(n, 0.98, 1.02, generator)
    shift_x = uniform(n, -0.04, 0.04, generator)  # 2 % of the side, in half sides
    shift_y = uniform(n, -0.04, 0.04, generator)
    cos = angle.cos()
    sin = angle.sin()
    row_x = torch.stack([cos / scale_x, -sin / scale_x, shift_x], 1)  # [n, 3]
    row_y = torch.stack([sin / scale_y, cos / scale_y, shift_y], 1)
    return torch.stack([row_x, row_y], 1)


def augment(images, masks, generator, total=None, rows=slice(None)):
    """Augment uint8 images `[B, 3, S, S]` and masks 0/1 `[B, 1, S, S]`.

    Returns (float images 0..255, uint8 masks, bool `[B]` on the CPU: which images are changed). generator: a
    CPU generator. total, rows: if the images are the slice `rows` of a batch of `total`, each is changed as
    it would be in the whole batch.
    """
    n = total or len(images)
    moved = torch.rand(n, generator=generator) < PROBABILITY
    matrices = affine_matrices(n, generator)
    lit = torch.rand(n, generator=generator) < PROBABILITY
    contrast = uniform(n, 0.9, 1.1, generator)
    brightness = uniform(n, -0.1, 0.1, generator)
    # All draws are for the whole batch, so that an image's do not depend on how the batch is cut
    moved = moved[rows]
    lit = lit[rows]
    images, masks = _move(images.float(), masks.clone(), moved, matrices[rows])
    alpha = torch.where(lit, contrast[rows], 1.0)
    beta = torch.where(lit, 255 * brightness[rows], 0.0)
    alpha = alpha.to(images.device, non_blocking=True)[:, None, None, None]
    beta = beta.to(images.device, non_blocking=True)[:, None, None, None]
    return (alpha * images + beta).clamp(0, 255), masks, moved | lit


def _move(images, masks, moved, matrices):
    """Transform the `moved` (bool `[B]`) images, bicubic, and masks, nearest, in place; returns both."""
    if not moved.any():
        return images, masks
    rows = moved.nonzero()[:, 0].to(images.device, non_blocking=True)
    size = [len(rows), 1, *images.shape[2:]]
    matrices = matrices[moved].to(images.device, non_blocking=True)
    grid = F.affine_grid(matrices, size, align_corners=False)

    def sample(pixels, mode):
        return F.grid_sample(pixels, grid, mode=mode, padding_mode="border", align_corners=False)

    images[rows] = sample(images[rows], "bicubic").clamp(0, 255)  # bicubic overshoots
    masks[rows] = sample(masks[rows].float(), "nearest").to(masks.dtype)
    return images, masks
