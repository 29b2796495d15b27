"""Tuning methods. A `Tuner` holds what a method trains and overrides the hooks that the base network's forward pass calls.

To add a method: subclass `Tuner`, override a hook or two, add a line to `METHODS`.

Source of the adapters: Dhakal et al., "VLSM-Adapter" (MICCAI 2024), Eq. 1 and Section 3.
"""

import torch
from torch import nn

from kernels import adapter

COND_DIM = 256  # width of the adapter on the conditional embedding, whatever `dim` is (as published)


class Tuner(nn.Module):
    """Base class, and the method `none`: the hooks change nothing, nothing is trained.

    config: the base's `CLIPSegConfig`; reference: reproduce the published code where it departs from its paper.
    """

    def __init__(self, config=None, reference=False):
        super().__init__()
        self.reference = reference

    def base_parameters(self, base):
        """Names of the base's parameters that this method trains."""
        return []

    def adders(self, branch, layer):
        """What makes the residual additions behind attention and MLP of a layer: two functions of (h, residual), each `[B, N, D]`."""
        return torch.add, torch.add

    def activation(self, k, x):
        """The k-th activation `[B, 1+N, D]` on its way to the decoder (k counts the extract layers in their order)."""
        return x

    def condition(self, cond, states):
        """The conditional embedding `[B, P]`; `states`: the end-of-text token's state `[B, D]` after each extract layer."""
        return cond


class Adapter(nn.Module):
    """A bottleneck, Eq. 1: f + relu(relu(f W1 + b1) W2 + b2), from width `d` through `dim`.

    Both layers start as torch's `nn.Linear` does. Starting `up` at zero would be dead: the outer ReLU has derivative 0 there,
    so that neither layer would ever receive a gradient.
    """

    def __init__(self, d, dim):
        super().__init__()
        self.down = nn.Linear(d, dim)
        self.up = nn.Linear(dim, d)

    def forward(self, x, residual=None):
        """Eq. 1 of x `[..., d]`, plus `residual` where there is one."""
        return adapter(x, residual, self.down.weight, self.down.bias, self.up.weight, self.up.bias)


class Adapters(Tuner):
    """What dense and shallow adapters share: the branches ("v" vision, "l" language, "c" conditional embedding), and c itself."""

    def __init__(self, config, branches="vl", dim=64, reference=False):
        super().__init__(config, reference)
        if not branches or set(branches) - set("vlc") or len(set(branches)) < len(branches):
            raise ValueError(
                f"--branches '{branches}' is not known; give one or more of the letters v (vision), l (language), c (conditional)."
            )
        if dim < 1:
            raise ValueError(
                f"--dim {dim} leaves an adapter without a hidden unit; give a width of 1 or more (the paper's: 64 dense, 512 shallow)."
            )
        places = {
            "vision": self.place(config.vision, config, dim) if "v" in branches else {},
            "text": self.place(config.text, config, dim) if "l" in branches else {},
        }
        self.vision = nn.ModuleDict(places["vision"])
        self.text = nn.ModuleDict(places["text"])
        if "c" in branches:
            self.cond = Adapter(config.projection_dim, COND_DIM)

    def place(self, encoder, config, dim):
        """Adapters of one encoder, by the name of their place."""
        raise NotImplementedError

    def condition(self, cond, states):
        return self.cond(cond) if hasattr(self, "cond") else cond


class DenseAdapters(Adapters):
    """Adapters before both residual additions of every block below the deepest extract layer (9 of 12 blocks)."""

    def place(self, encoder, config, dim):
        n = min(max(config.extract_layers), encoder.num_hidden_layers)
        d = encoder.hidden_size
        return {str(i): nn.ModuleDict({"attn": Adapter(d, dim), "mlp": Adapter(d, dim)}) for i in range(n)}

    def adders(self, branch, layer):
        places = self.vision if branch == "vision" else self.text
        if str(layer) not in places:
            return super().adders(branch, layer)
        return places[str(layer)]["attn"], places[str(layer)]["mlp"]


class ShallowAdapters(Adapters):
    """Adapters on the extracted activations; the text side's, of the end-of-text token, are added to the conditional embedding."""

    def __init__(self, config, branches="vl", dim=512, reference=False):
        if "l" in branches:
            if config.text.hidden_size != config.projection_dim:
                raise ValueError(
                    f"Shallow adapters in the text branch add text states (width {config.text.hidden_size}) to the conditional embedding "
                    f"(width {config.projection_dim}): this base's widths differ. Use --branches v, c or vc."
                )
            if max(config.extract_layers) >= config.text.num_hidden_layers:
                raise ValueError(
                    f"Shallow adapters in the text branch read text layers {list(config.extract_layers)}, and this base has "
                    f"{config.text.num_hidden_layers}. Use --branches v, c or vc."
                )
        super().__init__(config, branches, dim, reference)

    def place(self, encoder, config, dim):
        return {str(k): Adapter(encoder.hidden_size, dim) for k in range(len(config.extract_layers))}

    def activation(self, k, x):
        return self.vision[str(k)](x) if str(k) in self.vision else x

    def condition(self, cond, states):
        cond = super().condition(cond, states)
        if len(self.text):
            cond = cond + torch.stack([self.text[str(k)](t) for k, t in enumerate(states)]).sum(0)
        return cond


class DecoderTuner(Tuner):
    """Trains the base's decoder, nothing else."""

    def base_parameters(self, base):
        return [name for name, _ in base.named_parameters() if name.startswith("decoder.")]


class FullTuner(DecoderTuner):
    """Trains every parameter that the logits depend on.

    With `reference` it trains the decoder only, as the published end-to-end baseline does without meaning to: it runs
    both encoders without gradients.
    """

    def base_parameters(self, base):
        if self.reference:
            return super().base_parameters(base)
        unused = ["clip.logit_scale", "clip.visual_projection.", "clip.vision_model.post_layernorm."]
        last = max(base.config.extract_layers)
        unused += [f"clip.vision_model.encoder.layers.{i}." for i in range(last + 1, base.config.vision.num_hidden_layers)]
        return [name for name, _ in base.named_parameters() if not name.startswith(tuple(unused))]


METHODS = {"none": Tuner, "decoder": DecoderTuner, "full": FullTuner, "dense": DenseAdapters, "shallow": ShallowAdapters}
