"""From uint8 images to the network's `pixel_values`."""

import torch


def normalise(images, mean, std, out=None):
    """Turn uint8 (or float 0..255) `[B, 3, H, W]` into float32 `pixel_values`.

    mean, std: of images with values from 0 to 1. out: memory to write to; a large batch's fresh memory costs
    a CPU more than the arithmetic, which goes image by image there, so that both steps find it in the cache.
    """
    std = torch.tensor(std, device=images.device)
    scale = (1 / (255 * std))[:, None, None]
    shift = (-torch.tensor(mean, device=images.device) / std)[:, None, None]
    out = torch.empty(images.shape, device=images.device) if out is None else out
    parts = zip(images, out) if images.device.type == "cpu" else [(images, out)]
    for source, target in parts:
        torch.mul(source, scale, out=target).add_(shift)
    return out


class Normaliser:
    """Turns uint8 images `[B, 3, H, W]` into `pixel_values` in a buffer that is reused.

    None stays None. Call it only after the previous step's backward.
    """

    def __init__(self, mean, std, device):
        self.mean, self.std, self.buffer = mean, std, torch.empty(0, device=device)

    def __call__(self, images):
        if images is None:
            return None
        if self.buffer.numel() < images.numel():
            self.buffer = torch.empty(images.numel(), device=self.buffer.device)
        return normalise(images, self.mean, self.std, self.buffer[: images.numel()].view(images.shape))
