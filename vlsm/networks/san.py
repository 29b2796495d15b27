"""SAN in plain PyTorch: a small vision transformer beside a frozen CLIP proposes masks and says where CLIP
should look to name each.

Parameters carry the published names (`clip_model...`, `side_adapter_network...`); CLIP's come from a Hugging
Face CLIP folder. Shapes: B images; H x W, the side network's grid; L = h x w, CLIP's patches; Q masks.

Source: Xu et al., "Side Adapter Network for Open-Vocabulary Semantic Segmentation" (CVPR 2023).
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import EOS_IS_MAX_ID, ImageFeatures, Network
from vlsm.networks.clip import CLIP, CLIP_MEAN, CLIP_STD, SIZE_TENSORS, VisionTransformer, from_hugging_face
from vlsm.networks.encoder_config import VISION_DEFAULTS, EncoderConfig
from vlsm.networks.renaming import OPENAI_BLOCK
from vlsm.networks.transformer import Block, noise, resize_positions

SIDE, CLIP_PART = "side_adapter_network.", "clip_model."
HIDDEN = -100.0  # the published bias of what a mask's token must not see
FUSION = {0: 0, 1: 3, 2: 6, 3: 9}  # side block -> CLIP layer
FUSION_REFERENCE = {0: 0, 3: 1, 6: 2, 9: 3}  # the published code inverts it
ALIASES = ("clip_visual_extractor.", "clip_rec_head.")  # second names of CLIP's tensors in published files
SYNONYMS = dict(
    width="hidden_size",
    layers="num_hidden_layers",
    heads="num_attention_heads",
    context_length="max_position_embeddings",
)


@dataclass(frozen=True)
class SANConfig:
    """Sizes of a SAN; the defaults are the published ones, beside CLIP ViT-B/16."""

    text: EncoderConfig
    vision: EncoderConfig
    projection_dim: int = 512
    img_size: int = 640
    clip_resolution: float = 0.5  # of the images that CLIP sees
    split_layer: int = 9  # CLIP's layers from here on name the masks
    num_queries: int = 100
    side_width: int = 240
    side_depth: int = 8
    side_heads: int = 6
    side_patch: int = 16
    side_img_size: int = 640
    embed_channels: int = 256
    mlp_channels: int = 256
    # side block -> CLIP layer; empty: as published, or as the published code has it
    fusion_map: dict = field(default_factory=dict)

    upsampler_sizes = None  # the logits are a sum of masks, not made of features

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a Hugging Face CLIP's `config.json`; what it may say of the side network
        besides: img_size, clip_resolution, split_layer, num_queries, fusion_map, side_vit, mask_decoder.
        Raises ValueError for sizes that cannot work.
        """

        def encoder(names, defaults):
            given = next((raw[name] for name in names if raw.get(name)), {})
            values = {**defaults, **{SYNONYMS.get(k, k): v for k, v in given.items()}}
            values.setdefault("intermediate_size", 4 * values.get("hidden_size", EncoderConfig.hidden_size))
            return EncoderConfig.from_dict({**values, "eos_token_id": EOS_IS_MAX_ID}, names[0])

        defaults = dict(VISION_DEFAULTS, patch_size=16)
        defaults.pop("intermediate_size")
        parts = dict(
            text=encoder(("text_config", "clip_text"), {}),
            vision=encoder(("vision_config", "clip_vision"), defaults),
        )
        own = {k: raw[k] for k in ("img_size", "clip_resolution", "split_layer", "num_queries") if k in raw}
        own["projection_dim"] = raw.get("projection_dim", raw.get("embed_dim", cls.projection_dim))
        side, masks = raw.get("side_vit") or {}, raw.get("mask_decoder") or {}
        names = dict(
            width="side_width",
            depth="side_depth",
            heads="side_heads",
            patch_size="side_patch",
            img_size="side_img_size",
        )
        own.update({names[k]: v for k, v in side.items() if k in names})
        own.update({k: v for k, v in masks.items() if k in ("embed_channels", "mlp_channels")})
        own["fusion_map"] = {int(block): int(layer) for block, layer in (raw.get("fusion_map") or {}).items()}
        own.setdefault("side_img_size", own.get("img_size", cls.img_size))
        config = cls(**parts, **own)
        if config.side_width % config.side_heads:
            raise ValueError(
                f"side_vit: width {config.side_width} is no multiple of {config.side_heads} heads."
            )
        return config

    @property
    def stride(self):
        """Return what sides of images are multiples of: the side network's patch; CLIP's input is cut."""
        return self.side_patch


class SideViT(nn.Module):
    """The side network's vision transformer; `SideNetwork` runs its blocks."""

    def __init__(self, c):
        super().__init__()
        width, positions = c.side_width, (c.side_img_size // c.side_patch) ** 2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, c.side_patch, c.side_patch)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, positions, width), std=0.02))
        self.blocks = nn.ModuleList(
            Block(width, c.side_heads, 4 * width, "gelu", 1e-6) for _ in range(c.side_depth)
        )
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

    def forward(self, tokens, into, out):
        norm, conv = self.input_proj
        x = conv(norm(tokens).transpose(1, 2).unflatten(2, into))  # [B, D, h, w]
        x = F.interpolate(x, size=out, mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2)  # [B, H*W, D]


class MLP(nn.Module):
    """Three layers with ReLU between; on maps they are 1 x 1 convolutions."""

    def __init__(self, dim, hidden, out, of_maps):
        super().__init__()
        widths = (dim, hidden, hidden, out)
        make = (lambda a, b: nn.Conv2d(a, b, 1)) if of_maps else nn.Linear
        self.layers = nn.ModuleList(make(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.vision.num_attention_heads
        sizes = c.side_width, c.mlp_channels
        self.query_mlp = MLP(*sizes, c.embed_channels, of_maps=False)
        self.pix_mlp = MLP(*sizes, c.embed_channels, of_maps=True)
        self.attn_mlp = MLP(*sizes, c.embed_channels * self.heads, of_maps=True)
        self.bias_scaling = nn.Linear(1, 1)

    def forward(self, queries, pixels):
        """Return (masks `[B, Q, H, W]`, attention biases `[B, heads, Q, H, W]`).

        queries: `[B, Q, D]`; pixels: `[B, D, H, W]`.
        """
        q = self.query_mlp(queries)
        masks = torch.einsum("bqc,bchw->bqhw", q, self.pix_mlp(pixels))
        bias = torch.einsum("bqc,bnchw->bnqhw", q, self.attn_mlp(pixels).unflatten(1, (self.heads, -1)))
        return masks, self.bias_scaling(bias[..., None])[..., 0]


class SideNetwork(nn.Module):
    """What SAN trains; a fresh one starts as published."""

    def __init__(self, c):
        super().__init__()
        self.fusion_map = c.fusion_map
        self.query_embed, self.query_pos_embed = (noise(1, c.num_queries, c.side_width) for _ in range(2))
        self.vit_model = SideViT(c)
        self.fusion_layers = nn.ModuleDict({f"layer_{block}": Fusion(c) for block in c.fusion_map})
        self.mask_decoder = MaskDecoder(c)

    def forward(self, pixel_values, features, clip_grid):
        """Return masks `[B, Q, H, W]` and attention biases `[B, heads, Q, H, W]` of images.

        features: CLIP's tokens `[B, 1+L, D]` by layer, whose patches have the grid `clip_grid`.
        """
        patches = self.vit_model.patch_embed.proj(pixel_values)  # [B, D, H, W]
        (B, D, H, W), Q = patches.shape, self.query_embed.shape[1]
        pixel_positions = resize_positions(self.vit_model.pos_embed[0], H, W)
        position = torch.cat([self.query_pos_embed[0], pixel_positions])  # [Q+H*W, D]
        queries = self.query_embed.to(patches.dtype).expand(B, Q, D)
        x = torch.cat([queries, patches.flatten(2).transpose(1, 2)], 1) + position
        depth = len(self.vit_model.blocks)
        for n in range(depth + 1):
            if n:
                x = self.vit_model.blocks[n - 1](x)
            if n in self.fusion_map:
                clip_patches = features[self.fusion_map[n]][:, 1:]
                added = self.fusion_layers[f"layer_{n}"](clip_patches, clip_grid, (H, W))
                x = torch.cat([x[:, :Q], x[:, Q:] + added], 1)
            if 0 < n < depth:
                x = x + position
        return self.mask_decoder(x[:, :Q], x[:, Q:].transpose(1, 2).unflatten(2, (H, W)))


class SAN(Network):
    """SAN of a `SANConfig`.

    Logits are the masks, each weighted by the cosine of its embedding and the prompt's, and summed. (SAN's
    own scale on the cosine sharpens a softmax over many classes; one prompt has none.) Gradients run through
    the frozen CLIP into the biases, as SAN means it. With `reference`, as the published comparison has it:
    CLIP runs without gradients, so that the biases never learn, the fusion map is inverted, and the weight is
    the mean over channels of the product with the prompt's embedding as it is.
    """

    name = "SAN"
    model_types = ("clip", "san")
    default_weights = "openai/clip-vit-base-patch16"
    mean, std = CLIP_MEAN, CLIP_STD
    methods = ("none", "decoder", "full")
    unsupported_reason = (
        "SAN is an adapter itself, a network beside a frozen CLIP: --peft full trains what the paper's does, "
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
        layers = config.vision.num_hidden_layers
        fusion = config.fusion_map or (FUSION_REFERENCE if reference else FUSION)
        if not 0 < config.split_layer < layers or not set(fusion.values()) <= set(range(layers)):
            raise ValueError(
                f"split_layer {config.split_layer} and fusion_map {fusion} must name some of CLIP's {layers} "
                "layers."
            )
        super().__init__(replace(config, fusion_map=fusion), reference)
        visual = VisionTransformer(config.vision, config.projection_dim)
        self.clip_model = CLIP(visual, config.text, config.projection_dim)
        self.side_adapter_network = SideNetwork(self.config)
        fused = {layer for block, layer in fusion.items() if block <= config.side_depth}
        self.kept_layers = sorted(fused | set(range(config.split_layer, layers)))

    def smallest_side(self):
        """Return the side of images that leave CLIP one patch."""
        c = self.config
        return c.stride * math.ceil(c.vision.patch_size / c.clip_resolution / c.stride)

    def clip_gradients(self):
        """Return the context in which CLIP runs: with gradients, but not with `reference`."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.reference)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Return CLIP's tokens `[B, 1+L, D]` before each of the layers `kept_layers`."""
        visual, found = self.clip_model.visual, {}
        with self.clip_gradients():
            scale = self.config.clip_resolution
            small = F.interpolate(pixel_values, scale_factor=scale, mode="bilinear", align_corners=False)
            x = visual.embed(small)
            for i, block in enumerate(visual.transformer.resblocks):
                found[i] = x
                if i < self.kept_layers[-1]:
                    x = block(x)
        return ImageFeatures([found[i] for i in self.kept_layers], None, tuple(pixel_values.shape[-2:]))

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return the prompts' embeddings, a tuple of one tensor `[B, P]`."""
        clip = self.clip_model
        with self.clip_gradients():
            seen = None if self.reference else attention_mask
            states, end, _ = self.run_text_blocks(input_ids, seen, tuner)
            pooled = states[-1][torch.arange(end.shape[0], device=end.device), end]
            return (clip.ln_final(pooled) @ clip.text_projection,)

    def embed_masks(self, bias, features, clip_grid):
        """Return embeddings `[B, Q, P]` of length one.

        CLIP's last layers run with a class token for each mask, which sees itself and, as `bias` `[B, heads,
        Q, H, W]` has it, the patches. What the other tokens do there, `features` hold: they see none of
        these.
        """
        visual, split = self.clip_model.visual, self.config.split_layer
        B, heads, Q = bias.shape[:3]
        bias = F.adaptive_max_pool2d(bias.flatten(1, 2), clip_grid).view(B, heads, Q, -1)  # [B, heads, Q, L]
        own = HIDDEN * (1 - torch.eye(Q, Q + 1, device=bias.device, dtype=bias.dtype))
        mask = torch.cat([own.expand(B, heads, -1, -1), bias], 3)  # [B, heads, Q, Q+1+L]
        x = features[split][:, :1].expand(-1, Q, -1)
        for i in range(split, self.config.vision.num_hidden_layers):
            x = visual.transformer.resblocks[i].cross(x, features[i], mask)
        return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)

    def weigh_masks(self, embeddings, text):
        """Return the weight `[B, Q]` of each mask, from its embedding and the prompt's `[B, P]`."""
        if self.reference:
            return (embeddings * text[:, None]).mean(-1)
        return (embeddings * F.normalize(text, dim=-1)[:, None]).sum(-1)

    def decode(self, image_features, text_features, tuner, pixel_values=None):
        size, features = image_features.size, dict(zip(self.kept_layers, image_features.activations))
        step = self.config.vision.patch_size / self.config.clip_resolution
        clip_grid = tuple(int(side // step) for side in size)
        masks, bias = self.side_adapter_network(pixel_values, features, clip_grid)
        with self.clip_gradients():
            weights = self.weigh_masks(self.embed_masks(bias, features, clip_grid), *text_features)
        # summed first: enlarging is linear
        logits = torch.einsum("bq,bqhw->bhw", weights.to(masks.dtype), masks)[:, None]
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return tuner.adapt_logits(logits, masks)

    @classmethod
    def rename(cls, tensors):
        tensors = {name.removeprefix("net."): t for name, t in tensors.items()}
        if any(name.startswith("vision_model.") for name in tensors):
            tensors = from_hugging_face(tensors)
        own = {name: t for name, t in tensors.items() if name.startswith((SIDE, CLIP_PART))}
        unused = (*own, *SIZE_TENSORS)
        rest = {n: t for n, t in tensors.items() if n not in unused and not n.startswith(ALIASES)}
        return {**own, **{name if own else CLIP_PART + name: t for name, t in rest.items()}}

    def fresh_tensors(self, tensors):
        if any(name.startswith(SIDE) for name in tensors):
            return {}
        return {SIDE + name: t for name, t in SideNetwork(self.config).state_dict().items()}

    def text_transformer(self):
        return self.clip_model.text_transformer()

    def decoder_names(self):
        return [name for name, _ in self.named_parameters() if name.startswith(SIDE)]

    def full_tuning_names(self):
        return [*self.decoder_names(), f"{CLIP_PART}visual.positional_embedding"]

    def compilable_blocks(self):
        clip = self.clip_model
        side = self.side_adapter_network.vit_model.blocks
        return [*clip.visual.transformer.resblocks, *clip.transformer.resblocks, *side]
