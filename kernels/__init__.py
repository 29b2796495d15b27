"""Fused kernels, a file each: Triton kernel, plain-torch reference, registered op. Nothing here imports the rest of the project."""

from .adapter import adapter
from .boundary import surface_distances
from .dice_bce import dice_bce
from .dispatch import MODES, use

__all__ = ["MODES", "adapter", "dice_bce", "surface_distances", "use"]
