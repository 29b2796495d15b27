"""Measure speed: `python -m tests.bench [ROW ...]`.

Rows: adapter, dice_bce, hd95, cache, step, epoch, prompts, or all; step-dense is one of the rows of step. Prints
a table, and writes JSON after each row. All sides of a row run in one process in turn, after a warm-up; times are medians (CUDA events on a GPU). The floor of a row
is the bytes that it must move over the bandwidth measured in this run, or its FLOPs over the matrix rate measured
in this run, whichever is longer.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

import kernels
from tests.bench import hd95, kernel_rows, prompts, training
from tests.bench.frame import DTYPES, Bench

ROWS = dict(
    adapter=kernel_rows.bench_adapter,
    dice_bce=kernel_rows.bench_dice_bce,
    hd95=hd95.bench_hd95,
    cache=training.bench_cache,
    **{f"step-{label.split()[0]}": partial(training.bench_step, label=label) for label in training.STEPS},
    epoch=training.bench_epoch,
    prompts=prompts.bench_prompts,
)


def make_parser():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("rows", nargs="*", default=["all"], help=f"any of {', '.join(ROWS)}, or all (default)")
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
    add("--dataset", default="demo", help="data set of the epoch and cache rows (default demo)")
    add("--data-root", default="data", help="folder that holds the data sets' folders (default data)")
    add("--json", default="bench.json", help="file to write (default bench.json)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = vars(parser.parse_args(argv))
    names = args.pop("rows")
    args["file"] = Path(args.pop("json"))
    if "all" in names:
        names = list(ROWS)
    groups = {row.split("-")[0] for row in ROWS}
    unknown = sorted(set(names) - set(ROWS) - groups)
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; choose among {', '.join(ROWS)}, all")
    kernels.use_kernels("auto")
    bench = Bench(**args)
    bench.measure_ceilings()
    for name, value in bench.machine.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", end="  ")
    print(flush=True)
    for row, measure in ROWS.items():
        if row in names or row.split("-")[0] in names:
            measure(bench)
    print(f"Wrote {bench.file}")


if __name__ == "__main__":
    main()
