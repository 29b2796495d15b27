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
    residual = torch.randn(n, d, **factory, requires_grad=True)
    g = torch.randn(n, d, **factory)
    down = torch.nn.Linear(d, r, **factory)
    up = torch.nn.Linear(r, d, **factory)
    tensors = [h, residual, down.weight, down.bias, up.weight, up.bias]
    one_way = 3 * n * d * h.element_size()  # forward: h, residual, out; backward: g, h, dh
    flops = 2 * n * d * r  # of one product

    def forward(function):
        with torch.no_grad():
            return function(*tensors)

    def forward_and_backward(function):
        return torch.autograd.grad(function(*tensors), tensors, g)

    for name, way, floor in (
        ("forward", forward, bench.floor(one_way, 2 * flops)),
        ("forward+backward", forward_and_backward, bench.floor(2 * one_way, 6 * flops)),
    ):
        sides = {}
        for side, function in bench.sides(kernels.adapter_bottleneck, adapter_torch).items():
            sides[side] = lambda way=way, function=function: way(function)
        bench.row(f"adapter {name} N={n} d={d} r={r}", bench.time(sides), floor)


def bench_dice_bce(bench):
    z = torch.randn(32, 1, 352, 352, device=bench.device, requires_grad=True)
    y = (torch.rand(z.shape, device=bench.device) < 0.2).to(torch.uint8)
    sides = {}
    for side, loss in bench.sides(kernels.dice_bce_loss, dice_bce_torch).items():
        sides[side] = lambda loss=loss: torch.autograd.grad(loss(z, y), z)
    floor = bench.floor(z.numel() * ((4 + 1) + (4 + 1 + 4)))
    bench.row("dice_bce forward+backward 32 x 352 x 352", bench.time(sides), floor)
