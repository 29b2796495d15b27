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
    angle = uniform(n, -math.radians(5), math.radians(5), generator)
    sx, sy = uniform(n, 0.98, 1.02, generator), uniform(n, 0.98, 1.02, generator)
    # 2 % of the side, in half sides
    tx, ty = uniform(n, -0.04, 0.04, generator), uniform(n, -0.04, 0.04, generator)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos / sx, -sin / sx, tx, sin / sy, cos / sy, ty], 1).view(n, 2, 3)


def augment(images, masks, generator, total=None, part=slice(None)):
    """Augment uint8 images `[B, 3, S, S]` and masks 0/1 `[B, 1, S, S]`.

    Returns (float images 0..255, uint8 masks, bool `[B]` on the CPU: which images are changed). generator: a
    CPU generator. Of a batch of `total` images these may be the slice `part`, which then gets what it would
    get among all.
    """
    n, device = total or len(images), images.device
    images, masks = images.float(), masks.clone()
    moved = (torch.rand(n, generator=generator) < PROBABILITY)[part]
    matrices = affine_matrices(n, generator)[part]
    lit = (torch.rand(n, generator=generator) < PROBABILITY)[part]
    alpha, beta = uniform(n, 0.9, 1.1, generator)[part], uniform(n, -0.1, 0.1, generator)[part]
    if moved.any():
        rows = moved.nonzero()[:, 0].to(device)
        size = [len(rows), 1, *images.shape[2:]]
        grid = F.affine_grid(matrices[moved].to(device), size, align_corners=False)
        how = dict(padding_mode="border", align_corners=False)
        turned = F.grid_sample(images[rows], grid, mode="bicubic", **how)
        images[rows] = turned.clamp(0, 255)  # bicubic overshoots
        masks[rows] = F.grid_sample(masks[rows].float(), grid, mode="nearest", **how).to(masks.dtype)
    alpha, beta = torch.where(lit, alpha, 1.0), torch.where(lit, 255 * beta, 0.0)
    alpha, beta = (t.to(device)[:, None, None, None] for t in (alpha, beta))
    return (alpha * images + beta).clamp(0, 255), masks, moved | lit
