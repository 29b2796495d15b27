"""Fine-tuning of vision-language segmentation models with few trained parameters."""

from kernels import dice_bce as dice_bce_loss

from . import metrics
from .checkpoint import load
from .model import VLSM, build

__all__ = ["VLSM", "build", "dice_bce_loss", "load", "metrics"]
