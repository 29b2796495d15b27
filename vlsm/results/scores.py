"""Scores of predicted masks: of pairs, of two folders, and whether two runs differ.

Source of the test: Wilcoxon, "Individual Comparisons by Ranking Methods" (1945); zeros left out, normal
approximation with correction for ties.
"""

import math
from pathlib import Path

import numpy as np
import torch

from vlsm import metrics
from vlsm.data.images import image_files, read_mask
from vlsm.results.intervals import DRAWS, SEED, bootstrap_intervals, group_name, in_brackets
from vlsm.system.console import progress
from vlsm.system.files import write_csv, write_json

COLUMNS = ("image", "mask", "prompt", "dsc", "iou", "hd95", "nsd", "brier", "group")
# name -> how it is printed, the factor to that unit, what is better
METRICS = {
    "dsc": ("DSC %", 100, max), "iou": ("IoU %", 100, max), "hd95": ("HD95 px", 1, min),
    "nsd": ("NSD %", 100, max),
}  # fmt: skip
BINS = 15  # of probabilities, for the calibration error


def score(pairs, tolerance=2.0):
    """Return the scores of (prediction, truth) pairs of bool masks `[H, W]`, a dictionary for each.

    tolerance: of NSD, in pixels.
    """
    predicted, truth = zip(*pairs)
    dsc, iou, hd95 = (m(predicted, truth).tolist() for m in (metrics.dsc, metrics.iou, metrics.hd95))
    nsd = metrics.nsd(predicted, truth, tolerance).tolist()
    return [
        dict(
            dsc=dsc[i],
            iou=iou[i],
            hd95=hd95[i],
            nsd=nsd[i],
            diagonal=math.hypot(*t.shape),
            target_empty=not t.any().item(),
            pred_empty=not p.any().item(),
        )
        for i, (p, t) in enumerate(pairs)
    ]


def calibration_counts(probability, truth):
    """Return the Brier score of the foreground's probabilities `[H, W]`, and `bins` for the calibration
    error: of 15 equal ranges of probability the pixels, their summed probability, how many are true.
    """
    p, y = probability.double().flatten(), truth.flatten().double()
    which = (p * BINS).long().clamp(max=BINS - 1)
    sums = (torch.bincount(which, w, BINS).tolist() for w in (torch.ones_like(p), p, y))
    return dict(brier=(p - y).square().mean().item(), bins=list(sums))


def summarise(scores, about="image"):
    """Return the means over records of what `score` (and `calibration_counts`) returned, each with the 95 %
    interval `ci95`; see `metrics.summarise`.

    about: what a group of records is, for people. `ece` is the expected calibration error: the mean gap
    between probability and share of foreground, over all pixels in 15 equal ranges of probability.
    """
    names = ("dsc", "iou", "hd95", "diagonal", "target_empty", "pred_empty")
    others = {name: [s[name] for s in scores] for name in ("nsd", "brier") if name in scores[0]}
    summary = metrics.summarise(*([s[name] for s in scores] for name in names), **others)
    values = {name: [s[name] for s in scores] for name in ("dsc", "iou", "hd95", *others)}
    empty = np.array([s["target_empty"] for s in scores])
    values["dsc_nonempty"] = np.where(empty, np.nan, values["dsc"])
    values["empty_correct"] = np.where(empty, [s["pred_empty"] for s in scores], np.nan)
    groups = [s["group"] for s in scores] if "group" in scores[0] else None
    for name, ends in bootstrap_intervals(values, groups).items():
        summary[name]["ci95"] = ends
    n = len(set(groups)) if groups else len(scores)
    summary["intervals"] = dict(draws=DRAWS, seed=SEED, resampled=about, groups=n)
    if "bins" in scores[0]:
        count, probability, true = np.sum([s["bins"] for s in scores], 0)
        summary["ece"] = float(np.abs(probability - true).sum() / count.sum())
    return summary


def write_results(out, scores, summary, about):
    """Write metrics.csv, a row a record, and metrics.json, the summary and `about`."""
    digits = dict(dsc=6, iou=6, hd95=4, nsd=6, brier=6)
    rows = [
        [
            f"{s[name]:.{digits[name]}f}" if name in digits and name in s else s.get(name, "")
            for name in COLUMNS
        ]
        for s in scores
    ]
    write_csv(out / "metrics.csv", [COLUMNS, *rows])
    write_json(out / "metrics.json", {**summary, **about})


def _masks_by_stem(folder):
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder '{root}'.")
    found = {}
    for path in image_files(root):
        stem = path.relative_to(root).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"'{found[stem]}' and '{path}' share a stem, so they cannot be told apart.")
        found[stem] = path
    return found


def score_folders(pred, target, tolerance=2.0, group=None):
    """Return the scores of two folders of masks, paired by stem.

    tolerance: of NSD, in pixels. group: a pattern that finds a record's group in its mask's name.

    Raises FileNotFoundError or ValueError for masks without a partner, or of another size.
    """
    predicted, truths = _masks_by_stem(pred), _masks_by_stem(target)
    lone = sorted(set(predicted) ^ set(truths))
    if not predicted and not truths:
        raise ValueError("Both folders hold no masks.")
    if lone:
        raise ValueError(f"{len(lone)} masks have no partner in the other folder: {', '.join(lone[:5])}.")
    scores = []
    for stem in progress(truths, "scoring", "mask"):
        files = predicted[stem], truths[stem]
        masks = [torch.from_numpy(read_mask(file)) for file in files]
        if masks[0].shape != masks[1].shape:
            sizes = " and ".join(str(tuple(mask.shape)) for mask in masks)
            raise ValueError(f"'{files[0]}' and '{files[1]}' differ in size: {sizes} (height, width).")
        about = dict(image="", mask=files[1].name, group=group_name(stem, group), prompt="")
        scores.append({**about, **score([tuple(masks)], tolerance)[0]})
    return scores


def signed_rank(a, b):
    """Return the two-sided p of the paired scores a and b, and the number of pairs that differ.

    (1.0, 0) where none does. The normal approximation, without continuity correction; for fewer than ten
    differing pairs it is rough.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    d = d[d != 0]
    n = len(d)
    if not n:
        return 1.0, 0
    _, place, ties = np.unique(np.abs(d), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]  # equal sizes share their mean rank
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    z = (ranks[d > 0].sum() - n * (n + 1) / 4) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2)), n


def difference(a, b):
    """Return in words how the DSC of two runs' scores of the same records differ."""
    d = [x["dsc"] - y["dsc"] for x, y in zip(a, b)]
    ends = bootstrap_intervals({"dsc": d}, [s["group"] for s in a])["dsc"]
    p, n = signed_rank([s["dsc"] for s in a], [s["dsc"] for s in b])
    gap = f"{100 * np.mean(d):+.2f} {in_brackets(ends, sign='+')}".rstrip()
    return f"{gap} points, p = {p:.2g} (signed ranks of {n} pairs that differ)"


def describe(summary):
    """Return the summary of one evaluation in words, DSC and IoU in per cent."""

    def line(name, s, factor, unit):
        if not s["n"]:
            return f"{name:5}     n/a"
        mean = f"{factor * s['mean']:7.2f} {in_brackets(s.get('ci95'), factor)}".rstrip()
        return f"{name:5} {mean} +- {factor * s['std']:.2f} {unit}"

    h, empty, nonempty = summary["hd95"], summary["empty_correct"], summary["dsc_nonempty"]
    pairs = f"{h['n']}/{h['n'] + h['n_undefined']} pairs where it is defined"
    lines = [line("DSC", summary["dsc"], 100, "%"), line("IoU", summary["iou"], 100, "%")]
    if "nsd" in summary:
        lines.append(line("NSD", summary["nsd"], 100, f"% at {summary.get('nsd_tolerance', 2):g} px"))
    lines.append(line("HD95", h, 1, f"px at original size, over {pairs}"))
    if h["n_undefined"]:
        what = f"px with the image's diagonal for the {h['n_undefined']} pairs with one empty mask"
        lines.append(f"      {h['mean_with_diagonal']:7.2f} {what}")
    if empty["n"]:
        share = f"{empty['n']} empty ones: {100 * empty['mean']:.1f} % predicted exactly empty"
        what = f"% over the {nonempty['n']} records whose truth is not empty; {share}"
        lines.append(line("DSC", nonempty, 100, what))
    if "ece" in summary:
        brier, ece = summary["brier"]["mean"], summary["ece"]
        lines.append(f"Calibration: Brier score {brier:.4f}, expected calibration error {ece:.4f}")
    about = summary["intervals"]
    lines.append(
        f"[...]: 95 % bootstrap intervals, {about['groups']} groups ({about['resampled']}) drawn "
        f"{about['draws']:,} times"
    )
    return "\n".join(lines)
