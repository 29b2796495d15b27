"""Results of many runs as the papers print them: a table of data sets, metrics and methods, means over seeds, and two pictures."""

import csv
import io
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from . import pictures
from .checkpoint import read_metadata, replacing
from .weights import read_json

METRICS = {"dsc": ("DSC %", 100, max), "iou": ("IoU %", 100, max), "hd95": ("HD95 px", 1, min)}  # name, factor, what is better
THEIRS = " †"  # behind the method's name where a figure is a paper's
MODELS = {"clipseg": "", "cris": "CRIS ", "san": "SAN "}


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


@dataclass
class Cell:
    """A metric's mean over seeds, its standard deviation (of a sample; None for one seed), their number."""

    mean: float
    std: float | None
    seeds: int


def label_of(about):
    """A method and what tells it from its like: "dense vl 64", "coop J9", "CRIS full"."""
    options = about["options"]
    parts = [about["method"]] + [str(options[k]) for k in ("branches", "dim") if k in options]
    parts += [f"J{options['prompt_depth']}"] if "prompt_depth" in options else []
    return MODELS[about["model"]] + " ".join(parts) + " (published code)" * about["reference"]


def collect(root, split="test", say=print):
    """The `Run`s below a folder that were evaluated on a split. Raises ValueError where there are none."""
    root, found, left = Path(root), [], 0
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder '{root}'.")
    for file in sorted(root.rglob(f"eval-{split}/metrics.json")):
        folder = file.parents[1]
        if not (folder / "best.safetensors").is_file():
            continue
        about, metrics = read_metadata(folder), read_json(file)
        if "trained" not in metrics:  # of an older evaluate.py
            left += 1
            continue
        scores = {name: metrics[name]["mean"] for name in METRICS}
        recipe = dict(about["recipe"], weights=about["weights"], image_size=about["image_size"])
        seed, name = recipe.pop("seed"), Path(metrics["dataset"]).name
        found.append(Run(folder, name, label_of(about), json.dumps(recipe), seed, metrics["trained"], scores))
    if left:
        say(f"{left} evaluations were written by an older version and are left out; evaluate these runs again.")
    if not found:
        raise ValueError(f"Below '{root}' there is no run with eval-{split}/metrics.json. Evaluate the runs first: evaluate.py --ckpt RUN.")
    return _told_apart(found)


def _told_apart(runs):
    """Runs on one data set under one label whose recipes differ get what differs into their labels; of equal ones with one seed, the first
    alone counts.
    """
    recipes, out, seen = defaultdict(set), [], set()
    for run in runs:
        recipes[run.dataset, run.label].add(run.recipe)
    for run in runs:
        others = [json.loads(r) for r in recipes[run.dataset, run.label]]
        mine = json.loads(run.recipe)
        differ = [k for k in mine if len({json.dumps(o.get(k)) for o in others}) > 1]
        label = run.label + (f" ({', '.join(f'{k} {mine[k]}' for k in differ)})" if differ else "")
        key = run.dataset, label, run.seed
        if key not in seen:
            seen.add(key)
            out.append(Run(run.path, run.dataset, label, run.recipe, run.seed, run.trained, run.scores))
    return out


def tabulate(runs):
    """(data sets, labels by trained parameters, `{(data set, label, metric): Cell}`, `{label: trained}`)."""
    values, trained = defaultdict(list), {}
    for run in runs:
        trained[run.label] = run.trained
        for metric, value in run.scores.items():
            if value is not None:
                values[run.dataset, run.label, metric].append(value * METRICS[metric][1])
    cells = {}
    for key, numbers in values.items():
        n, mean = len(numbers), sum(numbers) / len(numbers)
        std = math.sqrt(sum((v - mean) ** 2 for v in numbers) / (n - 1)) if n > 1 else None
        cells[key] = Cell(mean, std, n)
    return list(dict.fromkeys(r.dataset for r in runs)), sorted(trained, key=lambda k: (trained[k], k)), cells, trained


def count(n):
    """A number of parameters for people: 20.0 k, 2.97 M."""
    return str(n) if n < 1000 else f"{n / 1e3:.3g} k" if n < 1e6 else f"{n / 1e6:.3g} M"


def published(file):
    """The cells, the methods' trained parameters and the source of a JSON file with a paper's figures.

    {"source": "...", "rows": [{"dataset": "kvasir", "method": "dense vl 64", "trained": 2974464, "dsc": ..., "dsc_std": ..., "iou":
    ..., "hd95": ...}, ...]}; DSC and IoU in per cent, what is not known left out. Raises ValueError for a file of another kind.
    """
    cells, trained = {}, {}
    found = read_json(file)
    if not isinstance(found.get("source"), str) or not isinstance(found.get("rows"), list):
        raise ValueError(f"'{file}' should hold a source (a text) and rows (a list).")
    for i, row in enumerate(found["rows"]):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("dataset", "method")):
            raise ValueError(f"'{file}', row {i}: dataset and method are texts, and one of them is missing.")
        label = row["method"] + THEIRS
        trained[label] = int(row.get("trained", 0))
        for metric in METRICS:
            if row.get(metric) is not None:
                cells[row["dataset"], label, metric] = Cell(float(row[metric]), row.get(f"{metric}_std"), 1)
    return cells, trained, found["source"]


def table(runs, kind="md", layout="datasets", papers=None):
    """The table as text: mean (and standard deviation over seeds), the best of ours in bold; what was not run is empty.

    kind: md, csv or tex. layout: "datasets", a row for each data set and metric, a column for each method with its trained parameters
    in the head (VLSM-Adapter's Table 1); "methods", the other way round, without HD95 (TuneVLSeg's way). papers: what `published`
    returns; these columns or rows are marked.
    """
    names, labels, cells, trained = tabulate(runs)
    best = {}
    for name in names:
        for metric, (_, _, better) in METRICS.items():
            present = [round(cells[name, label, metric].mean, 2) for label in labels if (name, label, metric) in cells]
            best[name, metric] = better(present, default=None)
    if papers:
        cells, trained = {**cells, **papers[0]}, {**trained, **papers[1]}
        labels = sorted(trained, key=lambda k: (trained[k], k))

    def show(name, label, metric):
        ours = None if label.endswith(THEIRS) else best[name, metric]
        return _cell(cells.get((name, label, metric)), ours, kind)

    if layout == "methods":
        columns = [(name, metric) for name in names for metric in ("dsc", "iou")]
        rows = [["method", "trained", *(f"{name} {METRICS[metric][0]}" for name, metric in columns)]]
        rows += [[label, count(trained[label]), *(show(name, label, metric) for name, metric in columns)] for label in labels]
    else:
        rows = [["data set", "metric", *(f"{label} ({count(trained[label])})" for label in labels)]]
        pairs = [(name, metric) for name in names for metric in METRICS]
        rows += [[name, METRICS[metric][0], *(show(name, label, metric) for label in labels)] for name, metric in pairs]
    return _format(rows, kind) + (f"\n{THEIRS.strip()} {papers[2]}\n" if papers and kind == "md" else "")


def _format(rows, kind):
    """Rows of texts, the first of which is the head, as markdown, CSV or LaTeX (booktabs)."""
    right = len(rows[0]) - 2
    if kind == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()
    if kind == "tex":
        signs = {"%": r"\%", "_": r"\_", THEIRS: r"$^\dagger$"}
        lines = [" & ".join(row) + r" \\" for row in rows]
        for sign, escaped in signs.items():
            lines = [line.replace(sign, escaped) for line in lines]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        return rf"\begin{{tabular}}{{ll{'r' * right}}}" + f"\n{body}\n" + r"\end{tabular}" + "\n"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- | --- |" + " ---: |" * right, *lines[1:]]) + "\n"


def _cell(cell, best, kind):
    if cell is None:
        return ""
    mean = f"{cell.mean:.2f}"
    if kind == "csv":
        return mean if cell.std is None else f"{mean} +- {cell.std:.2f}"
    spread = "" if cell.std is None else (rf" $\pm$ {cell.std:.2f}" if kind == "tex" else f" ± {cell.std:.2f}")
    if round(cell.mean, 2) == best:
        mean = rf"\textbf{{{mean}}}" if kind == "tex" else f"**{mean}**"
    return mean + spread


def draw(runs, folder):
    """Write dsc.png (bars by data set and method) and parameters.png (DSC against trained parameters) into a folder."""
    names, labels, cells, trained = tabulate(runs)
    folder = Path(folder)
    with replacing(folder / "dsc.png") as temporary:
        pictures.bars({name: {label: cells.get((name, label, "dsc")) for label in labels} for name in names}, "DSC in %", temporary)
    points = {name: [(label, cells.get((name, label, "dsc"))) for label in labels] for name in names}
    points = {name: [(trained[label], cell.mean, label) for label, cell in found if cell] for name, found in points.items()}
    with replacing(folder / "parameters.png") as temporary:
        pictures.against_parameters(points, temporary)
    return [folder / "dsc.png", folder / "parameters.png"]


def in_words(summary):
    """The summary of one evaluation in words, DSC and IoU in per cent."""

    def line(name, s, factor, unit):
        return f"{name:5} {factor * s['mean']:7.2f} +- {factor * s['std']:.2f} {unit}" if s["n"] else f"{name:5}     n/a"

    d, i, h = summary["dsc"], summary["iou"], summary["hd95"]
    total = h["n"] + h["n_undefined"]
    lines = [line("DSC", d, 100, "%"), line("IoU", i, 100, "%")]
    lines.append(line("HD95", h, 1, f"px at original size, over {h['n']}/{total} pairs where it is defined"))
    if h["n_undefined"]:
        lines.append(
            f"      {h['mean_with_diagonal']:7.2f} px with the image's diagonal for the {h['n_undefined']} pairs with one empty mask"
        )
    empty = summary["empty_correct"]
    if empty["n"]:
        share = f"{empty['n']} empty ones: {100 * empty['mean']:.1f} % predicted exactly empty"
        lines.append(
            line(
                "DSC", summary["dsc_nonempty"], 100, f"% over the {summary['dsc_nonempty']['n']} records whose truth is not empty; {share}"
            )
        )
    return "\n".join(lines)
