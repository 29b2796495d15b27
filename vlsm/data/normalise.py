"""Normalise images for a network."""

from functools import lru_cache

import torch


def normalise(images, mean, std):
    """Turn uint8 (or float 0..255) images `[B, 3, H, W]` into float32 `pixel_values`.

    mean, std: of the three channels, for values from 0 to 1.
    """
    scale, shift = _channel_factors(tuple(mean), tuple(std), images.device)
    return images.float().mul(scale).add_(shift)


@lru_cache
def _channel_factors(mean, std, device):
    """Return scale and shift of the channels `[3, 1, 1]`; kept, as copying them makes the host wait."""
    mean = torch.tensor(mean, device=device)[:, None, None]
    std = torch.tensor(std, device=device)[:, None, None]
    scale = 1 / (255 * std)
    return scale, -mean / std
