"""What a run is worth elsewhere: DSC on its own data set and on others, and over shares of its records."""

import json
from collections import defaultdict

import numpy as np

from vlsm.results.report import format_rows
from vlsm.system import plots
from vlsm.system.files import owned_write

CHART = "shares"


def harmonic_mean(a, b):
    """Return the harmonic mean of two numbers, 0 where either is."""
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


def transfer_table(runs, kind="md"):
    """Return the table of runs that were evaluated on other data sets too: a row for each method and training
    set, DSC in % there, elsewhere and on average, and the harmonic mean of both; means over seeds.

    runs: as `report.collect(..., elsewhere=True)` returns them. Raises ValueError where none was evaluated
    elsewhere.
    """
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.scores["dsc"] is not None:
            found[run.own, run.label][run.dataset].append(100 * run.scores["dsc"])
    others = sorted({run.dataset for run in runs if run.dataset != run.own})
    if not others:
        raise ValueError(
            "No run here was evaluated on another data set than its own. Do so first: evaluate.py --ckpt RUN "
            "--dataset NAME."
        )
    rows = [["trained on", "method", "in-domain", *others, "out-of-domain", "harmonic mean"]]
    for (own, label), by_set in sorted(found.items()):
        means = {name: float(np.mean(values)) for name, values in by_set.items()}
        outside = [means[name] for name in others if name in means and name != own]
        inside, out = means.get(own), float(np.mean(outside)) if outside else None
        both = harmonic_mean(inside, out) if inside is not None and out is not None else None
        numbers = [inside, *(means.get(name) if name != own else None for name in others), out, both]
        rows.append([own, label, *("" if n is None else f"{n:.2f}" for n in numbers)])
    return format_rows(rows, kind)


def shares(runs):
    """Return {data set: {method: [(share of the training records in %, [DSC in % of each seed])]}} of runs
    that differ in nothing else; methods with one share alone are left out.
    """
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.dataset == run.own and run.scores["dsc"] is not None:
            share = 100 * json.loads(run.recipe).get("limit_train", 1.0)
            label = run.label.split(" (limit_train ")[0]
            found[run.dataset, label][share].append(100 * run.scores["dsc"])
    curves = defaultdict(dict)
    for (dataset, label), points in found.items():
        if len(points) > 1:
            curves[dataset][label] = sorted(points.items())
    return curves


def draw_shares(runs, folder, kind="png"):
    """Write the curve of DSC over shares of training records; returns its file, in a list if there is one."""
    curves = shares(runs)
    if not curves:
        return []
    file = folder / f"{CHART}.{kind}"
    with owned_write(file) as temporary:
        plots.lines(curves, "DSC in %", "training records in %", temporary, kind)
    return [file]
