"""Does a run read its prompt? DSC under right, other and wrong ones, of the records that have foreground."""

import re

import numpy as np

from vlsm import metrics
from vlsm.data.describe import COLOURS, NUMBERS
from vlsm.data.prompts import prompt_texts
from vlsm.results.evaluation import measure_records
from vlsm.results.intervals import bootstrap_intervals, group_names, in_brackets
from vlsm.results.predict import mask_at_size
from vlsm.results.report import Cell
from vlsm.system import plots
from vlsm.system.console import say
from vlsm.system.files import owned_write, write_json

KINDS = ("right", "paraphrase", "swapped", "contradictory", "class word", "absent object", "nonsense")
ABSENT = ("a large green cross", "a bicycle", "a violin")  # the first has words that the embedded base knows
NONSENSE = "florp wexal quindle"
DEAF = 0.05  # a run whose DSC loses less by a wrong prompt does not read it
_COLOURS = list(COLOURS)
OPPOSITES = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top", "center": "top left",
    "small": "large", "large": "small", "medium": "small", "round": "irregular", "irregular": "round",
    "circle": "irregular", "oval": "irregular",
    **{word: _COLOURS[(k + 3) % len(_COLOURS)] for k, word in enumerate(_COLOURS)},
    **{word: NUMBERS[k + 2] if k < 2 else "one" for k, word in enumerate(NUMBERS)},
}  # fmt: skip
SAID = re.compile(rf"\b({'|'.join(OPPOSITES)})\b", re.I)


def contradict(text):
    """Return a prompt with its colours, places, sizes, shapes and numbers exchanged; None if it has none."""
    changed = SAID.sub(lambda word: OPPOSITES[word[0].lower()], text)
    return None if changed == text else changed


def audit_prompts(records, right, seed=0):
    """Return {kind: a text for each record, None where there is none} for `KINDS`.

    right: the records' prompts. A paraphrase is another of the record's own texts; a swapped prompt is
    another record's right one. The absent object shares no word with any prompt of the data set.
    """
    rng = np.random.default_rng(seed)
    own = [prompt_texts(r) for r in records]
    said = " ".join([*right, *(text for texts in own for text in texts)]).casefold()
    absent = next((a for a in ABSENT if not re.search(rf"\b{a.split()[-1]}\b", said)), None)

    def other(texts, than):
        fitting = sorted({text for text in texts if text and text != than})
        return fitting[rng.integers(len(fitting))] if fitting else None

    found = dict(zip(KINDS, ([] for _ in KINDS)))
    everywhere = sorted(set(right))
    for record, texts, text in zip(records, own, right):
        others = [t for t in everywhere if t not in texts]
        wrong = (other(others, text), contradict(text), record.class_word, absent, NONSENSE)
        for kind, prompt in zip(KINDS, (text, other(texts, text), *wrong)):
            found[kind].append(prompt)
    return found


def audit(predictor, data, right, options, seed=0, group=None):
    """Return {kind: summary}: DSC under each kind of prompt, its 95 % interval, an example.

    Over the records whose truth is not empty; `foreground`: the predicted pixels for each true one.
    """
    found, groups = {}, group_names(data.records, group)

    def measure(i, text, logits, truth):
        if not truth.any():
            return None
        mask = mask_at_size(logits, truth.shape, options.upsample)
        dsc = metrics.dsc(mask[None], truth[None]).item()
        return groups[i], text, dsc, mask.sum().item(), truth.sum().item()

    for kind, prompts in audit_prompts(data.records, right, seed).items():
        rows = measure_records(predictor, data, prompts, options.batch_size, measure)
        if rows:
            names, texts, dsc, predicted, true = zip(*rows)
            found[kind] = dict(
                mean=float(np.mean(dsc)), ci95=bootstrap_intervals({"dsc": dsc}, names)["dsc"], n=len(rows),
                foreground=sum(predicted) / sum(true), example=texts[0],
            )  # fmt: skip
    return found


def verdict(found):
    """Return in one sentence whether the run reads its prompt."""
    right = found["right"]["mean"]
    wrong = [kind for kind in ("swapped", "absent object") if kind in found]
    heard = [kind for kind in wrong if right - found[kind]["mean"] >= DEAF]
    figures = ", ".join(f"{kind} {100 * found[kind]['mean']:.1f}" for kind in [*wrong, "right"])
    if not heard:
        return f"This run answers the picture, not the text: {figures}."
    if "swapped" in found and "swapped" not in heard:
        return f"This run reads which object is asked for, but not its attributes: {figures}."
    return f"This run reads its prompt: {figures}."


def describe(found):
    """Return the audit as a table and a sentence."""
    lines = [
        f"{'prompt':15}{'DSC %':>7}  {'95 % interval':16}{'foreground %':>13}{'records':>9}   an example"
    ]
    for kind, s in found.items():
        numbers = (
            f"{100 * s['mean']:7.2f}  {in_brackets(s['ci95']):16}{100 * s['foreground']:13.1f}{s['n']:9}"
        )
        lines.append(f"{kind:15}{numbers}   {s['example'][:60]}")
    return "\n".join([*lines, verdict(found)])


def files(kind="png"):
    """Return the names of what `write` writes."""
    return ["audit.json", f"audit.{kind}"]


def write(found, folder, kind="png"):
    """Write audit.json and the chart of an audit, and print it."""
    data, chart = (folder / name for name in files(kind))
    write_json(data, dict(verdict=verdict(found), prompts=found))
    bars = {}
    for name, s in found.items():
        ends = s["ci95"] and [100 * end for end in s["ci95"]]
        bars[name] = {"DSC": Cell(100 * s["mean"], None, 1, ends)}
    with owned_write(chart) as temporary:
        plots.bars(bars, "DSC in % under each kind of prompt", temporary, kind)
    say(f"{describe(found)}\nWrote {data}, {chart}")
