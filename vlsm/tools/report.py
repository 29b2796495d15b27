"""Table and charts of the evaluated runs below a folder: a column for each method, means over seeds."""

import statistics
from collections import defaultdict, namedtuple
from pathlib import Path

from vlsm.checkpoint import differing_settings, read_metadata, run_settings
from vlsm.data.negatives import ABSENT_SETS
from vlsm.results.scores import METRICS, in_brackets, mean_over_runs, read_metrics
from vlsm.results.tables import BOLD, PLAIN, format_rows
from vlsm.system import plots
from vlsm.system.arguments import Parser
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import check_targets, owned_write, write_text
from vlsm.system.schema import field, read_json

IN_MM = " (mm)"  # after the name of a data set whose distances are in millimetres
ALARMS = {name: (f"false alarms %: {name}", 100, min) for name in ABSENT_SETS}
ROWS = METRICS | ALARMS
KEY = (
    "± standard deviation of the means of several seeds or folds; [...] 95 % bootstrap interval over "
    "records, each averaged over its runs."
)
NETWORK_PREFIXES = {"clipseg": "", "cris": "CRIS ", "san": "SAN ", "sam3": "SAM3 "}

# An evaluation of a run on its own data set, or on one class of it ("kvasir: polyp"); metrics: the contents
# of metrics.json, which is `file`, or what that says of the class, and each false alarm by its name;
# settings: see `run_settings`
Run = namedtuple("Run", "dataset label settings file metrics")
# A mean in per cent or pixels and its spread, as numbers and as text: the sample deviation of several seeds
# and the 95 % interval over records (" ± 1.41 [78.20, 83.10]")
Cell = namedtuple("Cell", "mean low high spread")


def method_label(metadata, metrics):
    """Return a method's name with network, options and evaluation: "dense vl 64", "CRIS full (mirrored)"."""
    label = NETWORK_PREFIXES[metadata["model"]] + metadata["method"]
    for option, prefix in (("branches", ""), ("dim", ""), ("prompt_depth", "J")):
        if option in metadata["options"]:
            label += f" {prefix}{metadata['options'][option]}"
    if metadata["reference"]:
        label += " (published code)"
    if metrics.get("mirror"):
        label += " (mirrored)"
    if metrics.get("ensemble"):
        label += f" (mean of {len(metrics['ensemble'])})"
    return label


def collect(root, split="test"):
    """Return the `Run`s below a folder that were evaluated on a split of their own data set.

    Raises ValueError if there are none.
    """
    runs = []
    for file in sorted(Path(root).rglob(f"eval-{split}*/metrics.json")):
        metrics, summaries = read_metrics(file)
        checkpoints = metrics.get("ensemble") or [file.parents[1] / "best.safetensors"]
        if not Path(checkpoints[0]).exists():
            continue
        metadata = read_metadata(checkpoints[0])
        dataset = Path(metrics["dataset"]).name
        if dataset == Path(metadata["dataset"]).name:
            for suffix, summary in summaries.items():
                runs.append(
                    Run(
                        dataset + suffix + (IN_MM if metrics.get("unit") == "mm" else ""),
                        method_label(metadata, metrics),
                        run_settings(metadata),
                        file,
                        summary | (summary.get("alarms") or {}),
                    )
                )
    if not runs:
        raise ValueError(
            f"Below '{root}' there is no run with eval-{split}/metrics.json. Evaluate the runs first: "
            "evaluate.py --ckpt RUN."
        )
    return runs


def group_seeds(runs):
    """Return ({(data set, label): {(seed, fold): run}}, {label: number of trained parameters}).

    The settings that differ between runs of one label are added to it. Of several evaluations with one seed
    and fold the first counts.
    """
    groups = defaultdict(dict)
    trained = {}
    for run in runs:
        others = [r.settings for r in runs if (r.dataset, r.label) == (run.dataset, run.label)]
        label = run.label
        for name in differing_settings(others):
            label += f" ({name} {run.settings.get(name)})"
        groups[run.dataset, label].setdefault((run.settings["seed"], run.settings.get("fold")), run)
        trained[label] = run.metrics["trained"]
    return groups, trained


def mean_over_seeds(runs, metric):
    """Return the `Cell` of runs that differ in seed or fold; None if the metric is undefined for all."""
    factor = ROWS[metric][1]
    runs = [run for run in runs if metric in METRICS or metric in run.metrics]  # not all have false alarms
    summaries = [run.metrics[metric] for run in runs]
    defined = [summary for summary in summaries if summary.get("mean") is not None]
    if not defined:
        return None
    stats = defined[0]
    mean = stats["mean"]
    low, high = stats.get("ci95") or (mean, mean)  # none of fewer than two groups of records
    spread = ""
    if len(defined) > 1:
        means = [summary["mean"] for summary in defined]
        folders = [] if metric in ALARMS else [run.file.parent for run in runs]  # metrics.csv has no alarms
        stats = mean_over_runs(folders, metric, runs[0].metrics.get("word"))
        mean = stats["mean"] if stats["n"] else statistics.mean(means)
        std = statistics.stdev(means)
        low, high = mean - std, mean + std
        spread = f" ± {factor * std:.2f}"
    spread += f" {in_brackets(stats.get('ci95'), factor)}"
    return Cell(factor * mean, factor * low, factor * high, spread.rstrip())


def tabulate(groups):
    """Return {(data set, metric): {label: Cell}} of the groups of `group_seeds`."""
    table = defaultdict(dict)
    for (dataset, label), runs in groups.items():
        for metric in ROWS:
            cell = mean_over_seeds(runs.values(), metric)
            if cell:
                table[dataset, metric][label] = cell
    return table


def add_published(table, trained, name):
    """Add a paper's figures to the table, and its methods to `trained`; return a note that names the paper.

    name: of a file in vlsm/tools/published ("vlsm-adapter"), or the path of a .json file like them:
    {"source": "A paper", "rows": [{"dataset": "kvasir", "method": "dense vl 64", "trained": 2974464, "dsc":
    89.1}, ...]}; DSC, IoU and NSD in per cent, unknown values left out. Raises OSError or ValueError.
    """
    file = Path(name) if name.endswith(".json") else Path(__file__).parent / "published" / f"{name}.json"
    paper = read_json(file)
    for i, row in enumerate(field(file, paper, "rows", kind=list, words="a list")):
        where = f"{file}, row {i}"
        dataset = field(where, row, "dataset", kind=str, words="a text")
        label = field(where, row, "method", kind=str, words="a text") + plots.DAGGER
        trained[label] = field(where, row, "trained") if "trained" in row else trained.get(label)
        for metric in METRICS:
            for place in (dataset, dataset + IN_MM):
                if metric in row and (place, metric) in table:
                    mean = field(where, row, metric)
                    # a paper's distances are in pixels
                    line = dataset if metric in ("hd95", "nsd") else place
                    table.setdefault((line, metric), {})[label] = Cell(mean, mean, mean, "")
    return f"{plots.DAGGER.strip()} {field(file, paper, 'source', kind=str, words='a text')}"


def head_text(label, trained):
    """Return a column's head: "dense vl 64 (2.97 M)"; the number is left out if it is 0 or unknown."""
    if not trained:
        return label
    return f"{label} ({trained / 1e3:.3g} k)" if trained < 1e6 else f"{label} ({trained / 1e6:.3g} M)"


def table_rows(table, trained):
    """Return rows of texts, the head first; our best figures are bold, unknown ones empty."""
    labels = sorted(trained, key=lambda label: (trained[label] is None, trained[label], label))
    rows = [["data set", "metric", *(head_text(label, trained[label]) for label in labels)]]
    for (dataset, metric), cells in table.items():
        title, _, better = ROWS[metric]
        ours = [cell.mean for label, cell in cells.items() if not label.endswith(plots.DAGGER)]
        best = f"{better(ours, default=0):.2f}"
        row = [dataset, title.replace("px", "mm") if IN_MM in dataset else title]
        for label in labels:
            text = ""
            if label in cells:
                text = f"{cells[label].mean:.2f}"
                if text == best and not label.endswith(plots.DAGGER):
                    text = BOLD + text + PLAIN
                text += cells[label].spread
            row.append(text)
        rows.append(row)
    return rows


def main(argv=None):
    parser = Parser(
        __doc__,
        "examples:\n  python -m vlsm.tools.report runs\n"
        "  python -m vlsm.tools.report runs --published vlsm-adapter\n"
        "  python -m vlsm.tools.report runs --split val --format tex --out tables --figure-format pdf",
        prog="python -m vlsm.tools.report",
    )
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs", help="folder of evaluated runs (default: runs)"
    )
    parser.add_argument("--split", default="test", choices=["train", "val", "test"], help="default: test")
    parser.add_argument("--format", default="md", choices=["md", "csv", "tex"], help="default: md")
    parser.add_argument(
        "--published",
        metavar="NAME",
        help="a paper's figures beside ours: vlsm-adapter, tunevlseg, another file of vlsm/tools/published, "
        "or FILE.json in their form",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: that of the runs)")
    parser.add_argument(
        "--figure-format", default="png", choices=["png", "pdf", "svg"], help="of the charts (default: png)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that this program did not write"
    )
    args = parser.parse_args(argv)
    groups, trained = group_seeds(collect(args.folder, args.split))
    table = tabulate(groups)
    sources = [add_published(table, trained, args.published)] if args.published else []
    dsc = {dataset: cells for (dataset, metric), cells in table.items() if metric == "dsc"}
    text = format_rows(table_rows(table, trained), args.format, [KEY, *sources])
    files = [
        Path(args.out or args.folder, name)
        for name in (f"report.{args.format}", f"dsc.{args.figure_format}", f"parameters.{args.figure_format}")
    ]
    check_targets(files, overwrite=args.overwrite)
    write_text(files[0], text)
    with owned_write(files[1]) as temporary:
        plots.bars(dsc, temporary, args.figure_format)
    with owned_write(files[2]) as temporary:
        plots.against_parameters(trained, dsc, temporary, args.figure_format)
    evaluations = {run.file for runs in groups.values() for run in runs.values()}
    say(f"{text}\n{len(evaluations)} evaluations. Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    with friendly_errors():
        main()
