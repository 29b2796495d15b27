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
from vlsm.system.console import progress
from vlsm.system.files import write_csv, write_json

COLUMNS = ("image", "mask", "prompt", "dsc", "iou", "hd95")
# name -> how it is printed, the factor to that unit, what is better
METRICS = {"dsc": ("DSC %", 100, max), "iou": ("IoU %", 100, max), "hd95": ("HD95 px", 1, min)}


def score(pairs):
    """Return the scores of (prediction, truth) pairs of bool masks `[H, W]`, a dictionary for each."""
    predicted, truth = zip(*pairs)
    dsc, iou, hd95 = (m(predicted, truth).tolist() for m in (metrics.dsc, metrics.iou, metrics.hd95))
    return [
        dict(
            dsc=dsc[i],
            iou=iou[i],
            hd95=hd95[i],
            diagonal=math.hypot(*t.shape),
            target_empty=not t.any().item(),
            pred_empty=not p.any().item(),
        )
        for i, (p, t) in enumerate(pairs)
    ]


def summarise(scores):
    """Return the means over records of what `score` returned; see `metrics.summarise`."""
    names = ("dsc", "iou", "hd95", "diagonal", "target_empty", "pred_empty")
    return metrics.summarise(*([s[name] for s in scores] for name in names))


def write_results(out, scores, summary, about):
    """Write metrics.csv, a row a record, and metrics.json, the summary and `about`."""
    rows = [
        [s["image"], s["mask"], s["prompt"], f"{s['dsc']:.6f}", f"{s['iou']:.6f}", f"{s['hd95']:.4f}"]
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


def score_folders(pred, target):
    """Return the scores of two folders of masks, paired by stem.

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
        scores.append(dict(image="", mask=files[1].name, prompt="", **score([tuple(masks)])[0]))
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


def describe(summary):
    """Return the summary of one evaluation in words, DSC and IoU in per cent."""

    def line(name, s, factor, unit):
        return (
            f"{name:5} {factor * s['mean']:7.2f} +- {factor * s['std']:.2f} {unit}"
            if s["n"]
            else f"{name:5}     n/a"
        )

    h, empty, nonempty = summary["hd95"], summary["empty_correct"], summary["dsc_nonempty"]
    pairs = f"{h['n']}/{h['n'] + h['n_undefined']} pairs where it is defined"
    lines = [line("DSC", summary["dsc"], 100, "%"), line("IoU", summary["iou"], 100, "%")]
    lines.append(line("HD95", h, 1, f"px at original size, over {pairs}"))
    if h["n_undefined"]:
        what = f"px with the image's diagonal for the {h['n_undefined']} pairs with one empty mask"
        lines.append(f"      {h['mean_with_diagonal']:7.2f} {what}")
    if empty["n"]:
        share = f"{empty['n']} empty ones: {100 * empty['mean']:.1f} % predicted exactly empty"
        what = f"% over the {nonempty['n']} records whose truth is not empty; {share}"
        lines.append(line("DSC", nonempty, 100, what))
    return "\n".join(lines)
