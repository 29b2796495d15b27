"""How a tuning method acts on a frozen network: the contract between `networks/` and `methods/`.

A network's forward pass calls every hook below; the base class changes nothing. A method is a subclass that
holds all trained parameters and overrides a hook or two. To add one, write the class and list it in
`METHODS` (registry.py).

Throughout: B images, N patches, T text tokens, n context vectors, D the width of an encoder, P that of the
embeddings.
"""

from typing import NamedTuple

import torch
from torch import nn

PLAIN_ADDITIONS = torch.add, torch.add  # of attention's and the MLP's output to the residual stream
PROJECTIONS = ("q", "k", "v", "out")  # the linear layers of attention, by LoRA's names


class Contexts(NamedTuple):
    """Vectors that join an encoder's tokens: entry i, `[n, D]` or `[B, n, D]`, enters layer i."""

    vision: tuple = ()
    text: tuple = ()


class Tuner(nn.Module):
    """Base class of all tuning methods, and the method `none`: changes nothing, trains nothing.

    config: the network's configuration. reference: do as the published code does where it departs from its
    paper. `upsampler`: a learnable upsampler (see methods/upsampler.py) or None.
    """

    default_upsampler = False  # whether the method comes with the learnable upsampler unless told otherwise
    needs_image_embedding = False  # whether `image_conditioned_contexts` reads the images' embeddings
    needs_ladder_blocks = False  # whether `adapt_blocks` reads the outputs of `config.ladder_blocks`

    def __init__(self, config=None, reference=False):
        super().__init__()
        self.reference = reference
        self.upsampler = None

    def on_attach(self, network, folder):
        """Initialise from the network's weights, which were read from `folder`; called once.

        Returns the options resolved from the weights, e.g. {"context": 5}.
        """
        return {}

    def trained_network_parameters(self, network):
        """Return the names of the network's own parameters that this method trains."""
        return []

    def contexts(self):
        """Return the `Contexts` of one forward pass."""
        return Contexts()

    def image_conditioned_contexts(self, contexts, image_embedding):
        """Return the text encoder's contexts, given its `contexts` and the image embedding `[B, P]`.

        Returns the same `[n, D]` for all images, or `[B, n, D]`.
        """
        return contexts

    def residual_ops(self, encoder, layer):
        """Return two functions (branch_output, residual) -> sum: for a layer's attention and its MLP.

        encoder: "vision" or "text". All three are `[B, N, D]`.
        """
        return PLAIN_ADDITIONS

    def lora_deltas(self, encoder, layer):
        """Return None or a mapping such as {"q": f}: f(x) is added to that projection of a layer's attention.

        The keys are some of `PROJECTIONS`; x `[B, N, D]` is the projection's input.
        """
        return None

    def adapt_blocks(self, by_block):
        """Return {image block: its output `[B, N, D]`}, those of the extract layers adapted.

        by_block: the outputs of the extract layers; of all `config.ladder_blocks` if the method needs these.
        """
        return by_block

    def adapt_activation(self, k, x):
        """Return the k-th activation that the decoder reads: `[B, 1+N, D]`; SAM 3: the neck's k-th map as
        tokens `[B, N, D]`.
        """
        return x

    def adapt_conditional(self, cond, states):
        """Return the conditional embedding `[B, P]`; SAM 3: the prompt's tokens `[B, T, P]`.

        states: a list of the end-of-text token's states `[B, D]` after each extract layer; SAM 3: empty.
        """
        return cond

    def adapt_logits(self, logits, features):
        """Return the logits `[B, 1, H, W]`, given the decoder's last features `[B, C, h, w]`."""
        return logits if self.upsampler is None else self.upsampler(logits, features)

    def uses_weight_decay(self, name, tensor):
        """Tell whether weight decay acts on a trained tensor."""
        return not name.endswith("upsampler.ratio")

    def merge_into(self, network):
        """Add the learnt change to the network's weights, in place.

        Raises ValueError if no change of weights has the same effect.
        """
        if next(self.parameters(), None) is not None:
            raise ValueError(
                "This method does not change the network's own weights, so it cannot be merged into them. "
                "That is possible for lora, decoder and full, without --upsampler."
            )
