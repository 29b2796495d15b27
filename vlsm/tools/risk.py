"""Fit a threshold that keeps the expected false-negative rate (missed foreground) below a level.

It is fitted on the validation split, and its effect is measured on the test split. Writes risk.json into
eval-SPLIT in the run's folder. Source: Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control"
(ICLR 2024), section 2.
"""

import textwrap

import numpy as np
import torch

from datasets import open_run_split
from vlsm import metrics
from vlsm.data.records import group_names
from vlsm.results.evaluation import add_split_arguments, measure_prompts, results_folder
from vlsm.results.predict import BATCH_SIZE, load_predictor, logits_at_size
from vlsm.results.scores import mean_text, summarise_values
from vlsm.system import parallel
from vlsm.system.arguments import Parser, add_machine_arguments, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import write_json

EXAMPLES = """examples:
  python -m vlsm.tools.risk runs/kvasir-dense-64-seed42 fn 0.1
  python -m vlsm.tools.risk runs/kvasir-dense-64-seed42 fn 0.05 --dataset clinicdb
  python -m vlsm.tools.risk runs/my-folder-dense-seed42 fn 0.2 --prompts "a polyp" --device cpu"""
THRESHOLDS = np.arange(1, 1000) / 1000


def missed_shares(predictor, data, prompts, batch_size=BATCH_SIZE):
    """Return the share of each record's true pixels below each of `THRESHOLDS`, `[N, 999]`.

    Records whose truth is empty have nothing to miss and are left out.
    """

    def missed(_, i, prompt, logits, truth):
        truth = truth == 1
        if not truth.any():
            return None
        probability = logits_at_size(logits, truth.shape).sigmoid()
        of_truth = probability[truth].double().sort().values
        below = torch.searchsorted(of_truth, torch.tensor(THRESHOLDS, device=truth.device))
        return (below / len(of_truth)).cpu().numpy()

    rows = measure_prompts(predictor, data, {"": prompts}, batch_size, missed)[""]
    return np.array(rows).reshape(-1, len(THRESHOLDS))


def fit_threshold(missed, level):
    """Return the largest of `THRESHOLDS` at which the expected share of a new record is at most `level`.

    missed: `[N, 999]`, of records that are exchangeable with the new one. A share is at most 1, so that
    (sum + 1) / (N + 1) bounds its expectation. Raises ValueError, with the least level, if there is none.
    """
    bounds = (missed.sum(0) + 1) / (len(missed) + 1)
    suitable = np.flatnonzero(bounds <= level)
    if not len(suitable):
        raise ValueError(
            f"fn {level}: {len(missed)} records with foreground allow no level below {bounds[0]:.3f}. Hold "
            "back more validation records, or choose a higher level."
        )
    return float(THRESHOLDS[suitable[-1]])


def effect(predictor, data, prompts, threshold, group=None, batch_size=BATCH_SIZE):
    """Return {"missed", "dsc", "dsc_at_half": as in `summarise_values`} of a threshold, and the usual 0.5."""
    groups = group_names(data.records, group)

    def measure(_, i, prompt, logits, truth):
        truth = truth == 1
        probability = logits_at_size(logits, truth.shape).sigmoid()
        mask = probability >= threshold
        half = probability >= 0.5
        missed = 1 - mask[truth].double().mean().item()  # NaN if there is no foreground
        dsc, dsc_at_half = metrics.dsc([mask, half], [truth, truth]).tolist()
        return groups[i], missed, dsc, dsc_at_half

    rows = measure_prompts(predictor, data, {"": prompts}, batch_size, measure)[""]
    row_groups, missed, dsc, dsc_at_half = zip(*rows)
    return summarise_values(dict(missed=missed, dsc=dsc, dsc_at_half=dsc_at_half), row_groups)


def guarantee(level, n):
    """Return in words what a threshold that was fitted on n records guarantees."""
    return (
        f"Of a new record with foreground, exchangeable with the {n} that the threshold was fitted on, the "
        f"expected share of missed foreground is at most {level:g}. Validation records that also chose the "
        "checkpoint are exchangeable with new ones only nearly."
    )


def describe(result):
    """Return a fitted threshold in words."""
    percent = {name: mean_text(stats) for name, stats in result["test"].items()}
    return (
        f"Threshold {result['threshold']:.3f} keeps the expected share of missed foreground below "
        f"{100 * result['level']:g} %\n(validation records it is fitted on: {result['fitted_on']}).\n"
        f"Test: missed {percent['missed']} %, DSC {percent['dsc']} %\n"
        f"(DSC at 0.5: {percent['dsc_at_half']} %)\n"
        f"{textwrap.fill(result['guarantee'], 90)}"
    )


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.risk")
    parser.add_argument("run", help="run folder or checkpoint")
    parser.add_argument("risk", choices=["fn"], help="fn: the share of foreground that is missed")
    parser.add_argument("level", type=number(float, high=0.999, above=0), help="such as 0.1")
    add_split_arguments(parser)
    add_machine_arguments(parser)
    args = parser.parse_args(argv)
    if args.split == "val":
        raise ValueError("The threshold is fitted on the validation split; judge it on --split test.")

    predictor = load_predictor(args.run, args.weights, args.device, args.amp, args.kernels, args.compile)
    metadata = predictor.metadata
    where = (args.dataset, args.data_root, args.prompts, args.seed, args.cache_dir)
    held_back, held_back_texts = open_run_split(metadata, "val", *where)
    test, test_texts = open_run_split(metadata, args.split, *where)

    missed = missed_shares(predictor, held_back, held_back_texts, args.batch_size)
    threshold = fit_threshold(missed, args.level)
    result = dict(
        risk="fn",
        level=args.level,
        threshold=threshold,
        fitted_on=len(missed),
        guarantee=guarantee(args.level, len(missed)),
        test=effect(predictor, test, test_texts, threshold, args.group, args.batch_size),
    )
    if not parallel.rank():
        file = results_folder(args.run, metadata, args.split, args.dataset) / "risk.json"
        write_json(file, result)
        say(f"{describe(result)}\nWrote {file}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
