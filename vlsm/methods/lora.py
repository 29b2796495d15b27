"""LoRA: updates of low rank of attention's projections.

Source: Hu et al., "LoRA" (ICLR 2022).
"""

import torch
from torch import nn

from vlsm.methods.adapters import check_branches, choose_blocks
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
        check_branches(branches, "vl", "lora")
        if dim < 1:
            raise ValueError(f"--dim {dim} leaves an update without a rank; give 1 or more (default 16).")
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
