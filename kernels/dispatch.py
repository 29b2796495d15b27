"""Choose between the Triton kernels and their plain-torch twins.

Triton is optional: without it (or without a GPU) every function of this package runs its twin under autograd.
With TRITON_INTERPRET=1 in the environment before this module is imported, the kernels run on CPU tensors in
Triton's interpreter: slow, for tests only.
"""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.library import wrap_triton


def load_triton():
    """Return (triton, triton.language), or stand-ins with which these files can be imported if Triton is
    missing.

    Sets TRITON_DEFAULT_FP_FUSION=1 in the environment unless it is set: the kernels rely on fused
    multiply-adds, and Triton warns (3.9) or stops (3.10) without the variable.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = SimpleNamespace(jit=lambda kernel: kernel)
        tl = SimpleNamespace(constexpr=None)
    return triton, tl


triton, tl = load_triton()
AVAILABLE = hasattr(triton, "cdiv")
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
MODES = ("auto", "triton", "torch")
_mode = "auto"


@triton.jit
def _probe_kernel(x):
    tl.store(x, 1.0)


def use_kernels(mode, device="cuda"):
    """Choose for all functions of this package: "auto" (Triton on a GPU), "triton" (an error where it cannot
    run), "torch" (the plain-torch twins).

    device: the type of the device that will be used. On a GPU a trivial kernel is compiled first: Triton
    needs a C compiler and Python's headers. Where that fails, "auto" prints why on stderr and becomes
    "torch". Returns whether Triton will run. Raises ValueError where "triton" is chosen and cannot run.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"--kernels '{mode}' is not known; choose one of: {', '.join(MODES)}.")
    gpu = device == "cuda" and torch.cuda.is_available()
    problem = None
    if not AVAILABLE:
        problem = "the package triton is not installed (pip install triton; Linux only)"
    elif gpu and mode != "torch":
        problem = _compile_problem()
    elif not INTERPRETED:
        problem = "there is no GPU in use"
    if mode == "triton" and problem:
        raise ValueError(f"--kernels triton: {problem}. Use --kernels auto.")
    if gpu and mode == "auto" and problem:
        print(f"{problem}; the slower plain torch code runs instead.", file=sys.stderr)
    _mode = "torch" if problem and gpu else mode
    return _mode != "torch" and not problem


def _compile_problem():
    """Return why Triton cannot compile the kernels on this GPU, or None."""
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):  # no matrix units for bf16
        return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name()} has less"
    try:
        _probe_kernel[1,](torch.empty(1, device="cuda"))
    except Exception as error:  # a missing compiler, missing headers, an unknown GPU
        first_line = str(error).strip().splitlines()[0]
        return f"Triton cannot build a kernel here ({first_line})"
    return None


def runs_triton(x):
    """Return whether the functions launch their Triton kernel for this tensor."""
    if _mode == "torch" or not AVAILABLE or x.dtype == torch.float64:
        return False
    return x.is_cuda or INTERPRETED


def launch(kernel, grid, first, *args, **sizes):
    """Run a kernel on a grid of programs, on the GPU of its `first` argument, a tensor.

    The kernel is wrapped so that `torch.compile` can trace its launch inside an op; not in the interpreter,
    which some versions of torch refuse to wrap.
    """
    wrapped = kernel if INTERPRETED else wrap_triton(kernel)
    several = first.is_cuda and torch.cuda.device_count() > 1
    with torch.cuda.device(first.device) if several else nullcontext():  # else it runs on the current GPU
        wrapped[grid](first, *args, **sizes)


def dot_precision():
    """Return the precision of a float32 `tl.dot`: that of torch's own matrix products at present."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
