"""Fine-tuning of vision-language segmentation models with few trained parameters."""

from . import metrics
from .checkpoint import load
from .losses import dice_bce_loss
from .model import VLSM, build

__all__ = ["VLSM", "build", "dice_bce_loss", "load", "metrics"]
