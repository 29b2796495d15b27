"""The one place where speed is measured: `python -m kernels.bench [adapter|dice_bce|hd95|cache|step|epoch|all]`.

Prints a table and writes JSON. All sides of a row run in one process in turn, after a warm-up; times are medians (CUDA events on a GPU).
The floor of a row is the bytes that it must move over the bandwidth measured in this run, or its FLOPs over the matrix rate measured in
this run, whichever takes longer. The kernels' rows are here, whole training steps in bench_steps.py.
"""

import argparse
import json
import math
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from . import adapter, dice_bce, surface_distances, use
from .adapter import reference as adapter_reference
from .dice_bce import reference as loss_reference

ROWS = ("adapter", "dice_bce", "hd95", "cache", "step", "epoch")
DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)


class Bench:
    """Where and how often to measure, and what the machine can do at best."""

    def __init__(self, args):
        self.args, self.device, self.rows = args, torch.device(args.device), []
        self.cuda = self.device.type == "cuda"
        self.dtype = DTYPES[args.dtype]
        self.compiles = self.cuda or bool(shutil.which("g++"))
        self.about = dict(
            device=torch.cuda.get_device_name(self.device) if self.cuda else f"CPU, {torch.get_num_threads()} threads",
            machine=platform.machine(), python=platform.python_version(), torch=torch.__version__, dtype=args.dtype, runs=args.runs,
        )  # fmt: skip
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
        self.about["bandwidth_GBs"], self.about["matrix_TFLOPs"] = 8 * n / t["copy"] / 1e9, 2 * m**3 / t["product"] / 1e12

    def time(self, sides, runs=None, warm=3):
        """Median seconds of each of some functions, run in turn."""
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
        """Ours, the plain code in eager mode and, where there is a compiler, the plain code compiled."""
        return dict(ours=ours, eager=plain, **({"compile": torch.compile(plain)} if self.compiles else {}))

    def floor(self, bytes_moved, flops=0):
        return max(bytes_moved / self.about["bandwidth_GBs"] / 1e9, flops / self.about["matrix_TFLOPs"] / 1e12)

    def row(self, name, times, floor=None, **more):
        """Note and print one row: our seconds, each other side's, and how many times ours is faster."""
        ours = times["ours"]
        ratios = {side: t / ours for side, t in times.items() if side != "ours"}
        self.rows.append(dict(row=name, seconds=times, ratios=ratios, floor_seconds=floor, share_of_floor=floor and floor / ours, **more))
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
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"


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
        times = bench.time({side: lambda f=f, way=way: way(f) for side, f in bench.sides(adapter, adapter_reference).items()})
        bench.row(f"adapter {name} N={n} d={d} r={r}", times, floor)


def bench_dice_bce(bench):
    z = torch.randn(32, 1, 352, 352, device=bench.device, requires_grad=True)
    y = (torch.rand(z.shape, device=bench.device) < 0.2).to(torch.uint8)

    times = bench.time({side: lambda f=f: torch.autograd.grad(f(z, y), z) for side, f in bench.sides(dice_bce, loss_reference).items()})
    floor = bench.floor(z.numel() * ((4 + 1) + (4 + 1 + 4)))
    bench.row("dice_bce forward+backward 32 x 352 x 352", times, floor)


def lesions(count, side, generator):
    """Smooth blobs that cover about a tenth to a third of the image: bool `[count, side, side]`."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    masks = []
    for _ in range(count):
        u = torch.rand(12, generator=generator)
        cy, cx, r = 0.4 + 0.2 * u[0], 0.4 + 0.2 * u[1], 0.18 + 0.14 * u[2]
        angle = torch.atan2(y - cy, x - cx)
        wave = sum(0.12 / k * u[k] * torch.sin(k * angle + 6 * u[k + 5]) for k in range(2, 7))
        masks.append((y - cy) ** 2 + (x - cx) ** 2 < (r * (1 + wave)) ** 2)
    return torch.stack(masks)


def monai_way(pred, target):
    """HD95 of one pair as MONAI computes it on a CPU: SciPy's erosion and distance transform on the joint bounding box."""
    import numpy as np
    from scipy import ndimage

    rows, cols = (np.flatnonzero((pred | target).any(axis)) for axis in (1, 0))
    box = tuple(slice(max(i[0] - 1, 0), i[-1] + 2) for i in (rows, cols))
    a, b = (m[box] ^ ndimage.binary_erosion(m[box]) for m in (pred, target))
    values = []
    for points, to in ((a, b), (b, a)):
        distances = ndimage.distance_transform_edt(~to).astype(np.float32)[points]
        values.append(np.quantile(distances, 0.95))
    return max(values)


def tree_way(pred, target):
    """HD95 of one pair by a k-d tree on the boundary points."""
    import numpy as np
    from scipy import ndimage
    from scipy.spatial import cKDTree

    a, b = (np.argwhere(m ^ ndimage.binary_erosion(m)) for m in (pred, target))
    return max(np.quantile(cKDTree(to).query(points)[0], 0.95) for points, to in ((a, b), (b, a)))


def bench_hd95(bench):
    for side in (352, 1024, 2500):
        _hd95(bench, side, 16 if bench.cuda or side < 2500 else 4)


def _hd95(bench, side, count):
    from vlsm.metrics import hd95

    pred, target = lesions(2 * count, side, torch.Generator().manual_seed(0)).split(count)
    arrays = [m.numpy() for m in (pred, target)]
    p, t = pred.to(bench.device), target.to(bench.device)
    found = dict(ours=lambda: hd95(p, t))
    if bench.about["scipy"] == "not installed":
        print("hd95: the comparisons need SciPy (pip install scipy)")
    else:
        for name, way in (("MONAI's way", monai_way), ("k-d tree", tree_way)):
            found[name] = lambda way=way: [way(*pair) for pair in zip(*arrays)]
            assert (hd95(p, t).cpu() - torch.tensor(found[name](), dtype=torch.float64)).abs().max() < 1e-3, name
    times = bench.time(found, bench.args.runs if side < 2500 else max(5, bench.args.runs // 6), warm=1)
    boundary = int(surface_distances(p, t)[1].float().median())
    bench.row(f"hd95 {side} x {side}, a pair, of {count}", {k: v / count for k, v in times.items()}, boundary_pixels=boundary)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    cuda = torch.cuda.is_available()
    parser.add_argument("rows", nargs="*", default=["all"], help=f"any of {', '.join(ROWS)}, or all (default)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", default="bf16" if cuda else "fp32", choices=DTYPES, help="of products (default: bf16 on a GPU, else fp32)"
    )
    parser.add_argument("--batch-size", type=int, default=32 if cuda else 4, help="default 32 on a GPU, else 4")
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each side, after the warm-up (default 30)")
    parser.add_argument("--step-runs", type=int, help="the same for whole training steps (default: as --runs)")
    parser.add_argument("--epoch-runs", type=int, default=3, help="the same for whole epochs (default 3)")
    parser.add_argument("--images", type=int, default=64, help="pictures of the epoch and cache rows (default 64)")
    parser.add_argument("--dataset", default="demo", help="data set of the epoch rows (default demo, written to a temporary folder)")
    parser.add_argument("--data-root", default="data", help="folder that holds the data sets' folders (default data)")
    parser.add_argument("--json", default="bench.json", help="file to write (default bench.json)")
    args = parser.parse_args(argv)
    wanted = ROWS if "all" in args.rows else args.rows
    unknown = sorted(set(wanted) - set(ROWS))
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; choose among {', '.join(ROWS)}, all")
    from . import bench_steps

    use("auto")
    bench = Bench(args)
    bench.ceilings()
    print("  ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in bench.about.items()), flush=True)
    functions = dict(adapter=bench_adapter, dice_bce=bench_dice_bce, hd95=bench_hd95, **bench_steps.ROWS)
    for name in wanted:
        functions[name](bench)
    Path(args.json).write_text(json.dumps(dict(**bench.about, rows=bench.rows), indent=1))
    print(f"Wrote {args.json}")
    assert all(math.isfinite(t) for row in bench.rows for t in row["seconds"].values())


if __name__ == "__main__":
    main()
