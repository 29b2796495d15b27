"""Adapters, LoRA, and the methods that train the network's own weights: decoder and full.

Sources: adapters: Dhakal et al., "VLSM-Adapter" (MICCAI 2024), Eq. 1 and Section 3; LoRA: Hu et al. (ICLR
2022).
"""

import torch
from torch import nn

import kernels
from vlsm.networks.hooks import PROJECTIONS, Tuner

COND_DIM = 256  # width of the adapter on the conditional embedding, whatever `dim` is (as published)
BRANCHES = dict(v="vision", l="language", c="conditional")


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


class Adapters(Tuner):
    """What dense and shallow adapters share.

    branches: "v" (vision encoder), "l" (language encoder), "c" (conditional embedding). dim: an adapter's
    width.
    """

    def __init__(self, config, branches="vl", dim=64, reference=False):
        super().__init__(config, reference)
        check_branches(branches, "vlc")
        if dim < 1:
            raise ValueError(
                f"--dim {dim} leaves an adapter without a hidden unit; give a width of 1 or more (the "
                "paper's: 64 dense, 512 shallow)."
            )
        vision = self.encoder_adapters(config.vision, config, dim) if "v" in branches else {}
        text = self.encoder_adapters(config.text, config, dim) if "l" in branches else {}
        self.vision, self.text = nn.ModuleDict(vision), nn.ModuleDict(text)
        if "c" in branches:
            self.cond = Adapter(config.projection_dim, COND_DIM)

    def encoder_adapters(self, encoder, config, dim):
        """Return the adapters of one encoder (its `EncoderConfig`), by the name of their layer."""
        raise NotImplementedError

    def adapt_conditional(self, cond, states):
        return self.cond(cond) if hasattr(self, "cond") else cond


class DenseAdapters(Adapters):
    """Adapters before both residual additions of every block below the deepest extract layer (9 of 12
    blocks).
    """

    def encoder_adapters(self, encoder, config, dim):
        count, d = min(max(config.extract_layers), encoder.num_hidden_layers), encoder.hidden_size
        return {str(i): nn.ModuleDict(dict(attn=Adapter(d, dim), mlp=Adapter(d, dim))) for i in range(count)}

    def residual_ops(self, encoder, layer):
        adapters = self.vision if encoder == "vision" else self.text
        if str(layer) not in adapters:
            return super().residual_ops(encoder, layer)
        return adapters[str(layer)]["attn"], adapters[str(layer)]["mlp"]


class ShallowAdapters(Adapters):
    """Adapters on the extracted activations.

    The text side's, of the end-of-text token's states, are added to the conditional embedding.
    """

    def __init__(self, config, branches="vl", dim=512, reference=False):
        if "l" in branches:
            self.check_text(config)
        super().__init__(config, branches, dim, reference)

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

    def encoder_adapters(self, encoder, config, dim):
        return {str(k): Adapter(encoder.hidden_size, dim) for k in range(len(config.extract_layers))}

    def adapt_activation(self, k, x):
        return self.vision[str(k)](x) if str(k) in self.vision else x

    def adapt_conditional(self, cond, states):
        cond = super().adapt_conditional(cond, states)
        if len(self.text):
            cond = cond + torch.stack([self.text[str(k)](t) for k, t in enumerate(states)]).sum(0)
        return cond


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
        self, config, branches="vl", dim=16, lora_alpha=32.0, lora_targets=("q", "v"), reference=False
    ):
        super().__init__(config, reference)
        check_branches(branches, "vl", "lora")
        if dim < 1:
            raise ValueError(f"--dim {dim} leaves an update without a rank; give 1 or more (default 16).")
        wrong = sorted(set(lora_targets) - set(PROJECTIONS))
        if wrong or not lora_targets:
            names = " ".join(wrong) or "without a name"
            raise ValueError(f"--lora-targets {names}: give one or more of {', '.join(PROJECTIONS)}.")
        targets = [t for t in PROJECTIONS if t in lora_targets]

        def deltas(letter, encoder, layers):
            return nn.ModuleDict(
                {
                    str(i): nn.ModuleDict(
                        {t: LowRankDelta(encoder.hidden_size, dim, lora_alpha) for t in targets}
                    )
                    for i in range(layers if letter in branches else 0)
                }
            )

        self.vision = deltas("v", config.vision, max(config.extract_layers) + 1)
        self.text = deltas("l", config.text, config.text.num_hidden_layers)

    def lora_deltas(self, encoder, layer):
        deltas = self.vision if encoder == "vision" else self.text
        return deltas[str(layer)] if str(layer) in deltas else None

    @torch.no_grad()
    def merge_into(self, network):
        if self.upsampler is not None:
            super().merge_into(network)
        for encoder in ("vision", "text"):
            layers = getattr(network.clip, f"{encoder}_model").encoder.layers
            for i, deltas in getattr(self, encoder).items():
                for target, delta in deltas.items():
                    getattr(layers[int(i)].self_attn, f"{target}_proj").weight += delta.weight()


class DecoderTuner(Tuner):
    """Trains what stands on the network's encoders, nothing else."""

    def trained_network_parameters(self, network):
        return network.decoder_names()


class FullTuner(DecoderTuner):
    """Trains the network itself, as its `full_tuning_names` have it."""

    def trained_network_parameters(self, network):
        return network.full_tuning_names()
