"""Where the Triton kernels run, and where their plain-torch references do.

Triton is optional: without it (or without a GPU) every op of this package computes its reference. With TRITON_INTERPRET=1 in the
environment, before this package is imported, the kernels run on CPU tensors in Triton's interpreter: slow, for the tests alone.
"""

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels' definitions must still import; nothing calls them
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None)

import torch

AVAILABLE = hasattr(triton, "cdiv")
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
MODES = ("auto", "triton", "torch")
_chosen = "auto"


def use(mode):
    """Choose for all ops: "auto" (Triton on a GPU), "triton" (refuse to run without), "torch" (the references everywhere).

    Raises ValueError where Triton is asked for and cannot run.
    """
    global _chosen
    if mode not in MODES:
        raise ValueError(f"--kernels '{mode}' is not known; choose one of: {', '.join(MODES)}.")
    if mode == "triton" and not AVAILABLE:
        raise ValueError("--kernels triton: the package triton is not installed (pip install triton; Linux only). Use --kernels auto.")
    if mode == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError("--kernels triton needs a GPU, and there is none here. Use --kernels auto.")
    _chosen = mode


def runs_triton(x):
    """Whether ops on this tensor launch their Triton kernel."""
    if _chosen == "torch" or not AVAILABLE or x.dtype == torch.float64:
        return False
    return x.is_cuda or INTERPRETED


def precision():
    """How a float32 `tl.dot` multiplies: as torch's own products do at present."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
