"""Which of a record's prompts is used."""

import re

import numpy as np

# What follows the class in MedVLSM's p1: "Myocardium of the heart."
PLACE = re.compile(
    r"\s+(in|of)\s+(the|a)\s+(heart|cardiac ultrasound|chest x-?ray|breast ultrasound image).*$", re.I
)


def choose_prompt(record, mode, *seed):
    """Return a prompt of a record; equal numbers `seed` draw equal prompts.

    mode: "random", a key drawn uniformly from all but the first (p0, the empty prompt), then one of its
    texts; "class", the class word; a key (p0..p9); any other text is itself the prompt. Raises ValueError if
    the record has no such prompt.
    """
    prompts = record.prompts
    rng = np.random.default_rng(seed)
    if mode == "class":
        if not record.class_word:
            raise ValueError(
                "--prompts class: these records have no class word (no prompt p1). Give the word itself: "
                '--prompts "polyp".'
            )
        return record.class_word
    if mode == "random":
        keys = list(prompts)[1:] or list(prompts)
        if not keys:
            raise ValueError(
                '--prompts random: these images came without prompts. Give one for all: --prompts "a polyp".'
            )
        key = keys[rng.integers(len(keys))]
    elif re.fullmatch(r"p\d+", mode):
        key = mode
        if key not in prompts:
            known = ", ".join(prompts) or "none"
            raise ValueError(
                f'--prompts {mode}: there is no such key. Known here: {known}; or "random", "class", or a '
                "text of your own."
            )
    else:
        return mode
    value = prompts[key]
    if isinstance(value, str):
        return value
    return value[rng.integers(len(value))]


def prompt_texts(record):
    """Return all texts of a record's prompts."""
    texts = []
    for value in record.prompts.values():
        if isinstance(value, str):
            texts.append(value)
        else:
            texts += value
    return texts


def class_word(prompts):
    """Return the class that p1 names, without its place ("Myocardium of the heart." -> "Myocardium"), or None
    without p1.
    """
    value = prompts.get("p1")
    if not value:
        return None
    text = value if isinstance(value, str) else value[0]
    return PLACE.sub("", text).strip(" .") or None
