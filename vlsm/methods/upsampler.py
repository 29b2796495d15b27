"""The learnable upsampler beside a frozen decoder's own last layer.

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
    with torch.inference_mode(False):  # kept for training too
        eye = torch.eye(n, device=device)[None]
        up = F.interpolate(eye, scale_factor=factor, mode="linear", align_corners=False)[0].T
        at = (
            torch.arange(n * factor, device=device)
            + torch.arange(KERNEL, device=device)[:, None]
            - KERNEL // 2
        )
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

        Both are linear, so that the products over channels can be had before the enlargement: a twelfth of
        the arithmetic, and nothing of size C x H x W is ever held.
        """
        sides = features.shape[-2:]
        rows, columns = (
            shifted_interpolation(n, self.factor, features.device).to(features.dtype) for n in sides
        )
        features = self.reduce(features)
        taps = torch.einsum("brhw,rij->bihjw", features, self.conv.weight[0].to(features.dtype))
        out = torch.einsum("iyh,bihx->byx", rows, torch.einsum("bihjw,jxw->bihx", taps, columns))
        return out[:, None] + self.conv.bias

    def forward(self, logits, features):
        return (1 - self.ratio) * logits + self.ratio * self.upsample(features)
