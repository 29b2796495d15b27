"""Where the Triton kernels run, and where their plain-torch references do.

Triton is optional: without it (or without a GPU) every function of this package computes its reference under
autograd. With TRITON_INTERPRET=1 in the environment, before this module is imported, the kernels run on CPU
tensors in Triton's interpreter: slow, for the tests alone.
"""

import os
import sys
from types import SimpleNamespace

import torch
from torch.library import wrap_triton


def load_triton():
    """Return (triton, triton.language), or stand-ins that can only define kernels where Triton is not
    installed.

    Sets TRITON_DEFAULT_FP_FUSION=1 in the environment unless it is set: the kernels count on fused
    multiply-adds, and Triton warns (3.9) or stops (3.10) where the variable is missing.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)
    return triton, tl


triton, tl = load_triton()
AVAILABLE = hasattr(triton, "cdiv")
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
MODES = ("auto", "triton", "torch")
_mode = "auto"


@triton.jit
def _probe_kernel(x):
    tl.store(x, 1.0)


def use_kernels(mode):
    """Choose for all functions: "auto" (Triton on a GPU), "triton" (refuse to run without), "torch"
    (references).

    On a GPU a trivial kernel is built first: Triton needs a C compiler and Python's headers. Where that
    fails, "auto" says so on stderr and becomes "torch". Returns whether Triton will run. Raises ValueError
    where Triton is asked for and cannot run.
    """
    global _mode
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
    _mode = "torch" if problem and gpu else mode
    return _mode != "torch" and not problem


def runs_triton(x):
    """Tell whether functions on this tensor launch their Triton kernel."""
    if _mode == "torch" or not AVAILABLE or x.dtype == torch.float64:
        return False
    return x.is_cuda or INTERPRETED


def launcher(kernel):
    """Return a kernel as it is launched in an op: `torch.compile` sees into it.

    Not in the interpreter, which some versions of torch refuse to wrap.
    """
    return kernel if INTERPRETED else wrap_triton(kernel)


def dot_precision():
    """Return how a float32 `tl.dot` multiplies: as torch's own products do at present."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
