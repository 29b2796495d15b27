"""The device and the precision of a run."""

import contextlib

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_device(device, amp):
    """Return (torch.device, autocast dtype or None) for the options `--device` and `--amp`.

    Raises ValueError for a device that is not available, and for fp16 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} is not available ({reason}). Try --device cpu.") from error
    if amp == "auto":
        amp = "off"
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type == "cpu" and amp == "fp16":
        raise ValueError("--amp fp16 needs a GPU; on a CPU use bf16 or off.")
    return device, AMP_DTYPES[amp]


def autocast(device, dtype):
    """Return the autocast context of a dtype, or one that does nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
