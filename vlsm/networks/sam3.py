"""SAM 3 in plain PyTorch, as far as its semantic mask needs it: a windowed vision transformer with rotary
positions, a neck, CLIP's text transformer, a DETR encoder that fuses both, a pixel decoder.

Parameters carry the names of the Hugging Face checkpoint (`vision_encoder...`, `text_encoder...`,
`detr_encoder...`, `mask_decoder...`). The DETR decoder with its boxes and scores, the geometry encoder and
the trackers are read past.

Source: Carion et al., "SAM 3: Segment Anything with Concepts" (2025); transformers' `Sam3Model`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import ImageFeatures, Network
from vlsm.networks.encoder_config import VISION_DEFAULTS, EncoderConfig
from vlsm.networks.transformer import (
    MLP,
    Attention,
    Block,
    TextEncoder,
    initialise_embeddings,
    text_model,
    tree,
)
from vlsm.system.options import select_fields

LEVELS = (4, 2, 1)  # by how much the neck enlarges the vision transformer's map, finest first
PREFIXES = ("detector_model.", "sam3.")  # that other ways of saving put before the names
UNUSED = (
    "tracker_model.", "tracker_neck.", "geometry_encoder.", "detr_decoder.", "dot_product_scoring.",
    "mask_decoder.mask_embedder.", "mask_decoder.instance_projection.", "text_encoder.text_projection.",
    f"vision_encoder.neck.fpn_layers.{len(LEVELS)}.", f"mask_decoder.pixel_decoder.norms.{len(LEVELS) - 1}.",
    f"mask_decoder.pixel_decoder.conv_layers.{len(LEVELS) - 1}.",
)  # fmt: skip


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
        vision, text, fusion, mask = (
            raw.get(f"{name}_config") or {} for name in ("vision", "text", "detr_encoder", "mask_decoder")
        )
        backbone = vision.get("backbone_config") or {}
        published = dict(
            VISION_DEFAULTS, hidden_size=1024, intermediate_size=4736, num_hidden_layers=32, image_size=1008,
            num_attention_heads=16, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6,
        )  # fmt: skip
        words = dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            max_position_embeddings=32, hidden_act="gelu",
        )  # fmt: skip
        rope = backbone.get("rope_parameters") or {}
        names = {
            "num_layers": "fusion_layers", "num_attention_heads": "fusion_heads", "hidden_act": "fusion_act",
            "intermediate_size": "fusion_hidden", "dropout": "dropout",
        }  # fmt: skip
        own = select_fields(cls, {**backbone, "width": vision.get("fpn_hidden_size")})
        own.update({ours: fusion[theirs] for theirs, ours in names.items() if theirs in fusion})
        own.update({"mask_heads": mask["num_attention_heads"]} if "num_attention_heads" in mask else {})
        own["global_attn_indexes"] = tuple(own.get("global_attn_indexes", cls.global_attn_indexes))
        own["rope_theta"] = rope.get("rope_theta", backbone.get("rope_theta", cls.rope_theta))
        config = cls(
            EncoderConfig.from_dict({**words, **text}, "text_config"),
            EncoderConfig.from_dict({**published, **backbone}, "vision_config.backbone_config"), **own,
        )  # fmt: skip
        if tuple(vision.get("scale_factors", (4, 2, 1, 0.5))) != (4, 2, 1, 0.5):
            raise ValueError(f"vision_config.scale_factors {vision['scale_factors']} are not 4, 2, 1, 0.5.")
        if config.width % 8 or config.vision.hidden_size // config.vision.num_attention_heads % 4:
            raise ValueError("SAM 3's widths: fpn_hidden_size divides by 8, the width of a vision head by 4.")
        return config

    @property
    def img_size(self):
        """Return the side of the images that the network was trained on."""
        return self.vision.image_size

    @property
    def stride(self):
        """Return what sides of images are multiples of."""
        return self.vision.patch_size

    @property
    def extract_layers(self):
        """Return the layer whose output the rest of the network reads: the last one."""
        return (self.vision.num_hidden_layers - 1,)

    @property
    def activation_widths(self):
        """Return the widths of the neck's maps."""
        return [self.width] * len(LEVELS)

    @property
    def projection_dim(self):
        """Return the width of a prompt's tokens as the fusion reads them."""
        return self.width

    def max_prompt_depth(self, encoders, reference=False):
        """Return how many sets of context vectors can act: one a text layer, one over the last."""
        return self.text.num_hidden_layers + 1


# Vision


def rotary_angles(h, w, dim, theta, scale, device):
    """Return (cos, sin), `[h * w, dim]` float32, of axial rotary positions: columns in a head's first half,
    rows in its second, both times `scale`.
    """
    frequencies = theta ** -(torch.arange(0, dim // 2, 2, dtype=torch.float, device=device) / (dim // 2))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float, device=device) for n in (h, w)), indexing="ij")
    angles = [(axis.flatten() * scale)[:, None] * frequencies for axis in (x, y)]
    angles = torch.cat(angles, -1).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def to_windows(x, grid, side):
    """Cut tokens `[B, h * w, D]` into windows `[B * n, side * side, D]`, zeros beyond the border."""
    x = x.unflatten(1, grid)
    x = F.pad(x, (0, 0, 0, -grid[1] % side, 0, -grid[0] % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, rows, side, columns, side, D]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x, grid, side):
    """Undo `to_windows`."""
    rows, columns = (-(-n // side) for n in grid)
    x = x.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]
    return x.flatten(1, 2)


class WindowBlock(Block):
    """Pre-norm layer whose attention sees windows of `window` x `window` tokens; 0: all of them."""

    def __init__(self, c, window):
        v = c.vision
        sizes = v.hidden_size, v.num_attention_heads, v.intermediate_size, v.hidden_act, v.layer_norm_eps
        super().__init__(*sizes)
        for name in ("self_attn", "layer_norm2", "mlp"):  # the optimizer's state of a run is in this order
            self._modules[name] = self._modules.pop(name)
        self.window, self.scale_side, self.theta = window, c.window_size, c.rope_theta

    def attend(self, x, grid, deltas):
        """Return attention's output for normed tokens `[B, h * w, D]` of a grid (h, w)."""
        attention, side = self.self_attn, self.window
        seen, (h, w) = (to_windows(x, grid, side), (side, side)) if side else (x, grid)
        dim = x.shape[-1] // attention.heads
        rope = rotary_angles(h, w, dim, self.theta, self.scale_side / w, x.device)
        out = attention(seen, deltas=deltas, rope=rope)
        return from_windows(out, grid, side) if side else out

    def _transform(self, x, residual_ops, grid, causal, deltas):
        add_attention, add_mlp = residual_ops
        x = add_attention(self.attend(self.layer_norm1(x), grid, deltas), x)
        return add_mlp(self.mlp(self.layer_norm2(x)), x)


class NeckLevel(nn.Module):
    """Enlarges the vision transformer's map by `factor` and brings it to the width of the fusion."""

    def __init__(self, d, width, factor):
        super().__init__()
        steps = {1: [], 2: [(d, d // 2)], 4: [(d, d // 2), (d // 2, d // 4)]}[factor]
        layers = [layer for a, b in steps for layer in (nn.ConvTranspose2d(a, b, 2, 2), nn.GELU())]
        self.scale_layers = nn.ModuleList(layers[:-1])
        self.proj1 = nn.Conv2d(d // factor, width, 1)
        self.proj2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        for layer in self.scale_layers:
            x = layer(x)
        return self.proj2(self.proj1(x))


def adapted(tuner, k, x):
    """Return the neck's k-th map `[B, P, h, w]` as the tuner has it."""
    tokens = tuner.adapt_activation(k, x.flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def sine_positions(h, w, width, device):
    """Return DETR's positions `[h * w, width]` of a grid: sines and cosines of rows, then of columns."""
    i = torch.arange(width // 2, device=device)
    periods = 10000 ** (2 * (i // 2) / (width // 2))
    y, x = (torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi for n in (h, w))
    y, x = (axis[:, None] / periods for axis in (y, x))
    y, x = (torch.stack([a[:, 0::2].sin(), a[:, 1::2].cos()], 2).flatten(1) for a in (y, x))
    return torch.cat([y[:, None].expand(-1, w, -1), x[None].expand(h, -1, -1)], -1).flatten(0, 1)


class FusionLayer(nn.Module):
    """DETR encoder layer: image tokens see each other, then the prompt's tokens."""

    def __init__(self, c):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(c.width), Attention(c.width, c.fusion_heads)
        self.cross_attn, self.layer_norm2 = Attention(c.width, c.fusion_heads), nn.LayerNorm(c.width)
        self.mlp, self.layer_norm3 = MLP(c.width, c.fusion_hidden, c.fusion_act), nn.LayerNorm(c.width)
        self.p = c.dropout

    def forward(self, x, positions, prompt, mask):
        def dropped(t):
            return F.dropout(t, self.p, self.training)

        normed = self.layer_norm1(x)
        placed = normed + positions
        x = x + dropped(self.self_attn(placed, placed, normed))
        x = x + dropped(self.cross_attn(self.layer_norm2(x), prompt, mask=mask))
        return x + dropped(self.mlp(self.layer_norm3(x)))


class SAM3(Network):
    """SAM 3 of a `SAM3Config`; weights are uninitialised noise until loaded (see weights.py)."""

    name = "SAM 3"
    model_types = ("sam3", "sam3_video")
    default_weights = "facebook/sam3"
    mean, std = [0.5] * 3, [0.5] * 3
    keeps_padding = True  # prompts have the window's length; padding is hidden by the mask
    compile_dynamic = None  # torch.compile takes minutes to reason about windows of an open grid
    methods = ("none", "decoder", "full", "dense", "shallow", "telescopic", "lora", "coop", "cocoop")
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
        c, v, t, width = config, config.vision, config.text, config.width
        side = c.pretrain_image_size // v.patch_size
        embeddings = tree(
            patch_embeddings=tree(
                projection=nn.Conv2d(v.num_channels, v.hidden_size, v.patch_size, v.patch_size, bias=False)
            ),
            position_embeddings=nn.Parameter(torch.zeros(1, side * side, v.hidden_size)),
        )
        windows = [0 if i in c.global_attn_indexes else c.window_size for i in range(v.num_hidden_layers)]
        self.vision_encoder = tree(
            backbone=tree(
                embeddings=embeddings,
                layer_norm=nn.LayerNorm(v.hidden_size, eps=v.layer_norm_eps),
                layers=nn.ModuleList(WindowBlock(c, window) for window in windows),
            ),
            neck=tree(fpn_layers=nn.ModuleList(NeckLevel(v.hidden_size, width, k) for k in LEVELS)),
        )
        self.text_encoder = tree(text_model=text_model(t))
        self.text_projection = nn.Linear(t.hidden_size, width)
        self.detr_encoder = tree(layers=nn.ModuleList(FusionLayer(c) for _ in range(c.fusion_layers)))
        joins = len(LEVELS) - 1
        self.mask_decoder = tree(
            pixel_decoder=tree(
                conv_layers=nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(joins)),
                norms=nn.ModuleList(nn.GroupNorm(8, width) for _ in range(joins)),
            ),
            semantic_projection=nn.Conv2d(width, 1, 1),
            prompt_cross_attn=Attention(width, c.mask_heads),
            prompt_cross_attn_norm=nn.LayerNorm(width),
        )

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Return the vision transformer's last tokens `[B, h * w, D]`, which the neck enlarges.

        The embedding is the mean of the neck's coarsest map.
        """
        vision = self.vision_encoder.backbone
        patches = vision.embeddings.patch_embeddings.projection(pixel_values)  # [B, D, h, w]
        grid = tuple(patches.shape[-2:])
        positions = self._tiled_positions(*grid).to(patches.dtype)
        x = vision.layer_norm(patches.flatten(2).transpose(1, 2) + positions)
        for i, block in enumerate(self.vision_blocks()):
            x = block(x, tuner.residual_ops("vision", i), grid, False, tuner.lora_deltas("vision", i))
        embedding = None
        if tuner.needs_image_embedding:
            coarsest = self.vision_encoder.neck.fpn_layers[-1]
            embedding = coarsest(x.transpose(1, 2).unflatten(2, grid)).mean((2, 3))
        return ImageFeatures([x], embedding, tuple(pixel_values.shape[-2:]))

    def _tiled_positions(self, h, w):
        """Return position embeddings `[h * w, D]`: those of the pretraining's grid, repeated."""
        table = self.vision_encoder.backbone.embeddings.position_embeddings[0]
        side = math.isqrt(len(table))
        table = table.unflatten(0, (side, side)).repeat(-(-h // side), -(-w // side), 1)
        return table[:h, :w].flatten(0, 1)

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return (tokens `[B, S, P]`, bool `[B, S]`: which of them the image sees)."""
        states, _, seen = self.run_text_blocks(input_ids, attention_mask, tuner, contexts)
        words = self.text_projection(self.text_encoder.text_model.final_layer_norm(states[-1]))
        if seen is None:
            seen = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        return words, seen

    def decode(self, image_features, text_features, tuner, pixel_values=None):
        (words, seen), (x,) = text_features, image_features.activations
        words, mask = tuner.adapt_conditional(words, []), seen[:, None, None]  # [B, 1, 1, S]
        grid = tuple(side // self.config.stride for side in image_features.size)
        tokens = x.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
        levels = self.vision_encoder.neck.fpn_layers
        # finest first, [B, P, ., .]
        maps = [adapted(tuner, k, level(tokens)) for k, level in enumerate(levels)]
        x = maps[-1].flatten(2).transpose(1, 2)
        positions = sine_positions(*grid, x.shape[-1], x.device).to(x.dtype)
        for layer in self.detr_encoder.layers:
            x = layer(x, positions, words, mask)
        head = self.mask_decoder
        x = x + head.prompt_cross_attn(head.prompt_cross_attn_norm(x), words, mask=mask)
        features = x.transpose(1, 2).unflatten(2, grid)
        decoder = head.pixel_decoder
        for finer, convolution, norm in zip(maps[-2::-1], decoder.conv_layers, decoder.norms):
            features = F.interpolate(features, finer.shape[-2:], mode="nearest") + finer
            features = F.relu(norm(convolution(features)))
        logits = head.semantic_projection(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, image_features.size, mode="bilinear", align_corners=False)
        return tuner.adapt_logits(logits, features)

    @classmethod
    def rename(cls, tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            if not name.startswith(UNUSED) and not name.endswith("position_ids"):
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
        heads = ("detr_encoder.", "mask_decoder.")
        return [name for name, _ in self.named_parameters() if name.startswith(heads)]

    def full_tuning_names(self):
        return [name for name, _ in self.named_parameters()]

    def compilable_blocks(self):
        return [*self.vision_blocks(), *self.text_transformer().blocks, *self.detr_encoder.layers]
