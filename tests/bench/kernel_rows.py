"""Rows of the fused kernels: ours, the same in eager torch, and compiled."""

import torch

import kernels
from kernels.adapter import adapter_torch
from kernels.dice_bce import dice_bce_torch


def bench_adapter(bench):
    for d, r in ((768, 64), (768, 512), (512, 64)):
        _adapter(bench, bench.batch_size * 485, d, r)


def _adapter(bench, n, d, r):
    factory = dict(device=bench.device, dtype=bench.dtype)
    h = torch.randn(n, d, **factory, requires_grad=True)
    # float32 as under autocast: the stream of residuals, what is added to it, and their gradient
    residual = torch.randn(n, d, device=bench.device, requires_grad=True)
    g = torch.randn(n, d, device=bench.device)
    down = torch.nn.Linear(d, r, **factory)
    up = torch.nn.Linear(r, d, **factory)
    tensors = [h, residual, down.weight, down.bias, up.weight, up.bias]
    forward_bytes = n * d * (h.element_size() + 4 + 4)  # h, residual, out
    backward_bytes = n * d * (4 + 2 * h.element_size())  # g, h, dh
    flops = 2 * n * d * r  # of one product

    def forward(function):
        with torch.no_grad():
            return function(*tensors)

    def forward_and_backward(function):
        return torch.autograd.grad(function(*tensors), tensors, g)

    for name, way, floor in (
        ("forward", forward, bench.floor(forward_bytes, 2 * flops)),
        ("forward+backward", forward_and_backward, bench.floor(forward_bytes + backward_bytes, 6 * flops)),
    ):
        sides = {}
        for side, function in bench.sides(kernels.adapter_bottleneck, adapter_torch).items():
            sides[side] = lambda way=way, function=function: way(function)
        bench.row(f"adapter {name} N={n} d={d} r={r}", bench.time(sides), floor)


def bench_dice_bce(bench):
    z = torch.randn(32, 1, 352, 352, device=bench.device, dtype=bench.dtype, requires_grad=True)
    y = (torch.rand(z.shape, device=bench.device) < 0.2).to(torch.uint8)
    sides = {}
    for side, loss in bench.sides(kernels.dice_bce_loss, dice_bce_torch).items():
        sides[side] = lambda loss=loss: torch.autograd.grad(loss(z, y), z)
    logit = z.element_size()
    floor = bench.floor(z.numel() * ((logit + 1) + (logit + 1 + logit)))  # forward: z, y; backward: z, y, dz
    bench.row("dice_bce forward+backward 32 x 352 x 352", bench.time(sides), floor)
