"""Checks of where adapters and LoRA act: the options --branches, --blocks and --dim."""

import re

BRANCHES = dict(v="vision", l="language", c="conditional")
BLOCKS = re.compile(r"(?:([vl]):)?(\d{1,4})(?:-(\d{1,4}))?")  # "5", "5-8" or "v:5-8"


def check_branches(branches, known):
    """Raise ValueError unless `branches` are some of the letters `known`, each once."""
    unknown = set(branches) - set(known)
    repeated = len(set(branches)) < len(branches)
    if not branches or unknown or repeated:
        letters = ", ".join(f"{letter} ({BRANCHES[letter]})" for letter in known)
        raise ValueError(f"--branches '{branches}' is not known; give one or more of the letters {letters}.")


def check_width(dim):
    """Raise ValueError for a width that leaves an adapter, or LoRA's update, without a hidden unit."""
    if dim < 1:
        raise ValueError(
            f"--dim {dim} leaves an adapter without a hidden unit; give a width (of lora a rank) of 1 or "
            "more (the papers': 64 dense, 512 shallow, 16 lora)."
        )


def choose_blocks(blocks, encoder, default, count):
    """Return the range of an encoder's blocks in which a method acts.

    blocks: None; "5-8" (or "5"), for both encoders; or "v:5-8,l:9-11". encoder: "v" or "l". default: the
    range if `blocks` does not name the encoder. count: number of the encoder's first blocks that reach the
    logits. Raises ValueError for another form, and for blocks from `count` on.
    """
    named = {}
    for text in str(blocks).split(",") if blocks else []:
        match = BLOCKS.fullmatch(text)
        letters = match[1] or "vl" if match else ""
        if not match or set(letters) & set(named):
            raise ValueError(f"--blocks '{blocks}': give a range such as 5-8, or v:5-8,l:9-11.")
        for letter in letters:
            named[letter] = range(int(match[2]), int(match[3] or match[2]) + 1)
    chosen = named.get(encoder, default)
    if not chosen or chosen[-1] >= count:
        raise ValueError(
            f"--blocks '{blocks}': of the {BRANCHES[encoder]} encoder blocks 0 to {count - 1} reach the "
            "logits."
        )
    return chosen
