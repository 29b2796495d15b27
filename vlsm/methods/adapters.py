"""Adapters: dense, before residual additions of an encoder's blocks; shallow, on the decoder's input.

Source: Dhakal et al., "VLSM-Adapter" (MICCAI 2024), Eq. 1 and Section 3.
"""

import torch
from torch import nn

import kernels
from vlsm.methods.branches import BRANCHES, check_branches, check_width, choose_blocks
from vlsm.networks.hooks import Tuner

COND_DIM = 256  # published width of the adapter on the conditional embedding, whatever `dim` is


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


class Adapters(Tuner):
    """Base of dense and shallow adapters.

    branches: any of "v" (vision encoder), "l" (language encoder), "c" (conditional embedding). Attributes:
    `vision` and `text`, adapters by the number of their layer, as text; `cond`, if "c" is chosen.
    """

    def __init__(self, config, branches="vl", reference=False):
        super().__init__(config, reference)
        check_branches(branches, "vlc")
        self.vision = nn.ModuleDict()
        self.text = nn.ModuleDict()

    def adapt_conditional(self, cond, states):
        return self.cond(cond) if hasattr(self, "cond") else cond  # [B, P]


class DenseAdapters(Adapters):
    """Adapters before both residual additions of a block.

    dim: an adapter's hidden width. dims: instead of `dim`, a width for each block. blocks: see
    `choose_blocks` (default: every block below the deepest extract layer, which are 9 of CLIPSeg's 12).
    """

    adapter_class = Adapter
    cond_dim = COND_DIM  # None: `dim`

    def __init__(self, config, branches="vl", dim=64, dims=None, blocks=None, reference=False):
        super().__init__(config, branches, reference)

        def pairs(letter, encoder, count):
            """Return a pair of adapters for each chosen block of an encoder's first `count`, by number."""
            layers = nn.ModuleDict()
            if letter in branches:
                chosen = choose_blocks(blocks, letter, self.default_blocks(letter, config), count)
                for i, width in zip(chosen, self.widths(letter, len(chosen), dim, dims)):
                    check_width(width)
                    pair = dict(
                        attn=self.adapter_class(encoder.hidden_size, width),
                        mlp=self.adapter_class(encoder.hidden_size, width),
                    )
                    layers[str(i)] = nn.ModuleDict(pair)
            return layers

        # deeper blocks of the vision encoder do not reach the logits
        self.vision = pairs("v", config.vision, max(config.extract_layers) + 1)
        self.text = pairs("l", config.text, config.text.num_hidden_layers)
        if "c" in branches:
            self.cond = self.adapter_class(config.projection_dim, self.cond_dim or dim)

    def default_blocks(self, encoder, config):
        """Return the range of blocks of an encoder ("v" or "l") that have adapters."""
        layers = (config.vision if encoder == "v" else config.text).num_hidden_layers
        return range(min(max(config.extract_layers), layers))

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

    def residual_ops(self, encoder, layer):
        adapters = self.vision if encoder == "vision" else self.text
        if str(layer) not in adapters:
            return super().residual_ops(encoder, layer)
        pair = adapters[str(layer)]
        return pair["attn"], pair["mlp"]


class ShallowAdapters(Adapters):
    """Adapters on the activations that the decoder reads, of hidden width `dim`.

    In the text branch they adapt the end-of-text token's states, and their sum is added to the conditional
    embedding. Where the decoder reads the prompt's tokens instead (SAM 3), one adapter acts on these.
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
        """Return an adapter of hidden width `dim` for inputs of each of some widths, keyed "0", "1", ..."""
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
