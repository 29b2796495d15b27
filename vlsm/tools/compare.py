"""Compare runs on the same records: DSC with intervals, Wilcoxon's test of each pair, a sheet of cases.

Each run has its own prompts unless --prompts is given; the sheet shows the first run's best, median and worst
cases.
"""

from itertools import combinations
from pathlib import Path

import numpy as np

from datasets import open_run_split
from vlsm.data.records import describe_groups
from vlsm.results.evaluation import add_split_arguments, evaluate_split
from vlsm.results.figures import draw_cases
from vlsm.results.gallery import page_files, write_gallery
from vlsm.results.predict import load_predictors
from vlsm.results.scores import DRAWS, bootstrap_intervals, in_brackets, mean_text, summarise
from vlsm.system import parallel
from vlsm.system.arguments import Parser, add_machine_arguments, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import check_targets

EXAMPLE = """examples:
  python -m vlsm.tools.compare runs/kvasir-dense-64-seed42 runs/kvasir-coop-seed42
  python -m vlsm.tools.compare runs/a runs/b runs/c --gallery --figure 12
  python -m vlsm.tools.compare runs/a runs/b --dataset clinicdb --out clinicdb.pdf"""


def signed_rank(gaps):
    """Return (two-sided p, number of gaps other than 0) of differences, by Wilcoxon's signed-rank test.

    The normal approximation; (1.0, 0) if all are 0.
    """
    from scipy.stats import wilcoxon

    n = np.count_nonzero(gaps)
    if not n:
        return 1.0, 0
    return float(wilcoxon(gaps, zero_method="wilcox", correction=False, method="approx").pvalue), n


def difference(a, b):
    """Return in words how the DSC of two runs' scores of the same records differ."""
    gaps = np.array([x["dsc"] - y["dsc"] for x, y in zip(a, b)])
    interval = bootstrap_intervals({"dsc": gaps}, [score["group"] for score in a])["dsc"]
    p, n = signed_rank(gaps)
    mean = f"{100 * gaps.mean():+.2f} {in_brackets(interval, sign='+')}".rstrip()
    return f"{mean} points, p = {p:.2g} (signed ranks of {n} pairs that differ)"


def run_names(paths):
    """Return distinct names of checkpoints: folder or file name, with number and parent if some are equal."""
    paths = [Path(path).absolute() for path in paths]
    names = [path.name.removesuffix(".safetensors") for path in paths]
    if len(set(names)) < len(names):  # as of runs that differ in the seed
        names = [f"{k}: {path.parent.name}/{name}" for k, (path, name) in enumerate(zip(paths, names), 1)]
    return names


def parse_arguments(argv=None):
    parser = Parser(__doc__, EXAMPLE, prog="python -m vlsm.tools.compare")
    parser.add_argument("run", help="run folder or checkpoint")
    parser.add_argument("others", nargs="+", metavar="other_run", help="one or more to compare it with")
    add = parser.add_argument_group("output").add_argument
    add("--figure", type=number(int, 1), default=6, metavar="N", help="rows of the sheet (default 6)")
    add(
        "--out",
        default="compare.png",
        metavar="FILE",
        help="the sheet, .png, .pdf or .svg (default %(default)s)",
    )
    add(
        "--gallery", action="store_true", help="also write FILE/gallery/index.html: all records, side by side"
    )
    add("--overwrite", action="store_true", help="replace files that this program did not write")
    add_split_arguments(parser)
    add_machine_arguments(parser)
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out '{args.out}' should end with .png, .pdf or .svg.")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    out = Path(args.out)
    gallery = out.with_suffix("") / "gallery"
    check_targets([out, *page_files(gallery)] if args.gallery else [out], overwrite=args.overwrite)
    paths = [args.run, *args.others]
    predictors = load_predictors(
        paths,
        weights=args.weights,
        device=args.device,
        amp=args.amp,
        kernels=args.kernels,
        compile=args.compile,
    )
    dataset = args.dataset or predictors[0].metadata["dataset"]

    runs = {}
    for name, predictor in zip(run_names(paths), predictors):
        data, texts = open_run_split(
            predictor.metadata, args.split, dataset, args.data_root, args.prompts, args.seed, args.cache_dir
        )
        runs[name] = evaluate_split(
            predictor,
            data,
            texts,
            upsample=args.upsample,
            batch_size=args.batch_size,
            group=args.group,
            keep_masks=True,
        )
        dsc = summarise(runs[name])["dsc"]
        prompts = args.prompts or predictor.metadata["prompts"]
        say(f"{name:30} DSC {mean_text(dsc)} % over {dsc['n']} records, prompts: {prompts}")
    for a, b in combinations(runs, 2):
        say(f"{a} - {b}: {difference(runs[a], runs[b])}")
    groups = describe_groups(data.records, args.group)
    say(f"[...]: 95 % bootstrap intervals, groups ({groups}) drawn {DRAWS:,} times")
    if not parallel.rank():
        draw_cases(out, data.records, runs, args.figure, out.suffix[1:])
        say(f"Wrote {out}")
        if args.gallery:
            title = f"{' and '.join(runs)} on {dataset} {args.split}"
            facts = [f"prompts: {args.prompts or 'of each run'}", "foreground: probability above 0.5"]
            say(f"Wrote {write_gallery(gallery, data.records, runs, title, facts)}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
