"""Scores of predicted masks: of each pair, their means over a split with bootstrap intervals, their files."""

import csv
import math
from collections import defaultdict

import numpy as np
import torch

from vlsm import metrics
from vlsm.system.files import read_csv, write_csv, write_json
from vlsm.system.schema import NUMBER, OBJECT, check_fields, field, read_json

COLUMNS = ("image", "mask", "prompt", "dsc", "iou", "hd95", "nsd", "brier", "group", "class")
DIGITS = dict(dsc=6, iou=6, hd95=4, nsd=6, brier=6)  # in metrics.csv
# name -> title with unit, factor to that unit, which of two values is better
METRICS = {
    "dsc": ("DSC %", 100, max),
    "iou": ("IoU %", 100, max),
    "hd95": ("HD95 px", 1, min),
    "nsd": ("NSD %", 100, max),
}
NO_CLASS = "no class"  # stands for the class word of records without one
BINS = 15  # of probabilities, for the calibration error
RESULT_FILES = ("metrics.csv", "metrics.json")
# The schemas of metrics.json, of what it says of all records or of a class, and of a mean; see `check_fields`
EVALUATION = {
    "dataset": (str, "a name"), "ensemble?": ([str], "a list of checkpoints"), "classes?": OBJECT,
    "classes.each?": OBJECT,
}  # fmt: skip
SUMMARY = {"trained": (int, "a whole number"), "alarms?": OBJECT}
MEAN = {
    "": OBJECT, ".mean?": NUMBER, ".ci95?": ([(int, float)] * 2, "two numbers"),
}  # fmt: skip


def score(prediction, truth, tolerance=2.0, spacing=None):
    """Return the scores of a bool prediction `[H, W]` against its true mask, a dictionary.

    truth: bool, or uint8 with 255 where pixels are ignored. spacing: of rows and columns, in millimetres;
    then HD95, the `tolerance` of NSD and `diagonal`, the image's, are in millimetres, else in pixels.
    """
    prediction, truth = metrics.counted_pixels(prediction, truth)
    batch = prediction[None], truth[None]
    height, width = truth.shape
    row, column = spacing or (1, 1)
    return dict(
        dsc=metrics.dsc(*batch).item(),
        iou=metrics.iou(*batch).item(),
        hd95=metrics.hd95(*batch, spacing).item(),
        nsd=metrics.nsd(*batch, tolerance, spacing).item(),
        diagonal=math.hypot(height * row, width * column),
        unit="mm" if spacing else "px",
        target_empty=not truth.any().item(),
        pred_empty=not prediction.any().item(),
    )


def summarise_values(values, groups):
    """Return {name: mean, std, n and `ci95`} of columns of numbers, NaN where there is none, for JSON.

    groups: as in `bootstrap_intervals`.
    """
    intervals = bootstrap_intervals(values, groups)
    return {name: dict(_mean_and_std(column), ci95=intervals[name]) for name, column in values.items()}


def summarise_label_maps(counts, words):
    """Return {"miou", "iou": {class: IoU}} of a confusion matrix `[C + 1, C + 1]`, as VOC does.

    words: of the C classes. The mean is over the background and all classes that any pixel is, or is
    predicted to be.
    """
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    iou = {}
    for word, intersection, union in zip(["background", *words], both.tolist(), either.tolist()):
        if union:
            iou[word] = intersection / union
    return dict(miou=sum(iou.values()) / len(iou), iou=iou)


def calibration_counts(probability, truth):
    """Return the Brier score of probabilities `[H, W]`, and `bins` for the calibration error.

    Pixels whose truth is 255 are left out. bins: for each of 15 equal ranges of probability the number of
    pixels, their summed probability, and how many are true.
    """
    counted = truth != metrics.IGNORED
    p = probability[counted].double()
    y = truth[counted].double()
    bin_of = (p * BINS).long().clamp(max=BINS - 1)
    bins = []
    for weights in (torch.ones_like(p), p, y):
        bins.append(torch.bincount(bin_of, weights, BINS).tolist())
    return dict(brier=(p - y).square().mean().item(), bins=bins)


def summarise(scores, resampled="image"):
    """Return the means over records of the dictionaries of `score` (and `calibration_counts`), for JSON.

    Each metric: mean, std (population), n, and `ci95`, the 95 % bootstrap interval; None if undefined. For
    hd95 n counts the defined pairs, `n_undefined` those with exactly one empty mask, and `mean_with_diagonal`
    puts the image's diagonal in their place; `unit`: px or mm. `dsc_nonempty`: over records whose truth is
    not empty. `empty_correct`: share of empty truths predicted exactly empty. `ece`: expected calibration
    error, the mean gap between probability and share of foreground over all pixels. resampled: what a group
    of the bootstrap is, in words. `classes`: as `summarise_classes`, where the records have several.
    """
    values = {name: _column(scores, name) for name in DIGITS if name in scores[0]}
    truth_empty = _column(scores, "target_empty") > 0
    values["dsc_nonempty"] = np.where(truth_empty, np.nan, values["dsc"])
    values["empty_correct"] = np.where(truth_empty, _column(scores, "pred_empty"), np.nan)
    groups = [s.get("group", i) for i, s in enumerate(scores)]

    summary = dict(unit=scores[0]["unit"], **summarise_values(values, groups))
    hd95 = values["hd95"]
    undefined = np.isnan(hd95)
    with_diagonal = np.where(undefined, _column(scores, "diagonal"), hd95)
    summary["hd95"]["n_undefined"] = int(undefined.sum())
    summary["hd95"]["mean_with_diagonal"] = with_diagonal.mean()
    summary["intervals"] = dict(draws=DRAWS, seed=SEED, resampled=resampled, groups=len(set(groups)))
    if "bins" in scores[0]:
        summary["ece"] = calibration_error([s["bins"] for s in scores])
    if len({s.get("class") for s in scores}) > 1:
        summary["classes"] = summarise_classes(scores, resampled)
    return summary


def summarise_classes(scores, resampled="image"):
    """Return {"each": {class word: summary of its records}, "mean": {metric: mean over classes}}, for JSON.

    A mean comes with std and n.
    """
    rows = defaultdict(list)
    for s in scores:
        rows[s["class"] or NO_CLASS].append(s)
    each = {word: summarise(rows[word], resampled) for word in sorted(rows)}
    means = {}
    for name in METRICS:
        means[name] = _mean_and_std([summary[name]["mean"] for summary in each.values()])
    return dict(each=each, mean=means)


def read_metrics(file):
    """Return the contents of a metrics.json, and {"": these, ": polyp": what they say of a class, for each}.

    Raises ValueError, which names file and key, for a value of another type.
    """
    metrics = read_json(file)
    check_fields(file, metrics, EVALUATION)
    summaries = {"": metrics}
    for word, summary in ((metrics.get("classes") or {}).get("each") or {}).items():
        field(file, metrics, "classes", "each", word, kind=dict, words="an object")
        summaries[f": {word}"] = dict(summary, trained=metrics.get("trained"), word=word)
    for suffix, summary in summaries.items():
        source = f"{file}{suffix}"
        check_fields(source, summary, SUMMARY)
        for place in (*METRICS, *(f"alarms.{name}" for name in summary.get("alarms") or ())):
            check_fields(source, summary, {f"{place}{key}": schema for key, schema in MEAN.items()})
    return metrics, summaries


def _column(scores, name):
    """Return one score of all records, float64 `[N]`."""
    return np.array([s[name] for s in scores], float)


def _mean_and_std(values):
    """Return mean, population standard deviation and number of the values `[N]` that are not NaN or None."""
    values = np.array(values, float)  # None becomes NaN
    defined = values[~np.isnan(values)]
    if not len(defined):
        return dict(mean=None, std=None, n=0)
    return dict(mean=defined.mean(), std=defined.std(), n=len(defined))


def calibration_error(bins):
    """Return the expected calibration error of the `bins` of several images."""
    count, probability, true = np.sum(bins, 0)
    return float(np.abs(probability - true).sum() / count.sum())


# In files and in words


def write_results(folder, scores, summary, settings):
    """Write metrics.csv, a row for each record, and metrics.json: summary and settings of the evaluation."""
    rows = [COLUMNS]
    for s in scores:
        row = {name: s.get(name, "") for name in COLUMNS}
        for name, digits in DIGITS.items():
            if name in s:
                row[name] = f"{s[name]:.{digits}f}"
        rows.append(row.values())
    write_csv(folder / "metrics.csv", rows)
    write_json(folder / "metrics.json", {**summary, **settings})


def describe(summary):
    """Return the summary of an evaluation as text; DSC, IoU and NSD in per cent, HD95 in its unit."""
    unit = summary["unit"]
    hd95 = summary["hd95"]
    undefined = hd95["n_undefined"]
    empty = summary["empty_correct"]
    tolerance = summary.get("nsd_tolerance", 2)
    pairs = f"{hd95['n']}/{hd95['n'] + undefined} pairs"
    lines = [
        _line("DSC", summary["dsc"], "%"),
        _line("IoU", summary["iou"], "%"),
        _line("NSD", summary["nsd"], f"% at {tolerance:g} {unit}"),
        _line("HD95", hd95, f"{unit} at original size, defined for {pairs}", 1),
    ]
    if undefined:
        lines.append(
            f"      {hd95['mean_with_diagonal']:7.2f} {unit} with the image's diagonal for the {undefined} "
            "pairs with one empty mask"
        )
    nonempty = summary["dsc_nonempty"]
    if empty["n"]:
        filled = 100 - 100 * empty["mean"]
        lines.append(f"Empty masks: {empty['n']}, foreground predicted in {filled:.1f} % of them")
        if nonempty["n"]:
            lines.append(_line("DSC", nonempty, f"% over masks that are not empty ({nonempty['n']})"))
    if "ece" in summary:
        lines.append(
            f"Calibration: Brier score {summary['brier']['mean']:.4f}, expected calibration error "
            f"{summary['ece']:.4f}"
        )
    intervals = summary["intervals"]
    lines.append(
        f"[...]: 95 % bootstrap intervals, groups ({intervals['resampled']}, {intervals['groups']} in all) "
        f"drawn {intervals['draws']:,} times"
    )
    if "classes" in summary:
        lines += describe_classes(summary["classes"], unit)
    if "label_maps" in summary:
        miou = 100 * summary["label_maps"]["miou"]
        lines.append(f"mIoU  {miou:7.2f} % of label maps, background included")
    alarms = summary.get("alarms", {})
    for name, rate in alarms.items():
        lines.append(f"False alarms {mean_text(rate)} % of prompts ({rate['n']}): {name}")
    if "absent word in the prompt" in alarms:
        lines.append("  (in the prompt: the record's own, with an absent word in place of its class)")
    return "\n".join(lines)


def describe_classes(classes, unit):
    """Return the lines of a table by class, of `summarise_classes`; in brackets the intervals."""
    widest = max(map(len, classes["each"]))
    head = " " * widest
    for name in METRICS:
        head += f"{metric_title(name, unit):>26}"
    lines = [head]
    for word, summary in [*classes["each"].items(), ("mean", classes["mean"])]:
        row = f"{word:{widest}}"
        for name, (_, factor, _) in METRICS.items():
            row += f"{mean_text(summary[name], factor):>26}"
        lines.append(row)
    return lines


def metric_title(name, unit):
    """Return a metric's title with its unit; unit: of distances, px or mm."""
    return METRICS[name][0].replace("px", unit)


def _line(title, stats, unit, factor=100):
    if not stats["n"]:
        return f"{title:5}     n/a"
    return f"{title:5} {mean_text(stats, factor, '7.2f')} +- {factor * stats['std']:.2f} {unit}"


def mean_text(stats, factor=100, form=".2f"):
    """Format a mean times a factor with its interval, "81.20 [78.30, 83.90]"; "n/a" if it is undefined."""
    if stats["mean"] is None:
        return "n/a"
    return f"{factor * stats['mean']:{form}} {in_brackets(stats.get('ci95'), factor)}".rstrip()


# Bootstrap intervals


DRAWS = 10_000
SEED = 0
CHUNK = 1 << 22  # numbers drawn at a time


def in_brackets(ends, factor=100, sign=""):
    """Format an interval times a factor, "[1.20, 3.40]"; "" for None. sign: "+" prints the sign always."""
    if ends is None:
        return ""
    low, high = ends
    return f"[{factor * low:{sign}.2f}, {factor * high:{sign}.2f}]"


def bootstrap_intervals(values, groups, draws=DRAWS, seed=SEED):
    """Return {name: [low, high]}, the 95 % bootstrap interval of each mean; None for fewer than two groups.

    values: {name: [N]}, NaN where a record has no value. groups: a name for each record; whole groups are
    drawn. A mean is the sum over the drawn groups' records by their number, so that large groups count more.
    """
    table = np.stack([np.asarray(column, float) for column in values.values()], 1)  # [N, M]
    unique, group_of = np.unique(groups, return_inverse=True)
    if len(unique) < 2:
        return dict.fromkeys(values)
    sums = np.zeros((len(unique), len(values)))
    counts = np.zeros_like(sums)
    np.add.at(sums, group_of, np.nan_to_num(table))
    np.add.at(counts, group_of, ~np.isnan(table))

    means = np.concatenate(list(_draw_means(sums, counts, draws, seed)))  # [draws, M]
    intervals = {}
    for k, name in enumerate(values):
        intervals[name] = None
        if counts[:, k].any():
            intervals[name] = np.nanpercentile(means[:, k], [2.5, 97.5]).tolist()
    return intervals


def _draw_means(sums, counts, draws, seed):
    """Yield the means `[n, M]` of chunks of draws; sums, counts: of each group's values, `[G, M]`."""
    rng = np.random.default_rng(seed)
    n_groups = len(sums)
    at_a_time = max(1, CHUNK // n_groups)
    for start in range(0, draws, at_a_time):
        n = min(at_a_time, draws - start)
        drawn = rng.integers(0, n_groups, (n, n_groups))
        drawn += n_groups * np.arange(n)[:, None]  # draw k counts in its own range of bins
        times = np.bincount(drawn.ravel(), minlength=n * n_groups)
        times = times.reshape(n, n_groups).astype(float)
        n_defined = times @ counts
        yield np.where(n_defined > 0, times @ sums / np.maximum(n_defined, 1), np.nan)


def mean_over_runs(folders, metric, word=None):
    """Return mean, std, n and `ci95` of a metric over records; a record's value is its mean over its runs.

    folders: each holds a run's metrics.csv, of the same records (seeds) or of others (folds); if one holds
    none, there are no values. word: class of the records that count; None: all.
    """
    files = [folder / "metrics.csv" for folder in folders]
    if not all(file.is_file() for file in files):
        files = []
    values = defaultdict(list)
    groups = {}
    for file in files:
        try:
            columns, *rows = read_csv(file)
            for row in (dict(zip(columns, cells)) for cells in rows):
                if word in (None, row.get("class") or NO_CLASS):
                    record = row["image"], row["mask"]
                    values[record].append(float(row[metric]))
                    groups[record] = row["group"]
        except (KeyError, ValueError, csv.Error) as error:
            raise ValueError(
                f"'{file}' is not as evaluate.py wrote it ({error!r}). Evaluate the run again."
            ) from error
    means = [np.mean(values[record]) for record in groups]  # nan if undefined for one
    return summarise_values({metric: means}, list(groups.values()))[metric]
