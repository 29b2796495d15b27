"""Dice + binary cross entropy on logits, Eq. 2 of VLSM-Adapter, in one pass forward and one backward.

With p = sigmoid(z), sums over the pixels of a sample:

    dice = mean over samples of 1 - (2 sum p y + s) / (sum p + sum y + s)
    bce  = mean over pixels of max(z, 0) - z y + log(1 + exp(-|z|))
    loss = dice_weight dice + bce_weight bce

The forward kernel reads z and y once and writes four sums a tile; a second, of one program, adds them in a
fixed order and leaves the loss and the two numbers a sample that the gradient needs:

    dloss/dz = p (1 - p) (A y + B) + C (p - y)
    A = -2 w / (sum p + sum y + s),  B = w (2 sum p y + s) / (sum p + sum y + s)^2

with w = dice_weight / samples, C = bce_weight / pixels. Bytes that must move, for n pixels, logits of e bytes
and targets of t: forward n (e + t), backward n (2 e + t).

`ce="reference"` hands p to the cross entropy where z belongs, as the published code does; its gradient is C
(sigmoid(p) - y) p (1 - p).
"""

import torch
import torch.nn.functional as F
from torch.library import triton_op

from .dispatch import launcher, runs_triton, tl, triton

# launch sizes: pixels a program, and samples and tiles at a time of the program that adds them up
PASS, FINISH = dict(BLOCK=4096, num_warps=8), dict(BLOCK_B=32, BLOCK_T=32)
CE_CHOICES = ("logits", "reference")


def reference(logits, target, dice_weight=1.5, bce_weight=1.0, smooth=1e-5, ce="logits"):
    """Compute the formula in plain torch, as eager code writes it; arguments as in `dice_bce_loss`."""
    exact = torch.promote_types(logits.dtype, torch.float32)  # half precision would lose the sums
    z, y = logits.to(exact).flatten(1), target.to(exact).flatten(1)  # [B, pixels]
    p = torch.sigmoid(z)
    dice = (1 - (2 * (p * y).sum(1) + smooth) / (p.sum(1) + y.sum(1) + smooth)).mean()
    return dice_weight * dice + bce_weight * F.binary_cross_entropy_with_logits(
        p if ce == "reference" else z, y
    )


@triton.jit
def sums_kernel(z, y, sums, P, tiles, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum p y, sum p, sum y and sum bce of one tile of one sample."""
    sample, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    logit = tl.load(z + sample * P + at, mask=inside, other=0.0).to(tl.float32)
    truth = tl.load(y + sample * P + at, mask=inside, other=0).to(tl.float32)
    decay = tl.exp(-tl.abs(logit))
    p = tl.where(inside, tl.where(logit >= 0, 1.0, decay) / (1.0 + decay), 0.0)
    x = logit
    if TWICE:
        x = p
        decay = tl.exp(-p)
    # log(1 + e) has no digits of a small e left; the series has them
    series = decay * (1.0 - decay * (0.5 - decay * (1.0 / 3 - decay * 0.25)))
    log = tl.where(decay < 0.03, series, tl.log(1.0 + decay))
    bce = tl.where(inside, tl.maximum(x, 0.0) - x * truth + log, 0.0)
    out = sums + (sample * tiles + tile) * 4
    tl.store(out, tl.sum(p * truth, 0))
    tl.store(out + 1, tl.sum(p, 0))
    tl.store(out + 2, tl.sum(truth, 0))
    tl.store(out + 3, tl.sum(bce, 0))


@triton.jit
def finish_kernel(
    sums,
    loss,
    terms,
    B,
    P,
    tiles,
    dice_weight,
    bce_weight,
    smooth,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Compute the loss, and (A, B) of every sample, from the tiles' sums; one program."""
    # scalars arrive as float64 under torch.compile
    dice_weight, bce_weight = tl.cast(dice_weight, tl.float32), tl.cast(bce_weight, tl.float32)
    smooth = tl.cast(smooth, tl.float32)
    total = 0.0
    for first in range(0, B, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)
        both, p = tl.zeros([BLOCK_B], tl.float32), tl.zeros([BLOCK_B], tl.float32)
        y, bce = tl.zeros([BLOCK_B], tl.float32), tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            at = sums + (sample.to(tl.int64)[:, None] * tiles + tile[None, :]) * 4
            inside = (sample < B)[:, None] & (tile < tiles)[None, :]
            both += tl.sum(tl.load(at, mask=inside, other=0.0), 1)
            p += tl.sum(tl.load(at + 1, mask=inside, other=0.0), 1)
            y += tl.sum(tl.load(at + 2, mask=inside, other=0.0), 1)
            bce += tl.sum(tl.load(at + 3, mask=inside, other=0.0), 1)
        top, bottom = 2 * both + smooth, p + y + smooth
        tl.store(terms + 2 * sample, -2 * dice_weight / (B * bottom), mask=sample < B)
        tl.store(terms + 2 * sample + 1, dice_weight * top / (B * bottom * bottom), mask=sample < B)
        each = dice_weight * (1 - top / bottom) + bce_weight * (bce / P)
        total += tl.sum(tl.where(sample < B, each, 0.0), 0)
    tl.store(loss, total / B)


@triton.jit
def gradient_kernel(g, z, y, terms, dz, P, bce_scale, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute dloss/dz times the incoming gradient `g`, of one tile of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    logit = tl.load(z + sample * P + at, mask=inside, other=0.0).to(tl.float32)
    truth = tl.load(y + sample * P + at, mask=inside, other=0).to(tl.float32)
    decay = tl.exp(-tl.abs(logit))
    p = tl.where(logit >= 0, 1.0, decay) / (1.0 + decay)
    slope = decay / ((1.0 + decay) * (1.0 + decay))  # p (1 - p), without cancellation
    out = slope * (tl.load(terms + 2 * sample) * truth + tl.load(terms + 2 * sample + 1))
    scale = tl.cast(bce_scale, tl.float32)
    if TWICE:
        out += scale * (1.0 / (1.0 + tl.exp(-p)) - truth) * slope
    else:
        out += scale * (p - truth)
    tl.store(dz + sample * P + at, out * tl.load(g).to(tl.float32), mask=inside)


@triton_op("vlsm::dice_bce", mutates_args=())
def _forward(
    logits: torch.Tensor, target: torch.Tensor, dice_weight: float, bce_weight: float, smooth: float, ce: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, (A, B) of each sample `[B, 2]`) of contiguous `[B, pixels]` tensors."""
    samples, pixels = logits.shape
    tiles = triton.cdiv(pixels, PASS["BLOCK"])
    sums = torch.empty(samples, tiles, 4, dtype=torch.float32, device=logits.device)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    terms = torch.empty(samples, 2, dtype=torch.float32, device=logits.device)
    twice = ce == "reference"
    launcher(sums_kernel)[tiles, samples](logits, target, sums, pixels, tiles, TWICE=twice, **PASS)
    launcher(finish_kernel)[1,](
        sums, loss, terms, samples, pixels, tiles, dice_weight, bce_weight, smooth, **FINISH
    )
    return loss, terms


@triton_op("vlsm::dice_bce_backward", mutates_args=())
def _backward(
    g: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    terms: torch.Tensor,
    bce_weight: float,
    ce: str,
) -> torch.Tensor:
    """Return the gradient by the logits `[B, pixels]`, in their dtype; g: the loss's own, on the device."""
    samples, pixels = logits.shape
    dz = torch.empty_like(logits)
    scale = bce_weight / (samples * pixels)
    launcher(gradient_kernel)[triton.cdiv(pixels, PASS["BLOCK"]), samples](
        g, logits, target, terms, dz, pixels, scale, TWICE=ce == "reference", **PASS
    )
    return dz


def _save_for_backward(ctx, inputs, output):
    logits, target, _, ctx.bce_weight, _, ctx.ce = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, g, _):
    logits, target, terms = ctx.saved_tensors
    wanted = g is not None and ctx.needs_input_grad[0]
    dz = _backward(g, logits, target, terms, ctx.bce_weight, ctx.ce) if wanted else None
    return dz, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def dice_bce_loss(logits, target, dice_weight=1.5, bce_weight=1.0, smooth=1e-5, ce="logits"):
    """Compute the scalar loss of logits `[B, ...]`, in float32 or wider.

    target: of the logits' shape, bool, uint8 0/1 or float in [0, 1]; it gets no gradient. ce: "logits", or
    "reference" for the cross entropy of the published code, see above. Raises ValueError where shapes differ,
    or for another `ce`.
    """
    if logits.shape != target.shape:
        raise ValueError(
            f"Logits {list(logits.shape)} and target {list(target.shape)} differ in shape; nothing is "
            "broadcast."
        )
    if ce not in CE_CHOICES:
        raise ValueError(f"ce='{ce}' is not known; choose 'logits' or 'reference'.")
    target = target.detach().to(logits.device)
    if not runs_triton(logits):
        return reference(logits, target, dice_weight, bce_weight, smooth, ce)
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    logits, target = logits.flatten(1).contiguous(), target.flatten(1).contiguous()
    return _forward(logits, target, dice_weight, bce_weight, smooth, ce)[0]
