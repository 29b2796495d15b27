"""The learnable upsampler, mixed with a frozen decoder's own last layer.

Source: Adhikari et al., "TuneVLSeg" (ACCV 2024), Section 3:
logits = (1 - ratio) * frozen layer(features) + ratio * conv(bilinear(features)).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

KERNEL = 5


@lru_cache(maxsize=16)
def shifted_interpolation(n, factor, device):
    """Return `[KERNEL, n * factor, n]`: bilinear interpolation along a side as a matrix, at KERNEL offsets.

    The border is replicated.
    """
    with torch.inference_mode(False):  # the cached matrix also serves training
        eye = torch.eye(n, device=device)[None]
        up = F.interpolate(eye, scale_factor=factor, mode="linear", align_corners=False)
        up = up[0].T  # [n * factor, n]
        offsets = torch.arange(KERNEL, device=device) - KERNEL // 2
        at = torch.arange(n * factor, device=device) + offsets[:, None]  # [KERNEL, n * factor]
        return up[at.clamp(0, n * factor - 1)]


class Upsampler(nn.Module):
    """A convolution of the enlarged features, mixed with the frozen logits by a ratio that starts at 0.5.

    config: has `upsampler_sizes`. Wide features are reduced by a 1 x 1 convolution first.
    """

    def __init__(self, config):
        super().__init__()
        channels, reduced, self.factor = config.upsampler_sizes
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False) if reduced else nn.Identity()
        self.conv = nn.Conv2d(reduced or channels, 1, KERNEL, padding=KERNEL // 2, padding_mode="replicate")
        self.ratio = nn.Parameter(torch.tensor(0.5))

    def upsample(self, features):
        """Compute conv(bilinear(reduce(features))): `[B, C, h, w]` -> `[B, 1, H, W]`.

        Both are linear, so the products over channels come before the enlargement: a twelfth of the
        arithmetic, and no tensor of size C x H x W.
        """
        h, w = features.shape[-2:]
        rows = shifted_interpolation(h, self.factor, features.device).to(features.dtype)  # [5, H, h]
        columns = shifted_interpolation(w, self.factor, features.device).to(features.dtype)  # [5, W, w]
        features = self.reduce(features)
        weight = self.conv.weight[0].to(features.dtype)
        taps = torch.einsum("brhw,rij->bihjw", features, weight)
        wide = torch.einsum("bihjw,jxw->bihx", taps, columns)
        out = torch.einsum("iyh,bihx->byx", rows, wide)  # [B, H, W]
        return out[:, None] + self.conv.bias

    def forward(self, logits, features):
        """Mix logits `[B, 1, H, W]` with upsampled features `[B, C, h, w]` -> `[B, 1, H, W]`."""
        return (1 - self.ratio) * logits + self.ratio * self.upsample(features)
