"""CLIPSeg in plain PyTorch: two pre-norm CLIP encoders and a small FiLM-conditioned decoder.

Parameters carry the names of the Hugging Face checkpoint (`clip.vision_model...`, `clip.text_model...`,
`decoder...`), so a checkpoint loads by name. The forward pass computes only what the logits depend on, and
calls the hooks of a `Tuner` (hooks.py) where a tuning method may act.

Sources: Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts" (CVPR 2022); Radford et al.,
CLIP (2021).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import FrozenBlocks, ImageFeatures, Network
from vlsm.networks.transformer import (
    MLP,
    VISION_DEFAULTS,
    Attention,
    EncoderConfig,
    TextEncoder,
    encoder_blocks,
    initialise_embeddings,
    insert_context,
    patch_tokens,
    select_fields,
    text_model,
    to_map,
    tokens_at,
    tree,
)

# buffers in files of older transformers releases; they hold 0, 1, 2, ...
UNUSED_KEYS = ("clip.text_model.embeddings.position_ids", "clip.vision_model.embeddings.position_ids")


@dataclass(frozen=True)
class CLIPSegConfig:
    """Sizes of a CLIPSeg network, as `config.json` holds them."""

    text: EncoderConfig
    vision: EncoderConfig
    projection_dim: int = 512
    extract_layers: tuple = (3, 6, 9)
    reduce_dim: int = 64
    decoder_num_attention_heads: int = 4
    decoder_intermediate_size: int = 2048
    conditional_layer: int = 0
    use_complex_transposed_convolution: bool = False

    published_coop_ignores_upsampler = True

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a Hugging Face `config.json`.

        Raises ValueError for sizes that cannot work.
        """
        text = EncoderConfig.from_dict(_encoder_sizes(raw, "text_config"), "text_config")
        vision_sizes = {**VISION_DEFAULTS, **_encoder_sizes(raw, "vision_config")}
        vision = EncoderConfig.from_dict(vision_sizes, "vision_config")
        sizes = select_fields(cls, raw)
        layers = tuple(sizes.get("extract_layers", cls.extract_layers))
        sizes.update(text=text, vision=vision, extract_layers=layers)
        count = vision.num_hidden_layers
        heads = sizes.get("decoder_num_attention_heads", cls.decoder_num_attention_heads)
        if heads < 1 or sizes.get("reduce_dim", cls.reduce_dim) % heads:
            raise ValueError(f"decoder_num_attention_heads {heads} should divide reduce_dim.")
        if not layers or min(layers) < 0 or max(layers) >= count:
            raise ValueError(f"extract_layers {list(layers)} must be indices of the {count} vision layers.")
        return cls(**sizes)

    @property
    def stride(self):
        """Return the number that image sides must be multiples of."""
        return self.vision.patch_size

    @property
    def ladder_blocks(self):
        """Return the vision blocks whose outputs a ladder reads: all that reach the decoder."""
        return range(max(self.extract_layers) + 1)

    @property
    def activation_widths(self):
        """Return the width of each activation that the decoder reads."""
        return [self.vision.hidden_size] * len(self.extract_layers)

    @property
    def pooled_states(self):
        """Return how many states of the end-of-text token come with the conditional embedding."""
        return len(self.extract_layers)

    @property
    def upsampler_sizes(self):
        """Return an upsampler's sizes: channels of the features, channels after reduction, factor."""
        return self.reduce_dim, None, self.vision.patch_size

    def max_prompt_depth(self, encoders, reference=False):
        """Return how many layers' context vectors can act on the logits.

        In the vision encoder one more set may replace outputs of the deepest extract layer, which the decoder
        reads. With `reference` one set for each layer, as in the published code.
        """
        if reference:
            return min(self.vision.num_hidden_layers, self.text.num_hidden_layers)
        limits = dict(vision=max(self.extract_layers) + 2, text=self.text.num_hidden_layers)
        return min(limits[encoder] for encoder in encoders)


def _encoder_sizes(raw, name):
    """Return an encoder's part of a `config.json`; in old files `<name>_dict` has precedence."""
    return {**(raw.get(name) or {}), **(raw.get(f"{name}_dict") or {})}


def vision_model(c):
    """Build CLIP's vision transformer of an `EncoderConfig`, in Hugging Face's tree of names."""
    width = c.hidden_size
    patches = (c.image_size // c.patch_size) ** 2
    return tree(
        embeddings=tree(
            class_embedding=nn.Parameter(torch.zeros(width)),
            patch_embedding=nn.Conv2d(c.num_channels, width, c.patch_size, c.patch_size, bias=False),
            position_embedding=nn.Embedding(patches + 1, width),
        ),
        pre_layrnorm=nn.LayerNorm(width, eps=c.layer_norm_eps),  # spelt so in the checkpoint
        encoder=tree(layers=encoder_blocks(c)),
        post_layernorm=nn.LayerNorm(width, eps=c.layer_norm_eps),
    )


class DecoderLayer(nn.Module):
    """Post-norm transformer layer; its activation is ReLU whatever `decoder_hidden_act` says."""

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c.reduce_dim, c.decoder_num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(c.reduce_dim, eps=c.vision.layer_norm_eps)
        self.mlp = MLP(c.reduce_dim, c.decoder_intermediate_size, "relu")
        self.layer_norm2 = nn.LayerNorm(c.reduce_dim, eps=c.vision.layer_norm_eps)

    def forward(self, x):
        x = self.layer_norm1(x + self.self_attn(x))  # [B, S, r]
        return self.layer_norm2(x + self.mlp(x))  # [B, S, r]


class Decoder(nn.Module):
    """Reduces the activations, deepest first, modulates them by the prompt (FiLM), upsamples to pixels."""

    def __init__(self, c):
        super().__init__()
        r = c.reduce_dim
        self.conditional_layer = c.conditional_layer
        self.film_mul = nn.Linear(c.projection_dim, r)
        self.film_add = nn.Linear(c.projection_dim, r)
        patch = c.vision.patch_size
        if c.use_complex_transposed_convolution:
            quarter = patch // 4
            self.transposed_convolution = nn.Sequential(
                nn.Conv2d(r, r, 3, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(r, r // 2, quarter, quarter),
                nn.ReLU(),
                nn.ConvTranspose2d(r // 2, 1, quarter, quarter),
            )
        else:
            self.transposed_convolution = nn.ConvTranspose2d(r, 1, patch, patch)
        depth = len(c.extract_layers)
        self.reduces = nn.ModuleList(nn.Linear(c.vision.hidden_size, r) for _ in range(depth))
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(depth))

    def forward(self, reduced, cond, grid):
        """Decode reduced activations `[B, 1+N(+n), r]`, deepest first, by the prompt's embedding `[B, P]`.

        Returns (logits `[B, 1, H, W]`, the features `[B, r, h, w]` that they are made of); grid: (h, w).
        """
        x = 0
        for k, layer in enumerate(self.layers):
            x = x + reduced[k]  # [B, 1+N(+n), r]
            if k == self.conditional_layer:
                x = self.film_mul(cond)[:, None] * x + self.film_add(cond)[:, None]
            x = layer(x)
        h, w = grid
        x = x[:, 1 : 1 + h * w]  # class token and contexts dropped
        features = to_map(x, grid)  # [B, r, h, w]
        return self.transposed_convolution(features), features


class CLIPSeg(Network):
    """CLIPSeg of a `CLIPSegConfig`; weights are uninitialised noise until loaded (see weights.py)."""

    name = "CLIPSeg"
    model_types = ("clipseg",)
    default_weights = "CIDAS/clipseg-rd64-refined"
    Config = CLIPSegConfig

    def __init__(self, config, reference=False):
        super().__init__(config, reference)
        width = config.projection_dim
        self.clip = tree(  # in the checkpoint's tree of names
            text_model=text_model(config.text),
            vision_model=vision_model(config.vision),
            visual_projection=nn.Linear(config.vision.hidden_size, width, bias=False),
            text_projection=nn.Linear(config.text.hidden_size, width, bias=False),
            logit_scale=nn.Parameter(torch.tensor(2.6592)),  # not used; in the checkpoint
        )
        self.decoder = Decoder(config)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Encode images `[B, 3, H, W]` to the activations `[B, 1+N+n, D]` after the `kept_blocks`.

        Stops after the deepest extract layer, as nothing above it reaches the logits, unless the tuner needs
        the embedding. Returns `ImageFeatures`.
        """
        return self.encode_rest(self.embed(pixel_values, contexts), tuner, contexts)

    def encode_blocks(self, pixel_values, tuner, contexts=(), depth=None):
        blocks = self.embed(pixel_values, contexts)
        if depth is not None:
            return self.run_vision(blocks, depth, tuner, contexts)
        # one block at a time, until a trained parameter acts
        for stop in range(1, max(self.config.extract_layers) + 1):
            more = self.run_vision(blocks, stop, tuner, contexts)
            if more.tokens.requires_grad:
                break
            blocks = more
        return blocks

    def encode_rest(self, blocks, tuner, contexts=()):
        stop = max(self.config.extract_layers) + 1
        if tuner.needs_image_embedding:
            stop = len(self.vision_blocks())
        blocks = self.run_vision(blocks, stop, tuner, contexts)
        embedding = None
        if tuner.needs_image_embedding:
            class_token = self.clip.vision_model.post_layernorm(blocks.tokens[:, 0])
            embedding = self.clip.visual_projection(class_token)  # [B, P]
        return ImageFeatures(blocks.activations, embedding, blocks.size)

    def embed(self, pixel_values, contexts=()):
        """Embed images `[B, 3, H, W]`: class token, patches, contexts. Returns `FrozenBlocks` of no block."""
        embeddings = self.clip.vision_model.embeddings
        patches = embeddings.patch_embedding(pixel_values)  # [B, D, h, w]
        x = patch_tokens(patches, embeddings.class_embedding, embeddings.position_embedding.weight)
        if contexts:
            x = insert_context(x, x.shape[1], contexts[0])
        x = self.clip.vision_model.pre_layrnorm(x)  # [B, 1+N+n, D]
        return FrozenBlocks(0, x, [], pixel_values.shape[-2:])

    def run_vision(self, blocks, stop, tuner, contexts=()):
        """Run the vision encoder's blocks `blocks.depth` to `stop` - 1: `FrozenBlocks` -> `FrozenBlocks`.

        The n contexts follow the patches. Before layer i the previous outputs at their places are replaced by
        the contexts of layer i; the decoder sees these tokens, too.
        """
        x = blocks.tokens  # [B, 1+N+n, D]
        activations = list(blocks.activations)
        for i in range(blocks.depth, stop):
            block = self.vision_blocks()[i]
            x = block(x, tuner.residual_ops("vision", i), deltas=tuner.lora_deltas("vision", i))
            if i + 1 < len(contexts):
                n = contexts[0].shape[-2]
                x = insert_context(x, x.shape[1] - n, contexts[i + 1], replace=n)
            if i in self.kept_blocks(tuner):
                activations.append(x)
        return FrozenBlocks(stop, x, activations, blocks.size)

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return (conditional embedding `[B, P]`, the pooled state `[B, D]` at each extract layer...)."""
        states, end, _ = self.run_text_blocks(input_ids, attention_mask, tuner, contexts)
        pooled = [tokens_at(x, end) for x in states]  # [B, D] each
        cond = self.clip.text_projection(self.clip.text_model.final_layer_norm(pooled[-1]))
        at_extract_layers = [pooled[i] for i in self.config.extract_layers if i < len(pooled)]
        return cond, *at_extract_layers

    def adapt_activations(self, image_features, tuner, pixel_values=None):
        """Return the adapted and reduced activations `[B, 1+N+n, r]`, deepest first."""
        by_block = tuner.adapt_blocks(dict(zip(self.kept_blocks(tuner), image_features.activations)))
        activations = []
        for k, i in enumerate(self.config.extract_layers):
            activations.append(tuner.adapt_activation(k, by_block[i]))
        return [reduce(x) for reduce, x in zip(self.decoder.reduces, reversed(activations))]

    def decode(self, image_features, text_features, tuner):
        cond, *states = text_features
        cond = tuner.adapt_conditional(cond, states)  # [B, P]
        H, W = image_features.size
        patch = self.config.vision.patch_size
        logits, features = self.decoder(image_features.activations, cond, (H // patch, W // patch))
        if logits.shape[-2:] != (H, W):  # the three-layer head enlarges by (patch // 4)^2, not by patch
            logits = F.interpolate(logits, (H, W), mode="bilinear", align_corners=False)
        return tuner.adapt_logits(logits, features)  # [B, 1, H, W]

    @classmethod
    def rename(cls, tensors):
        return {name: t for name, t in tensors.items() if name not in UNUSED_KEYS}

    def initialise(self):
        initialise_embeddings(self)
        nn.init.normal_(self.clip.vision_model.embeddings.class_embedding, std=0.02)

    def text_transformer(self):
        return TextEncoder.of(self.clip.text_model)

    def vision_blocks(self):
        return self.clip.vision_model.encoder.layers

    def decoder_names(self):
        return self.parameter_names("decoder.")

    def full_tuning_names(self):
        """Return the names of all parameters that the logits depend on.

        With `reference`, the decoder's alone: the published end-to-end baseline trains no more, without
        meaning to, as it runs both encoders without gradients.
        """
        if self.reference:
            return self.decoder_names()
        unused = ["clip.logit_scale", "clip.visual_projection.", "clip.vision_model.post_layernorm."]
        for i in range(max(self.config.extract_layers) + 1, self.config.vision.num_hidden_layers):
            unused.append(f"clip.vision_model.encoder.layers.{i}.")
        unused = self.parameter_names(*unused)
        return [name for name in self.parameter_names() if name not in unused]

    def compilable_blocks(self):
        return [*self.vision_blocks(), *self.text_transformer().blocks, *self.decoder.layers]
