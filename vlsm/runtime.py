"""Device, precision, kernels and compilation: what train.py and evaluate.py both choose."""

import contextlib
import os
import shutil

import torch

import kernels

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def add_arguments(group):
    group.add_argument("--device", default="auto", help="auto (default: cuda where there is one), cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--amp",
        default="auto",
        choices=["auto", *AMP],
        help="autocast; auto (default) is bf16 on a GPU that has it, else fp16, and off on a CPU",
    )
    group.add_argument(
        "--kernels", default="auto", choices=kernels.MODES, help="fused Triton kernels (auto, the default: on a GPU) or plain torch"
    )
    group.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="torch.compile the transformer layers (auto, the default: on a GPU); the first step takes up to a minute",
    )


def choose(device, amp):
    """(torch.device, autocast dtype or None) of the two options. Raises ValueError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not to be had here ({str(error).splitlines()[0]}). Try --device cpu.") from error
    if amp == "auto":
        amp = "off" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type == "cpu" and amp == "fp16":
        raise ValueError("--amp fp16 needs a GPU; on a CPU use bf16 or off.")
    return device, AMP[amp]


def place(model, device, dtype, fused="auto", compiled="auto"):
    """Move a model there, its frozen matrices in the compute dtype; choose its kernels, and have its layers compiled.

    Raises ValueError where what is asked for cannot be.
    """
    triton = kernels.use(fused)
    if dtype is not None:
        model.hold_frozen_weights_in(dtype)
    model.to(device)
    if compiled == "on" and device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ValueError("--compile on needs a C++ compiler for a CPU, and there is none on the PATH (apt install g++). Use --compile off.")
    if compiled == "on" or (compiled == "auto" and device.type == "cuda" and triton):
        model.compile_blocks()
    return model


def autocast(device, dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Later:
    """A few numbers on their way from the device: reading them, a step later, waits for that step's work and for no more."""

    def __init__(self, values):
        self.ready = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, device = host.copy_(values, non_blocking=True), values.device
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(device))
        self.values = values

    def read(self):
        if self.ready:
            self.ready.synchronize()
        return self.values.tolist()
