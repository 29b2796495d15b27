"""The first hour on a GPU, in one command: `python -m tests.gpu` (for a trial: `--device cpu --quick`).

Runs each part in a process of its own with a time limit, goes on where one fails, and writes all of it to one
folder, `gpu-report` by default: README.md with the facts, the results beside the goals and every part's output,
the benchmark's JSON, a profiler trace, and the caches of Inductor and Triton, which the parts share. README.md
is written after each part; a later call with other --parts adds to it.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# (start of a row's name in the benchmark, its side, how many times faster ours should be)
GOALS = (
    ("step dense", "reference", 2.5), ("step dense", "compile", 1.2), ("adapter forward+backward", "compile", 1.5),
    ("dice_bce", "compile", 1.0), ("hd95", "all pairs", 3.0), ("hd95", "MONAI's way", 3.0),
)  # fmt: skip
MEMORY_GOAL = 0.6  # of the reference's, at the peak of a dense step
# images per second of dense steps, batch 32, that arithmetic gives for an H100
PREDICTED = {"auto": "2,000; 1,550 if each step waits for its prompts", "off": "1,200"}
FACT = "fact: "  # begins each line of a part's output that the report repeats


def parts(args):
    """Return [(name, time limit in seconds, command)] of all parts, the most informative first."""
    python, out, quick = [sys.executable], args.out, args.quick
    device = ["--device", args.device]
    demo = ["train.py", "--dataset", "demo", *device]
    found = []
    for compiled, seconds in (("off", 60), ("on", 150)):
        name = f"train-compile-{compiled}"
        found.append((name, seconds, [*demo, "--epochs", "1", "--compile", compiled, "--out", out / name]))

    def bench(row, seconds):
        sizes = ["--runs", "3", "--step-runs", "1", "--epoch-runs", "1", "--images", "4"]
        low = ["--dtype", "bf16", "--batch-size", "2" if quick else "32"]
        options = [*device, *low, *(sizes if quick else ["--step-runs", "10"])]
        name = f"bench-{row}"
        found.append((name, seconds, ["-m", "tests.bench", *options, "--json", out / f"{name}.json", row]))

    def own(name, seconds):
        quickly = ["--quick"] if quick else []
        found.append((name, seconds, ["-m", "tests.gpu", "--part", name, *device, "--out", out, *quickly]))

    bench("step-dense", 200)
    own("profile", 150)
    own("same", 200)
    if args.device == "cuda":
        own("waits", 60)
    tests = ["-m", "pytest", "-q", "tests/kernels/test_kernels.py", *["-k", "registered"] * quick]
    found.append(("kernels", 180, tests))
    own("distances", 60)
    own("last", 200)
    for row, seconds in (("adapter", 90), ("dice_bce", 60), ("hd95", 150), ("step-shallow", 150), ("step-coop", 150),
                         ("step-vpt", 150), ("epoch", 200), ("cache", 30)):  # fmt: skip
        bench(row, seconds)
    for amp in ("bf16",) if args.device == "cpu" else ("bf16", "fp16"):
        run = out / f"demo-{amp}"
        train = [*demo, "--epochs", "1" if quick else "19", "--amp", amp, "--out", run]
        found.append((f"demo-{amp}", 150, train))
        found.append((f"scores-{amp}", 60, ["evaluate.py", *device, "--ckpt", run]))
    own("graphs", 300)
    limit = 300 if quick else None  # a slow machine's
    return [
        (name, limit or seconds, python + [str(word) for word in words]) for name, seconds, words in found
    ]


def run(name, seconds, command, out):
    """Run a part; returns (how it ended, seconds). Its output goes to NAME.txt."""
    began = time.perf_counter()
    caches = dict(TORCHINDUCTOR_CACHE_DIR=str(out / "inductor"), TRITON_CACHE_DIR=str(out / "triton"))
    with open(out / f"{name}.txt", "w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds,
                env={**os.environ, **caches},
            ).returncode  # fmt: skip
            how = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            how = f"FAILED (longer than {seconds:.0f} s)"
    return how, time.perf_counter() - began


def graphs(device, out, quick):
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


def profile(device, out, quick):
    """Measure dense steps of real size, eager and compiled; write the trace of one of each."""
    import tempfile

    from tests.bench.frame import Bench
    from tests.bench.training import Pair, prompts_of

    cuda = device == "cuda"
    B = 32 if cuda else 1
    target = (torch.rand(B, 1, 352, 352, device=device) < 0.2).to(torch.uint8)
    inputs = torch.randn(B, 3, 352, 352, device=device), prompts_of(B), target
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for compiled, predicted in reversed(PREDICTED.items()):
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(torch.device(device), torch.bfloat16, folder, "dense", compiled)

        def step(pair=pair):
            pair.our_step(*inputs)

        seconds = Bench(device, "bf16", runs=10 if cuda else 1).time(dict(ours=step))["ours"]
        name = f"dense, batch {B}, --compile {compiled}"
        predicted = f" (predicted for an H100: {predicted})" if cuda else ""
        print(f"{FACT}{name}: {B / seconds:,.0f} images/s{predicted}")
        with torch.profiler.profile(activities=kinds) as trace:
            step()
            if cuda:
                torch.cuda.synchronize()
        trace.export_chrome_trace(str(out / f"dense-step-{compiled}.json"))
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
        if cuda:
            launched = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            busy = sum(e.time_range.elapsed_us() for e in launched) / 1e6
            peak = torch.cuda.max_memory_allocated() / 2**30
            idle = 100 * max(0, 1 - busy / seconds)
            print(
                f"{FACT}{name}: {len(launched)} launches, GPU idle {idle:.0f} %, peak {peak:.2f} GiB",
                flush=True,
            )


def train_demo(device, run, *options):
    """Train on the demo, unless told otherwise for two epochs and from the start; returns the loss of each."""
    import train

    fresh = [] if "--resume" in options else ["--dataset", "demo", "--device", device, "--overwrite"]
    fixed = ["--out", str(run), *fresh]
    train.main([*fixed, *options] if "--epochs" in options else [*fixed, "--epochs", "2", *options])
    with open(run / "log.csv") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def same(device, out, quick):
    """Compare a resumed run, and one with the other kernels, with an unbroken run; SystemExit if they differ."""
    few = ["--limit-train", "0.1"] if quick else []
    unbroken = train_demo(device, out / "unbroken", *few)
    train_demo(device, out / "resumed", "--epochs", "1", *few)
    others = dict(
        resumed=(train_demo(device, out / "resumed", "--resume", "--epochs", "2"), 1e-3),
        plain=(train_demo(device, out / "plain", "--kernels", "torch", *few), 1e-2),
    )
    wrong = 0
    for name, (losses, limit) in others.items():
        difference = max(abs(a - b) for a, b in zip(unbroken, losses, strict=True))
        print(
            f"{FACT}losses, {name} run against the unbroken one: differ by {difference:.1e} (at most {limit})"
        )
        wrong += not difference <= limit
    raise SystemExit(wrong)


def waits(device, out, quick):
    """Print each place where the host waits for the GPU in an epoch, and how often."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_demo(device, out / "waits", "--epochs", "1", "--compile", "off")
    places = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    print(f"{FACT}the host waited {len(places)} times in a run of one epoch (see waits.txt)")
    for place, count in Counter(places).most_common():
        print(count, place)


def last(device, out, quick):
    """Train with a last batch of 5; SystemExit if the second epoch compiles anything."""
    import datasets

    count = len(datasets.records("demo", "train"))
    sizes = [size for size in range(32, 5, -1) if count % size == 5]
    graphs_after = []

    def count_graphs(run):
        graphs_after.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    import train

    options = f"--dataset demo --epochs 2 --compile on --device {device} --batch-size {sizes[0]}"
    train.main([*options.split(), "--out", str(out / "last"), "--overwrite"], count_graphs)
    print(f"{FACT}a last batch of 5: {graphs_after} graphs compiled after epochs 1 and 2")
    raise SystemExit(graphs_after[1] > graphs_after[0])


def distances(device, out, quick):
    """Compare HD95 on the device with the CPU's; raises SystemExit if they differ."""
    from tests.bench.hd95 import lesions
    from vlsm.metrics import hd95

    pred, target = lesions(8, 352, torch.Generator().manual_seed(0)).split(4)
    difference = (hd95(pred.to(device), target.to(device)).cpu() - hd95(pred, target)).abs().max().item()
    print(f"{FACT}HD95 of 4 pairs differs from the CPU's by {difference:.1e} pixels (at most 1e-5)")
    raise SystemExit(not difference <= 1e-5)


OWN = dict(graphs=graphs, profile=profile, same=same, waits=waits, last=last, distances=distances)


def goals(out):
    """Return lines of a table: each goal, the measured value, whether it was reached."""
    rows, lines = [], []
    for file in sorted(out.glob("bench-*.json")):
        rows += json.loads(file.read_text())["rows"]
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


def card_facts():
    """Return lines on the GPU and what torch chooses on it."""
    q = torch.zeros(1, 12, 485, 64, device="cuda", dtype=torch.bfloat16)
    chosen = torch.nn.attention.SDPBackend(torch._C._fused_sdp_choice(q, q, q)).name
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,power.limit",
        "--format=csv,noheader",
    ]
    return [
        "nvidia-smi: " + subprocess.run(command, capture_output=True, text=True).stdout.strip(),
        f"compute capability {torch.cuda.get_device_capability()}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, attention in bf16: {chosen}",
    ]


def report(out, ended, device, quick):
    """Write README.md with the results so far."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    facts = card_facts() if device == "cuda" else []
    for part in ended:
        file = out / f"{part}.txt"
        lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
        facts += [line.removeprefix(FACT) for line in lines if line.startswith(FACT)]
    lines = [f"# {name}, torch {torch.__version__}", "", *[f"- {fact}" for fact in facts]]
    lines += ["", "| part | ended | seconds |", "| --- | --- | ---: |"]
    lines += [f"| [{part}]({part}.txt) | {how} | {seconds:.0f} |" for part, (how, seconds) in ended.items()]
    lines += ["", "| goal | wanted | found | |", "| --- | ---: | ---: | --- |", *goals(out)]
    for file in sorted(out.glob("demo-*/eval-test/metrics.json")):
        dsc = 100 * json.loads(file.read_text())["dsc"]["mean"]
        wanted = "-" if quick else "within 1"
        lines.append(f"| {file.parts[-3]}: DSC, 87.8 on a CPU in float32 | {wanted} | {dsc:.2f} | |")
    (out / "README.md").write_text("\n".join([*lines, ""]))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command itself")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder (default gpu-report)")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all parts (default 540)")
    parser.add_argument("--parts", help="these alone, in this order: a,b (default: all)")
    parser.add_argument("--part", choices=list(OWN), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    if args.part:
        return OWN[args.part](args.device, args.out, args.quick)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the command with --device cpu --quick")
    available = {part[0]: part for part in parts(args)}
    names = args.parts.split(",") if args.parts else list(available)
    unknown = ", ".join(sorted(set(names) - set(available)))
    if unknown:
        parser.error(f"there is no part {unknown}; choose among {', '.join(available)}")
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "parts.json"
    ended = json.loads(state.read_text()) if state.is_file() else {}
    end = time.perf_counter() + args.limit
    for name, seconds, command in (available[name] for name in names):
        left = end - time.perf_counter()
        how = ("left out: no time", 0.0) if left < 5 else run(name, min(seconds, left), command, args.out)
        ended[name] = how
        state.write_text(json.dumps(ended))
        print(f"{name}: {how[0]}, {how[1]:.0f} s", flush=True)
        report(args.out, ended, args.device, args.quick)
    print((args.out / "README.md").read_text())
    return sum(ended[name][0] != "passed" for name in names)


if __name__ == "__main__":
    sys.exit(main())
