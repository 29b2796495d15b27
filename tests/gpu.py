"""The first hour on a GPU, in one command: `python -m tests.gpu` (for a trial: `--device cpu --quick`).

Runs each part in a process of its own with a time limit, goes on where one fails, and writes all of it to one
folder, `gpu-report` by default: README.md with the results beside the goals, every part's output, the
benchmark's JSON and a profiler trace. On one card it takes at most nine minutes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# (start of a row's name in the benchmark, its side, how many times faster ours should be)
GOALS = (
    ("step dense", "reference", 2.5), ("step dense", "compile", 1.2), ("adapter forward+backward", "compile", 1.5),
    ("dice_bce", "compile", 1.0), ("hd95", "all pairs", 3.0), ("hd95", "MONAI's way", 3.0),
)  # fmt: skip
MEMORY_GOAL = 0.6  # of the reference's, at the peak of a dense step


def parts(args):
    """Return [(name, time limit in seconds, command)] of all parts, the most informative first."""
    python, out, small = [sys.executable], args.out, args.quick
    bench = ["-m", "tests.bench", "--device", args.device, "--json"]
    sizes = (
        ["--runs", "3", "--step-runs", "1", "--epoch-runs", "1", "--images", "4"]
        if small
        else ["--step-runs", "10"]
    )
    rows = ["dice_bce", "cache"] if small else ["adapter", "dice_bce", "hd95", "step", "epoch", "cache"]
    low = ["--dtype", "bf16", "--batch-size", "2" if small else "32"]
    train = ["train.py", "--dataset", "demo", "--device", args.device, "--epochs", "1" if small else "19"]
    found = [
        (
            "kernels",
            120,
            ["-m", "pytest", "-q", "tests/kernels/test_kernels.py", *["-k", "registered"] * small],
        ),
        ("graphs", 300, ["-m", "tests.gpu", "--part", "graphs", "--device", args.device]),
        ("benchmark", 180, [*bench, out / "bench.json", *low, *sizes, *rows]),
        ("profile", 45, ["-m", "tests.gpu", "--part", "profile", "--device", args.device, "--out", out]),
    ]
    for amp in ("bf16",) if args.device == "cpu" else ("bf16", "fp16"):
        run = out / f"demo-{amp}"
        found.append((f"demo-{amp}", 90, [*train, "--amp", amp, "--out", run]))
        found.append((f"scores-{amp}", 30, ["evaluate.py", "--device", args.device, "--ckpt", run]))
    return [(name, seconds, python + [str(word) for word in command]) for name, seconds, command in found]


def run(name, seconds, command, out):
    """Run a part; returns (how it ended, seconds). Its output goes to NAME.txt."""
    began = time.perf_counter()
    with open(out / f"{name}.txt", "w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            how = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            how = f"FAILED (longer than {seconds} s)"
    return how, time.perf_counter() - began


def graphs(device):
    """Print the graph breaks of each network's layers under `torch.compile`; raises SystemExit for any."""
    import vlsm
    from tests.conftest import tiny_batch

    networks = (
        ("clipseg", "dense"),
        ("clipseg", "vpt"),
        ("cris", "full"),
        ("san", "full"),
        ("sam3", "dense"),
    )
    sides, backend = dict(san=72, sam3=70), {} if device == "cuda" else {"backend": "aot_eager"}
    for name, method in networks:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        weights = "mini" if name == "clipseg" else f"random:{ROOT}/tests/tiny/{name}.json"
        model = vlsm.build(name, weights, method).place_on(torch.device(device), None).train()
        for block in model.network.compilable_blocks():
            block.compile(dynamic=model.network.compile_dynamic, **backend)
        images, ids = tiny_batch(2, sides.get(name, 64))
        model(images.to(device), ids).square().mean().backward()
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        print(name, method, "graph breaks:", breaks or "none", flush=True)
        if breaks:
            raise SystemExit(1)


def profile(device, out):
    """Write the trace of one dense step of real size, and print where its time goes."""
    import tempfile

    from tests.bench.training import Pair, prompts_of

    cuda = device == "cuda"
    B = 32 if cuda else 1
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(torch.device(device), torch.bfloat16, folder, "dense")
    target = (torch.rand(B, 1, 352, 352, device=device) < 0.2).to(torch.uint8)
    inputs = torch.randn(B, 3, 352, 352, device=device), prompts_of(B), target
    for _ in range(3 if cuda else 1):
        pair.our_step(*inputs)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as trace:
        pair.our_step(*inputs)
        if cuda:
            torch.cuda.synchronize()
    trace.export_chrome_trace(str(Path(out) / "dense-step.json"))
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


def goals(out):
    """Return lines of a table: each goal, the measured value, whether it was reached."""
    file = out / "bench.json"
    rows, lines = json.loads(file.read_text())["rows"] if file.is_file() else [], []
    for start, side, times in GOALS:
        for row in (r for r in rows if r["row"].startswith(start) and side in r["ratios"]):
            found = row["ratios"][side]
            verdict = "reached" if found >= times else "missed"
            lines.append(f"| {row['row']} against {side} | {times:.1f} times | {found:.2f} | {verdict} |")
    for row in (r for r in rows if "peak_GiB_reference" in r and r["row"].startswith("step dense")):
        found = row["peak_GiB_ours"] / row["peak_GiB_reference"]
        verdict = "reached" if found <= MEMORY_GOAL else "missed"
        lines.append(f"| {row['row']}: memory | at most {MEMORY_GOAL} | {found:.2f} | {verdict} |")
    return lines


def report(out, ended, device):
    """Write README.md with the results so far."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"# {name}, torch {torch.__version__}", "", "| part | ended | seconds |", "| --- | --- | ---: |"]
    lines += [f"| [{part}]({part}.txt) | {how} | {seconds:.0f} |" for part, (how, seconds) in ended.items()]
    lines += ["", "| goal | wanted | found | |", "| --- | ---: | ---: | --- |", *goals(out)]
    for file in sorted(out.glob("demo-*/eval-test/metrics.json")):
        dsc = 100 * json.loads(file.read_text())["dsc"]["mean"]
        lines.append(f"| {file.parts[-3]}: DSC, 87.8 on a CPU in float32 | within 1 | {dsc:.2f} | |")
    (out / "README.md").write_text("\n".join([*lines, ""]))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command itself")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder (default gpu-report)")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all parts (default 540)")
    parser.add_argument("--part", choices=["graphs", "profile"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return graphs(args.device) if args.part == "graphs" else profile(args.device, args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the command with --device cpu --quick")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    ended, end = {}, time.perf_counter() + args.limit
    for name, seconds, command in parts(args):
        left = end - time.perf_counter()
        how = ("left out: no time", 0.0) if left < 5 else run(name, min(seconds, left), command, args.out)
        ended[name] = how
        print(f"{name}: {how[0]}, {how[1]:.0f} s", flush=True)
        report(args.out, ended, args.device)
    print((args.out / "README.md").read_text())
    return sum(how != "passed" for how, _ in ended.values())


if __name__ == "__main__":
    sys.exit(main())
