"""SAM 3 in plain PyTorch, the part that its semantic mask needs: a windowed vision transformer with rotary
positions, a neck, CLIP's text transformer, a DETR encoder that fuses both, a pixel decoder.

Parameters carry the names of the Hugging Face checkpoint (`vision_encoder...`, `text_encoder...`,
`detr_encoder...`, `mask_decoder...`) except in attention (`SAM3.renames`). Tensors of the DETR decoder with
its boxes and scores, of the geometry encoder and of the trackers are not loaded. Shapes: B images; h x w, the
grid of patches; D the vision transformer's width; P the width of the neck and of all that follows; S tokens
of a prompt.

Source: Carion et al., "SAM 3: Segment Anything with Concepts" (2025); transformers' `Sam3Model`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import ImageFeatures, Network
from vlsm.networks.transformer import (
    MLP,
    Attention,
    Block,
    EncoderConfig,
    TextEncoder,
    initialise_embeddings,
    rename_keys,
    select_fields,
    text_model,
    to_map,
    to_tokens,
    tree,
)

SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]  # of the published neck; its last level does not reach the mask
LEVELS = (4, 2, 1)  # by how much the neck enlarges the vision transformer's map, finest first
JOINS = len(LEVELS) - 1
PREFIXES = ("detector_model.", "sam3.")  # name prefixes of other exports
UNUSED = (
    "tracker_model.",
    "tracker_neck.",
    "geometry_encoder.",
    "detr_decoder.",
    "dot_product_scoring.",
    "mask_decoder.mask_embedder.",
    "mask_decoder.instance_projection.",
    "text_encoder.text_projection.",
    f"vision_encoder.neck.fpn_layers.{len(LEVELS)}.",
    f"mask_decoder.pixel_decoder.norms.{JOINS}.",
    f"mask_decoder.pixel_decoder.conv_layers.{JOINS}.",
)
# sizes that a config.json leaves out: the published ones
VISION_SIZES = dict(
    hidden_size=1024,
    intermediate_size=4736,
    num_hidden_layers=32,
    image_size=1008,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
)
TEXT_SIZES = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    max_position_embeddings=32,
    hidden_act="gelu",
)
# the fusion's sizes in a config.json -> our fields
FUSION_SIZES = dict(
    num_layers="fusion_layers",
    num_attention_heads="fusion_heads",
    hidden_act="fusion_act",
    intermediate_size="fusion_hidden",
    dropout="dropout",
)


@dataclass(frozen=True)
class SAM3Config:
    """Sizes of a SAM 3 network, as `config.json` holds them; the defaults are the published ones."""

    text: EncoderConfig
    vision: EncoderConfig
    window_size: int = 24
    global_attn_indexes: tuple = (7, 15, 23, 31)
    pretrain_image_size: int = 336
    rope_theta: float = 10000.0
    width: int = 256  # of the neck and of all that follows
    fusion_layers: int = 6
    fusion_heads: int = 8
    fusion_hidden: int = 2048
    fusion_act: str = "relu"
    dropout: float = 0.1
    mask_heads: int = 8

    pooled_states = 0  # the decoder reads the prompt's tokens
    upsampler_sizes = None
    published_coop_ignores_upsampler = False

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a Hugging Face `config.json`, of `sam3` or of `sam3_video`.

        Raises ValueError for sizes that cannot work.
        """
        raw = raw.get("detector_config") or raw
        vision = raw.get("vision_config") or {}
        text = raw.get("text_config") or {}
        fusion = raw.get("detr_encoder_config") or {}
        mask = raw.get("mask_decoder_config") or {}
        backbone = vision.get("backbone_config") or {}
        rope = backbone.get("rope_parameters") or {}
        sizes = select_fields(cls, {**backbone, **rope, "width": vision.get("fpn_hidden_size")})
        sizes.update(rename_keys(fusion, FUSION_SIZES))
        sizes.update(rename_keys(mask, {"num_attention_heads": "mask_heads"}))
        text = {**TEXT_SIZES, **text}
        sizes["text"] = EncoderConfig.from_dict(text, "text_config")
        backbone = {**VISION_SIZES, **backbone}
        sizes["vision"] = EncoderConfig.from_dict(backbone, "vision_config.backbone_config")
        config = cls(**sizes)
        factors = list(vision.get("scale_factors", SCALE_FACTORS))
        if factors != SCALE_FACTORS:
            raise ValueError(f"vision_config.scale_factors {factors} are not {SCALE_FACTORS}.")
        head_width = config.vision.hidden_size // config.vision.num_attention_heads
        if config.width % 8 or head_width % 4:
            raise ValueError(
                f"fpn_hidden_size {config.width} must be a multiple of 8, and the width of a vision head, "
                f"{head_width}, one of 4."
            )
        return config

    @property
    def img_size(self):
        """Return the side of the images that the network was trained on."""
        return self.vision.image_size

    @property
    def stride(self):
        """Return the number that image sides must be multiples of."""
        return self.vision.patch_size

    @property
    def extract_layers(self):
        """Return the layer whose output the rest of the network reads: the last one."""
        return (self.vision.num_hidden_layers - 1,)

    @property
    def ladder_blocks(self):
        """Return the vision blocks whose outputs a ladder reads: those that see the whole image, the last."""
        whole = (*self.global_attn_indexes, *self.extract_layers)
        return [i for i in range(self.vision.num_hidden_layers) if i in whole]

    @property
    def activation_widths(self):
        """Return the widths of the neck's maps."""
        return [self.width] * len(LEVELS)

    @property
    def projection_dim(self):
        """Return the width of a prompt's tokens as the fusion reads them."""
        return self.width

    def max_prompt_depth(self, encoders, reference=False):
        """Return how many sets of context vectors can act: one a text layer, one for the last output."""
        return self.text.num_hidden_layers + 1


# Vision


def rotary_angles(h, w, dim, theta, scale, device):
    """Return (cos, sin), `[h * w, dim]` float32, of axial rotary positions: columns in a head's first half,
    rows in its second, both times `scale`.
    """
    exponents = torch.arange(0, dim // 2, 2, dtype=torch.float, device=device) / (dim // 2)
    frequencies = theta**-exponents  # [dim / 4]
    columns = torch.arange(w, dtype=torch.float, device=device).repeat(h)  # [h * w]
    rows = torch.arange(h, dtype=torch.float, device=device).repeat_interleave(w)
    across = (columns * scale)[:, None] * frequencies
    down = (rows * scale)[:, None] * frequencies
    angles = torch.cat([across, down], -1).repeat_interleave(2, -1)  # [h * w, dim]
    return angles.cos(), angles.sin()


def to_windows(x, grid, side):
    """Cut tokens `[B, h * w, D]` into windows `[B * n, side * side, D]`, zeros beyond the border."""
    h, w = grid
    x = x.unflatten(1, grid)
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, rows, side, columns, side, D]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x, grid, side):
    """Undo `to_windows`."""
    h, w = grid
    rows = -(-h // side)
    columns = -(-w // side)
    x = x.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows * side, columns * side, D]
    return x[:, :h, :w].flatten(1, 2)


class WindowBlock(Block):
    """Pre-norm layer whose attention sees windows of `window` x `window` tokens; 0: all of them."""

    def __init__(self, c, window):
        v = c.vision
        super().__init__(
            v.hidden_size, v.num_attention_heads, v.intermediate_size, v.hidden_act, v.layer_norm_eps
        )
        for name in ("self_attn", "layer_norm2", "mlp"):  # the optimizer's state of a run is in this order
            self._modules[name] = self._modules.pop(name)
        self.window = window
        self.rope_side = c.window_size  # tokens over which rotary positions run, whatever the grid
        self.theta = c.rope_theta

    def attend(self, x, grid, deltas):
        """Return attention's output for normed tokens `[B, h * w, D]` of a grid (h, w)."""
        if not self.window:
            return self.self_attn(x, deltas=deltas, rope=self.angles(*grid, x))
        side = self.window
        windows = to_windows(x, grid, side)  # [B * n, side * side, D]
        out = self.self_attn(windows, deltas=deltas, rope=self.angles(side, side, x))
        return from_windows(out, grid, side)

    def angles(self, h, w, x):
        """Return the rotary angles of a grid for tokens `[..., D]`."""
        width = x.shape[-1] // self.self_attn.heads
        return rotary_angles(h, w, width, self.theta, self.rope_side / w, x.device)

    def _transform(self, x, residual_ops, grid, causal, deltas):
        add_attention, add_mlp = residual_ops
        attended = self.attend(self.layer_norm1(x), grid, deltas)
        x = add_attention(attended, x)  # [B, h * w, D]
        return add_mlp(self.mlp(self.layer_norm2(x)), x)


class NeckLevel(nn.Module):
    """Enlarges the vision transformer's map by `factor` and brings it to the width of the fusion."""

    def __init__(self, d, width, factor):
        super().__init__()
        self.scale_layers = nn.ModuleList()
        if factor > 1:
            self.scale_layers.append(nn.ConvTranspose2d(d, d // 2, 2, 2))
        if factor > 2:
            self.scale_layers.append(nn.GELU())
            self.scale_layers.append(nn.ConvTranspose2d(d // 2, d // 4, 2, 2))
        self.proj1 = nn.Conv2d(d // factor, width, 1)
        self.proj2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        """Transform a map `[B, D, h, w]` -> `[B, P, factor * h, factor * w]`."""
        for layer in self.scale_layers:
            x = layer(x)
        return self.proj2(self.proj1(x))


def sine_positions(h, w, width, device):
    """Return DETR's positions `[h * w, width]` of a grid: sines and cosines of rows, then of columns."""
    down = _axis_positions(h, width // 2, device)[:, None].expand(-1, w, -1)
    across = _axis_positions(w, width // 2, device).expand(h, -1, -1)
    return torch.cat([down, across], -1).flatten(0, 1)


def _axis_positions(n, width, device):
    i = torch.arange(width, device=device)
    periods = 10000 ** (2 * (i // 2) / width)
    angles = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
    angles = angles[:, None] / periods  # [n, width]
    sines = angles[:, 0::2].sin()
    cosines = angles[:, 1::2].cos()
    return torch.stack([sines, cosines], 2).flatten(1)


class FusionLayer(nn.Module):
    """DETR encoder layer: image tokens see each other, then the prompt's tokens."""

    def __init__(self, c):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width)
        self.self_attn = Attention(c.width, c.fusion_heads)
        self.cross_attn = Attention(c.width, c.fusion_heads)
        self.layer_norm2 = nn.LayerNorm(c.width)
        self.mlp = MLP(c.width, c.fusion_hidden, c.fusion_act)
        self.layer_norm3 = nn.LayerNorm(c.width)
        self.dropout = c.dropout

    def forward(self, x, positions, prompt, mask):
        """Transform image tokens `[B, h * w, P]` by a prompt's `[B, S, P]`; mask `[B, 1, 1, S]`."""
        normed = self.layer_norm1(x)
        placed = normed + positions
        x = x + self.drop(self.self_attn(placed, placed, normed))
        x = x + self.drop(self.cross_attn(self.layer_norm2(x), prompt, mask=mask))
        return x + self.drop(self.mlp(self.layer_norm3(x)))  # [B, h * w, P]

    def drop(self, x):
        """Apply dropout in training."""
        return F.dropout(x, self.dropout, self.training)


def vision_backbone(c):
    """Return the vision transformer of a `SAM3Config`, in the checkpoint's tree of names."""
    v = c.vision
    side = c.pretrain_image_size // v.patch_size
    patches = nn.Conv2d(v.num_channels, v.hidden_size, v.patch_size, v.patch_size, bias=False)
    layers = nn.ModuleList()
    for i in range(v.num_hidden_layers):
        layers.append(WindowBlock(c, 0 if i in c.global_attn_indexes else c.window_size))
    return tree(
        embeddings=tree(
            patch_embeddings=tree(projection=patches),
            position_embeddings=nn.Parameter(torch.zeros(1, side * side, v.hidden_size)),
        ),
        layer_norm=nn.LayerNorm(v.hidden_size, eps=v.layer_norm_eps),
        layers=layers,
    )


def mask_decoder(c):
    """Return the attention to the prompt, the pixel decoder and its head, by the checkpoint's names."""
    return tree(
        pixel_decoder=tree(
            conv_layers=nn.ModuleList(nn.Conv2d(c.width, c.width, 3, padding=1) for _ in range(JOINS)),
            norms=nn.ModuleList(nn.GroupNorm(8, c.width) for _ in range(JOINS)),
        ),
        semantic_projection=nn.Conv2d(c.width, 1, 1),
        prompt_cross_attn=Attention(c.width, c.mask_heads),
        prompt_cross_attn_norm=nn.LayerNorm(c.width),
    )


class SAM3(Network):
    """SAM 3 of a `SAM3Config`; weights are uninitialised noise until loaded (see weights.py)."""

    name = "SAM 3"
    model_types = ("sam3", "sam3_video")
    default_weights = "facebook/sam3"
    mean, std = [0.5] * 3, [0.5] * 3
    keeps_padding = True  # prompts have the window's length; padding is hidden by the mask
    compile_dynamic = None  # torch.compile takes minutes to reason about windows of an open grid
    methods = ("none", "decoder", "full", "dense", "shallow", "telescopic", "lora", "side", "coop", "cocoop")
    unsupported_reason = "Its image tokens lie in windows, which leave no place for vision contexts."
    Config = SAM3Config
    renames = (
        ("backbone.layers.#.attention.o_proj.", "backbone.layers.#.self_attn.out_proj."),
        ("backbone.layers.#.attention.", "backbone.layers.#.self_attn."),
        ("detr_encoder.layers.#.self_attn.o_proj.", "detr_encoder.layers.#.self_attn.out_proj."),
        ("detr_encoder.layers.#.cross_attn.o_proj.", "detr_encoder.layers.#.cross_attn.out_proj."),
        ("prompt_cross_attn.o_proj.", "prompt_cross_attn.out_proj."),
    )

    def __init__(self, config, reference=False):
        super().__init__(config, reference)
        width, d = config.width, config.vision.hidden_size
        self.vision_encoder = tree(
            backbone=vision_backbone(config),
            neck=tree(fpn_layers=nn.ModuleList(NeckLevel(d, width, factor) for factor in LEVELS)),
        )
        self.text_encoder = tree(text_model=text_model(config.text))
        self.text_projection = nn.Linear(config.text.hidden_size, width)
        fusion = nn.ModuleList(FusionLayer(config) for _ in range(config.fusion_layers))
        self.detr_encoder = tree(layers=fusion)
        self.mask_decoder = mask_decoder(config)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Encode images `[B, 3, H, W]` to the tokens `[B, h * w, D]` after the `kept_blocks`.

        The embedding is the mean of the neck's coarsest map.
        """
        vision = self.vision_encoder.backbone
        patches = vision.embeddings.patch_embeddings.projection(pixel_values)  # [B, D, h, w]
        grid = patches.shape[-2:]
        x = to_tokens(patches)  # [B, h * w, D]
        x = x + self._tiled_positions(*grid).to(patches.dtype)
        x = vision.layer_norm(x)
        activations = []
        for i, block in enumerate(self.vision_blocks()):
            x = block(x, tuner.residual_ops("vision", i), grid, False, tuner.lora_deltas("vision", i))
            if i in self.kept_blocks(tuner):
                activations.append(x)
        embedding = None
        if tuner.needs_image_embedding:
            coarsest = self.vision_encoder.neck.fpn_layers[-1]
            embedding = coarsest(to_map(x, grid)).mean((2, 3))  # [B, P]
        return ImageFeatures(activations, embedding, pixel_values.shape[-2:])

    def _tiled_positions(self, h, w):
        """Return position embeddings `[h * w, D]`: those of the pretraining's grid, repeated."""
        table = self.vision_encoder.backbone.embeddings.position_embeddings[0]
        side = math.isqrt(len(table))
        rows = -(-h // side)
        columns = -(-w // side)
        table = table.unflatten(0, (side, side)).repeat(rows, columns, 1)
        return table[:h, :w].flatten(0, 1)

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Encode prompts `[B, T]` to (tokens `[B, S, P]`, bool `[B, S]`: those that the image sees)."""
        states, _, seen = self.run_text_blocks(input_ids, attention_mask, tuner, contexts)
        words = self.text_projection(self.text_encoder.text_model.final_layer_norm(states[-1]))
        if seen is None:
            seen = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        return words, seen

    def adapt_activations(self, image_features, tuner, pixel_values=None):
        """Return the neck's maps `[B, P, ., .]`, finest first."""
        by_block = tuner.adapt_blocks(dict(zip(self.kept_blocks(tuner), image_features.activations)))
        (last,) = self.config.extract_layers
        H, W = image_features.size
        grid = (H // self.config.stride, W // self.config.stride)
        x = to_map(by_block[last], grid)  # [B, D, h, w]
        maps = []
        for k, level in enumerate(self.vision_encoder.neck.fpn_layers):
            enlarged = level(x)  # [B, P, ., .]
            tokens = tuner.adapt_activation(k, to_tokens(enlarged))
            maps.append(to_map(tokens, enlarged.shape[2:]))
        return maps

    def decode(self, image_features, text_features, tuner):
        words, seen = text_features
        words = tuner.adapt_conditional(words, [])
        mask = seen[:, None, None]  # [B, 1, 1, S]
        maps = image_features.activations
        H, W = image_features.size
        features = self._fuse(maps[-1], words, mask)
        decoder = self.mask_decoder.pixel_decoder
        for finer, convolution, norm in zip(maps[-2::-1], decoder.conv_layers, decoder.norms):
            features = F.interpolate(features, finer.shape[-2:], mode="nearest") + finer
            features = F.relu(norm(convolution(features)))
        logits = self.mask_decoder.semantic_projection(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, (H, W), mode="bilinear", align_corners=False)
        return tuner.adapt_logits(logits, features)  # [B, 1, H, W]

    def _fuse(self, coarsest, words, mask):
        """Fuse the neck's coarsest map `[B, P, h, w]` with words `[B, S, P]` -> `[B, P, h, w]`."""
        grid = coarsest.shape[-2:]
        x = to_tokens(coarsest)  # [B, h * w, P]
        positions = sine_positions(*grid, x.shape[-1], x.device).to(x.dtype)
        for layer in self.detr_encoder.layers:
            x = layer(x, positions, words, mask)
        normed = self.mask_decoder.prompt_cross_attn_norm(x)
        x = x + self.mask_decoder.prompt_cross_attn(normed, words, mask=mask)
        return to_map(x, grid)

    @classmethod
    def rename(cls, tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            unused = name.startswith(UNUSED) or name.endswith("position_ids")
            if not unused:
                renamed[name] = tensor
        return renamed

    def initialise(self):
        initialise_embeddings(self)
        nn.init.normal_(self.vision_encoder.backbone.embeddings.position_embeddings, std=0.02)

    def text_transformer(self):
        return TextEncoder.of(self.text_encoder.text_model)

    def vision_blocks(self):
        return self.vision_encoder.backbone.layers

    def decoder_names(self):
        return self.parameter_names("detr_encoder.", "mask_decoder.")

    def full_tuning_names(self):
        return self.parameter_names()

    def compilable_blocks(self):
        return [*self.vision_blocks(), *self.text_transformer().blocks, *self.detr_encoder.layers]
