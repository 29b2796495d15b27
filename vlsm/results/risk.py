"""A threshold with a guarantee: the expected share of missed foreground stays below a level.

Source: Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control" (ICLR 2024), section 2.
"""

import numpy as np
import torch

from vlsm import metrics
from vlsm.results.evaluation import measure_records
from vlsm.results.intervals import bootstrap_intervals, group_names, in_brackets
from vlsm.results.predict import logits_at_size

THRESHOLDS = np.arange(1, 1000) / 1000


def missed_shares(predictor, data, prompts, options):
    """Return the share of each record's true pixels below each of `THRESHOLDS`, `[n, 999]`.

    Records whose truth is empty have nothing to miss and are left out.
    """

    def missed(i, text, logits, truth):
        if not truth.any():
            return None
        probability = logits_at_size(logits, truth.shape).sigmoid()[truth].double().sort().values
        below = torch.searchsorted(probability, torch.tensor(THRESHOLDS, device=truth.device))
        return (below / len(probability)).cpu().numpy()

    rows = measure_records(predictor, data, prompts, options.batch_size, missed)
    return np.array(rows).reshape(-1, len(THRESHOLDS))


def fit_threshold(missed, level):
    """Return the largest of `THRESHOLDS` at which the expected share of a new record is at most `level`.

    missed: `[n, 999]`, of records that are exchangeable with the new one. A share is at most 1, so that
    (sum + 1) / (n + 1) bounds its expectation. Raises ValueError where no threshold does, with what would.
    """
    n = len(missed)
    fitting = np.flatnonzero((missed.sum(0) + 1) / (n + 1) <= level)
    if not len(fitting):
        least = ((missed[:, 0].sum() if n else 0) + 1) / (n + 1)
        raise ValueError(
            f"--risk fn {level}: {n} records with foreground allow no level below {least:.3f}. Hold back "
            "more validation records, or ask for less."
        )
    return float(THRESHOLDS[fitting[-1]])


def effect(predictor, data, prompts, options, threshold, group=None):
    """Return what a threshold does to the records of a split, beside the usual 0.5, with 95 % intervals."""
    groups = group_names(data.records, group)

    def measure(i, text, logits, truth):
        probability, row = logits_at_size(logits, truth.shape).sigmoid(), {}
        for name, cut in (("dsc_at_half", 0.5), ("dsc", threshold)):
            mask = probability >= cut
            row[name] = metrics.dsc(mask[None], truth[None]).item()
        row["missed"] = 1 - (mask & truth).sum().item() / truth.sum().item() if truth.any() else np.nan
        return groups[i], row

    found = measure_records(predictor, data, prompts, options.batch_size, measure)
    values = {name: [row[name] for _, row in found] for name in ("missed", "dsc", "dsc_at_half")}
    ends = bootstrap_intervals(values, [name for name, _ in found])
    return {
        name: dict(mean=float(np.nanmean(v)), ci95=ends[name], n=int(np.isfinite(v).sum()))
        for name, v in values.items()
    }


def control(predictor, held_back, test, options, level, group=None):
    """Fit the threshold on a held-back split, and return what it is, promises and does to the test split.

    held_back, test: of each the `CachedSplit` and its records' prompts.
    """
    missed = missed_shares(predictor, *held_back, options)
    threshold = fit_threshold(missed, level)
    guarantee = (
        f"Of a new record with foreground, exchangeable with the {len(missed)} that the threshold was fitted "
        f"on, the expected share of missed foreground is at most {level:g}. Validation records that also "
        "chose the checkpoint are exchangeable with new ones only nearly."
    )
    test = effect(predictor, *test, options, threshold, group)
    fitted = dict(risk="fn", level=level, threshold=threshold, fitted_on=len(missed))
    return dict(**fitted, guarantee=guarantee, test=test)


def describe(found):
    """Return a fitted threshold in words."""

    def percent(name):
        s = found["test"][name]
        return f"{100 * s['mean']:.2f} {in_brackets(s['ci95'])}".rstrip()

    return (
        f"Threshold {found['threshold']:.3f} keeps the expected share of missed foreground below "
        f"{100 * found['level']:g} % (fitted on {found['fitted_on']} validation records).\n"
        f"Test: missed {percent('missed')} %, DSC {percent('dsc')} % (at 0.5: {percent('dsc_at_half')} %)\n"
        f"{found['guarantee']}"
    )
