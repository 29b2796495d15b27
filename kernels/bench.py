"""The one place where speed is measured: `python -m kernels.bench [ROW ...]`.

Rows: adapter, dice_bce, hd95, cache, step, epoch, or all. Prints a table and writes JSON. All sides of a row
run in one process in turn, after a warm-up; times are medians (CUDA events on a GPU). The floor of a row is
the bytes that it must move over the bandwidth measured in this run, or its FLOPs over the matrix rate
measured in this run, whichever is longer. The kernels' rows are here; those that need the project are in its
tests.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

import kernels

from .adapter import reference as adapter_reference
from .dice_bce import reference as loss_reference

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)


class Bench:
    """Where and how often to measure, and what the machine can do at best."""

    def __init__(self, args):
        self.args, self.device, self.rows = args, torch.device(args.device), []
        self.cuda = self.device.type == "cuda"
        self.dtype = DTYPES[args.dtype]
        self.compiles = self.cuda or bool(shutil.which("g++"))
        threads = f"CPU, {torch.get_num_threads()} threads"
        self.about = dict(
            device=torch.cuda.get_device_name(self.device) if self.cuda else threads,
            machine=platform.machine(),
            python=platform.python_version(),
            torch=torch.__version__,
            dtype=args.dtype,
            runs=args.runs,
        )
        for package in ("triton", "transformers", "scipy"):
            module = sys.modules.get(package) or _import(package)
            self.about[package] = getattr(module, "__version__", "not installed")

    def ceilings(self):
        """Measure bandwidth (a copy that fits no cache) and matrix rate (a large product)."""
        n = (1 << 28) if self.cuda else (1 << 25)
        a, b = torch.zeros(n, device=self.device), torch.ones(n, device=self.device)
        m = 8192 if self.cuda else 2048
        x = torch.randn(m, m, device=self.device, dtype=self.dtype)
        t = self.time(dict(copy=lambda: a.copy_(b), product=lambda: x @ x))
        self.about["bandwidth_GBs"], self.about["matrix_TFLOPs"] = (
            8 * n / t["copy"] / 1e9,
            2 * m**3 / t["product"] / 1e12,
        )

    def time(self, sides, runs=None, warm=3):
        """Return the median seconds of each of some functions, run in turn."""
        runs, taken = runs or self.args.runs, {name: [] for name in sides}
        for k in range(warm + runs):
            for name, f in sides.items():
                seconds = self._once(f)
                if k >= warm:
                    taken[name].append(seconds)
        return {name: statistics.median(s) for name, s in taken.items()}

    def _once(self, f):
        if not self.cuda:
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def sides(self, ours, plain):
        """Return ours, the plain code in eager mode and, where there is a compiler, compiled."""
        return dict(ours=ours, eager=plain, **({"compile": torch.compile(plain)} if self.compiles else {}))

    def floor(self, bytes_moved, flops=0):
        return max(
            bytes_moved / self.about["bandwidth_GBs"] / 1e9, flops / self.about["matrix_TFLOPs"] / 1e12
        )

    def row(self, name, times, floor=None, **more):
        """Note and print one row: our seconds, each other side's, and how many times ours is faster."""
        ours = times["ours"]
        ratios = {side: t / ours for side, t in times.items() if side != "ours"}
        self.rows.append(
            dict(
                row=name,
                seconds=times,
                ratios=ratios,
                floor_seconds=floor,
                share_of_floor=floor and floor / ours,
                **more,
            )
        )
        parts = [f"{name:44} ours {_short(ours):>9}"]
        parts += [f"{side} {_short(times[side]):>9} ({r:.2f}x)" for side, r in ratios.items()]
        parts += [f"floor {_short(floor):>9} ({100 * floor / ours:.0f} %)"] if floor else []
        parts += [f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in more.items()]
        print("  ".join(parts), flush=True)


def _import(package):
    try:
        return __import__(package)
    except ImportError:
        return None


def _short(seconds):
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.2f} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.1f} us"
    )


def bench_adapter(bench):
    for d, r in ((768, 64), (768, 512), (512, 64)):
        _adapter(bench, bench.args.batch_size * 485, d, r)


def _adapter(bench, n, d, r):
    def make(*shape):
        return torch.randn(shape, device=bench.device, dtype=bench.dtype)

    h, residual, g = make(n, d).requires_grad_(), make(n, d).requires_grad_(), make(n, d)
    layers = [torch.nn.Linear(*sizes, device=bench.device, dtype=bench.dtype) for sizes in ((d, r), (r, d))]
    tensors = [h, residual, *(p for layer in layers for p in (layer.weight, layer.bias))]
    one_way = 3 * n * d * h.element_size()  # forward: h, residual, out; backward: g, h, dh
    flops = 2 * n * d * r  # of one product

    def forward(f):
        with torch.no_grad():
            return f(*tensors)

    def both(f):
        return torch.autograd.grad(f(*tensors), tensors, g)

    for name, way, floor in (
        ("forward", forward, bench.floor(one_way, 2 * flops)),
        ("forward+backward", both, bench.floor(2 * one_way, 6 * flops)),
    ):
        times = bench.time(
            {
                side: lambda f=f, way=way: way(f)
                for side, f in bench.sides(kernels.adapter_bottleneck, adapter_reference).items()
            }
        )
        bench.row(f"adapter {name} N={n} d={d} r={r}", times, floor)


def bench_dice_bce(bench):
    z = torch.randn(32, 1, 352, 352, device=bench.device, requires_grad=True)
    y = (torch.rand(z.shape, device=bench.device) < 0.2).to(torch.uint8)

    sides = bench.sides(kernels.dice_bce_loss, loss_reference)
    times = bench.time({side: lambda f=f: torch.autograd.grad(f(z, y), z) for side, f in sides.items()})
    floor = bench.floor(z.numel() * ((4 + 1) + (4 + 1 + 4)))
    bench.row("dice_bce forward+backward 32 x 352 x 352", times, floor)


def project_rows():
    """Return the rows that need the whole project, from its tests; none where `kernels/` stands alone."""
    try:
        from tests import bench_project
    except ImportError:
        return {}
    return bench_project.ROWS


def main(argv=None):
    rows = dict(adapter=bench_adapter, dice_bce=bench_dice_bce, **project_rows())
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    gpu, add = torch.cuda.is_available(), parser.add_argument
    add("rows", nargs="*", default=["all"], help=f"any of {', '.join(rows)}, or all (default)")
    add("--device", default="cuda" if gpu else "cpu", help="default: %(default)s")
    add(
        "--dtype",
        default="bf16" if gpu else "fp32",
        choices=DTYPES,
        help="of products (default: %(default)s)",
    )
    add("--batch-size", type=int, default=32 if gpu else 4, help="default: %(default)s")
    add("--runs", type=int, default=30, help="timed runs of each side, after the warm-up (default 30)")
    add("--step-runs", type=int, help="the same for whole training steps (default: as --runs)")
    add("--epoch-runs", type=int, default=3, help="the same for whole epochs (default 3)")
    add("--images", type=int, default=64, help="images of the epoch and cache rows (default 64)")
    add("--dataset", default="demo", help="data set of the epoch rows (default demo, in a temporary folder)")
    add("--data-root", default="data", help="folder that holds the data sets' folders (default data)")
    add("--json", default="bench.json", help="file to write (default bench.json)")
    args = parser.parse_args(argv)
    wanted = rows if "all" in args.rows else args.rows
    unknown = sorted(set(wanted) - set(rows))
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; choose among {', '.join(rows)}, all")
    kernels.use_kernels("auto")
    bench = Bench(args)
    bench.ceilings()
    about = (f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in bench.about.items())
    print("  ".join(about), flush=True)
    for name in wanted:
        rows[name](bench)
    Path(args.json).write_text(json.dumps(dict(**bench.about, rows=bench.rows), indent=1))
    print(f"Wrote {args.json}")


if __name__ == "__main__":
    main()
