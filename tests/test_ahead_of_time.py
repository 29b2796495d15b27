"""Every launch of every Triton kernel, compiled for A100 and H100 without a GPU: no spills, memory that fits, matrix instructions."""

import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is to be had on Linux alone")

POINTER = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
CAPABILITIES = (80, 90)
SHARED = 99 * 1024  # what a program may use on every GPU of compute capability 8 or 9


def adapter_jobs(dtype, precision="ieee", d=768):
    """(kernel, signature, constants, launch options) of the three adapter kernels for every width in the table."""
    from kernels.adapter import BLOCKS, KERNELS, backward_rows_kernel, backward_weights_kernel, blocks, forward_kernel

    p, size = POINTER[dtype], 4 if dtype == "fp32" else 2
    signatures = dict(
        forward=dict(h=p, residual="*fp32", w1=p, b1="*fp32", w2=p, b2="*fp32", out="*fp32", hidden=p, N="i32"),
        rows=dict(g="*fp32", hidden=p, w1=p, w2=p, b2="*fp32", dh=p, dz1=p, N="i32"),
        weights=dict(g="*fp32", h=p, hidden=p, dz1=p, w2=p, b2="*fp32", partial="*fp32", N="i32", rows_each="i32"),
    )
    flags = dict(forward=dict(HAS_RESIDUAL=True, KEEP=True), rows=dict(WITH_H=True, WITH_WEIGHTS=True), weights={})
    functions = dict(forward=forward_kernel, rows=backward_rows_kernel, weights=backward_weights_kernel)
    for element, r in BLOCKS:
        for kernel in KERNELS if element == size else ():
            sizes = blocks(kernel, r, size)
            options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
            # a stream of the same type as h takes the same launch, with less to hold
            constants = dict(D=d, R=r, PRECISION=precision, **flags[kernel], **sizes)
            yield functions[kernel].__name__, signatures[kernel], constants, options


def other_jobs():
    from kernels.dice_bce import TILE

    for z in POINTER.values():
        for y in ("*u8", "*fp32"):
            for twice in (False, True):
                yield (
                    "sums_kernel", dict(z=z, y=y, sums="*fp32", P="i32", tiles="i32"), dict(TWICE=twice, BLOCK=TILE), dict(num_warps=8),
                )  # fmt: skip
                signature = dict(g="*fp32", z=z, y=y, terms="*fp32", dz=z, P="i32", bce_scale="fp64")
                yield "gradient_kernel", signature, dict(TWICE=twice, BLOCK=TILE), dict(num_warps=8)
    for scalar in ("fp32", "fp64"):  # torch.compile hands over float64
        signature = dict(sums="*fp32", loss="*fp32", terms="*fp32", B="i32", P="i32", tiles="i32")
        scalars = dict(dice_weight=scalar, bce_weight=scalar, smooth=scalar)
        yield "finish_kernel", {**signature, **scalars}, dict(BLOCK_B=32, BLOCK_T=32), {}
    signature = dict(masks="*u8", edge="*u8", gap="*i16", H="i32", W="i32", FAR="i32")
    yield "columns_kernel", signature, dict(BLOCK_H=32, BLOCK_W=32), {}
    signature = dict(points="*i64", gap="*i16", squared="*i32", pixels="i32", half="i32", W="i32", FAR="i32")
    yield "nearest_kernel", signature, dict(BLOCK=128), dict(num_warps=1)


def compile_one(job):
    """Compile for one GPU: what the machine code says of itself."""
    name, signature, constants, options, capability = job
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels  # noqa: F401  (the modules below)

    modules = (sys.modules[f"kernels.{part}"] for part in ("adapter", "dice_bce", "boundary"))
    (kernel,) = {getattr(m, name) for m in modules if hasattr(m, name)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = Path(triton.knobs.cache.dir) / f"{compiled.hash}-{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"\b{w}:(\d+)", text.stdout + text.stderr)[1]) for w in ("REG", "STACK", "LOCAL"))
    matrix = len(re.findall(r"\bmma\.sync|wgmma\.mma_async", compiled.asm["ptx"]))
    return dict(registers=registers, spilled=stack + local, shared=compiled.metadata.shared, matrix=matrix)


@pytest.fixture(scope="module")
def compile_all(tmp_path_factory):
    """Two processes that compile into a folder of their own, so that nothing comes out of an older cache."""
    folder = tmp_path_factory.mktemp("triton")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_use_cache, initargs=(str(folder),)) as pool:
        yield lambda jobs: [(job, pool.submit(compile_one, job)) for job in jobs]


def _use_cache(folder):
    triton.knobs.cache.dir = folder


def results(compile_all, jobs):
    submitted = compile_all([(*job, capability) for job in jobs for capability in CAPABILITIES])
    assert submitted
    for job, future in submitted:
        found = future.result()
        assert found["spilled"] == 0 and found["registers"] <= 255, (job, found)
        yield job, found


@pytest.mark.parametrize("dtype, precision", [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")])
def test_adapter_kernels(compile_all, dtype, precision):
    from kernels.adapter import SHARED_MEMORY

    for job, found in results(compile_all, adapter_jobs(dtype, precision)):
        limit = SHARED_MEMORY.get((4 if dtype == "fp32" else 2, job[2]["BLOCK_R"]), SHARED)
        assert found["shared"] <= limit, (job, found)
        assert (found["matrix"] > 0) == (dtype != "fp32" or precision == "tf32"), (job, found)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapter_kernels_of_odd_sizes(compile_all, dtype):
    """A width and a bottleneck that fill no block: every load is checked."""
    jobs = [(n, signature, dict(constants, D=80, R=constants["BLOCK_R"] - 3), o) for n, signature, constants, o in adapter_jobs(dtype)]
    assert len(list(results(compile_all, jobs))) == 36


def test_loss_and_distance_kernels(compile_all):
    for job, found in results(compile_all, other_jobs()):
        assert found["shared"] <= SHARED, (job, found)
