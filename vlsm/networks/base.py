"""The base class of all networks: the forward pass, and encoding prompts, with or without context vectors.

A `Network` also tells the rest of the program how images are normalised, which sizes it takes, which
parameters are the decoder's, which ones reach the logits, which layers to compile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.hooks import Tuner
from vlsm.networks.transformer import drop_padding, fit_window, insert_context, repeat_rows, unique_rows
from vlsm.networks.weights import to_own, to_published

EOS_IS_MAX_ID = 2  # an `eos_token_id` that means "the highest id of a prompt": old files, CLIP's own code
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class ImageFeatures(NamedTuple):
    """The image encoder's output for images `[B, 3, H, W]`.

    activations: the tensors `[B, ...]` that the decoder and the tuner read; embedding: `[B, P]`, or None
    unless the tuner needs it; size: (H, W).
    """

    activations: list
    embedding: torch.Tensor | None
    size: tuple


class FrozenBlocks(NamedTuple):
    """The output of an image encoder's first `depth` blocks for images `[B, 3, H, W]`.

    tokens: `[B, S, D]`, the next block's input; activations: outputs `[B, S, D]` of the `kept_blocks` among
    these blocks; size: (H, W).
    """

    depth: int
    tokens: torch.Tensor
    activations: list
    size: tuple


class Network(nn.Module):
    """Base class of all networks.

    config: has `text` (an `EncoderConfig`) and `stride` (image sides must be multiples of it). reference: do
    as the published code does where it departs from its paper. A network whose vision encoder has transformer
    layers that methods act in also has `vision_blocks()`, which returns them.
    """

    name = ""  # as people write it
    model_types = ()  # values of `model_type` in config.json
    default_weights = None  # hub id
    renames = ()  # pairs (published name, ours), see weights.py
    mean, std = IMAGENET_MEAN, IMAGENET_STD  # of images with values from 0 to 1
    methods = None  # names of the tuning methods that can act on it; None: all
    unsupported_reason = ""  # a sentence: why the others cannot
    decoder_reads_pixels = False  # whether `adapt_activations` needs pixel_values
    keeps_padding = False  # whether prompts keep their padding tokens
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
        """Segment images by prompts: `[B, 3, H, W]`, `[B * P, T]`, `[B * P, T]` -> logits `[B * P, 1, H, W]`.

        Rows b * P to b * P + P - 1 are the P prompts of image b, which is encoded once. Foreground is where
        logits are above 0. image_features: `ImageFeatures` or `FrozenBlocks` computed before; pixel_values
        may then be None, unless `decoder_reads_pixels`. text_features: an earlier result of `encode_prompts`;
        input_ids may then be None. Raises ValueError if H or W is no multiple of `config.stride`, or if the
        number of prompts is no multiple of that of images.
        """
        tuner = tuner or Tuner()
        contexts = tuner.contexts()
        if image_features is None:
            self.check_size(*pixel_values.shape[-2:])
            image_features = self.encode_image(pixel_values, tuner, contexts.vision)
        elif isinstance(image_features, FrozenBlocks):
            image_features = self.encode_rest(image_features, tuner, contexts.vision)
        # not `len`: it would fix the batch size of an exported file
        images = image_features.activations[0].shape[0]
        prompts = (input_ids if text_features is None else text_features[0]).shape[0]
        if prompts < images or prompts % images:
            raise ValueError(
                f"{images} images came with {prompts} prompts; each image needs one, or equally many."
            )
        P = prompts // images
        if text_features is None:
            embedding = repeat_rows(image_features.embedding, P)
            text_features = self.encode_prompts(input_ids, attention_mask, tuner, contexts.text, embedding)
        activations = self.adapt_activations(image_features, tuner, pixel_values)
        image_features = image_features._replace(activations=[repeat_rows(x, P) for x in activations])
        return self.decode(image_features, text_features, tuner)  # [B * P, 1, H, W]

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Encode images `[B, 3, H, W]` to `ImageFeatures`; contexts: vectors for the vision encoder."""
        raise NotImplementedError

    def encode_blocks(self, pixel_values, tuner, contexts=(), depth=None):
        """Encode images `[B, 3, H, W]` to `FrozenBlocks`, so that their output can be cached.

        depth: number of blocks; None: all first blocks whose output needs no gradient. Returns None if the
        network cannot be split; one that can also has `encode_rest(blocks, tuner, contexts)`, which runs the
        remaining blocks: `FrozenBlocks` -> `ImageFeatures`.
        """
        return None

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Encode prompts `[B, T]` for the decoder: a tuple of tensors `[B, ...]`.

        Those with a row for each token may be padded with zeros.
        """
        raise NotImplementedError

    def adapt_activations(self, image_features, tuner, pixel_values=None):
        """Return the tensors `[B, ...]` that `decode` reads: all that does not depend on the prompts."""
        return image_features.activations

    def decode(self, image_features, text_features, tuner):
        """Return logits `[B, 1, H, W]` of images, of which `adapt_activations` made the activations."""
        raise NotImplementedError

    def kept_blocks(self, tuner):
        """Return the numbers of the image blocks whose outputs are the activations, in ascending order."""
        if tuner.needs_ladder_blocks:
            return self.config.ladder_blocks
        return sorted(set(self.config.extract_layers))

    # Prompts

    def encode_prompts(self, input_ids, attention_mask, tuner, contexts=(), image_embedding=None):
        """Encode prompts `[B, T]` as `encode_text`; equal ones once, unless contexts depend on the image."""
        contexts = tuner.image_conditioned_contexts(contexts, image_embedding)
        if torch.compiler.is_compiling():  # the number of unique prompts depends on values, not on shapes
            return self.encode_text(input_ids, attention_mask, tuner, contexts)
        input_ids, attention_mask, row = self.unique_prompts(input_ids, attention_mask)
        if contexts and contexts[0].dim() == 3:  # [B, n, D]
            mask = None if attention_mask is None else attention_mask[row]
            return self.encode_text(input_ids[row], mask, tuner, contexts)
        text_features = self.encode_text(input_ids, attention_mask, tuner, contexts)
        row = row.to(text_features[0].device, non_blocking=True)
        return tuple(features[row] for features in text_features)

    def end_of_text(self, input_ids):
        """Return the index `[B]` of the pooled token: the first end token, or the highest id."""
        eos = self.config.text.eos_token_id
        if eos == EOS_IS_MAX_ID:
            return input_ids.argmax(1)
        return (input_ids == eos).int().argmax(1)

    def unique_prompts(self, input_ids, attention_mask):
        """Drop repeated prompts and needless padding.

        Returns (input_ids `[U, T]`, attention_mask or None, row `[B]` of each prompt among the U). Raises
        ValueError for a prompt without an end-of-text token. Keep `input_ids` on the CPU: on a GPU this
        synchronises.
        """
        eos = self.config.text.eos_token_id
        without_end = (input_ids != eos).all(1)  # [B]
        if eos != EOS_IS_MAX_ID and without_end.any():
            raise ValueError(
                f"Prompt {int(without_end.nonzero()[0])} of the batch holds no end-of-text token (id {eos}), "
                "so there is nothing to pool. Was it cut by hand, or made with another model's tokenizer?"
            )
        input_ids, attention_mask, row = unique_rows(input_ids, attention_mask)
        if not self.keeps_padding:
            input_ids, attention_mask = drop_padding(input_ids, attention_mask, self.end_of_text(input_ids))
        return input_ids, attention_mask, row

    def run_text_blocks(self, input_ids, attention_mask, tuner, contexts=()):
        """Run the text encoder's layers on prompts `[B, T]` with n context vectors.

        Returns (a list of the tokens `[B, n+T, D]` after each layer; index `[B]` of the pooled token; bool
        `[B, n+T]`, the tokens that `attention_mask` leaves visible, or None). The contexts follow the start
        token; before layer i the previous outputs at their places are replaced by the contexts of layer i.
        A prompt that exceeds the encoder's window together with its contexts loses its last words. Raises
        ValueError for a prompt that exceeds the window by itself.
        """
        encoder = self.text_transformer()
        limit = self.config.text.max_position_embeddings
        n = contexts[0].shape[-2] if contexts else 0
        device = encoder.tokens.weight.device
        input_ids = input_ids.to(device, non_blocking=True)
        seen = None if attention_mask is None else attention_mask.to(device, non_blocking=True).bool()
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
        """Rename a file's tensors to the published names, and drop those that the network lacks."""
        return tensors

    @classmethod
    def own_names(cls, tensors):
        """Rename tensors from the published names to those of our modules; names of ours stay."""
        return to_own(tensors, cls.renames)

    @classmethod
    def published_names(cls, tensors):
        """Rename tensors from the names of our modules to the published ones."""
        return to_published(tensors, cls.renames)

    def fresh_tensors(self, tensors):
        """Return the tensors, at a random start and by our names, that a file of `tensors` lacks and may
        lack: a part that is always trained.
        """
        return {}

    def initialise(self):
        """Initialise parameters created as zeros (random weights only)."""

    def parameter_names(self, *prefixes):
        """Return the names of all parameters, or of those that start with one of the `prefixes`."""
        return [name for name, _ in self.named_parameters() if name.startswith(prefixes or "")]

    def text_transformer(self):
        """Return the `TextEncoder`."""
        raise NotImplementedError

    def decoder_names(self):
        """Return the names of the parameters that follow the two encoders."""
        raise NotImplementedError

    def full_tuning_names(self):
        """Return the names of the parameters that `--peft full` trains."""
        raise NotImplementedError

    def updated_buffers(self):
        """Return the names of the buffers that training changes: BatchNorm's statistics.

        Called once, after the weights are loaded and `requires_grad` is set.
        """
        return []

    def compilable_blocks(self):
        """Return the layers to compile and to recompute: few kinds, many copies of each."""
        raise NotImplementedError

    def smallest_side(self):
        """Return the side of the smallest images that the network takes."""
        return self.config.stride

    def check_size(self, H, W):
        """Raise ValueError for images of a size that the network does not take."""
        step = self.config.stride
        least = self.smallest_side()
        if min(H, W) < least or H % step or W % step:
            raise ValueError(
                f"Images of {H} x {W} pixels do not fit; resize their sides to multiples of {step}, {least} "
                "at least."
            )
