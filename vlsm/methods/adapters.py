"""Adapters: dense, before residual additions of an encoder's blocks; shallow, on the decoder's input.

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
        """Return Eq. 1 of x `[..., d]`, plus `residual` if it is given."""
        down, up = self.down, self.up
        return kernels.adapter_bottleneck(x, residual, down.weight, down.bias, up.weight, up.bias)


def check_branches(branches, known, method=""):
    """Raise ValueError unless `branches` are some of the letters `known`, each once."""
    unknown = set(branches) - set(known)
    repeated = len(set(branches)) < len(branches)
    if not branches or unknown or repeated:
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


class Adapters(Tuner):
    """Base of dense and shallow adapters: `vision` and `text`, adapters by the name of their layer; `cond`.

    branches: "v" (vision encoder), "l" (language encoder), "c" (conditional embedding).
    """

    def __init__(self, config, branches="vl", reference=False):
        super().__init__(config, reference)
        check_branches(branches, "vlc")
        self.vision = nn.ModuleDict()
        self.text = nn.ModuleDict()

    def adapt_conditional(self, cond, states):
        return self.cond(cond) if hasattr(self, "cond") else cond  # [B, P]


class DenseAdapters(Adapters):
    """Adapters before both residual additions of blocks: of every one below the deepest extract layer (9 of
    12), unless `blocks` says otherwise.

    dim: an adapter's width. dims: its width in each block instead.
    """

    adapter_class = Adapter

    def __init__(self, config, branches="vl", dim=64, dims=None, blocks=None, reference=False):
        super().__init__(config, branches, reference)
        vision, text = config.vision, config.text
        if "v" in branches:
            count = max(config.extract_layers) + 1  # deeper blocks do not reach the logits
            chosen = choose_blocks(blocks, "v", self.default_blocks("v", config), count)
            self.vision = self.adapters(vision.hidden_size, chosen, self.widths("v", len(chosen), dim, dims))
        if "l" in branches:
            chosen = choose_blocks(blocks, "l", self.default_blocks("l", config), text.num_hidden_layers)
            self.text = self.adapters(text.hidden_size, chosen, self.widths("l", len(chosen), dim, dims))
        if "c" in branches:
            self.cond = self.adapter_class(config.projection_dim, self.cond_width(dim))

    def default_blocks(self, encoder, config):
        """Return the range of blocks of an encoder ("v" or "l") that have adapters."""
        layers = (config.vision if encoder == "v" else config.text).num_hidden_layers
        return range(min(max(config.extract_layers), layers))

    def cond_width(self, dim):
        """Return the width of the adapter on the conditional embedding."""
        return COND_DIM

    def widths(self, encoder, count, dim, dims):
        """Return the width in each of `count` blocks. Raises ValueError for another number of `dims`."""
        if dims is None:
            return [dim] * count
        if len(dims) != count:
            raise ValueError(
                f"--dims gives {len(dims)} widths, and the {BRANCHES[encoder]} encoder has adapters in "
                f"{count} blocks: one width a block."
            )
        return list(dims)

    def adapters(self, d, blocks, widths):
        """Return two adapters for each block of an encoder of width d."""
        adapters = nn.ModuleDict()
        for i, dim in zip(blocks, widths):
            check_width(dim)
            pair = dict(attn=self.adapter_class(d, dim), mlp=self.adapter_class(d, dim))
            adapters[str(i)] = nn.ModuleDict(pair)
        return adapters

    def residual_ops(self, encoder, layer):
        adapters = self.vision if encoder == "vision" else self.text
        if str(layer) not in adapters:
            return super().residual_ops(encoder, layer)
        pair = adapters[str(layer)]
        return pair["attn"], pair["mlp"]


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
            count = config.pooled_states or 1
            self.text = self.adapters([config.projection_dim] * count, dim)
        if "v" in branches:
            self.vision = self.adapters(config.activation_widths, dim)
        if "c" in branches:
            self.cond = Adapter(config.projection_dim, COND_DIM)

    @staticmethod
    def check_text(config):
        """Raise ValueError if text states cannot be added to the conditional embedding."""
        width = config.text.hidden_size
        layers = config.text.num_hidden_layers
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
        if not self.text:
            return cond
        if not states:  # SAM 3: `cond` are the prompt's tokens
            return self.text["0"](cond)  # [B, T, P]
        adapted = [self.text[str(k)](state) for k, state in enumerate(states)]
        return cond + torch.stack(adapted).sum(0)  # [B, P]
