"""Which of a record's prompts is used."""

import re

import numpy as np

# What follows the class in MedVLSM's p1: "Myocardium of the heart."
PLACE_SEEN = re.compile(
    r"\s+(in|of)\s+(the|a)\s+(heart|cardiac ultrasound|chest x-?ray|breast ultrasound image).*$", re.I
)


def select_prompt(prompts, mode, rng, class_word=None):
    """Return the text for a record with `prompts` (key -> text or list of texts).

    mode: "random", a key drawn uniformly from all but the first (p0, the empty prompt), then one of its
    texts; "class", the class word; a key (p0..p9); any other text is itself the prompt. rng: numpy Generator.
    Raises ValueError for a key that is not there.
    """
    if mode == "class":
        if not class_word:
            raise ValueError(
                "--prompts class: these records have no class word (no prompt p1). Give the word itself: "
                '--prompts "polyp".'
            )
        return class_word
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
    return value if isinstance(value, str) else value[rng.integers(len(value))]


def choose_prompt(record, mode, *seed):
    """Return the prompt of a record, drawn by the numbers `seed`: equal numbers give equal prompts at any
    time.
    """
    return select_prompt(record.prompts, mode, np.random.default_rng(seed), record.class_word)


def prompt_texts(record):
    """Return all texts of a record's prompts."""
    return [
        text for value in record.prompts.values() for text in ([value] if isinstance(value, str) else value)
    ]


def class_word(prompts):
    """Return what p1 names, without where it is seen: "Myocardium of the heart." -> "Myocardium"; None
    without p1.
    """
    value = prompts.get("p1")
    text = value if isinstance(value, str) or not value else value[0]
    return PLACE_SEEN.sub("", text).strip(" .") or None if text else None
