"""Measure whether a run listens to its prompt: its masks under right, paraphrased, wrong and absent prompts.

Absent words are whole words of the base's vocabulary that no prompt of the split uses and that training never
drew. DSC is over the records with foreground. Writes audit.json into eval-SPLIT in the run's folder.
"""

import re
import textwrap

import numpy as np

from datasets import open_run_split
from vlsm import metrics
from vlsm.data.describe import COLOURS, NUMBERS
from vlsm.data.negatives import ABSENT_SETS, absent_prompts, unused_words
from vlsm.data.records import group_names, prompt_texts
from vlsm.results.evaluation import add_split_arguments, measure_prompts, results_folder
from vlsm.results.predict import BATCH_SIZE, load_predictor, masks_at_size
from vlsm.results.scores import mean_text, summarise_values
from vlsm.segment import enlarge
from vlsm.system import parallel
from vlsm.system.arguments import Parser, add_machine_arguments
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import write_json

EXAMPLE = """examples:
  python -m vlsm.tools.audit runs/kvasir-dense-64-seed42
  python -m vlsm.tools.audit runs/kvasir-dense-64-seed42 --split val --device cpu
  python -m vlsm.tools.audit hub:owner/polyps --dataset my-folder"""
CONDITIONS = ("right", "paraphrase", "swapped", "contradictory", "class word", "nonsense")
NONSENSE = "florp wexal quindle"
MOST_ALARMS = 0.05  # share of false alarms up to which a run refuses what is not there
LEAST_LOSS = 0.05  # of DSC, below which nonsense scores like the right prompt
COLUMNS = 100  # of the lines of text
FEW = 30  # records below which a verdict is uncertain
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
OPPOSITE_WORD = re.compile(rf"\b({'|'.join(OPPOSITES)})\b", re.I)


def contradict(text):
    """Return a prompt with its colours, places, sizes, shapes and numbers exchanged; None if it has none."""
    changed = OPPOSITE_WORD.sub(lambda word: OPPOSITES[word[0].lower()], text)
    return None if changed == text else changed


def audit_prompts(records, right, words, seed=0):
    """Return {condition: a text for each record, or None} for `CONDITIONS` and `ABSENT_SETS`.

    right: the records' prompts. A paraphrase is another of the record's own texts; a swapped prompt is
    another record's right one. words: those that may be asked for.
    """
    rng = np.random.default_rng(seed)

    def draw(texts, prompt):
        """Return one of the texts other than the prompt; None if there is none."""
        candidates = sorted({text for text in texts if text and text != prompt})
        return candidates[rng.integers(len(candidates))] if candidates else None

    rows = []
    right_texts = set(right)
    for record, prompt in zip(records, right):
        texts = prompt_texts(record)
        foreign = [text for text in right_texts if text not in texts]
        swapped = draw(foreign, prompt)  # drawn first: another order would change the prompts of a seed
        paraphrase = draw(texts, prompt)
        rows.append((prompt, paraphrase, swapped, contradict(prompt), record.class_word, NONSENSE))
    return dict(zip(CONDITIONS, map(list, zip(*rows)))) | absent_prompts(records, right, words, seed)


def audit(predictor, data, right, seed=0, group=None, upsample="logits", batch_size=BATCH_SIZE):
    """Return {condition: summary} over the n records for which there is such a prompt.

    A summary holds the mean DSC where the truth is not empty, `alarms`, the share of images with a mask (as
    `metrics.is_alarm` says), their 95 % intervals and an example. right: the records' prompts. group: a
    pattern, as in `group_names`.
    """
    groups = group_names(data.records, group)

    def measure(_, i, prompt, logits, truth):
        mask = masks_at_size(logits, enlarge(logits, truth.shape), upsample)[0]
        predicted, truth = metrics.counted_pixels(mask, truth)
        dsc = metrics.dsc(predicted[None], truth[None]).item() if truth.any() else np.nan
        return groups[i], prompt, dsc, metrics.is_alarm(predicted[None]).item()

    summaries = {}
    words = unused_words(predictor.vocabulary(), data.records, right, held_out=True)
    prompt_sets = audit_prompts(data.records, right, words, seed)
    for condition, rows in measure_prompts(predictor, data, prompt_sets, batch_size, measure).items():
        if rows:
            names, texts, dsc, alarms = zip(*rows)
            stats = summarise_values(dict(dsc=dsc, alarms=alarms), names)
            summaries[condition] = dict(stats, n=len(rows), example=texts[0])
    return summaries


def verdict(summaries):
    """Return in one sentence whether the run listens to its prompt."""
    figures = []
    wrong = []
    for condition in ABSENT_SETS:
        if condition in summaries:
            share = summaries[condition]["alarms"]["mean"]
            figures.append(f"{condition} {100 * share:.1f} %")
            if share > MOST_ALARMS:
                wrong.append(condition)
    sentence = "This run listens: it refuses what is not there"
    if summaries["right"]["alarms"]["mean"] < 0.5:
        sentence = "This run mostly gives no mask for the right prompt, so that its refusals mean nothing"
    elif "absent word" in wrong:
        sentence = "This run gives a mask for a word of what is not there"
    elif wrong:
        sentence = f"This run refuses an absent word, but not an {' or an '.join(wrong)}"
    sentence += f" (images with a mask: {', '.join(figures)})"
    right = summaries["right"]["dsc"]["mean"]
    nonsense = summaries["nonsense"]["dsc"]["mean"]
    if right is not None and right - nonsense < LEAST_LOSS:
        sentence += (
            f"; nonsense scores like the right prompt (DSC {100 * nonsense:.1f} and {100 * right:.1f})"
        )
    n = summaries["right"]["n"]
    if n < FEW:
        sentence += f"; of {n} records alone, so this is uncertain"
    return sentence + "."


def describe(summaries):
    """Return the audit as a table and a sentence, in lines of at most `COLUMNS`."""
    lines = [f"{'prompt':26}{'DSC %':>24}{'images with a mask %':>24}{'records':>9}"]
    examples = ["Examples of these prompts:"]
    for condition, summary in summaries.items():
        dsc = mean_text(summary["dsc"])
        alarms = mean_text(summary["alarms"])
        lines.append(f"{condition:26}{dsc:>24}{alarms:>24}{summary['n']:9}")
        examples.append(textwrap.shorten(f"- {condition}: {summary['example']}", COLUMNS, placeholder=" ..."))
    return "\n".join([*lines, *examples, textwrap.fill(verdict(summaries), COLUMNS)])


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
    summaries = audit(predictor, data, texts, seed, args.group, args.upsample, args.batch_size)
    if not parallel.rank():
        file = results_folder(args.run, metadata, args.split, args.dataset) / "audit.json"
        write_json(file, dict(verdict=verdict(summaries), prompts=summaries))
        say(f"{describe(summaries)}\nWrote {file}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
