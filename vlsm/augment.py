"""TuneVLSeg's training augmentation on whole batches, in torch; image and mask move alike.

Affine with probability 0.2: scale 0.98..1.02 and shift -2..2 % of the side, both per axis, rotation -5..5 degrees, the border replicated.
Brightness and contrast with probability 0.2: clip(alpha x + 255 beta), alpha 0.9..1.1, beta -0.1..0.1. No flips.
"""

import math

import torch
import torch.nn.functional as F

PROBABILITY = 0.2


def uniform(n, low, high, generator):
    return low + (high - low) * torch.rand(n, generator=generator)


def affine_matrices(n, generator):
    """n random maps from output to input coordinates (in half sides, as `affine_grid` takes them), `[n, 2, 3]`."""
    angle = uniform(n, -math.radians(5), math.radians(5), generator)
    sx, sy = uniform(n, 0.98, 1.02, generator), uniform(n, 0.98, 1.02, generator)
    tx, ty = uniform(n, -0.04, 0.04, generator), uniform(n, -0.04, 0.04, generator)  # 2 % of the side in half sides
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos / sx, -sin / sx, tx, sin / sy, cos / sy, ty], 1).view(n, 2, 3)


def augment(pixels, masks, generator, total=None, mine=slice(None)):
    """uint8 pixels `[B, 3, S, S]` and masks 0/1 `[B, 1, S, S]` -> float pixels 0..255, uint8 masks, and which of the pictures are changed
    (bool `[B]` on the CPU). `generator`: a CPU generator. Of a batch of `total` pictures these may be the part `mine` (a slice), which then
    gets what it would get among all.
    """
    n, device = total or len(pixels), pixels.device
    pixels, masks = pixels.float(), masks.clone()
    moved = (torch.rand(n, generator=generator) < PROBABILITY)[mine]
    matrices = affine_matrices(n, generator)[mine]
    lit = (torch.rand(n, generator=generator) < PROBABILITY)[mine]
    alpha, beta = uniform(n, 0.9, 1.1, generator)[mine], uniform(n, -0.1, 0.1, generator)[mine]
    if moved.any():
        rows = moved.nonzero()[:, 0].to(device)
        grid = F.affine_grid(matrices[moved].to(device), [len(rows), 1, *pixels.shape[2:]], align_corners=False)
        image = F.grid_sample(pixels[rows], grid, mode="bicubic", padding_mode="border", align_corners=False)
        pixels[rows] = image.clamp(0, 255)  # bicubic overshoots
        masks[rows] = F.grid_sample(masks[rows].float(), grid, mode="nearest", padding_mode="border", align_corners=False).to(masks.dtype)
    alpha, beta = torch.where(lit, alpha, 1.0), torch.where(lit, 255 * beta, 0.0)
    pixels = (alpha.to(device)[:, None, None, None] * pixels + beta.to(device)[:, None, None, None]).clamp(0, 255)
    return pixels, masks, moved | lit
