"""Adapters: dense, before residual additions of an encoder's blocks, and shallow, on what the decoder reads.

Source: Dhakal et al., "VLSM-Adapter" (MICCAI 2024), Eq. 1 and Section 3.
"""

import re

import torch
from torch import nn

import kernels
from vlsm.networks.hooks import Tuner

COND_DIM = 256  # width of the adapter on the conditional embedding, whatever `dim` is (as published)
BRANCHES = dict(v="vision", l="language", c="conditional")
BLOCKS = re.compile(r"(?:([vl]):)?(\d{1,4})(?:-(\d{1,4}))?")  # of --blocks


class Adapter(nn.Module):
    """A bottleneck from width `d` through `dim`, Eq. 1: x + relu(relu(x W1 + b1) W2 + b2).

    Both layers start as torch's `nn.Linear` does. Starting `up` at zero would be dead: the outer ReLU has
    derivative 0 there, so that neither layer would ever receive a gradient.
    """

    def __init__(self, d, dim):
        super().__init__()
        self.down = nn.Linear(d, dim)
        self.up = nn.Linear(dim, d)

    def forward(self, x, residual=None):
        """Return Eq. 1 of x `[..., d]`, plus `residual` where there is one."""
        down, up = self.down, self.up
        return kernels.adapter_bottleneck(x, residual, down.weight, down.bias, up.weight, up.bias)


def check_branches(branches, known, method=""):
    """Raise ValueError unless `branches` are some of the letters `known`, each once."""
    if not branches or set(branches) - set(known) or len(set(branches)) < len(branches):
        letters = ", ".join(f"{letter} ({BRANCHES[letter]})" for letter in known)
        owner = f" to {method}" if method else ""
        raise ValueError(
            f"--branches '{branches}' is not known{owner}; give one or more of the letters {letters}."
        )


def check_width(dim):
    """Raise ValueError for a width that leaves an adapter without a hidden unit."""
    if dim < 1:
        raise ValueError(
            f"--dim {dim} leaves an adapter without a hidden unit; give a width of 1 or more (the paper's: "
            "64 dense, 512 shallow)."
        )


def choose_blocks(blocks, encoder, default, count):
    """Return the blocks of an encoder on which a method acts.

    blocks: None; "5-8" (or "5"), of both encoders; or "v:5-8,l:9-11", where an encoder that is not named
    keeps its `default`, a range. encoder: "v" or "l". count: of the blocks that reach the logits. Raises
    ValueError for another form, and for blocks beyond them.
    """
    named = {}
    for part in filter(None, str(blocks or "").split(",")):
        match = BLOCKS.fullmatch(part)
        if not match or (match[1] or "vl") in named:
            raise ValueError(f"--blocks '{blocks}': give a range such as 5-8, or v:5-8,l:9-11.")
        low, high = int(match[2]), int(match[3] or match[2])
        named.update({letter: range(low, high + 1) for letter in match[1] or "vl"})
    chosen = named.get(encoder, default)
    if not chosen or chosen[-1] >= count:
        raise ValueError(
            f"--blocks '{blocks}': of the {BRANCHES[encoder]} encoder blocks 0 to {count - 1} reach the "
            "logits."
        )
    return chosen


class Adapters(Tuner):
    """What dense and shallow adapters share: `vision` and `text`, adapters by the name of their layer, and
    `cond`.

    branches: "v" (vision encoder), "l" (language encoder), "c" (conditional embedding).
    """

    def __init__(self, config, branches="vl", reference=False):
        super().__init__(config, reference)
        check_branches(branches, "vlc")
        self.vision, self.text = nn.ModuleDict(), nn.ModuleDict()

    def adapt_conditional(self, cond, states):
        return self.cond(cond) if hasattr(self, "cond") else cond


class DenseAdapters(Adapters):
    """Adapters before both residual additions of blocks: of every one below the deepest extract layer (9 of
    12), unless `blocks` says otherwise.

    dim: an adapter's width. dims: its width in each block instead.
    """

    kind = Adapter

    def __init__(self, config, branches="vl", dim=64, dims=None, blocks=None, reference=False):
        super().__init__(config, branches, reference)
        reach = max(config.extract_layers)
        vision, text = config.vision, config.text
        if "v" in branches:
            default, count = self.default_blocks("v", config), min(reach + 1, vision.num_hidden_layers)
            chosen = choose_blocks(blocks, "v", default, count)
            self.vision = self.adapters(vision.hidden_size, chosen, self.widths("v", len(chosen), dim, dims))
        if "l" in branches:
            chosen = choose_blocks(blocks, "l", self.default_blocks("l", config), text.num_hidden_layers)
            self.text = self.adapters(text.hidden_size, chosen, self.widths("l", len(chosen), dim, dims))
        if "c" in branches:
            self.cond = self.kind(config.projection_dim, self.cond_width(dim))

    def default_blocks(self, encoder, config):
        """Return the range of blocks of an encoder ("v" or "l") that have adapters."""
        layers = (config.vision if encoder == "v" else config.text).num_hidden_layers
        return range(min(max(config.extract_layers), layers))

    def cond_width(self, dim):
        """Return the width of the adapter on the conditional embedding."""
        return COND_DIM

    def widths(self, encoder, count, dim, dims):
        """Return the width in each of `count` blocks. Raises ValueError for another number of `dims`."""
        if dims is not None and len(dims) != count:
            raise ValueError(
                f"--dims gives {len(dims)} widths, and the {BRANCHES[encoder]} encoder has adapters in "
                f"{count} blocks: one width a block."
            )
        return [dim] * count if dims is None else list(dims)

    def adapters(self, d, blocks, widths):
        """Return two adapters for each block of an encoder of width d."""
        found = nn.ModuleDict()
        for i, dim in zip(blocks, widths):
            check_width(dim)
            found[str(i)] = nn.ModuleDict(dict(attn=self.kind(d, dim), mlp=self.kind(d, dim)))
        return found

    def residual_ops(self, encoder, layer):
        adapters = self.vision if encoder == "vision" else self.text
        if str(layer) not in adapters:
            return super().residual_ops(encoder, layer)
        return adapters[str(layer)]["attn"], adapters[str(layer)]["mlp"]


class ShallowAdapters(Adapters):
    """Adapters on the activations that the decoder reads.

    The text side's, of the end-of-text token's states, are added to the conditional embedding; where the
    decoder reads the prompt's tokens instead (SAM 3), one adapter acts on these.
    """

    def __init__(self, config, branches="vl", dim=512, reference=False):
        super().__init__(config, branches, reference)
        check_width(dim)
        if "l" in branches:
            if config.pooled_states:
                self.check_text(config)
            self.text = self.adapters([config.projection_dim] * (config.pooled_states or 1), dim)
        if "v" in branches:
            self.vision = self.adapters(config.activation_widths, dim)
        if "c" in branches:
            self.cond = Adapter(config.projection_dim, COND_DIM)

    @staticmethod
    def check_text(config):
        """Raise ValueError where text states cannot be added to the conditional embedding."""
        width, layers = config.text.hidden_size, config.text.num_hidden_layers
        if width != config.projection_dim:
            raise ValueError(
                f"Shallow adapters in the text branch add text states (width {width}) to the conditional "
                f"embedding (width {config.projection_dim}): this base's widths differ. Use --branches v, c "
                "or vc."
            )
        if max(config.extract_layers) >= layers:
            raise ValueError(
                f"Shallow adapters in the text branch read text layers {list(config.extract_layers)}, and "
                f"this base has {layers}. Use --branches v, c or vc."
            )

    @staticmethod
    def adapters(widths, dim):
        """Return an adapter for each of some widths, by their numbers."""
        return nn.ModuleDict({str(k): Adapter(d, dim) for k, d in enumerate(widths)})

    def adapt_activation(self, k, x):
        return self.vision[str(k)](x) if str(k) in self.vision else x

    def adapt_conditional(self, cond, states):
        cond = super().adapt_conditional(cond, states)
        if len(self.text) and states:
            cond = cond + torch.stack([self.text[str(k)](t) for k, t in enumerate(states)]).sum(0)
        elif len(self.text):
            cond = self.text["0"](cond)
        return cond
