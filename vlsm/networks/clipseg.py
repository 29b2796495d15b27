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

from vlsm.networks.base import FrozenBlocks, ImageFeatures, Network, TextEncoder, insert_context, patch_tokens
from vlsm.networks.encoder_config import VISION_DEFAULTS, EncoderConfig
from vlsm.networks.transformer import MLP, Attention, encoder_blocks, initialise_embeddings, text_model, tree
from vlsm.system.options import select_fields

# Buffers that older transformers releases wrote; they hold 0, 1, 2, ... and are not needed.
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

        def encoder(name, defaults):  # old files repeat the values, and win, under `<name>_dict`
            values = {**defaults, **(raw.get(name) or {}), **(raw.get(f"{name}_dict") or {})}
            return EncoderConfig.from_dict(values, name)

        top = select_fields(cls, {k: v for k, v in raw.items() if k not in ("text", "vision")})
        top["extract_layers"] = tuple(top.get("extract_layers", cls.extract_layers))
        config = cls(text=encoder("text_config", {}), vision=encoder("vision_config", VISION_DEFAULTS), **top)
        layers, count = config.extract_layers, config.vision.num_hidden_layers
        if not layers or min(layers) < 0 or max(layers) >= count:
            raise ValueError(f"extract_layers {list(layers)} must be indices of the {count} vision layers.")
        return config

    @property
    def stride(self):
        """Return what sides of images are multiples of."""
        return self.vision.patch_size

    @property
    def activation_widths(self):
        """Return the widths of the activations that the decoder reads."""
        return [self.vision.hidden_size] * len(self.extract_layers)

    @property
    def pooled_states(self):
        """Return how many states of the end-of-text token stand beside the conditional embedding."""
        return len(self.extract_layers)

    @property
    def upsampler_sizes(self):
        """Return an upsampler's sizes: channels of the features, to how many they are reduced, its factor."""
        return self.reduce_dim, None, self.vision.patch_size

    def max_prompt_depth(self, encoders, reference=False):
        """Return how many sets of context vectors can act on the logits; the published code has one a layer.

        In the vision encoder a set may stand over the last extracted output: the decoder sees it.
        """
        vision, text = self.vision.num_hidden_layers, self.text.num_hidden_layers
        if reference:
            return min(vision, text)
        limits = dict(vision=max(self.extract_layers) + 2, text=text)
        return min(limits[encoder] for encoder in encoders)


def clip_encoders(c):
    """Return CLIP's two encoders and their projections, in the checkpoint's tree of names."""
    text, vision, wide = c.text, c.vision, c.vision.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    return tree(
        text_model=text_model(text),
        vision_model=tree(
            embeddings=tree(
                class_embedding=nn.Parameter(torch.zeros(wide)),
                patch_embedding=nn.Conv2d(
                    vision.num_channels, wide, vision.patch_size, vision.patch_size, bias=False
                ),
                position_embedding=nn.Embedding(patches + 1, wide),
            ),
            pre_layrnorm=nn.LayerNorm(wide, eps=vision.layer_norm_eps),  # spelt so in the checkpoint
            encoder=tree(layers=encoder_blocks(vision)),
            post_layernorm=nn.LayerNorm(wide, eps=vision.layer_norm_eps),
        ),
        visual_projection=nn.Linear(wide, c.projection_dim, bias=False),
        text_projection=nn.Linear(text.hidden_size, c.projection_dim, bias=False),
        logit_scale=nn.Parameter(torch.tensor(2.6592)),  # not used; in the checkpoint
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
        x = self.layer_norm1(x + self.self_attn(x))
        return self.layer_norm2(x + self.mlp(x))


class Decoder(nn.Module):
    """Reduces the activations, deepest first, modulates them by the prompt (FiLM), upsamples to pixels."""

    def __init__(self, c):
        super().__init__()
        r, patch, depth = c.reduce_dim, c.vision.patch_size, len(c.extract_layers)
        self.conditional_layer = c.conditional_layer
        self.film_mul = nn.Linear(c.projection_dim, r)
        self.film_add = nn.Linear(c.projection_dim, r)
        if c.use_complex_transposed_convolution:
            k = patch // 4
            self.transposed_convolution = nn.Sequential(
                nn.Conv2d(r, r, 3, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(r, r // 2, k, k),
                nn.ReLU(),
                nn.ConvTranspose2d(r // 2, 1, k, k),
            )
        else:
            self.transposed_convolution = nn.ConvTranspose2d(r, 1, patch, patch)
        self.reduces = nn.ModuleList(nn.Linear(c.vision.hidden_size, r) for _ in range(depth))
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(depth))

    def forward(self, activations, cond, grid):
        """Return (logits `[B, 1, H, W]`, the features `[B, r, h, w]` that they are made of); grid: (h, w)."""
        x = 0
        for k, (activation, reduce, layer) in enumerate(
            zip(reversed(activations), self.reduces, self.layers)
        ):
            x = x + reduce(activation)  # [B, 1+N(+n), r]
            if k == self.conditional_layer:
                x = self.film_mul(cond)[:, None] * x + self.film_add(cond)[:, None]
            x = layer(x)
        h, w = grid
        x = x[:, 1 : 1 + h * w]  # class token and contexts dropped
        features = x.transpose(1, 2).unflatten(2, grid)  # [B, r, h, w]
        return self.transposed_convolution(features), features


class CLIPSeg(Network):
    """CLIPSeg of a `CLIPSegConfig`; weights are uninitialised noise until loaded (see weights.py)."""

    name = "CLIPSeg"
    model_types = ("clipseg",)
    default_weights = "CIDAS/clipseg-rd64-refined"
    Config = CLIPSegConfig

    def __init__(self, config, reference=False):
        super().__init__(config, reference)
        self.clip = clip_encoders(config)
        self.decoder = Decoder(config)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Return the activations `[B, 1+N+n, D]` at the extract layers, and the embedding if it is needed.

        Stops after the deepest extract layer, as nothing above it reaches the logits, unless the tuner needs
        the embedding. The n contexts stand behind the patches; those of layer i replace their outputs of
        layer i - 1, and so the decoder sees them too.
        """
        return self.encode_rest(self.encode_blocks(pixel_values, tuner, contexts, 0), tuner, contexts)

    def encode_blocks(self, pixel_values, tuner, contexts=(), depth=None):
        vision = self.clip.vision_model
        embeddings = vision.embeddings
        patches = embeddings.patch_embedding(pixel_values)  # [B, D, h, w]
        x = patch_tokens(patches, embeddings.class_embedding, embeddings.position_embedding.weight)
        if contexts:
            x = insert_context(x, x.shape[1], contexts[0])
        begun = FrozenBlocks(0, vision.pre_layrnorm(x), [], tuple(pixel_values.shape[-2:]))
        last = max(self.config.extract_layers) if depth is None else depth
        return self._run_vision_blocks(begun, last, tuner, contexts, frozen_only=depth is None)

    def encode_rest(self, blocks, tuner, contexts=()):
        vision, wanted = self.clip.vision_model, self.config.extract_layers
        last = len(self.vision_blocks()) if tuner.needs_image_embedding else max(wanted) + 1
        done, embedding = self._run_vision_blocks(blocks, last, tuner, contexts), None
        if tuner.needs_image_embedding:
            embedding = self.clip.visual_projection(vision.post_layernorm(done.tokens[:, 0]))
        by_layer = dict(zip(sorted(set(wanted)), done.activations))
        return ImageFeatures([by_layer[i] for i in wanted], embedding, done.size)

    def _run_vision_blocks(self, begun, last, tuner, contexts, frozen_only=False):
        """Return the `FrozenBlocks` after block `last` - 1, or after the last one that needs no gradient."""
        x, activations = begun.tokens, list(begun.activations)
        n = contexts[0].shape[-2] if contexts else 0
        for i in range(begun.depth, last):
            block = self.vision_blocks()[i]
            after = block(x, tuner.residual_ops("vision", i), deltas=tuner.lora_deltas("vision", i))
            if i + 1 < len(contexts):
                after = insert_context(after, after.shape[1] - n, contexts[i + 1], replace=n)
            if frozen_only and after.requires_grad:
                return FrozenBlocks(i, x, activations, begun.size)
            x = after
            if i in self.config.extract_layers:
                activations.append(x)
        return FrozenBlocks(last, x, activations, begun.size)

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return (conditional embedding `[B, P]`, the pooled state `[B, D]` at each extract layer...)."""
        states, end, _ = self.run_text_blocks(input_ids, attention_mask, tuner, contexts)
        rows = torch.arange(end.shape[0], device=end.device)
        pooled = [x[rows, end] for x in states]
        cond = self.clip.text_projection(self.clip.text_model.final_layer_norm(pooled[-1]))
        return cond, *(pooled[i] for i in self.config.extract_layers if i < len(pooled))

    def decode(self, image_features, text_features, tuner, pixel_values=None):
        cond, *states = text_features
        grid = tuple(side // self.config.vision.patch_size for side in image_features.size)
        activations = [tuner.adapt_activation(k, x) for k, x in enumerate(image_features.activations)]
        logits, features = self.decoder(activations, tuner.adapt_conditional(cond, states), grid)
        if logits.shape[-2:] != image_features.size:  # of a three-layer head, unless patches are of 16
            logits = F.interpolate(logits, image_features.size, mode="bilinear", align_corners=False)
        return tuner.adapt_logits(logits, features)

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
        return [name for name, _ in self.named_parameters() if name.startswith("decoder.")]

    def full_tuning_names(self):
        """Return the names of all parameters that the logits depend on.

        With `reference`, the decoder's alone: the published end-to-end baseline trains no more, without
        meaning to, as it runs both encoders without gradients.
        """
        if self.reference:
            return self.decoder_names()
        unused = ["clip.logit_scale", "clip.visual_projection.", "clip.vision_model.post_layernorm."]
        layers = range(max(self.config.extract_layers) + 1, self.config.vision.num_hidden_layers)
        unused += [f"clip.vision_model.encoder.layers.{i}." for i in layers]
        return [name for name, _ in self.named_parameters() if not name.startswith(tuple(unused))]

    def compilable_blocks(self):
        return [*self.vision_blocks(), *self.text_transformer().blocks, *self.decoder.layers]
