"""Every launch of every Triton kernel, compiled ahead of time, without a GPU: `python -m tests.kernels.ahead`
prints what the machine code says.

For the GPUs of TARGETS: registers and spilled bytes a thread, shared memory, instructions, and how many of them
multiply matrices. tests/kernels/test_ahead_of_time.py holds the kernels to it.
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

# NVIDIA's compute capabilities (A100, 3090, 4090, H100, B200, 5090) and AMD's architecture (MI300)
CAPABILITIES = (80, 86, 89, 90, 100, 120)
TARGETS = (*CAPABILITIES, "gfx942")
# arguments that a multiple of 16 pixels makes multiples of 16, which Triton then knows
SIZES = ("P", "H", "W", "pixels", "half")
MATRIX = r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"  # instructions that multiply matrices
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
    odd: bool = False  # whether the images' sides are no multiple of 16

    def attributes(self):
        """What the compiler may assume of the arguments: pointers, and sizes unless odd, are multiples of 16."""
        multiples = {}
        for i, (name, kind) in enumerate(self.signature.items()):
            size = name in SIZES and kind == "i32" and not self.odd
            if kind.startswith("*") or size:
                multiples[(i,)] = [["tt.divisibility", 16]]
        return multiples

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
    """The kernels of the loss and of the boundary distances, for images of 352 x 352."""
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


def gpu_target(target):
    """Return Triton's name of one of TARGETS."""
    from triton.backends.compiler import GPUTarget

    if isinstance(target, str):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", target, 32)


def compile_launch(launch, target, count):
    """Compile for one GPU: registers, bytes spilled and shared, matrix products and, with `count`, all
    instructions.
    """
    from importlib import import_module

    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"kernels.{MODULES[launch.kernel]}"), f"{launch.kernel}_kernel")
    constants = {name: value for name, value in launch.constants.items() if name not in OPTIONS}
    signature = {**launch.signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constants, launch.attributes())
    compiled = triton.compile(source, target=gpu_target(target), options=launch.options())
    if "cubin" in compiled.asm:
        assembly = compiled.asm["ptx"]
        registers, spilled, instructions = read_cubin(compiled.asm["cubin"], count)
    else:
        assembly = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
        instructions = len(re.findall(r"^\s+[vs]_|^\s+(?:global|buffer|ds|flat)_", assembly, re.M))
    return dict(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        instructions=instructions,
        matrix=len(re.findall(MATRIX, assembly)),
    )


def read_cubin(cubin, count):
    """Return the registers, the spilled bytes and, with `count`, the instructions of NVIDIA's machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def output_of(tool, option):
        ended = subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True)
        return ended.stdout + ended.stderr

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output_of("cuobjdump", "-res-usage")
        code = output_of("nvdisasm", "-c") if count else ""
    registers, stack, local = (int(re.search(rf"\b{w}:(\d+)", usage)[1]) for w in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", code, re.M)
    return registers, stack + local, len(instructions)


def refusal(target):
    """Return why the installed Triton compiles nothing for a target, or None; tried with a kernel of our own."""
    launch = [launch for launch in other_launches() if launch.kernel == "nearest"][0]
    try:
        compile_launch(launch, target, False)
    except Exception as error:  # an architecture that it, its LLVM or its ptxas does not know
        return f"Triton {triton.__version__} does not compile for {target}: {str(error).splitlines()[0]}"
    return None


def compile_all(launches, targets=TARGETS, count=False):
    """(launch, target, what `compile_launch` found) of each, compiled by two processes in a cache of
    their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(
            2, mp_context=get_context("spawn"), initializer=_use_cache, initargs=(folder,)
        ) as pool:
            waiting = [
                (launch, target, pool.submit(compile_launch, launch, target, count))
                for launch in launches
                for target in targets
            ]
            yield from ((launch, target, future.result()) for launch, target, future in waiting)


def _use_cache(folder):
    triton.knobs.cache.dir = folder


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.ahead", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--dtype", nargs="*", default=["bf16"], choices=DTYPES, help="of the adapter kernels (default bf16)"
    )
    parser.add_argument("--targets", nargs="*", default=["80", "90"], help="GPUs (default 80 90)")
    args = parser.parse_args(argv)
    targets = [int(target) if target.isdigit() else target for target in args.targets]
    launches = [launch for dtype in args.dtype for launch in adapter_launches(dtype)] + list(other_launches())
    print("| kernel | launch | target | warps | registers | spilled | shared KiB | instructions | matrix |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for launch, target, f in compile_all(launches, targets, count=True):
        warps = launch.options().get("num_warps", 4)
        shared = f"{f['shared'] / 1024:.0f}"
        row = [launch.kernel, launch.label, target, warps, f["registers"], f["spilled"], shared]
        row += [f["instructions"], f["matrix"]]
        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
