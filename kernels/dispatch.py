"""Where the Triton kernels run, and where their plain-torch references do.

Triton is optional: without it (or without a GPU) every op of this package computes its reference. With TRITON_INTERPRET=1 in the
environment, before this package is imported, the kernels run on CPU tensors in Triton's interpreter: slow, for the tests alone.
"""

import os
import sys
from types import SimpleNamespace

# Fused multiply-adds, as compilers make by default and the kernels count on; Triton 3.10 would stop, and 3.9 warns of it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

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
exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # before PyTorch 2.7 nobody can ask
_chosen = "auto"


@triton.jit
def _probe_kernel(x):
    tl.store(x, 1.0)


def use(mode):
    """Choose for all ops: "auto" (Triton on a GPU), "triton" (refuse to run without), "torch" (the references everywhere).

    On a GPU a trivial kernel is built first: Triton needs a C compiler and Python's headers. Where it fails, "auto" says so on stderr
    and becomes "torch". Returns whether Triton will run. Raises ValueError where Triton is asked for and cannot run.
    """
    global _chosen
    if mode not in MODES:
        raise ValueError(f"--kernels '{mode}' is not known; choose one of: {', '.join(MODES)}.")
    gpu, problem = torch.cuda.is_available(), None
    if not AVAILABLE:
        problem = "the package triton is not installed (pip install triton; Linux only)"
    elif gpu and mode != "torch":
        try:
            _probe_kernel[1,](torch.empty(1, device="cuda"))
        except Exception as error:  # a missing compiler, missing headers, an unknown GPU
            problem = f"Triton cannot build a kernel here ({str(error).strip().splitlines()[0]})"
    elif not INTERPRETED:
        problem = "there is no GPU"
    if mode == "triton" and problem:
        raise ValueError(f"--kernels triton: {problem}. Use --kernels auto.")
    if gpu and mode == "auto" and problem:
        print(f"{problem}; the slower plain torch code runs instead.", file=sys.stderr)
    _chosen = "torch" if problem and gpu else mode
    return _chosen != "torch" and not problem


def runs_triton(x):
    """Whether ops on this tensor launch their Triton kernel."""
    if _chosen == "torch" or not AVAILABLE or x.dtype == torch.float64:
        return False
    return x.is_cuda or INTERPRETED


def precision():
    """How a float32 `tl.dot` multiplies: as torch's own products do at present."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
