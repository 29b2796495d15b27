"""Which blocks matter: DSC of a run with the adapters (or LoRA) of one block switched off at a time."""

import re
from contextlib import contextmanager

import numpy as np
import torch

from vlsm import metrics
from vlsm.results.evaluation import measure_records
from vlsm.results.intervals import bootstrap_intervals, group_names, in_brackets
from vlsm.results.predict import mask_at_size

IN_BLOCK = re.compile(r"(?:^|\.)(vision|text)\.(\d+)\.(?:attn|mlp|[qkv]|out)\.")  # a tuned tensor's name


@contextmanager
def switched_off(tuner, encoder, block):
    """Let the tuner change nothing in a block while the context lasts: its tensors there are zero."""
    parameters = [p for name, p in tuner.named_parameters() if f".{encoder}.{block}." in f".{name}"]
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept):
                parameter.copy_(before)


def tuned_blocks(tuner):
    """Return (encoder, block) of each block in which a tuner has adapters or LoRA, in order."""
    found = (IN_BLOCK.search(name) for name, _ in tuner.named_parameters())
    return sorted({(m[1], int(m[2])) for m in found if m}, key=lambda at: (at[0] != "vision", at[1]))


def audit_blocks(predictor, data, prompts, options, group=None):
    """Return {"all": ..., "vision 0": ...}: DSC of the run, and of it with one block's adapters off.

    Each with the 95 % interval of what it loses. Raises ValueError for a run without adapters in blocks.
    """
    tuner = predictor.model.tuner
    blocks, groups = tuned_blocks(tuner), group_names(data.records, group)
    if not blocks:
        raise ValueError(
            "--audit-blocks is for runs with adapters or LoRA in blocks: dense, telescopic, lora."
        )

    def dsc(i, text, logits, truth):
        mask = mask_at_size(logits, truth.shape, options.upsample)
        return metrics.dsc(mask[None], truth[None]).item()

    def scores():
        return np.array(measure_records(predictor, data, prompts, options.batch_size, dsc))

    whole = scores()
    found = {"all": dict(mean=float(whole.mean()), lost=0.0, ci95=None)}
    for encoder, block in blocks:
        with switched_off(tuner, encoder, block):
            lost = whole - scores()
        ends = bootstrap_intervals({"lost": lost}, groups)["lost"]
        mean = float(whole.mean() - lost.mean())
        found[f"{encoder} {block}"] = dict(mean=mean, lost=float(lost.mean()), ci95=ends)
    return found


def describe_blocks(found):
    """Return the audit of blocks as a table."""
    lines = [f"{'without':12}{'DSC %':>7}{'lost':>8}  95 % interval"]
    for name, s in found.items():
        without, ends = "-" if name == "all" else name, in_brackets(s["ci95"])
        lines.append(f"{without:12}{100 * s['mean']:7.2f}{100 * s['lost']:8.2f}  {ends}")
    return "\n".join(lines)
