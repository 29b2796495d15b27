"""Device and precision: what train.py and evaluate.py both choose."""

import contextlib

import torch

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def add_arguments(group):
    group.add_argument("--device", default="auto", help="auto (default: cuda where there is one), cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--amp",
        default="auto",
        choices=["auto", *AMP],
        help="autocast; auto (default) is bf16 on a GPU that has it, else fp16, and off on a CPU",
    )


def choose(device, amp):
    """(torch.device, autocast dtype or None) of the two options. Raises ValueError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not to be had here ({str(error).splitlines()[0]}). Try --device cpu.") from error
    if amp == "auto":
        amp = "off" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type == "cpu" and amp == "fp16":
        raise ValueError("--amp fp16 needs a GPU; on a CPU use bf16 or off.")
    return device, AMP[amp]


def place(model, device, dtype):
    """Move a model there, its frozen matrices in the compute dtype."""
    if dtype is not None:
        model.hold_frozen_weights_in(dtype)
    return model.to(device)


def autocast(device, dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
