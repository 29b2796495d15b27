"""Results of many runs as the papers print them: data sets, metrics and methods, means over seeds."""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlsm.checkpoint import read_metadata
from vlsm.results.intervals import bootstrap_intervals, in_brackets
from vlsm.results.scores import METRICS
from vlsm.system import plots
from vlsm.system.console import say
from vlsm.system.files import csv_text, field, owned_write, read_json

PUBLISHED = Path(__file__).parent / "published"
CHARTS = ("dsc", "parameters")
THEIRS = " †"  # behind the method's name where a figure is a paper's
NETWORK_LABELS = {"clipseg": "", "cris": "CRIS ", "san": "SAN ", "sam3": "SAM3 "}


@dataclass(frozen=True)
class Run:
    """One evaluation of one run."""

    path: Path
    dataset: str
    label: str
    recipe: str
    seed: int
    trained: int
    scores: dict
    own: str = ""  # the data set that it was trained on
    records: dict | None = None  # (image, mask, group) -> the record's scores


@dataclass
class Cell:
    """A metric's mean over seeds, its standard deviation (of a sample; None for one seed), their number.

    ci95: the 95 % interval over records (of each the mean over seeds), None where they are not known.
    """

    mean: float
    std: float | None
    seeds: int
    ci95: tuple | None = None


def label_of(about):
    """Return a method and what tells it from its like: "dense vl 64", "coop J9", "CRIS full"."""
    options = about["options"]
    parts = [about["method"], *(str(options[k]) for k in ("branches", "dim") if k in options)]
    if "prompt_depth" in options:
        parts.append(f"J{options['prompt_depth']}")
    if about["reference"]:
        parts.append("(published code)")
    return NETWORK_LABELS[about["model"]] + " ".join(parts)


def _how(metrics):
    """Return what tells an evaluation from a plain one, for the label: " (mirrored, mean of 3)"."""
    members = metrics.get("ensemble") or []
    how = {"mirrored": metrics.get("mirror"), f"mean of {len(members)}": members}
    said = ", ".join(words for words, holds in how.items() if holds)
    return f" ({said})" if said else ""


def collect(root, split="test", elsewhere=False):
    """Return the `Run`s below a folder that were evaluated on a split.

    elsewhere: also their evaluations on other data sets than their own. Raises FileNotFoundError where there
    is no folder, ValueError where there are no runs.
    """
    root, found, outdated = Path(root), [], 0
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder '{root}'.")
    for file in sorted(root.rglob(f"eval-{split}*/metrics.json")):
        folder, metrics = file.parents[1], read_json(file)
        members = metrics.get("ensemble")
        if not (folder / "best.safetensors").is_file() and not members:
            continue
        about = read_metadata(members[0] if members else folder)
        if "trained" not in metrics:  # of an older evaluate.py
            outdated += 1
            continue
        scores = {name: _mean(file, metrics, name) for name in METRICS}
        base = dict(weights=about["weights"], image_size=about["image_size"])
        recipe = {"limit_train": 1.0, **about["recipe"], **base}
        seed = field(folder / "best.safetensors", recipe, "seed", kind=int, words="a whole number")
        del recipe["seed"]
        name = Path(field(file, metrics, "dataset", kind=str, words="a name")).name
        trained = field(file, metrics, "trained", kind=int, words="a whole number")
        own, label = Path(about["dataset"]).name, label_of(about) + _how(metrics)
        if elsewhere or name == own:
            records = _records(file.with_name("metrics.csv"))
            found.append(Run(folder, name, label, json.dumps(recipe), seed, trained, scores, own, records))
    if outdated:
        say(
            f"{outdated} evaluations were written by an older version and are left out; evaluate these runs "
            "again."
        )
    if not found:
        raise ValueError(
            f"Below '{root}' there is no run with eval-{split}/metrics.json. Evaluate the runs first: "
            "evaluate.py --ckpt RUN."
        )
    return _tell_apart(found)


def _records(file):
    """Return {(image, mask, group): {metric: value}} of a metrics.csv; None where it cannot be read so."""
    try:
        with open(file, encoding="utf-8", newline="") as text:
            rows = list(csv.DictReader(text))
        return {(r["image"], r["mask"], r["group"]): {name: float(r[name]) for name in METRICS} for r in rows}
    except (OSError, ValueError, KeyError, TypeError):  # of an older evaluate.py, or changed by hand
        return None


def _mean(file, metrics, name):
    """Return a metric's mean in a metrics.json, None where it is not defined. Raises ValueError."""
    if name == "nsd" and name not in metrics:  # of an older evaluate.py
        return None
    of = field(file, metrics, name, kind=dict, words="a summary")
    return None if of.get("mean") is None else field(file, metrics, name, "mean")


def _tell_apart(runs):
    """Put what differs between recipes into the labels of runs that share a data set and a label.

    Of runs that are equal in that and in their seed, the first alone counts.
    """
    recipes, found = defaultdict(set), {}
    for run in runs:
        recipes[run.dataset, run.label].add(run.recipe)
    for run in runs:
        own, others = json.loads(run.recipe), [json.loads(r) for r in recipes[run.dataset, run.label]]
        differing = [k for k in own if len({json.dumps(o.get(k)) for o in others}) > 1]
        told = f" ({', '.join(f'{k} {own[k]}' for k in differing)})" if differing else ""
        found.setdefault((run.dataset, run.label + told, run.seed), replace(run, label=run.label + told))
    return list(found.values())


def tabulate(runs):
    """Return (data sets, labels by trained parameters, {(data set, label, metric): Cell}, {label: n})."""
    values, trained, alike = defaultdict(list), {}, defaultdict(list)
    for run in runs:
        trained[run.label] = run.trained
        alike[run.dataset, run.label].append(run.records)
        for metric, value in run.scores.items():
            if value is not None:
                values[run.dataset, run.label, metric].append(value * METRICS[metric][1])
    cells, ends = {}, {key: _intervals(records) for key, records in alike.items()}
    for key, numbers in values.items():
        n, mean = len(numbers), sum(numbers) / len(numbers)
        std = math.sqrt(sum((v - mean) ** 2 for v in numbers) / (n - 1)) if n > 1 else None
        ci95, factor = ends[key[:2]].get(key[2]), METRICS[key[2]][1]
        cells[key] = Cell(mean, std, n, ci95 and tuple(factor * end for end in ci95))
    names = list(dict.fromkeys(r.dataset for r in runs))
    return names, sorted(trained, key=lambda k: (trained[k], k)), cells, trained


def _intervals(runs):
    """Return {metric: [low, high]} over records, of each the mean over the seeds' runs; {} where unknown."""
    if None in runs or any(run.keys() != runs[0].keys() for run in runs):
        return {}
    keys, found = list(runs[0]), {}
    # of a record that is undefined for one seed: undefined
    values = {name: np.mean([[run[key][name] for key in keys] for run in runs], 0) for name in METRICS}
    found = bootstrap_intervals(values, [group for *_, group in keys])
    return {name: ends for name, ends in found.items() if ends}


def short_count(n):
    """Return a number of parameters for people: 20.0 k, 2.97 M; of an unknown one (None) nothing."""
    if n is None:
        return ""
    return str(n) if n < 1000 else f"{n / 1e3:.3g} k" if n < 1e6 else f"{n / 1e6:.3g} M"


def published(name):
    """Return the cells, the methods' trained parameters and the source of a paper's figures.

    name: one of those in vlsm/results/published/ ("vlsm-adapter"), or a JSON file:
    {"source": "...", "rows": [{"dataset": "kvasir", "method": "dense vl 64", "trained": 2974464, "dsc": ...,
    "dsc_std": ..., "iou": ..., "hd95": ...}, ...]}; DSC and IoU in per cent, what is not known left out.
    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    own = {file.stem: file for file in sorted(PUBLISHED.glob("*.json"))}
    file = own.get(str(name), Path(name))
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}' with figures. The papers' are {', '.join(own)}.")
    cells, trained, found = {}, {}, read_json(file)
    keys = {"trained", *METRICS, *(f"{metric}_std" for metric in METRICS)}
    if not isinstance(found.get("source"), str) or not isinstance(found.get("rows"), list):
        raise ValueError(f"'{file}' should hold a source (a text) and rows (a list).")
    for i, row in enumerate(found["rows"]):
        where = f"{file}, row {i}"
        dataset, method = (field(where, row, key, kind=str, words="a text") for key in ("dataset", "method"))
        label = method + THEIRS
        known = {key: field(where, row, key) for key in row if key in keys and row[key] is not None}
        trained[label] = known.get("trained", trained.get(label))
        for metric in METRICS:
            if metric in known:
                cells[dataset, label, metric] = Cell(known[metric], known.get(f"{metric}_std"), 1)
    return cells, trained, found["source"]


def table(runs, kind="md", layout="datasets", papers=None):
    """Return the table as text: mean (and deviation over seeds), our best in bold; what was not run is empty.

    kind: md, csv or tex. layout: "datasets", a row for each data set and metric, a column for each method
    with its trained parameters in the head (VLSM-Adapter's Table 1); "methods", the other way round, without
    HD95 (TuneVLSeg's way). papers: what `published` returns; these columns or rows are marked.
    """
    names, labels, cells, trained = tabulate(runs)
    best = {}
    for name in names:
        for metric, (_, _, better) in METRICS.items():
            present = [round(cells[name, n, metric].mean, 2) for n in labels if (name, n, metric) in cells]
            best[name, metric] = better(present, default=None)
    if papers:
        cells, trained = {**cells, **papers[0]}, {**trained, **papers[1]}
        labels = sorted(trained, key=lambda k: (trained[k] is None, trained[k], k))

    def show(name, label, metric):
        ours = None if label.endswith(THEIRS) else best[name, metric]
        return _cell(cells.get((name, label, metric)), ours, kind)

    if layout == "methods":
        columns = [(name, metric) for name in names for metric in ("dsc", "iou")]
        rows = [["method", "trained", *(f"{name} {METRICS[metric][0]}" for name, metric in columns)]]
        rows += [[n, short_count(trained[n]), *(show(name, n, m) for name, m in columns)] for n in labels]
    else:
        counts = {label: f" ({short_count(n)})" if n is not None else "" for label, n in trained.items()}
        rows = [["data set", "metric", *(f"{label}{counts[label]}" for label in labels)]]
        known = {(name, metric) for name, _, metric in cells}
        pairs = [(name, metric) for name in names for metric in METRICS if (name, metric) in known]
        rows += [[name, METRICS[m][0], *(show(name, label, m) for label in labels)] for name, m in pairs]
    note = f"\n{THEIRS.strip()} {papers[2]}\n" if papers and kind == "md" else ""
    return format_rows(rows, kind) + note


def format_rows(rows, kind):
    """Format rows of texts, the first of which is the head, as markdown, CSV or LaTeX (booktabs)."""
    right = len(rows[0]) - 2
    if kind == "csv":
        return csv_text(rows)
    if kind == "tex":
        body = "\n".join(" & ".join(row) + r" \\" for row in rows)
        for sign, escaped in (("%", r"\%"), ("_", r"\_"), (THEIRS, r"$^\dagger$")):
            body = body.replace(sign, escaped)
        head, _, rest = body.partition("\n")
        begin, end = rf"\begin{{tabular}}{{ll{'r' * right}}}", r"\end{tabular}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", rest, r"\bottomrule", end, ""])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- | --- |" + " ---: |" * right, *lines[1:]]) + "\n"


def _cell(cell, best, kind):
    if cell is None:
        return ""
    mean = f"{cell.mean:.2f}"
    ends = f" {in_brackets(cell.ci95, 1)}".rstrip()
    sign = {"csv": " +- ", "tex": r" $\pm$ ", "md": " ± "}[kind]
    spread = ("" if cell.std is None else f"{sign}{cell.std:.2f}") + ends
    if kind == "csv":
        return mean + spread
    if round(cell.mean, 2) == best:
        mean = rf"\textbf{{{mean}}}" if kind == "tex" else f"**{mean}**"
    return mean + spread


def chart_files(folder, kind="png"):
    """Return the paths of the charts of a report."""
    return [Path(folder) / f"{name}.{kind}" for name in CHARTS]


def draw(runs, folder, kind="png"):
    """Write dsc (bars by data set and method) and parameters (DSC against trained parameters) as png, pdf or
    svg; returns the files.
    """
    names, labels, cells, trained = tabulate(runs)
    files = chart_files(folder, kind)
    dsc = {name: {label: cells.get((name, label, "dsc")) for label in labels} for name in names}
    with owned_write(files[0]) as temporary:
        plots.bars(dsc, "DSC in %", temporary, kind)
    points = {n: [(trained[label], c.mean, label) for label, c in row.items() if c] for n, row in dsc.items()}
    with owned_write(files[1]) as temporary:
        plots.against_parameters(points, temporary, kind)
    return files
