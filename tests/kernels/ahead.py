"""Every launch of every Triton kernel, compiled ahead of time, without a GPU: `python -m tests.kernels.ahead`
prints what the machine code says.

For NVIDIA GPUs of compute capability 8.0 (A100) and 9.0 (H100): registers and spilled bytes a thread, shared
memory, instructions, and how many of them multiply matrices. tests/kernels/test_ahead_of_time.py holds the kernels to
it.
"""

import argparse
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from kernels.adapter import BLOCKS, KERNELS, blocks
from kernels.boundary import COLUMNS, NEAREST
from kernels.dice_bce import FINISH, PASS
from kernels.dispatch import triton

CAPABILITIES = (80, 90)
DTYPES = ("fp32", "bf16", "fp16")
OPTIONS = ("num_warps", "num_stages")  # the compiler's among the launch sizes
MODULES = {
    "forward": "adapter",
    "backward_rows": "adapter",
    "backward_weights": "adapter",
    "sums": "dice_bce",
    "finish": "dice_bce",
    "gradient": "dice_bce",
    "columns": "boundary",
    "nearest": "boundary",
}


@dataclass
class Launch:
    """One way in which a kernel is launched: the types of its arguments, its constants and launch sizes."""

    kernel: str  # its name, less "_kernel"
    label: str
    signature: dict
    constants: dict

    def options(self):
        """The compiler's part of the constants."""
        return {name: self.constants[name] for name in OPTIONS if name in self.constants}


def adapter_launches(dtype, precision="ieee", d=768):
    """The three adapter kernels for every width in the table, with a float32 stream around h, as autocast
    makes it.
    """
    p, size = "*" + dtype, 4 if dtype == "fp32" else 2
    signatures = dict(
        forward=dict(
            h=p, residual="*fp32", w1=p, b1="*fp32", w2=p, b2="*fp32", out="*fp32", hidden=p, N="i32"
        ),
        rows=dict(g="*fp32", hidden=p, w1=p, w2=p, b2="*fp32", dh=p, dz1=p, N="i32"),
        weights=dict(
            g="*fp32", h=p, hidden=p, dz1=p, w2=p, b2="*fp32", partial="*fp32", N="i32", rows_each="i32"
        ),
    )
    flags = dict(
        forward=dict(HAS_RESIDUAL=True, KEEP=True), rows=dict(WITH_H=True, WITH_WEIGHTS=True), weights={}
    )
    for element, r in BLOCKS:
        for kernel in KERNELS if element == size else ():
            sizes = blocks(kernel, r, size)
            name = kernel if kernel == "forward" else f"backward_{kernel}"
            label = f"{dtype}{' tf32' * (precision == 'tf32')} d {d} r {r}"
            yield Launch(
                name, label, signatures[kernel], dict(D=d, R=r, PRECISION=precision, **flags[kernel], **sizes)
            )


def other_launches():
    """The kernels of the loss and of the boundary distances."""
    for dtype in DTYPES:
        for y in ("u8", "fp32"):
            for twice in (False, True):
                z, constants, label = (
                    "*" + dtype,
                    dict(TWICE=twice, **PASS),
                    f"{dtype}, target {y}{', ce=reference' * twice}",
                )
                signature = dict(z=z, y="*" + y, sums="*fp32", pixels="*i64", P="i32", tiles="i32")
                yield Launch("sums", label, signature, constants)
                signature = dict(g="*fp32", z=z, y="*" + y, terms="*fp32", dz=z, P="i32", bce_scale="fp64")
                yield Launch("gradient", label, signature, constants)
    for scalar in ("fp32", "fp64"):  # torch.compile hands over float64
        signature = dict(sums="*fp32", loss="*fp32", terms="*fp32", pixels="*i64")
        signature.update(B="i32", P="i32", tiles="i32")
        scalars = dict(dice_weight=scalar, bce_weight=scalar, smooth=scalar)
        yield Launch("finish", f"scalars {scalar}", {**signature, **scalars}, FINISH)
    signature = dict(masks="*u8", edge="*u8", gap="*i16", H="i32", W="i32", FAR="i32")
    for whole, label in ((True, "all pixels"), (False, "boundaries")):
        yield Launch("columns", label, signature, dict(WHOLE=whole, **COLUMNS))
    signature = dict(points="*i64", gap="*i16", squared="*i32", pixels="i32", half="i32", W="i32", FAR="i32")
    yield Launch("nearest", "", signature, NEAREST)


def compile_launch(launch, capability, count):
    """Compile for one GPU: registers, bytes spilled and shared, matrix products and, with `count`, all
    instructions.
    """
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"kernels.{MODULES[launch.kernel]}"), f"{launch.kernel}_kernel")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(launch.signature.values())
        if kind.startswith("*")
    }
    constants = {name: value for name, value in launch.constants.items() if name not in OPTIONS}
    source = ASTSource(
        kernel, {**launch.signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options())
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = ""
        if count:
            code = subprocess.run(
                [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
            ).stdout
    registers, stack, local = (
        int(re.search(rf"\b{w}:(\d+)", usage.stdout + usage.stderr)[1]) for w in ("REG", "STACK", "LOCAL")
    )
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", code, re.M)
    return dict(
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        instructions=len(instructions),
        matrix=len(re.findall(r"\bmma\.sync|wgmma\.mma_async", compiled.asm["ptx"])),
    )


def compile_all(launches, capabilities=CAPABILITIES, count=False):
    """(launch, capability, what `compile_launch` found) of each, compiled by two processes in a cache of
    their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(
            2, mp_context=get_context("spawn"), initializer=_use_cache, initargs=(folder,)
        ) as pool:
            waiting = [
                (launch, c, pool.submit(compile_launch, launch, c, count))
                for launch in launches
                for c in capabilities
            ]
            yield from ((launch, c, future.result()) for launch, c, future in waiting)


def _use_cache(folder):
    triton.knobs.cache.dir = folder


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.ahead", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--dtype", nargs="*", default=["bf16"], choices=DTYPES, help="of the adapter kernels (default bf16)"
    )
    args = parser.parse_args(argv)
    launches = [launch for dtype in args.dtype for launch in adapter_launches(dtype)] + list(other_launches())
    print("| kernel | launch | sm | warps | registers | spilled | shared KiB | instructions | matrix |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for launch, capability, f in compile_all(launches, count=True):
        row = (
            launch.kernel,
            launch.label,
            capability,
            launch.options().get("num_warps", 4),
            f["registers"],
            f["spilled"],
        )
        print(
            "|",
            " | ".join(map(str, (*row, f"{f['shared'] / 1024:.0f}", f["instructions"], f["matrix"]))),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
