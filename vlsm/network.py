"""What the three networks share: how prompts are read, with or without context vectors, and the order of a forward pass.

A `Network` says of itself what the rest of the program asks: how pictures are normalised, which sizes it takes, which of its parameters
are the decoder, which ones reach the logits, which layers are worth compiling.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .images import MEAN, STD
from .tuners import Tuner

HIGHEST = 2  # an `eos_token_id` that stands for "the highest id of a prompt", as in old files and in CLIP's own code


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one CLIP encoder; the defaults are those that transformers leaves out of `config.json` (text encoder)."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    @classmethod
    def from_dict(cls, values, name):
        """Read a part of `config.json`; `name` is the part's. Raises ValueError for sizes that cannot work."""
        config = cls(**known(cls, values))
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"{name}.hidden_act is '{config.hidden_act}'; known are {', '.join(ACTIVATIONS)}.")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{name}: hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} heads.")
        return config


VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


def known(kind, values):
    """Those of the values that are fields of the dataclass `kind`."""
    names = {f.name for f in fields(kind)}
    return {k: v for k, v in values.items() if k in names and v is not None}


def quick_gelu(x):
    """x sigmoid(1.702 x), by way of SiLU: one fused operation each way where the formula as written takes three."""
    return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}


def positions(weight, h, w):
    """Position embeddings `[h*w, D]` for a grid, of `[side*side, D]`; resized bicubically if that is not the trained grid."""
    side = round(len(weight) ** 0.5)
    if (h, w) == (side, side):
        return weight
    grid = weight.T.reshape(1, -1, side, side)  # [1, D, side, side]
    return F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False).flatten(2)[0].T


def patch_tokens(patches, class_embedding, position_embedding):
    """Tokens `[B, 1+h*w, D]` of patches `[B, D, h, w]`: the class token, then the patches by rows, each with its position."""
    B, D, h, w = patches.shape
    x = torch.cat([class_embedding.to(patches.dtype).expand(B, 1, D), patches.flatten(2).transpose(1, 2)], 1)
    return x + torch.cat([position_embedding[:1], positions(position_embedding[1:], h, w)])


def put(x, at, contexts, over=0):
    """Tokens x `[B, S, D]` with contexts `[n, D]` or `[B, n, D]` at position `at`, in the place of the `over` tokens there."""
    contexts = contexts.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :at], contexts, x[:, at + over :]], 1)


class TextEncoder(NamedTuple):
    """A network's text encoder, wherever its checkpoint keeps the parts."""

    tokens: nn.Embedding
    positions: torch.Tensor
    blocks: nn.ModuleList


class Network(nn.Module):
    """Base class of CLIPSeg, CRIS and SAN. `config` has `text` (an `EncoderConfig`); reference: do as the published code does."""

    name = ""  # as people write it
    model_types = ()  # that `config.json` may state
    default_weights = None  # hub id
    mean, std = MEAN, STD  # of pictures, values from 0 to 1
    methods = None  # the tuning methods that can act on it; None: all
    why = ""  # a sentence on those that cannot
    reads_pixels = False  # whether `decode` wants the pictures again
    keeps_padding = False  # whether padding tokens take part

    def __init__(self, config, reference=False):
        super().__init__()
        self.config, self.reference = config, reference

    # What a network is

    @classmethod
    def rename(cls, tensors):
        """Tensors of a checkpoint by the network's own names, without those that it has no use for."""
        return tensors

    def fresh(self, tensors):
        """Tensors that a checkpoint lacks and that start at random, by name."""
        return {}

    def initialise(self):
        """Give parameters that their modules have left at zero a random start."""

    def settle(self):
        """Called once, when the weights are there."""

    def text_encoder(self):
        raise NotImplementedError

    def decoder_names(self):
        """Names of the parameters that stand on the two encoders."""
        raise NotImplementedError

    def useful_names(self):
        """Names of the parameters that training the whole means."""
        raise NotImplementedError

    def moving_buffers(self):
        """Names of the buffers that training changes, given which parameters are trained."""
        return []

    def compilable(self):
        """The layers that are worth compiling: few kinds, each often."""
        raise NotImplementedError

    def check_size(self, H, W):
        """Raise ValueError for pictures of a size that cannot be."""
        step = self.config.stride
        if H % step or W % step:
            raise ValueError(f"Images of {H} x {W} pixels do not divide into patches of {step}; resize them to multiples of {step}.")

    # What a network does

    def encode_image(self, pixel_values, tuner, contexts=()):
        """(what the decoder reads of images `[B, 3, H, W]`: a list of tensors `[B, ...]`; the images' features `[B, P]` or None)."""
        raise NotImplementedError

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """What the decoder reads of prompts `[B, T]`: a tuple of tensors `[B, ...]`; those with a row a token may be padded with zeros."""
        raise NotImplementedError

    def decode(self, activations, text, size, tuner, pixel_values=None):
        """Logits `[B, 1, *size]` of what the encoders return; `pixel_values` for a network that `reads_pixels`."""
        raise NotImplementedError

    def forward(self, pixel_values, input_ids, attention_mask=None, tuner=None):
        """`[B, 3, H, W]`, `[B, T]`, `[B, T]` -> logits `[B, 1, H, W]` (foreground where > 0). H, W: multiples of `config.stride`."""
        tuner, size = tuner or Tuner(), tuple(pixel_values.shape[-2:])
        self.check_size(*size)
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} images came with {len(input_ids)} prompts; each image needs one.")
        contexts = tuner.contexts()
        activations, features = self.encode_image(pixel_values, tuner, contexts.vision)
        text = self.encode_prompts(input_ids, attention_mask, tuner, contexts.text, features)
        return self.decode(activations, text, size, tuner, pixel_values)

    # Prompts

    def end_of_text(self, input_ids):
        """Index `[B]` of the pooled token: the first end token, or (`HIGHEST`) the highest id."""
        eos = self.config.text.eos_token_id
        return input_ids.argmax(1) if eos == HIGHEST else (input_ids == eos).int().argmax(1)

    def distinct(self, input_ids, attention_mask):
        """Prompts without repetition and needless padding: (input_ids `[U, T]`, attention_mask or None, row `[B]` of each prompt).

        The attention is causal, so what follows the end-of-text token cannot reach it: those columns are cut off, and a padding mask
        stays only where it hides a token before the end. Raises ValueError for a prompt without an end. On a GPU's tensors this
        synchronises; keep `input_ids` on the CPU.
        """
        eos = self.config.text.eos_token_id
        missing = (input_ids != eos).all(1)
        if eos != HIGHEST and missing.any():
            raise ValueError(
                f"Prompt {int(missing.nonzero()[0])} of the batch holds no end-of-text token (id {eos}), so there is nothing to pool. "
                "Was it cut by hand, or made with another model's tokenizer?"
            )
        pairs = input_ids if attention_mask is None else torch.stack([input_ids, attention_mask.to(input_ids)], -1)
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

    def encode_prompts(self, input_ids, attention_mask, tuner, contexts=(), features=None):
        """As `encode_text`, but equal prompts are encoded once, unless their contexts depend on the image.

        (`torch.compile` of the whole cannot look at values: it encodes all.)
        """
        contexts = tuner.text_contexts(contexts, features)
        if torch.compiler.is_compiling():
            return self.encode_text(input_ids, attention_mask, tuner, contexts)
        input_ids, attention_mask, row = self.distinct(input_ids, attention_mask)
        if contexts and contexts[0].dim() == 3:
            mask = None if attention_mask is None else attention_mask[row]
            return self.encode_text(input_ids[row], mask, tuner, contexts)
        text = self.encode_text(input_ids, attention_mask, tuner, contexts)
        row = row.to(text[0].device)
        return tuple(t[row] for t in text)

    def read(self, input_ids, attention_mask, tuner, contexts=()):
        """The text encoder's layers on prompts `[B, T]`: (tokens after each layer, a list of `[B, n+T, D]`; index `[B]` of the pooled one;
        bool `[B, n+T]`, which tokens `attention_mask` leaves to be seen, or None).

        The n contexts stand behind the start token; those of layer i are put over the output of layer i - 1. Where a prompt and its
        contexts exceed the encoder's window, the prompt loses its last words, never its end token.
        """
        encoder, limit = self.text_encoder(), self.config.text.max_position_embeddings
        n = contexts[0].shape[-2] if contexts else 0
        input_ids = input_ids.to(encoder.tokens.weight.device)
        seen = None if attention_mask is None else attention_mask.to(input_ids.device).bool()
        end, rows, keep = self.end_of_text(input_ids), torch.arange(input_ids.shape[0], device=input_ids.device), limit - n
        if input_ids.shape[1] > keep:
            if not n:
                raise ValueError(f"A prompt has {input_ids.shape[1]} tokens; the text encoder takes at most {limit}.")
            cut = [None if t is None else torch.cat([t[:, : keep - 1], t[rows, end][:, None]], 1) for t in (input_ids, seen)]
            (input_ids, seen), end = cut, end.clamp(max=keep - 1)
        mask, S = None, input_ids.shape[1] + n
        if seen is not None:
            seen = F.pad(seen, (n, 0), value=True)
            mask = seen[:, None, None] & torch.ones(S, S, dtype=torch.bool, device=input_ids.device).tril()
        x = encoder.tokens(input_ids)  # [B, T, D]
        if contexts:
            x = put(x, 1, contexts[0])
        x = x + encoder.positions[:S]  # [B, S, D]
        states = []
        for i, block in enumerate(encoder.blocks):
            x = block(x, tuner.adders("text", i), mask, causal=mask is None, updates=tuner.updates("text", i))
            if i + 1 < len(contexts):
                x = put(x, 1, contexts[i + 1], over=n)
            states.append(x)
        return states, end + n, seen
