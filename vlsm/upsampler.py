"""The learnable upsampler beside a frozen decoder's own last layer.

Source: Adhikari et al., "TuneVLSeg" (ACCV 2024), Section 3: logits = (1 - ratio) * frozen layer(z) + ratio * conv(bilinear(z)).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

KERNEL = 5


@lru_cache(maxsize=16)
def shifted_interpolation(n, factor, device):
    """`[KERNEL, n * factor, n]`: bilinear interpolation along one side as a matrix, read at KERNEL offsets, the border replicated."""
    with torch.inference_mode(False):  # kept for training too
        up = F.interpolate(torch.eye(n, device=device)[None], scale_factor=factor, mode="linear", align_corners=False)[0].T
        at = torch.arange(n * factor, device=device) + torch.arange(KERNEL, device=device)[:, None] - KERNEL // 2
        return up[at.clamp(0, n * factor - 1)]


class Upsampler(nn.Module):
    """`conv` and `ratio`, which starts at 0.5 and is unbounded; `reduce` where features are wide. The sizes are `config.upsampler`."""

    def __init__(self, config):
        super().__init__()
        channels, reduced, self.factor = config.upsampler
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False) if reduced else nn.Identity()
        self.conv = nn.Conv2d(reduced or channels, 1, KERNEL, padding=KERNEL // 2, padding_mode="replicate")
        self.ratio = nn.Parameter(torch.tensor(0.5))

    def rise(self, z):
        """conv(bilinear(reduce(z))): `[B, r, h, w]` -> `[B, 1, H, W]`.

        Both are linear, so that the products over channels can be had before the enlargement: a twelfth of the arithmetic,
        and nothing of size r x H x W is ever held.
        """
        rows, columns = (shifted_interpolation(n, self.factor, z.device).to(z.dtype) for n in z.shape[-2:])
        z = self.reduce(z)
        taps = torch.einsum("brhw,rij->bihjw", z, self.conv.weight[0].to(z.dtype))
        out = torch.einsum("iyh,bihx->byx", rows, torch.einsum("bihjw,jxw->bihx", taps, columns))
        return out[:, None] + self.conv.bias

    def forward(self, logits, z):
        return (1 - self.ratio) * logits + self.ratio * self.rise(z)
