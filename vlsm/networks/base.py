"""The base class of all networks: the forward pass, and encoding prompts, with or without context vectors.

A `Network` also answers the rest of the program: how images are normalised, which sizes it takes, which
parameters are the decoder's, which ones reach the logits, which layers are worth compiling.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.hooks import Tuner
from vlsm.networks.renaming import to_own, to_published
from vlsm.networks.transformer import fit_window, insert_context

EOS_IS_MAX_ID = 2  # an `eos_token_id` that means "the highest id of a prompt": old files, CLIP's own code
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class ImageFeatures(NamedTuple):
    """The image encoder's output for images `[B, 3, H, W]`.

    activations: the tensors `[B, ...]` that the decoder reads; embedding: `[B, P]`, or None unless the tuner
    needs it; size: (H, W).
    """

    activations: list
    embedding: torch.Tensor | None
    size: tuple


class FrozenBlocks(NamedTuple):
    """The output of an image encoder's first `depth` blocks for images `[B, 3, H, W]`.

    tokens: `[B, S, D]`, the next block's input; activations: outputs `[B, S, D]` of the extract layers among
    these blocks; size: (H, W).
    """

    depth: int
    tokens: torch.Tensor
    activations: list
    size: tuple


class Network(nn.Module):
    """Base class of all networks.

    config: has `text` (an `EncoderConfig`) and `stride` (image sides must be multiples of it). reference: do
    as the published code does where it departs from its paper.
    """

    name = ""  # as people write it
    model_types = ()  # values of `model_type` in config.json
    default_weights = None  # hub id
    renames = ()  # pairs (published name, ours), see renaming.py
    mean, std = IMAGENET_MEAN, IMAGENET_STD  # of images with values from 0 to 1
    methods = None  # names of the tuning methods that can act on it; None: all
    unsupported_reason = ""  # why the others cannot, a sentence
    decoder_reads_pixels = False
    keeps_padding = False  # whether padding tokens take part
    compile_dynamic = True  # torch.compile's `dynamic`. True: dynamic shapes; None: only sizes that vary

    def __init__(self, config, reference=False):
        super().__init__()
        self.config = config
        self.reference = reference

    # The forward pass

    def forward(
        self,
        pixel_values,
        input_ids,
        attention_mask=None,
        tuner=None,
        image_features=None,
        text_features=None,
    ):
        """Segment images by prompts: `[B, 3, H, W]`, `[B, T]`, `[B, T]` -> logits `[B, 1, H, W]`.

        Foreground is where logits are above 0. image_features: `ImageFeatures` or `FrozenBlocks` computed
        before; pixel_values may then be None, unless `decoder_reads_pixels`. text_features: an earlier result
        of `encode_prompts`; input_ids may then be None. Raises ValueError if H or W is no multiple of
        `config.stride`, or if images and prompts differ in number.
        """
        tuner = tuner or Tuner()
        contexts = tuner.contexts()
        if image_features is None:
            self.check_size(*pixel_values.shape[-2:])
            image_features = self.encode_image(pixel_values, tuner, contexts.vision)
        elif isinstance(image_features, FrozenBlocks):
            image_features = self.encode_rest(image_features, tuner, contexts.vision)
        if text_features is None:
            images = image_features.activations[0].shape[0]  # `len` would bind an exported file to one number
            if input_ids.shape[0] != images:
                raise ValueError(f"{images} images came with {len(input_ids)} prompts; each image needs one.")
            text_features = self.encode_prompts(
                input_ids, attention_mask, tuner, contexts.text, image_features.embedding
            )
        return self.decode(image_features, text_features, tuner, pixel_values)  # [B, 1, H, W]

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Encode images `[B, 3, H, W]` to `ImageFeatures`; contexts: vectors for the vision encoder."""
        raise NotImplementedError

    def encode_blocks(self, pixel_values, tuner, contexts=(), depth=None):
        """Encode images `[B, 3, H, W]` to `FrozenBlocks`: of `depth` blocks, or of all that need no gradient.

        None for a network without such blocks.
        """
        return None

    def encode_rest(self, blocks, tuner, contexts=()):
        """Go on from the first blocks' output: `FrozenBlocks` -> `ImageFeatures`."""
        raise NotImplementedError

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Encode prompts `[B, T]` for the decoder: a tuple of tensors `[B, ...]`.

        Those with a row for each token may be padded with zeros.
        """
        raise NotImplementedError

    def decode(self, image_features, text_features, tuner, pixel_values=None):
        """Return logits `[B, 1, H, W]` from the encoders' output."""
        raise NotImplementedError

    # Prompts

    def encode_prompts(self, input_ids, attention_mask, tuner, contexts=(), image_embedding=None):
        """Encode prompts `[B, T]` as `encode_text`; equal ones once, unless contexts depend on the image.

        (`torch.compile` of the whole network cannot look at values: it encodes all.)
        """
        contexts = tuner.image_conditioned_contexts(contexts, image_embedding)
        if torch.compiler.is_compiling():
            return self.encode_text(input_ids, attention_mask, tuner, contexts)
        input_ids, attention_mask, row = self.unique_prompts(input_ids, attention_mask)
        if contexts and contexts[0].dim() == 3:  # [B, n, D]
            mask = None if attention_mask is None else attention_mask[row]
            return self.encode_text(input_ids[row], mask, tuner, contexts)
        text_features = self.encode_text(input_ids, attention_mask, tuner, contexts)
        row = row.to(text_features[0].device)
        return tuple(t[row] for t in text_features)

    def end_of_text(self, input_ids):
        """Return the index `[B]` of the pooled token: the first end token, or the highest id."""
        eos = self.config.text.eos_token_id
        if eos == EOS_IS_MAX_ID:
            return input_ids.argmax(1)
        return (input_ids == eos).int().argmax(1)

    def unique_prompts(self, input_ids, attention_mask):
        """Drop repeated prompts and needless padding.

        Returns (input_ids `[U, T]`, attention_mask or None, row `[B]` of each prompt). Raises ValueError for
        a prompt without an end. On a GPU's tensors this synchronises; keep `input_ids` on the CPU.
        """
        self.check_ends(input_ids)
        if attention_mask is None:
            input_ids, row = torch.unique(input_ids, dim=0, return_inverse=True)
        else:
            pairs = torch.stack([input_ids, attention_mask.to(input_ids)], -1)  # [B, T, 2]
            pairs, row = torch.unique(pairs, dim=0, return_inverse=True)
            input_ids, attention_mask = pairs.unbind(-1)
        if not self.keeps_padding:
            input_ids, attention_mask = self.without_padding(input_ids, attention_mask)
        return input_ids, attention_mask, row

    def check_ends(self, input_ids):
        """Raise ValueError for a prompt of `[B, T]` without an end-of-text token."""
        eos = self.config.text.eos_token_id
        missing = (input_ids != eos).all(1)  # [B]
        if eos != EOS_IS_MAX_ID and missing.any():
            raise ValueError(
                f"Prompt {int(missing.nonzero()[0])} of the batch holds no end-of-text token (id {eos}), so "
                "there is nothing to pool. Was it cut by hand, or made with another model's tokenizer?"
            )

    def without_padding(self, input_ids, attention_mask):
        """Cut prompts `[U, T]` after the last end token. Returns (input_ids, attention_mask or None).

        The attention is causal, so tokens after the end cannot reach it. A mask stays only if it hides a
        token before the end.
        """
        end = self.end_of_text(input_ids)
        T = int(end.max()) + 1
        input_ids = input_ids[:, :T]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :T]
            up_to_end = torch.arange(T, device=end.device) <= end[:, None]  # [U, T]
            if attention_mask[up_to_end].all():
                attention_mask = None
        return input_ids, attention_mask

    def run_text_blocks(self, input_ids, attention_mask, tuner, contexts=()):
        """Run the text encoder's layers on prompts `[B, T]`.

        Returns (tokens after each layer, `[B, n+T, D]` each; index `[B]` of the pooled token; bool
        `[B, n+T]`, the tokens that `attention_mask` leaves visible, or None). The n contexts follow the start
        token; before layer i the previous outputs at their places are replaced by those of layer i. If a
        prompt and its contexts exceed the encoder's window, the prompt loses its last words. Raises
        ValueError for a prompt that exceeds it alone.
        """
        encoder = self.text_transformer()
        limit = self.config.text.max_position_embeddings
        n = contexts[0].shape[-2] if contexts else 0
        input_ids = input_ids.to(encoder.tokens.weight.device)
        seen = None if attention_mask is None else attention_mask.to(input_ids.device).bool()
        end = self.end_of_text(input_ids)
        T = input_ids.shape[1]
        if T > limit and not n:
            raise ValueError(f"A prompt has {T} tokens; the text encoder takes at most {limit}.")
        if T > limit - n:
            input_ids, seen, end = fit_window(input_ids, seen, end, limit - n)
        S = input_ids.shape[1] + n
        mask = None
        if seen is not None:
            seen = F.pad(seen, (n, 0), value=True)
            causal = torch.ones(S, S, dtype=torch.bool, device=input_ids.device).tril()
            mask = seen[:, None, None] & causal  # [B, 1, S, S]
        x = encoder.tokens(input_ids)  # [B, T, D]
        if contexts:
            x = insert_context(x, 1, contexts[0])
        x = x + encoder.positions[:S]  # [B, S, D]
        states = []
        for i, block in enumerate(encoder.blocks):
            x = block(x, tuner.residual_ops("text", i), mask, mask is None, tuner.lora_deltas("text", i))
            if i + 1 < len(contexts):
                x = insert_context(x, 1, contexts[i + 1], replace=n)
            states.append(x)
        return states, end + n, seen

    # Weights and parameters

    @classmethod
    def rename(cls, tensors):
        """Return a checkpoint's tensors under the published names, without those that the network lacks."""
        return tensors

    @classmethod
    def own_names(cls, tensors):
        """Return tensors of published names under the names of our modules; own names stay."""
        return to_own(tensors, cls.renames)

    @classmethod
    def published_names(cls, tensors):
        """Return tensors of our modules' names under the published ones."""
        return to_published(tensors, cls.renames)

    def fresh_tensors(self, tensors):
        """Return tensors that a checkpoint of these `tensors` lacks, at a random start, by our names."""
        return {}

    def initialise(self):
        """Initialise parameters created as zeros (random weights only)."""

    def on_weights_loaded(self):
        """Hook: runs once after the weights are loaded."""

    def parameter_names(self, *prefixes):
        """Return the names of all parameters, or of those that start with one of some prefixes."""
        names = [name for name, _ in self.named_parameters()]
        return [name for name in names if name.startswith(prefixes)] if prefixes else names

    def text_transformer(self):
        """Return the `TextEncoder`."""
        raise NotImplementedError

    def vision_blocks(self):
        """Return the vision encoder's layers, if methods can act in them."""
        raise NotImplementedError

    def decoder_names(self):
        """Return the names of the parameters that follow the two encoders."""
        raise NotImplementedError

    def full_tuning_names(self):
        """Return the names of the parameters that `--peft full` trains."""
        raise NotImplementedError

    def updated_buffers(self):
        """Return the names of the buffers that training moves, given which parameters are trained."""
        return []

    def compilable_blocks(self):
        """Return the layers that are worth compiling: few kinds, many copies of each."""
        raise NotImplementedError

    def smallest_side(self):
        """Return the side of the smallest images that the network takes."""
        return self.config.stride

    def check_size(self, H, W):
        """Raise ValueError for images of a size that the network does not take."""
        step = self.config.stride
        least = self.smallest_side()
        if min(H, W) < least:
            raise ValueError(f"Images of {H} x {W} pixels are too small; {least} x {least} at least.")
        if H % step or W % step:
            raise ValueError(
                f"Images of {H} x {W} pixels do not divide into patches of {step}; resize them to multiples "
                f"of {step}."
            )
