"""Dice + binary cross entropy on logits, Eq. 2 of VLSM-Adapter, in one pass forward and one backward.

With p = sigmoid(z), sums over the pixels of a sample:

    dice = mean over samples of 1 - (2 sum p y + s) / (sum p + sum y + s)
    bce  = mean over pixels of max(z, 0) - z y + log(1 + exp(-|z|))
    loss = dice_weight dice + bce_weight bce

Pixels whose target is 255 are ignored: they count in no sum and no mean, and their gradient is 0.

The first forward kernel reads z and y once, writes four sums per tile and counts the pixels that are not
ignored. The second, a single program, adds these in a fixed order and writes the loss and three numbers per
sample, from which the gradient is computed:

    dloss/dz = p (1 - p) (A y + B) + C D (p - y)
    A = -2 w / (sum p + sum y + s),  B = w (2 sum p y + s) / (sum p + sum y + s)^2

with w = dice_weight / samples, C = bce_weight / pixels, D = pixels / pixels that are not ignored (1 without
ignored ones, so that C keeps its digits). Bytes that must move, for n pixels, logits of e bytes
and targets of t: forward n (e + t), backward n (2 e + t).

With `ce="reference"` the cross entropy takes p in the place of z, as the published code does; its gradient is
C (sigmoid(p) - y) p (1 - p).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from .dispatch import launch, runs_triton, tl, triton

PASS = dict(BLOCK=4096, num_warps=8)  # launch sizes: pixels per program
FINISH = dict(BLOCK_B=32, BLOCK_T=32)  # samples and tiles that the single program adds up at a time
FAR = -1e4  # a logit whose sigmoid is 0, and whose cross entropy with 0 is 0, exactly


def dice_bce_torch(logits, target, dice_weight=1.5, bce_weight=1.0, smooth=1e-5, ce="logits"):
    """Compute `dice_bce_loss` in plain torch, as eager code writes it; the arguments are the same."""
    dtype = torch.promote_types(logits.dtype, torch.float32)  # sums in half precision would be inexact
    ignored = target.flatten(1) == 255
    z = logits.to(dtype).flatten(1).masked_fill(ignored, FAR)  # [B, pixels]
    y = target.to(dtype).flatten(1).masked_fill(ignored, 0)  # [B, pixels]
    p = torch.sigmoid(z)
    overlap = (p * y).sum(1)  # [B]
    size = p.sum(1) + y.sum(1)  # [B]
    dice = 1 - (2 * overlap + smooth) / (size + smooth)
    bce_input = p.masked_fill(ignored, FAR) if ce == "reference" else z
    share = ignored.numel() / (~ignored).sum().clamp(min=1).double()  # exactly 1 if none is ignored
    bce = F.binary_cross_entropy_with_logits(bce_input, y) * share.to(dtype)
    return dice_weight * dice.mean() + bce_weight * bce


@triton.jit
def _load(base, at, inside):
    """Load a sample's pixels `at`, in float32."""
    return tl.load(base + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _sigmoid(logit):
    """Return (sigmoid, exp(-|logit|)) of a tile: no exponential overflows."""
    decay = tl.exp(-tl.abs(logit))
    p = tl.where(logit >= 0, 1.0, decay) / (1.0 + decay)
    return p, decay


@triton.jit
def sums_kernel(z, y, sums, pixels, P, tiles, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum p y, p, y and the cross entropy over one tile of one sample; add to `pixels` how many count."""
    sample = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    logit = _load(z + sample * P, at, inside)
    truth = _load(y + sample * P, at, inside)
    inside = inside & (truth != 255)
    p, decay = _sigmoid(logit)
    p = tl.where(inside, p, 0.0)
    x = logit
    if TWICE:
        x = p
        decay = tl.exp(-p)
    # log(1 + decay) loses the digits of a small decay; the series keeps them
    series = decay * (1.0 - decay * (0.5 - decay * (1.0 / 3 - decay * 0.25)))
    log = tl.where(decay < 0.03, series, tl.log(1.0 + decay))
    bce = tl.maximum(x, 0.0) - x * truth + log
    bce = tl.where(inside, bce, 0.0)
    out = sums + (sample * tiles + tile) * 4
    tl.store(out, tl.sum(p * truth, 0))
    tl.store(out + 1, tl.sum(p, 0))
    tl.store(out + 2, tl.sum(tl.where(inside, truth, 0.0), 0))
    tl.store(out + 3, tl.sum(bce, 0))
    tl.atomic_add(pixels, tl.sum(inside.to(tl.int64), 0))  # integers: the order changes nothing


@triton.jit
def _sum_of_tiles(at, inside):
    """Add one of the four sums over a block of tiles `[BLOCK_B, BLOCK_T]`."""
    return tl.sum(tl.load(at, mask=inside, other=0.0), 1)


@triton.jit
def finish_kernel(
    sums, loss, terms, pixels, B, P, tiles, dice_weight, bce_weight, smooth,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute the loss, and (A, B, D) of every sample, from the tiles' sums, in a single program."""
    # torch.compile passes scalars as float64
    dice_weight = tl.cast(dice_weight, tl.float32)
    bce_weight = tl.cast(bce_weight, tl.float32)
    smooth = tl.cast(smooth, tl.float32)
    share = tl.cast(B, tl.int64) * P / tl.maximum(tl.load(pixels), 1)  # D
    total = 0.0
    for first in range(0, B, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)
        known = sample < B
        both = tl.zeros([BLOCK_B], tl.float32)
        p = tl.zeros([BLOCK_B], tl.float32)
        y = tl.zeros([BLOCK_B], tl.float32)
        bce = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            at = sums + (sample.to(tl.int64)[:, None] * tiles + tile[None, :]) * 4
            inside = known[:, None] & (tile < tiles)[None, :]
            both += _sum_of_tiles(at, inside)
            p += _sum_of_tiles(at + 1, inside)
            y += _sum_of_tiles(at + 2, inside)
            bce += _sum_of_tiles(at + 3, inside)
        top = 2 * both + smooth
        bottom = p + y + smooth
        tl.store(terms + 3 * sample, -2 * dice_weight / (B * bottom), mask=known)
        tl.store(terms + 3 * sample + 1, dice_weight * top / (B * bottom * bottom), mask=known)
        tl.store(terms + 3 * sample + 2, share, mask=known)
        each = dice_weight * (1 - top / bottom) + bce_weight * (bce / P * share)
        total += tl.sum(tl.where(known, each, 0.0), 0)
    tl.store(loss, total / B)


@triton.jit
def gradient_kernel(g, z, y, terms, dz, P, bce_scale, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute dloss/dz times the incoming gradient `g`, for one tile of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    logit = _load(z + sample * P, at, inside)
    truth = _load(y + sample * P, at, inside)
    p, decay = _sigmoid(logit)
    slope = decay / ((1.0 + decay) * (1.0 + decay))  # p (1 - p), without cancellation
    factor = tl.load(terms + 3 * sample)  # A
    offset = tl.load(terms + 3 * sample + 1)  # B
    out = slope * (factor * truth + offset)
    scale = tl.cast(bce_scale, tl.float32) * tl.load(terms + 3 * sample + 2)  # C D
    if TWICE:
        out += scale * (1.0 / (1.0 + tl.exp(-p)) - truth) * slope
    else:
        out += scale * (p - truth)
    out = out * tl.load(g).to(tl.float32)
    tl.store(dz + sample * P + at, tl.where(truth == 255, 0.0, out), mask=inside)


@triton_op("vlsm::dice_bce", mutates_args=())
def _forward(
    logits: Tensor, target: Tensor, dice_weight: float, bce_weight: float, smooth: float, ce: str
) -> tuple[Tensor, Tensor]:
    """Return (loss, (A, B, D) of each sample `[B, 3]`) of contiguous `[B, pixels]` tensors."""
    samples, pixels = logits.shape
    tiles = triton.cdiv(pixels, PASS["BLOCK"])
    float32 = dict(dtype=torch.float32, device=logits.device)
    sums = torch.empty(samples, tiles, 4, **float32)
    loss = torch.empty((), **float32)
    terms = torch.empty(samples, 3, **float32)
    counted = torch.zeros((), dtype=torch.int64, device=logits.device)
    twice = ce == "reference"
    launch(sums_kernel, (tiles, samples), logits, target, sums, counted, pixels, tiles, TWICE=twice, **PASS)
    launch(
        finish_kernel, (1,), sums, loss, terms, counted, samples, pixels, tiles, dice_weight, bce_weight,
        smooth, **FINISH,
    )  # fmt: skip
    return loss, terms


@triton_op("vlsm::dice_bce_backward", mutates_args=())
def _backward(g: Tensor, logits: Tensor, target: Tensor, terms: Tensor, bce_weight: float, ce: str) -> Tensor:
    """Return the gradient of the logits `[B, pixels]`, in their dtype; g: the loss's own gradient, a scalar
    tensor on the device.
    """
    samples, pixels = logits.shape
    dz = torch.empty_like(logits)
    scale = bce_weight / (samples * pixels)
    twice = ce == "reference"
    tiles = triton.cdiv(pixels, PASS["BLOCK"])
    launch(
        gradient_kernel, (tiles, samples), g, logits, target, terms, dz, pixels, scale, TWICE=twice, **PASS
    )
    return dz


def _save_for_backward(ctx, inputs, output):
    """Keep for `_gradients` the tensors and numbers that the backward kernel reads."""
    logits, target, _, bce_weight, _, ce = inputs
    _, terms = output
    ctx.bce_weight = bce_weight
    ctx.ce = ce
    ctx.save_for_backward(logits, target, terms)
    ctx.set_materialize_grads(False)


def _gradients(ctx, g, _):
    """Return the gradients of `_forward`'s arguments: only the logits get one."""
    dz = None
    if g is not None and ctx.needs_input_grad[0]:
        logits, target, terms = ctx.saved_tensors
        dz = _backward(g, logits, target, terms, ctx.bce_weight, ctx.ce)
    return dz, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def dice_bce_loss(logits, target, dice_weight=1.5, bce_weight=1.0, smooth=1e-5, ce="logits"):
    """Compute the scalar loss of logits `[B, ...]`, in float32 or wider.

    target: in the logits' shape; bool, uint8 0/1 or float in [0, 1]; it gets no gradient. Pixels of 255 are
    ignored: the loss is that of the others, 0 if there are none, and their gradient is exactly 0. ce:
    "logits", or "reference" for the cross entropy of the published code, see above. Raises ValueError where
    shapes differ, or for another `ce`.
    """
    if logits.shape != target.shape:
        raise ValueError(f"Logits {list(logits.shape)} and target {list(target.shape)} differ in shape.")
    if ce not in ("logits", "reference"):
        raise ValueError(f"ce='{ce}' is not known; choose 'logits' or 'reference'.")
    target = target.detach().to(logits.device)
    if not runs_triton(logits):
        return dice_bce_torch(logits, target, dice_weight, bce_weight, smooth, ce)
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    logits = logits.flatten(1).contiguous()
    target = target.flatten(1).contiguous()
    loss, _ = _forward(logits, target, dice_weight, bce_weight, smooth, ce)
    return loss
