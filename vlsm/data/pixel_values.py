"""From uint8 images to the network's `pixel_values`."""

import torch


def normalise(images, mean, std):
    """Turn uint8 (or float 0..255) images `[B, 3, H, W]` into float32 `pixel_values`.

    mean, std: of the three channels, for values from 0 to 1.
    """
    mean = torch.tensor(mean, device=images.device)[:, None, None]  # [3, 1, 1]
    std = torch.tensor(std, device=images.device)[:, None, None]
    scale = 1 / (255 * std)
    return images.float().mul(scale).add_(-mean / std)
