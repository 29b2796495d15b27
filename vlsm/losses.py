"""The training loss, Eq. 2 of VLSM-Adapter: a weighted sum of Dice and binary cross entropy on logits."""

import torch
import torch.nn.functional as F


def dice_bce_loss(logits, target, dice_weight=1.5, bce_weight=1.0, smooth=1e-5, ce="logits"):
    """Scalar loss of logits `[N, 1, H, W]` (or `[N, H, W]`) against a target of the same shape: bool, uint8 0/1 or float in [0, 1].

    Dice: mean over samples of 1 - (2 sum p y + smooth) / (sum p + sum y + smooth), p = sigmoid(logits). Cross entropy: mean over
    all pixels. `ce="reference"` hands the cross entropy the sigmoid a second time, as the published code does, so that its losses can
    be compared: such a loss is 0.69, not 0, on a perfect empty mask. Raises ValueError where shapes differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"Logits {list(logits.shape)} and target {list(target.shape)} differ in shape; nothing is broadcast.")
    if ce not in ("logits", "reference"):
        raise ValueError(f"ce='{ce}' is not known; choose 'logits' or 'reference'.")
    exact = torch.promote_types(logits.dtype, torch.float32)  # half precision would lose the sums
    z, y = logits.to(exact).flatten(1), target.to(logits.device, exact).flatten(1)  # [N, H*W]
    p = torch.sigmoid(z)
    dice = (1 - (2 * (p * y).sum(1) + smooth) / (p.sum(1) + y.sum(1) + smooth)).mean()
    return dice_weight * dice + bce_weight * F.binary_cross_entropy_with_logits(p if ce == "reference" else z, y)
