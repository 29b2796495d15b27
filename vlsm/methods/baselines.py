"""Methods that are in neither of the two papers: LoRA, decoder and full fine-tuning, telescopic adapters.

Sources: Hu et al., "LoRA" (ICLR 2022); telescopic adapters: arXiv 2512.13855 (WACV 2026).
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.methods.adapters import DenseAdapters
from vlsm.methods.branches import check_branches, check_width, choose_blocks
from vlsm.networks.hooks import PROJECTIONS, Tuner


class LowRankDelta(nn.Module):
    """A change of rank `dim` of a projection d -> d: alpha / dim * up(down(x)).

    `up` starts at zero, so that nothing changes at first.
    """

    def __init__(self, d, dim, alpha):
        super().__init__()
        self.scale = alpha / dim
        self.down = nn.Linear(d, dim, bias=False)
        self.up = nn.Linear(dim, d, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.scale * self.up(self.down(x))

    def weight(self):
        """Return the change as a weight `[d, d]`."""
        return self.scale * self.up.weight @ self.down.weight


class LoRA(Tuner):
    """Low-rank changes of the attention projections of every block that the logits depend on."""

    def __init__(
        self, config, branches="vl", dim=16, lora_alpha=32.0, lora_targets=("q", "v"), blocks=None,
        reference=False,
    ):  # fmt: skip
        super().__init__(config, reference)
        check_branches(branches, "vl")
        check_width(dim)
        wrong = sorted(set(lora_targets) - set(PROJECTIONS))
        if wrong or not lora_targets:
            names = " ".join(wrong) or "without a name"
            raise ValueError(f"--lora-targets {names}: give one or more of {', '.join(PROJECTIONS)}.")
        targets = [target for target in PROJECTIONS if target in lora_targets]

        def deltas(letter, encoder, count):
            layers = nn.ModuleDict()
            if letter in branches:
                for i in choose_blocks(blocks, letter, range(count), count):
                    layers[str(i)] = nn.ModuleDict()
                    for target in targets:
                        layers[str(i)][target] = LowRankDelta(encoder.hidden_size, dim, lora_alpha)
            return layers

        self.vision = deltas("v", config.vision, max(config.extract_layers) + 1)
        self.text = deltas("l", config.text, config.text.num_hidden_layers)

    def lora_deltas(self, encoder, layer):
        deltas = self.vision if encoder == "vision" else self.text
        return deltas[str(layer)] if str(layer) in deltas else None

    @torch.no_grad()
    def merge_into(self, network):
        if self.upsampler is not None:
            super().merge_into(network)
        self._merge(self.vision, network.vision_blocks())
        self._merge(self.text, network.text_transformer().blocks)

    @staticmethod
    def _merge(layers, blocks):
        for i, deltas in layers.items():
            attention = blocks[int(i)].self_attn
            for target, delta in deltas.items():
                projection = getattr(attention, f"{target}_proj")
                projection.weight += delta.weight()


# The network's own weights


class DecoderTuner(Tuner):
    """Trains the network's decoder alone: the parameters after the encoders."""

    def trained_network_parameters(self, network):
        return network.decoder_names()


class FullTuner(DecoderTuner):
    """Trains all parameters of the network that reach the logits: its `full_tuning_names`."""

    def trained_network_parameters(self, network):
        return network.full_tuning_names()


# Telescopic adapters


class TelescopicAdapter(nn.Module):
    """x + scale * up(dropout(silu(norm(down(x))))), without biases; the learnt scale starts at 0.1."""

    def __init__(self, d, dim):
        super().__init__()
        self.down = nn.Linear(d, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, d, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x, residual=None):
        """Return the adapted x `[..., d]`, plus `residual` if it is given."""
        hidden = F.dropout(F.silu(self.norm(self.down(x))), 0.1, self.training)
        out = x + self.scale * self.up(hidden)
        return out if residual is None else out + residual


class TelescopicAdapters(DenseAdapters):
    """Dense adapters whose width grows with depth: in the vision encoder 8 to 32, in the last three text
    blocks and on the conditional embedding `dim`.

    dims: the widths of the vision blocks (default: the published nine; for another number of blocks each has
    the width at its relative depth).
    """

    adapter_class = TelescopicAdapter
    cond_dim = None
    WIDTHS = (8, 8, 10, 14, 17, 21, 24, 28, 32)

    def __init__(self, config, branches="vlc", dim=16, dims=None, blocks=None, reference=False):
        super().__init__(config, branches, dim, dims, blocks, reference)

    def default_blocks(self, encoder, config):
        if encoder == "v":
            return super().default_blocks(encoder, config)
        layers = config.text.num_hidden_layers
        return range(max(0, layers - 3), layers)

    def widths(self, encoder, count, dim, dims):
        if encoder == "l":
            return [dim] * count
        if not dims:
            step = (len(self.WIDTHS) - 1) / max(count - 1, 1)
            dims = [self.WIDTHS[round(k * step)] for k in range(count)]
        return super().widths(encoder, count, dim, dims)
