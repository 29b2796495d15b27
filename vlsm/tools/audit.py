"""Measure whether a run reads its prompt: DSC under right, paraphrased and wrong prompts.

Only records with foreground count. Writes audit.json into eval-SPLIT in the run's folder.
"""

import re

import numpy as np

from datasets import group_pattern, open_run_split
from vlsm import metrics
from vlsm.data.describe import COLOURS, NUMBERS
from vlsm.data.records import prompt_texts
from vlsm.results.evaluation import add_split_arguments, measure_prompts, results_folder
from vlsm.results.predict import load_predictor, masks_at_size
from vlsm.results.scores import bootstrap_intervals, group_names, in_brackets
from vlsm.segment import enlarge
from vlsm.system import parallel
from vlsm.system.arguments import Parser, add_machine_arguments
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import write_json

EXAMPLE = "example:\n  python -m vlsm.tools.audit runs/kvasir-dense-64-seed42 --split test"
CONDITIONS = ("right", "paraphrase", "swapped", "contradictory", "class word", "absent object", "nonsense")
# the first is taken whose last word is in no prompt; the embedded base was trained on the words of the first
ABSENT = ("a large green cross", "a bicycle", "a violin")
NONSENSE = "florp wexal quindle"
LEAST_LOSS = 0.05  # of DSC under a wrong prompt; a run that loses less does not depend on the text
OPPOSITES = {
    "left": "right",
    "right": "left",
    "top": "bottom",
    "bottom": "top",
    "center": "top left",
    "small": "large",
    "large": "small",
    "medium": "small",
    "round": "irregular",
    "irregular": "round",
    "circle": "irregular",
    "oval": "irregular",
}
for k, colour in enumerate(COLOURS):
    OPPOSITES[colour] = list(COLOURS)[(k + 3) % len(COLOURS)]
for k, number in enumerate(NUMBERS):
    OPPOSITES[number] = NUMBERS[k + 2] if k < 2 else "one"
ATTRIBUTES = re.compile(rf"\b({'|'.join(OPPOSITES)})\b", re.I)


def contradict(text):
    """Return a prompt with its colours, places, sizes, shapes and numbers exchanged; None if it has none."""
    changed = ATTRIBUTES.sub(lambda word: OPPOSITES[word[0].lower()], text)
    return None if changed == text else changed


def audit_prompts(records, right, seed=0):
    """Return {condition: a text for each record, or None} for `CONDITIONS`.

    right: the records' prompts. A paraphrase is another of the record's own texts; a swapped prompt is
    another record's right one. The absent object shares no word with any prompt of the data set.
    """
    rng = np.random.default_rng(seed)
    own_texts = list(map(prompt_texts, records))
    words = set()
    for text in sum(own_texts, list(right)):
        words.update(re.findall(r"\w+", text.casefold()))
    absent = next((text for text in ABSENT if text.split()[-1] not in words), None)

    def draw(texts, prompt):
        """Return one of the texts other than the prompt; None if there is none."""
        candidates = sorted({text for text in texts if text and text != prompt})
        return candidates[rng.integers(len(candidates))] if candidates else None

    rows = []
    right_texts = set(right)
    for record, texts, prompt in zip(records, own_texts, right):
        foreign = [text for text in right_texts if text not in texts]
        swapped = draw(foreign, prompt)  # before the paraphrase: a seed fixes the order of the draws
        paraphrase = draw(texts, prompt)
        wrong = contradict(prompt)
        rows.append((prompt, paraphrase, swapped, wrong, record.class_word, absent, NONSENSE))
    return dict(zip(CONDITIONS, map(list, zip(*rows))))


def audit(predictor, data, right, seed=0, group=None, upsample="logits", batch_size=32):
    """Return {condition: summary} over the n records whose truth is not empty.

    A summary holds the mean DSC under these prompts, its 95 % interval `ci95`, `foreground` (predicted pixels
    for each true one) and an example. right: the records' prompts. group: a pattern, as in `group_names`.
    """
    groups = group_names(data.records, group)

    def measure(i, prompt, logits, truth):
        truth = truth == 1
        if not truth.any():
            return None
        mask = masks_at_size(logits, enlarge(logits, truth.shape), upsample)[0]
        dsc = metrics.dsc(mask[None], truth[None]).item()
        return groups[i], prompt, dsc, mask.sum().item(), truth.sum().item()

    summaries = {}
    prompt_sets = audit_prompts(data.records, right, seed)
    for condition, rows in measure_prompts(predictor, data, prompt_sets, batch_size, measure).items():
        if not rows:
            continue
        names, texts, dsc, predicted, true = zip(*rows)
        summaries[condition] = dict(
            mean=np.mean(dsc),
            ci95=bootstrap_intervals({"dsc": dsc}, names)["dsc"],
            n=len(rows),
            foreground=sum(predicted) / sum(true),
            example=texts[0],
        )
    return summaries


def verdict(summaries):
    """Return in one sentence whether the run reads its prompt."""
    right = summaries["right"]["mean"]
    figures = []
    losses = {}
    for condition in ("swapped", "absent object", "right"):
        if condition in summaries:
            mean = summaries[condition]["mean"]
            figures.append(f"{condition} {100 * mean:.1f}")
            losses[condition] = right - mean
    figures = ", ".join(figures)
    if max(losses.values()) < LEAST_LOSS:
        return f"This run answers the image, not the text: {figures}."
    if losses.get("swapped", 1) < LEAST_LOSS:
        return f"This run reads which object is asked for, but not its attributes: {figures}."
    return f"This run reads its prompt: {figures}."


def describe(summaries):
    """Return the audit as a table and a sentence."""
    lines = [
        f"{'prompt':15}{'DSC %':>7}  {'95 % interval':16}{'foreground %':>13}{'records':>9}   an example"
    ]
    for condition, s in summaries.items():
        interval = in_brackets(s["ci95"])
        numbers = f"{100 * s['mean']:7.2f}  {interval:16}{100 * s['foreground']:13.1f}{s['n']:9}"
        lines.append(f"{condition:15}{numbers}   {s['example'][:60]}")
    return "\n".join([*lines, verdict(summaries)])


def main(argv=None):
    parser = Parser(__doc__, EXAMPLE, prog="python -m vlsm.tools.audit")
    parser.add_argument("run", help="run folder or checkpoint")
    add_split_arguments(parser)
    add_machine_arguments(parser)
    args = parser.parse_args(argv)

    predictor = load_predictor(args.run, args.weights, args.device, args.amp, args.kernels, args.compile)
    metadata = predictor.metadata
    data, texts = open_run_split(
        metadata, args.split, args.dataset, args.data_root, args.prompts, args.seed, args.cache_dir
    )
    seed = metadata["recipe"]["seed"] if args.seed is None else args.seed
    group, _ = group_pattern(args.dataset or metadata["dataset"], args.group)
    summaries = audit(predictor, data, texts, seed, group, args.upsample, args.batch_size)
    if not parallel.rank():
        file = results_folder(args.run, metadata, args.split, args.dataset) / "audit.json"
        write_json(file, dict(verdict=verdict(summaries), prompts=summaries))
        say(f"{describe(summaries)}\nWrote {file}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
