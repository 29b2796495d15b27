"""Rename tensors: from a published checkpoint's names to those of our modules, and back.

A network lists pairs of patterns, (published, ours), in which # stands for a number. Where a checkpoint has
the projections to q, k and v in one tensor, our pattern ends in `qkv_proj.`; the tensor is split in three.
"""

import re

import torch

STACKED = ".qkv_proj."
PROJECTION = re.compile(r"\.[qkv]_proj\.")
# of a block of OpenAI's CLIP
OPENAI_BLOCK = (
    ("resblocks.#.ln_1.", "resblocks.#.layer_norm1."),
    ("resblocks.#.ln_2.", "resblocks.#.layer_norm2."),
    ("resblocks.#.attn.in_proj_", "resblocks.#.self_attn.qkv_proj."),
    ("resblocks.#.attn.out_proj.", "resblocks.#.self_attn.out_proj."),
    ("resblocks.#.mlp.c_fc.", "resblocks.#.mlp.fc1."),
    ("resblocks.#.mlp.c_proj.", "resblocks.#.mlp.fc2."),
)


def replace(name, old, new):
    """Return a name with the pattern `old` replaced by `new`."""
    pattern = re.escape(old).replace(r"\#", r"(\d+)")
    return re.sub(pattern, new.replace("#", r"\1"), name)


def to_own(tensors, pairs):
    """Rename tensors to our names; those that have such a name already keep it."""
    renamed = {}
    for name, tensor in tensors.items():
        for published, ours in pairs:
            name = replace(name, published, ours)
        if STACKED in name:
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(STACKED, f".{letter}_proj.")] = third.clone()
        else:
            renamed[name] = tensor
    return renamed


def to_published(tensors, pairs):
    """Rename tensors to the published names: undo `to_own`. If q, k or v is missing, they are not stacked."""
    renamed = {}
    for name, tensor in tensors.items():
        stacked = _published_name(PROJECTION.sub(STACKED, name), pairs)
        qkv = [PROJECTION.sub(f".{letter}_proj.", name) for letter in "qkv"]
        # the checkpoint stacks them if a pair of patterns has replaced `qkv_proj.`
        is_stacked = PROJECTION.search(name) and STACKED not in stacked and set(qkv) <= set(tensors)
        if not is_stacked:
            renamed[_published_name(name, pairs)] = tensor
        elif name == qkv[0]:  # stacked at the place of q; k and v are skipped
            renamed[stacked] = torch.cat([tensors[part] for part in qkv])
    return renamed


def _published_name(name, pairs):
    for published, ours in pairs:
        name = replace(name, ours, published)
    return name
