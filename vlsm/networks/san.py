"""SAN in plain PyTorch: a small vision transformer next to a frozen CLIP proposes masks, and attention biases
with which CLIP computes an embedding of each mask.

Parameters carry the published names (`clip_model...`, `side_adapter_network...`) except in blocks
(`SAN.renames`); CLIP's come from a Hugging Face CLIP folder. Shapes: B images; H x W, the side network's
grid; L = h x w, CLIP's patches; Q masks; P the width of embeddings.

Source: Xu et al., "Side Adapter Network for Open-Vocabulary Semantic Segmentation" (CVPR 2023).
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import EOS_IS_MAX_ID, ImageFeatures, Network
from vlsm.networks.clip import CLIP, CLIP_MEAN, CLIP_STD, SIZE_TENSORS, VisionTransformer, from_hugging_face
from vlsm.networks.transformer import (
    Block,
    EncoderConfig,
    noise,
    rename_keys,
    resize_positions,
    select_fields,
    to_map,
    to_tokens,
    tokens_at,
    tree,
)
from vlsm.networks.weights import OPENAI_BLOCK

SIDE, CLIP_PART = "side_adapter_network.", "clip_model."
HIDDEN = -100.0  # attention bias that hides a token (published value)
FUSION = {0: 0, 1: 3, 2: 6, 3: 9}  # side block -> CLIP layer
FUSION_REFERENCE = {0: 0, 3: 1, 6: 2, 9: 3}  # the published code inverts it
ALIASES = ("clip_visual_extractor.", "clip_rec_head.")  # second names of CLIP's tensors in published files
# names of sizes in a config.json -> our fields
ENCODER_SIZES = dict(
    width="hidden_size",
    layers="num_hidden_layers",
    heads="num_attention_heads",
    context_length="max_position_embeddings",
)
SIDE_SIZES = dict(
    width="side_width",
    depth="side_depth",
    heads="side_heads",
    patch_size="side_patch",
    img_size="side_img_size",
)


def encoder_config(raw, names, defaults):
    """Return the `EncoderConfig` of the first of some parts of a `config.json`, over defaults."""
    given = {}
    for name in reversed(names):
        given = raw.get(name) or given
    values = {**defaults, **given, **rename_keys(given, ENCODER_SIZES)}
    values.setdefault("intermediate_size", 4 * values.get("hidden_size", EncoderConfig.hidden_size))
    values["eos_token_id"] = EOS_IS_MAX_ID
    return EncoderConfig.from_dict(values, names[0])


@dataclass(frozen=True)
class SANConfig:
    """Sizes of a SAN; the defaults are the published ones, next to CLIP ViT-B/16."""

    text: EncoderConfig
    vision: EncoderConfig
    projection_dim: int = 512
    img_size: int = 640
    clip_resolution: float = 0.5  # of the images that CLIP sees
    split_layer: int = 9  # CLIP's layers from here on compute the masks' embeddings
    num_queries: int = 100
    side_width: int = 240
    side_depth: int = 8
    side_heads: int = 6
    side_patch: int = 16
    side_img_size: int = 640
    embed_channels: int = 256
    mlp_channels: int = 256
    # side block -> CLIP layer; empty: FUSION, with `reference` FUSION_REFERENCE
    fusion_map: dict = field(default_factory=dict)

    upsampler_sizes = None  # the logits are a sum of masks, not made of features

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a Hugging Face CLIP's `config.json`.

        It may hold sizes of the side network, too: img_size, clip_resolution, split_layer, num_queries,
        fusion_map, side_vit, mask_decoder. Raises ValueError for sizes that cannot work.
        """
        side = raw.get("side_vit") or {}
        masks = raw.get("mask_decoder") or {}
        sizes = select_fields(cls, {"projection_dim": raw.get("embed_dim"), **raw, **masks})
        sizes["side_img_size"] = sizes.get("img_size", cls.img_size)
        sizes.update(rename_keys(side, SIDE_SIZES))
        sizes["fusion_map"] = {}
        for block, layer in (raw.get("fusion_map") or {}).items():
            sizes["fusion_map"][int(block)] = int(layer)
        sizes["text"] = encoder_config(raw, ("text_config", "clip_text"), {})
        vision_defaults = dict(hidden_size=768, num_attention_heads=12, patch_size=16)
        sizes["vision"] = encoder_config(raw, ("vision_config", "clip_vision"), vision_defaults)
        config = cls(**sizes)
        if config.side_width % config.side_heads:
            raise ValueError(
                f"side_vit: width {config.side_width} is no multiple of {config.side_heads} heads."
            )
        return config

    @property
    def stride(self):
        """Return the number that image sides must be multiples of: the side network's patch."""
        return self.side_patch  # CLIP's input is cut to whole patches


class SideViT(nn.Module):
    """The side network's vision transformer; `SideNetwork` runs its blocks."""

    def __init__(self, c):
        super().__init__()
        width = c.side_width
        positions = (c.side_img_size // c.side_patch) ** 2
        self.patch_embed = tree(proj=nn.Conv2d(3, width, c.side_patch, c.side_patch))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList()
        for _ in range(c.side_depth):
            self.blocks.append(Block(width, c.side_heads, 4 * width, "gelu", 1e-6))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class Fusion(nn.Module):
    """CLIP's patches on their way into the side network: norm, 1 x 1 convolution, enlargement."""

    def __init__(self, c):
        super().__init__()
        conv = nn.Conv2d(c.vision.hidden_size, c.side_width, 1)
        nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(conv.bias)
        self.input_proj = nn.ModuleList([nn.LayerNorm(c.vision.hidden_size, eps=1e-6), conv])

    def forward(self, tokens, clip_grid, grid):
        """Fit CLIP's patches `[B, L, .]` to the side network's grid: `[B, H*W, D]`."""
        norm, conv = self.input_proj
        x = to_map(norm(tokens), clip_grid)  # [B, ., h, w]
        x = F.interpolate(conv(x), size=grid, mode="bilinear", align_corners=False)
        return to_tokens(x)


class ThreeLayerMLP(nn.Module):
    """Three layers with ReLU between them; on maps they are 1 x 1 convolutions."""

    def __init__(self, dim, hidden, out, of_maps):
        super().__init__()
        self.layers = nn.ModuleList()
        for a, b in ((dim, hidden), (hidden, hidden), (hidden, out)):
            self.layers.append(nn.Conv2d(a, b, 1) if of_maps else nn.Linear(a, b))

    def forward(self, x):
        """Transform `[B, Q, dim]` -> `[B, Q, out]`, or maps `[B, dim, H, W]` -> `[B, out, H, W]`."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Makes masks and CLIP's attention biases from queries and pixels, by inner products."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vision.num_attention_heads
        width, hidden, out = c.side_width, c.mlp_channels, c.embed_channels
        self.query_mlp = ThreeLayerMLP(width, hidden, out, of_maps=False)
        self.pix_mlp = ThreeLayerMLP(width, hidden, out, of_maps=True)
        self.attn_mlp = ThreeLayerMLP(width, hidden, out * self.heads, of_maps=True)
        self.bias_scaling = nn.Linear(1, 1)

    def forward(self, queries, pixels):
        """Decode queries `[B, Q, D]` and pixels `[B, D, H, W]`.

        Returns (masks `[B, Q, H, W]`, attention biases `[B, heads, Q, H, W]`).
        """
        q = self.query_mlp(queries)  # [B, Q, C]
        masks = torch.einsum("bqc,bchw->bqhw", q, self.pix_mlp(pixels))
        per_head = self.attn_mlp(pixels).unflatten(1, (self.heads, -1))  # [B, heads, C, H, W]
        bias = torch.einsum("bqc,bnchw->bnqhw", q, per_head)
        return masks, self.bias_scaling(bias[..., None])[..., 0]


class SideNetwork(nn.Module):
    """The side network, which SAN trains; it proposes masks and attention biases."""

    def __init__(self, c):
        super().__init__()
        self.fusion_map = c.fusion_map
        self.query_embed = noise(1, c.num_queries, c.side_width)
        self.query_pos_embed = noise(1, c.num_queries, c.side_width)
        self.vit_model = SideViT(c)
        self.fusion_layers = nn.ModuleDict({f"layer_{block}": Fusion(c) for block in c.fusion_map})
        self.mask_decoder = MaskDecoder(c)

    def forward(self, pixel_values, features, clip_grid):
        """Return masks `[B, Q, H, W]` and attention biases `[B, heads, Q, H, W]` of images.

        features: CLIP's tokens `[B, 1+L, .]` by layer, whose patches have the grid `clip_grid`.
        """
        patches = self.vit_model.patch_embed.proj(pixel_values)  # [B, D, H, W]
        B, D, H, W = patches.shape
        Q = self.query_embed.shape[1]
        pixel_positions = resize_positions(self.vit_model.pos_embed[0], H, W)
        position = torch.cat([self.query_pos_embed[0], pixel_positions])  # [Q+H*W, D]
        queries = self.query_embed.to(patches.dtype).expand(B, Q, D)
        x = torch.cat([queries, to_tokens(patches)], 1) + position
        x = self.fuse(0, x, features, clip_grid, (H, W))
        for n, block in enumerate(self.vit_model.blocks, 1):
            x = self.fuse(n, block(x), features, clip_grid, (H, W))  # [B, Q+H*W, D]
            if n < len(self.vit_model.blocks):
                x = x + position
        return self.mask_decoder(x[:, :Q], to_map(x[:, Q:], (H, W)))

    def fuse(self, n, x, features, clip_grid, grid):
        """Add CLIP's patches to the pixels among tokens `[B, Q+H*W, D]`, if `fusion_map` has block n."""
        if n not in self.fusion_map:
            return x
        clip_patches = features[self.fusion_map[n]][:, 1:]
        added = self.fusion_layers[f"layer_{n}"](clip_patches, clip_grid, grid)
        Q = self.query_embed.shape[1]
        return torch.cat([x[:, :Q], x[:, Q:] + added], 1)


class SAN(Network):
    """SAN of a `SANConfig`.

    Logits are the sum of the masks, each weighted by the cosine of its embedding and the prompt's. (SAN's own
    scale on the cosine sharpens a softmax over many classes; with one prompt there is no softmax.) Gradients
    run through the frozen CLIP into the biases, as in SAN's paper. With `reference`, as in the published
    comparison: CLIP runs without gradients, so that the biases never learn; the fusion map is inverted; and
    the weight is the mean over channels of the product with the prompt's unnormalised embedding.
    """

    name = "SAN"
    model_types = ("clip", "san")
    default_weights = "openai/clip-vit-base-patch16"
    mean, std = CLIP_MEAN, CLIP_STD
    methods = ("none", "decoder", "full")
    unsupported_reason = (
        "SAN is an adapter itself, a network next to a frozen CLIP: --peft full trains as the paper does, "
        "--peft decoder the same without CLIP's position embedding, so that CLIP runs once for each image."
    )
    decoder_reads_pixels = True
    Config = SANConfig
    renames = (
        *OPENAI_BLOCK,
        ("vit_model.blocks.#.norm1.", "vit_model.blocks.#.layer_norm1."),
        ("vit_model.blocks.#.norm2.", "vit_model.blocks.#.layer_norm2."),
        ("vit_model.blocks.#.attn.qkv.", "vit_model.blocks.#.self_attn.qkv_proj."),
        ("vit_model.blocks.#.attn.proj.", "vit_model.blocks.#.self_attn.out_proj."),
    )

    def __init__(self, config, reference=False):
        layers = range(config.vision.num_hidden_layers)
        fusion = config.fusion_map or (FUSION_REFERENCE if reference else FUSION)
        if config.split_layer not in layers[1:] or not set(fusion.values()) <= set(layers):
            raise ValueError(
                f"split_layer {config.split_layer} and fusion_map {fusion} must name some of CLIP's "
                f"{len(layers)} layers."
            )
        super().__init__(replace(config, fusion_map=fusion), reference)
        visual = VisionTransformer(config.vision, config.projection_dim)
        self.clip_model = CLIP(visual, config.text, config.projection_dim)
        self.side_adapter_network = SideNetwork(self.config)
        fused = {layer for block, layer in fusion.items() if block <= config.side_depth}
        self.kept_layers = sorted(fused.union(layers[config.split_layer :]))

    def smallest_side(self):
        """Return the side of images that leave CLIP one patch."""
        c = self.config
        return c.stride * math.ceil(c.vision.patch_size / c.clip_resolution / c.stride)

    def clip_gradients(self):
        """Return the context in which CLIP runs: with gradients, but not with `reference`."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.reference)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Encode images `[B, 3, H, W]` to CLIP's tokens `[B, 1+L, .]` before each of `kept_layers`."""
        visual = self.clip_model.visual
        scale = self.config.clip_resolution
        last = self.kept_layers[-1]
        activations = []
        with self.clip_gradients():
            small = F.interpolate(pixel_values, scale_factor=scale, mode="bilinear", align_corners=False)
            x = visual.embed(small)
            for i, block in enumerate(visual.transformer.resblocks[: last + 1]):
                if i in self.kept_layers:
                    activations.append(x)
                if i < last:
                    x = block(x)
        return ImageFeatures(activations, None, pixel_values.shape[-2:])

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Encode prompts `[B, T]` to their embeddings, a tuple of one tensor `[B, P]`."""
        clip = self.clip_model
        if self.reference:
            attention_mask = None
        with self.clip_gradients():
            states, end, _ = self.run_text_blocks(input_ids, attention_mask, tuner)
            pooled = tokens_at(states[-1], end)
            return (clip.ln_final(pooled) @ clip.text_projection,)

    def embed_masks(self, bias, features, clip_grid):
        """Return embeddings `[B, Q, P]` of length one.

        CLIP's last layers run with a class token for each mask, which sees itself and, by `bias` `[B, heads,
        Q, H, W]`, the patches. `features` hold the other tokens' states: these see none of the masks' tokens.
        """
        visual = self.clip_model.visual
        split = self.config.split_layer
        B, heads, Q = bias.shape[:3]
        bias = F.adaptive_max_pool2d(bias.flatten(1, 2), clip_grid).view(B, heads, Q, -1)  # [B, heads, Q, L]
        others = 1 - torch.eye(Q, Q + 1, device=bias.device, dtype=bias.dtype)
        hidden = (HIDDEN * others).expand(B, heads, -1, -1)
        mask = torch.cat([hidden, bias], 3)  # [B, heads, Q, Q+1+L]
        x = features[split][:, :1].expand(-1, Q, -1)
        for i in range(split, self.config.vision.num_hidden_layers):
            x = visual.transformer.resblocks[i].cross(x, features[i], mask)
        return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)

    def weigh_masks(self, embeddings, text):
        """Return the weight `[B, Q]` of each mask, from its embedding and the prompt's `[B, P]`."""
        if self.reference:
            return (embeddings * text[:, None]).mean(-1)
        return (embeddings * F.normalize(text, dim=-1)[:, None]).sum(-1)

    def adapt_activations(self, image_features, tuner, pixel_values=None):
        """Return [masks `[B, Q, H, W]`, their embeddings `[B, Q, P]`] of images."""
        H, W = image_features.size
        features = dict(zip(self.kept_layers, image_features.activations))
        step = self.config.vision.patch_size / self.config.clip_resolution
        clip_grid = (int(H // step), int(W // step))
        masks, bias = self.side_adapter_network(pixel_values, features, clip_grid)
        with self.clip_gradients():
            return [masks, self.embed_masks(bias, features, clip_grid)]

    def decode(self, image_features, text_features, tuner):
        (text,) = text_features
        masks, embeddings = image_features.activations
        H, W = image_features.size
        with self.clip_gradients():
            weights = self.weigh_masks(embeddings, text)
        # summed before they are enlarged, which is linear
        logits = torch.einsum("bq,bqhw->bhw", weights.to(masks.dtype), masks)[:, None]
        logits = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
        return tuner.adapt_logits(logits, masks)  # [B, 1, H, W]

    @classmethod
    def rename(cls, tensors):
        tensors = {name.removeprefix("net."): t for name, t in tensors.items()}
        if any(name.startswith("vision_model.") for name in tensors):
            tensors = from_hugging_face(tensors)
        whole = any(name.startswith((SIDE, CLIP_PART)) for name in tensors)  # else CLIP alone
        renamed = {}
        for name, tensor in tensors.items():
            if name in SIZE_TENSORS or name.startswith(ALIASES):
                continue
            renamed[name if whole else CLIP_PART + name] = tensor
        return renamed

    def fresh_tensors(self, tensors):
        if any(name.startswith(SIDE) for name in tensors):
            return {}
        side = SideNetwork(self.config).state_dict()
        return {SIDE + name: tensor for name, tensor in side.items()}

    def text_transformer(self):
        return self.clip_model.text_transformer()

    def decoder_names(self):
        return self.parameter_names(SIDE)

    def full_tuning_names(self):
        return [*self.decoder_names(), f"{CLIP_PART}visual.positional_embedding"]

    def compilable_blocks(self):
        clip = self.clip_model
        side = self.side_adapter_network.vit_model.blocks
        return [*clip.visual.transformer.resblocks, *clip.transformer.resblocks, *side]
