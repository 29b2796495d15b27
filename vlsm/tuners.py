"""Tuning methods. A `Tuner` holds what a method trains and overrides the hooks that the base network's forward pass calls.

Here: the hooks, adapters, LoRA, and methods that train the base's own weights. Prompt learners are in learners.py; methods.py names
and combines them all. To add a method: subclass `Tuner`, override a hook or two, add a line to `METHODS` there.

Sources: adapters: Dhakal et al., "VLSM-Adapter" (MICCAI 2024), Eq. 1 and Section 3; LoRA: Hu et al. (ICLR 2022).
"""

from typing import NamedTuple

import torch
from torch import nn

from kernels import adapter

COND_DIM = 256  # width of the adapter on the conditional embedding, whatever `dim` is (as published)
BRANCHES = dict(v="vision", l="language", c="conditional")
TARGETS = ("q", "k", "v", "out")  # attention's projections, as LoRA calls them


class Contexts(NamedTuple):
    """Vectors that join an encoder's tokens in one forward pass: entry i, `[n, D]` (or `[B, n, D]`), enters layer i."""

    vision: tuple = ()
    text: tuple = ()


class Tuner(nn.Module):
    """Base class, and the method `none`: the hooks change nothing, nothing is trained.

    config: the base's, a `CLIPSegConfig` in most cases; reference: reproduce the published code where it departs from its paper.
    `upsampler`: a learnable upsampler (see upsampler.py) or None.
    """

    upsamples = False  # whether the method comes with the learnable upsampler unless told otherwise
    reads_features = False  # whether `text_contexts` wants the images' features

    def __init__(self, config=None, reference=False):
        super().__init__()
        self.reference, self.upsampler = reference, None

    def start(self, base, folder):
        """Called once, when the base has its weights (from `folder`); a dictionary of the options that this has settled."""
        return {}

    def base_parameters(self, base):
        """Names of the base's parameters that this method trains."""
        return []

    def contexts(self):
        """The `Contexts` of one forward pass."""
        return Contexts()

    def text_contexts(self, contexts, features):
        """The text encoder's contexts `[n, D]`, given the images' features `[B, P]`: the same, or `[B, n, D]`."""
        return contexts

    def adders(self, branch, layer):
        """What makes the residual additions behind attention and MLP of a layer: two functions of (h, residual), each `[B, N, D]`."""
        return torch.add, torch.add

    def updates(self, branch, layer):
        """What is added to the projections of a layer's attention: a mapping from one of `TARGETS` to a function of its input, or None."""
        return None

    def activation(self, k, x):
        """The k-th activation `[B, 1+N, D]` on its way to the decoder (k counts the extract layers in their order)."""
        return x

    def condition(self, cond, states):
        """The conditional embedding `[B, P]`; `states`: the end-of-text token's state `[B, D]` after each extract layer."""
        return cond

    def output(self, logits, z):
        """The logits `[B, 1, H, W]`, given what they were made of: the decoder's last features z `[B, r, h, w]`."""
        return logits if self.upsampler is None else self.upsampler(logits, z)

    def decays(self, name, tensor):
        """Whether weight decay acts on a tuned tensor."""
        return not name.endswith("upsampler.ratio")

    def merge(self, base):
        """Add what was learnt to the weights of `base`, in place. Raises ValueError where no change of weights does the same."""
        if next(self.parameters(), None) is not None:
            raise ValueError(
                "What this method trains is no change of the base's own weights, so it cannot be merged into them. That is possible for "
                "lora, decoder and full, without --upsampler."
            )


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


def check_branches(branches, known, method=""):
    """Raise ValueError unless `branches` are some of the letters `known`, each once."""
    if not branches or set(branches) - set(known) or len(set(branches)) < len(branches):
        letters = ", ".join(f"{letter} ({BRANCHES[letter]})" for letter in known)
        whose = f" to {method}" if method else ""
        raise ValueError(f"--branches '{branches}' is not known{whose}; give one or more of the letters {letters}.")


class Adapters(Tuner):
    """What dense and shallow adapters share: the branches ("v" vision, "l" language, "c" conditional embedding), and c itself."""

    def __init__(self, config, branches="vl", dim=64, reference=False):
        super().__init__(config, reference)
        check_branches(branches, "vlc")
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


class Update(nn.Module):
    """A change of rank `dim` of a projection d -> d: alpha / dim * up(down(x)); `up` starts at zero, so that nothing changes at first."""

    def __init__(self, d, dim, alpha):
        super().__init__()
        self.scale = alpha / dim
        self.down = nn.Linear(d, dim, bias=False)
        self.up = nn.Linear(dim, d, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.scale * self.up(self.down(x))

    def weight(self):
        return self.scale * self.up.weight @ self.down.weight


class LoRA(Tuner):
    """Low-rank updates of the attention projections of every block that the logits depend on."""

    def __init__(self, config, branches="vl", dim=16, lora_alpha=32.0, lora_targets=("q", "v"), reference=False):
        super().__init__(config, reference)
        check_branches(branches, "vl", "lora")
        if dim < 1:
            raise ValueError(f"--dim {dim} leaves an update without a rank; give 1 or more (default 16).")
        wrong = sorted(set(lora_targets) - set(TARGETS))
        if wrong or not lora_targets:
            raise ValueError(f"--lora-targets {' '.join(wrong) or 'without a name'}: give one or more of {', '.join(TARGETS)}.")
        layers = dict(vision=max(config.extract_layers) + 1, text=config.text.num_hidden_layers)
        for branch, letter in (("vision", "v"), ("text", "l")):
            d = getattr(config, branch).hidden_size
            blocks = range(layers[branch] if letter in branches else 0)
            each = {str(i): nn.ModuleDict({t: Update(d, dim, lora_alpha) for t in TARGETS if t in lora_targets}) for i in blocks}
            setattr(self, branch, nn.ModuleDict(each))

    def updates(self, branch, layer):
        places = self.vision if branch == "vision" else self.text
        return places[str(layer)] if str(layer) in places else None

    @torch.no_grad()
    def merge(self, base):
        if self.upsampler is not None:
            super().merge(base)
        for branch in ("vision", "text"):
            layers = getattr(base.clip, f"{branch}_model").encoder.layers
            for i, updates in getattr(self, branch).items():
                for target, update in updates.items():
                    getattr(layers[int(i)].self_attn, f"{target}_proj").weight += update.weight()


class DecoderTuner(Tuner):
    """Trains what stands on the base's encoders, nothing else."""

    def base_parameters(self, base):
        return base.decoder_names()


class FullTuner(DecoderTuner):
    """Trains the base itself, as its `useful_names` have it."""

    def base_parameters(self, base):
        return base.useful_names()
