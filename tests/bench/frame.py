"""What all rows of the benchmark share: timing, the machine's ceilings, printing."""

import importlib
import json
import platform
import shutil
import statistics
import time

import torch

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)


class Bench:
    """How often to measure, on which device, what the machine can do at best, and the rows measured so far."""

    def __init__(
        self,
        device="cpu",
        dtype="fp32",
        runs=30,
        step_runs=None,
        epoch_runs=3,
        batch_size=4,
        images=64,
        dataset="demo",
        data_root="data",
        file=None,
    ):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.dtype = DTYPES[dtype]
        self.runs = runs
        self.step_runs = step_runs or runs
        self.epoch_runs = epoch_runs
        self.batch_size = batch_size
        self.images = images
        self.dataset = dataset
        self.data_root = data_root
        self.file = file
        self.compiles = self.cuda or bool(shutil.which("g++"))
        self.rows = []
        threads = f"CPU, {torch.get_num_threads()} threads"
        self.machine = dict(
            device=torch.cuda.get_device_name(self.device) if self.cuda else threads,
            machine=platform.machine(),
            python=platform.python_version(),
            torch=torch.__version__,
            dtype=dtype,
            runs=runs,
        )
        for package in ("triton", "transformers", "scipy"):
            self.machine[package] = version(package)

    def measure_ceilings(self):
        """Measure bandwidth (a copy that fits no cache) and matrix rate (a large product)."""
        n = (1 << 28) if self.cuda else (1 << 25)
        source = torch.ones(n, device=self.device)
        target = torch.zeros(n, device=self.device)
        side = 8192 if self.cuda else 2048
        x = torch.randn(side, side, device=self.device, dtype=self.dtype)
        seconds = self.time(dict(copy=lambda: target.copy_(source), product=lambda: x @ x))
        self.machine["bandwidth_GBs"] = 8 * n / seconds["copy"] / 1e9
        self.machine["matrix_TFLOPs"] = 2 * side**3 / seconds["product"] / 1e12

    def time(self, sides, runs=None, warm=3):
        """Return the median seconds of each of some functions, run in turn."""
        runs = runs or self.runs
        seconds = {name: [] for name in sides}
        for k in range(warm + runs):
            for name, function in sides.items():
                taken = self._time_once(function)
                if k >= warm:
                    seconds[name].append(taken)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def _time_once(self, function):
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def sides(self, ours, plain):
        """Return ours, the plain code in eager mode and, where there is a compiler, compiled."""
        sides = dict(ours=ours, eager=plain)
        if self.compiles:
            sides["compile"] = torch.compile(plain)
        return sides

    def floor(self, bytes_moved, flops=0):
        """Return the seconds that a machine with these ceilings needs at least."""
        moving = bytes_moved / self.machine["bandwidth_GBs"] / 1e9
        multiplying = flops / self.machine["matrix_TFLOPs"] / 1e12
        return max(moving, multiplying)

    def row(self, name, times, floor=None, **more):
        """Keep and print one row, and write all so far to the file: our seconds, each other side's, and how many times ours is faster."""
        ours = times["ours"]
        row = dict(row=name, seconds=times, ratios={}, floor_seconds=floor, share_of_floor=None, **more)
        words = [f"{name:44} ours {duration(ours):>9}"]
        for side, seconds in times.items():
            if side != "ours":
                row["ratios"][side] = seconds / ours
                words.append(f"{side} {duration(seconds):>9} ({seconds / ours:.2f}x)")
        if floor:
            row["share_of_floor"] = floor / ours
            words.append(f"floor {duration(floor):>9} ({100 * floor / ours:.0f} %)")
        for key, value in more.items():
            words.append(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}")
        self.rows.append(row)
        if self.file:
            self.file.write_text(json.dumps(dict(**self.machine, rows=self.rows), indent=1))
        print("  ".join(words), flush=True)


def version(package):
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return "not installed"


def duration(seconds):
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{1e3 * seconds:.2f} ms"
    return f"{1e6 * seconds:.1f} us"
