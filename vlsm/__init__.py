"""Fine-tuning of vision-language segmentation models with few trained parameters."""

import warnings

from kernels import dice_bce as dice_bce_loss

from . import metrics
from .bank import Bank, load_many
from .checkpoint import load
from .hub import push_to_hub
from .model import VLSM, build

# `python -m vlsm.cris` runs a module that this package has imported already; that is meant so
warnings.filterwarnings("ignore", "'vlsm.cris' found in sys.modules", RuntimeWarning)

__all__ = ["Bank", "VLSM", "build", "dice_bce_loss", "load", "load_many", "metrics", "push_to_hub"]
