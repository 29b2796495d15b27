"""What all networks share: the forward pass, and how prompts are encoded, with or without context vectors.

A `Network` says of itself what the rest of the program asks: how images are normalised, which sizes it takes,
which of its parameters are the decoder's, which ones reach the logits, which layers are worth compiling.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.hooks import Tuner
from vlsm.networks.renaming import to_own, to_published

EOS_IS_MAX_ID = 2  # an `eos_token_id` that means "the highest id of a prompt": old files, CLIP's own code
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class ImageFeatures(NamedTuple):
    """What the image encoder returns for images `[B, 3, H, W]`.

    activations: what the decoder reads, tensors `[B, ...]`; embedding: `[B, P]`, or None unless the tuner
    needs it; size: (H, W).
    """

    activations: list
    embedding: torch.Tensor | None
    size: tuple


class FrozenBlocks(NamedTuple):
    """What the first `depth` blocks of an image encoder make of images `[B, 3, H, W]`.

    tokens: `[B, S, D]`, the next block's input; activations: those of the extract layers among these blocks,
    `[B, S, D]`; size: (H, W).
    """

    depth: int
    tokens: torch.Tensor
    activations: list
    size: tuple


class TextEncoder(NamedTuple):
    """The parts of a network's text encoder, wherever its checkpoint keeps them."""

    tokens: nn.Embedding
    positions: torch.Tensor
    blocks: nn.ModuleList

    @classmethod
    def of(cls, text):
        """Return the parts of a `text_model`."""
        embeddings = text.embeddings
        return cls(embeddings.token_embedding, embeddings.position_embedding.weight, text.encoder.layers)


def resize_positions(weight, h, w):
    """Return position embeddings `[h*w, D]` for a grid, resized bicubically from `[side*side, D]`."""
    side = round(len(weight) ** 0.5)
    if (h, w) == (side, side):
        return weight
    grid = weight.T.reshape(1, -1, side, side)  # [1, D, side, side]
    return F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False).flatten(2)[0].T


def patch_tokens(patches, class_embedding, position_embedding):
    """Return tokens `[B, 1+h*w, D]` of patches `[B, D, h, w]`: class token, then patches by rows."""
    B, D, h, w = patches.shape
    x = torch.cat([class_embedding.to(patches.dtype).expand(B, 1, D), patches.flatten(2).transpose(1, 2)], 1)
    return x + torch.cat([position_embedding[:1], resize_positions(position_embedding[1:], h, w)])


def insert_context(x, at, context, replace=0):
    """Insert vectors `[n, D]` or `[B, n, D]` into tokens `[B, S, D]`, for `replace` tokens there."""
    context = context.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :at], context, x[:, at + replace :]], 1)


class Network(nn.Module):
    """Base class of all networks.

    config: has `text` (an `EncoderConfig`) and `stride` (sides of images are multiples of it). reference: do
    as the published code does where it departs from its paper.
    """

    name = ""  # as people write it
    model_types = ()  # that `config.json` may state
    default_weights = None  # hub id
    renames = ()  # pairs (published name, ours), see renaming.py
    mean, std = IMAGENET_MEAN, IMAGENET_STD  # of images with values from 0 to 1
    methods = None  # names of the tuning methods that can act on it; None: all
    unsupported_reason = ""  # why the others cannot, a sentence
    decoder_reads_pixels = False
    keeps_padding = False  # whether padding tokens take part
    compile_dynamic = True  # `dynamic` of torch.compile: all sizes open; None: those that were seen to change

    def __init__(self, config, reference=False):
        super().__init__()
        self.config, self.reference = config, reference

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

        Foreground is where logits are above 0. image_features: `ImageFeatures`, or `FrozenBlocks`, kept from
        before; pixel_values may then be None, unless `decoder_reads_pixels`. text_features: what
        `encode_prompts` returned before; input_ids may then be None. Raises ValueError where H or W is no
        multiple of `config.stride`, or images and prompts differ in number.
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
        return self.decode(image_features, text_features, tuner, pixel_values)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Return the `ImageFeatures` of images `[B, 3, H, W]`; contexts: vectors for the vision encoder."""
        raise NotImplementedError

    def encode_blocks(self, pixel_values, tuner, contexts=(), depth=None):
        """Return the `FrozenBlocks` of images: of `depth` blocks, or of those whose output needs no gradient.

        None where a network has no such blocks.
        """
        return None

    def encode_rest(self, blocks, tuner, contexts=()):
        """Return the `ImageFeatures` of images whose first blocks' output, `FrozenBlocks`, is there."""
        raise NotImplementedError

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return what the decoder reads of prompts `[B, T]`: a tuple of tensors `[B, ...]`.

        Those with a row for each token may be padded with zeros.
        """
        raise NotImplementedError

    def decode(self, image_features, text_features, tuner, pixel_values=None):
        """Return logits `[B, 1, H, W]` of what the encoders returned."""
        raise NotImplementedError

    # Prompts

    def encode_prompts(self, input_ids, attention_mask, tuner, contexts=(), image_embedding=None):
        """Return `encode_text` of prompts, equal ones encoded once unless their contexts depend on the image.

        (`torch.compile` of the whole network cannot look at values: it encodes all.)
        """
        contexts = tuner.image_conditioned_contexts(contexts, image_embedding)
        if torch.compiler.is_compiling():
            return self.encode_text(input_ids, attention_mask, tuner, contexts)
        input_ids, attention_mask, row = self.unique_prompts(input_ids, attention_mask)
        if contexts and contexts[0].dim() == 3:
            mask = None if attention_mask is None else attention_mask[row]
            return self.encode_text(input_ids[row], mask, tuner, contexts)
        text_features = self.encode_text(input_ids, attention_mask, tuner, contexts)
        row = row.to(text_features[0].device)
        return tuple(t[row] for t in text_features)

    def end_of_text(self, input_ids):
        """Return the index `[B]` of the pooled token: the first end token, or the highest id."""
        eos = self.config.text.eos_token_id
        return input_ids.argmax(1) if eos == EOS_IS_MAX_ID else (input_ids == eos).int().argmax(1)

    def unique_prompts(self, input_ids, attention_mask):
        """Drop repeated prompts and needless padding.

        Returns (input_ids `[U, T]`, attention_mask or None, row `[B]` of each prompt). The attention is
        causal, so what follows the end-of-text token cannot reach it: those columns are cut off, and a
        padding mask stays only where it hides a token before the end. Raises ValueError for a prompt without
        an end. On a GPU's tensors this synchronises; keep `input_ids` on the CPU.
        """
        eos = self.config.text.eos_token_id
        missing = (input_ids != eos).all(1)
        if eos != EOS_IS_MAX_ID and missing.any():
            raise ValueError(
                f"Prompt {int(missing.nonzero()[0])} of the batch holds no end-of-text token (id {eos}), so "
                "there is nothing to pool. Was it cut by hand, or made with another model's tokenizer?"
            )
        pairs = (
            input_ids
            if attention_mask is None
            else torch.stack([input_ids, attention_mask.to(input_ids)], -1)
        )
        pairs, row = torch.unique(pairs, dim=0, return_inverse=True)
        input_ids, attention_mask = (pairs, None) if attention_mask is None else pairs.unbind(-1)
        if self.keeps_padding:
            return input_ids, attention_mask, row
        end = self.end_of_text(input_ids)
        T = int(end.max()) + 1
        input_ids = input_ids[:, :T]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :T]
            if attention_mask[torch.arange(T, device=end.device) <= end[:, None]].all():
                attention_mask = None
        return input_ids, attention_mask, row

    def fit_window(self, input_ids, seen, end, limit):
        """Cut prompts to `limit` tokens: the last words go, the end token stays.

        Returns (input_ids, seen, end).
        """
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        cut = [
            None if t is None else torch.cat([t[:, : limit - 1], t[rows, end][:, None]], 1)
            for t in (input_ids, seen)
        ]
        return *cut, end.clamp(max=limit - 1)

    def run_text_blocks(self, input_ids, attention_mask, tuner, contexts=()):
        """Run the text encoder's layers on prompts `[B, T]`.

        Returns (the tokens after each layer, `[B, n+T, D]` each; the index `[B]` of the pooled token; bool
        `[B, n+T]`, which tokens `attention_mask` leaves to be seen, or None). The n contexts stand behind the
        start token; those of layer i replace their outputs of layer i - 1. Where a prompt and its contexts
        exceed the encoder's window, the prompt loses its last words. Raises ValueError for a prompt that
        exceeds it alone.
        """
        encoder, limit = self.text_transformer(), self.config.text.max_position_embeddings
        n = contexts[0].shape[-2] if contexts else 0
        input_ids = input_ids.to(encoder.tokens.weight.device)
        seen = None if attention_mask is None else attention_mask.to(input_ids.device).bool()
        end = self.end_of_text(input_ids)
        if input_ids.shape[1] > limit - n:
            if not n:
                raise ValueError(
                    f"A prompt has {input_ids.shape[1]} tokens; the text encoder takes at most {limit}."
                )
            input_ids, seen, end = self.fit_window(input_ids, seen, end, limit - n)
        mask, S = None, input_ids.shape[1] + n
        if seen is not None:
            seen = F.pad(seen, (n, 0), value=True)
            mask = seen[:, None, None] & torch.ones(S, S, dtype=torch.bool, device=input_ids.device).tril()
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

    # What a network is

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
        """Return what a checkpoint of these `tensors` lacks and what starts at random, by name."""
        return {}

    def initialise(self):
        """Give parameters that their modules have left at zero a random start."""

    def on_weights_loaded(self):
        """Look at the weights; called once, when they are there."""

    def text_transformer(self):
        """Return the `TextEncoder`."""
        raise NotImplementedError

    def vision_blocks(self):
        """Return the vision encoder's layers, of networks whose methods act in them."""
        raise NotImplementedError

    def decoder_names(self):
        """Return the names of the parameters that stand on the two encoders."""
        raise NotImplementedError

    def full_tuning_names(self):
        """Return the names of the parameters that `--peft full` trains."""
        raise NotImplementedError

    def updated_buffers(self):
        """Return the names of the buffers that training changes, given which parameters are trained."""
        return []

    def compilable_blocks(self):
        """Return the layers that are worth compiling: few kinds, each often."""
        raise NotImplementedError

    def smallest_side(self):
        """Return the side of the smallest images that the network takes."""
        return self.config.stride

    def check_size(self, H, W):
        """Raise ValueError for images of a size that cannot be."""
        step, least = self.config.stride, self.smallest_side()
        if min(H, W) < least:
            raise ValueError(f"Images of {H} x {W} pixels are too small; {least} x {least} at least.")
        if H % step or W % step:
            raise ValueError(
                f"Images of {H} x {W} pixels do not divide into patches of {step}; resize them to multiples "
                f"of {step}."
            )
