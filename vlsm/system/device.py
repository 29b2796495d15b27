"""The device and the precision of a run, and numbers on their way from a GPU."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from vlsm.system.options import option

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


@dataclass
class MachineOptions:
    """What train.py and evaluate.py both ask about the machine."""

    device: str = option("auto", "auto (default: cuda where there is one), cpu, cuda, cuda:1, ...")
    amp: str = option(
        "auto",
        "autocast; auto (default) is bf16 on a GPU that has it, else fp16, and off on a CPU",
        choices=["auto", *AMP_DTYPES],
    )
    kernels: str = option(
        "auto",
        "fused Triton kernels (auto, the default: on a GPU) or plain torch",
        choices=["auto", "triton", "torch"],
    )
    compile: str = option(
        "auto",
        "torch.compile the transformer layers (auto, the default: on a GPU); the first step takes up to a "
        "minute",
        choices=["auto", "on", "off"],
    )


def choose_device(device, amp):
    """Return (torch.device, autocast dtype or None) for the options `--device` and `--amp`.

    Raises ValueError for a device that is not there, and for fp16 on a CPU.
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
        raise ValueError(f"--device {device} is not to be had here ({reason}). Try --device cpu.") from error
    if amp == "auto":
        amp = "off" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type == "cpu" and amp == "fp16":
        raise ValueError("--amp fp16 needs a GPU; on a CPU use bf16 or off.")
    return device, AMP_DTYPES[amp]


def autocast(device, dtype):
    """Return the autocast context of a dtype, or one that does nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class AsyncScalars:
    """A few numbers on their way from the device; reading them later waits for them and no more."""

    def __init__(self, values):
        self.ready = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, device = host.copy_(values, non_blocking=True), values.device
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(device))
        self.values = values

    def tolist(self):
        """Wait for the copy and return the numbers."""
        if self.ready:
            self.ready.synchronize()
        return self.values.tolist()


def multiplies_bf16():
    """Tell whether this machine's CPU has products of bfloat16 (AVX-512 or AMX), as Linux says."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
