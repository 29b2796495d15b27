"""CRIS in plain PyTorch: CLIP's modified ResNet and text transformer, a text-gated pyramid, a cross-modal
decoder, a kernel made of text.

Parameters carry the names of the published checkpoint (`backbone.visual...`, `neck...`, `decoder...`,
`proj...`), without the prefix of DistributedDataParallel. Section numbers below are this file's own.

Source: Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation" (CVPR 2022).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import EOS_IS_MAX_ID, ImageFeatures, Network
from vlsm.networks.clip import CLIP, CLIP_MEAN, CLIP_STD
from vlsm.networks.encoder_config import EncoderConfig, select_fields
from vlsm.networks.renaming import OPENAI_BLOCK
from vlsm.networks.transformer import Attention, noise, resize_positions


@dataclass(frozen=True)
class CRISConfig:
    """Sizes of a CRIS network, as `config.json` holds them; the defaults are the published ones, of CLIP's
    ResNet-50.
    """

    img_size: int = 416
    vision_layers: tuple = (3, 4, 6, 3)
    vision_width: int = 64
    vision_heads: int = 32
    image_resolution: int = 224  # that of the pool's positions
    embed_dim: int = 1024
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    fpn_out: tuple = (256, 512, 1024)
    num_layers: int = 3
    num_head: int = 8
    dim_ffn: int = 2048
    dropout: float = 0.2

    stride = 32  # sides of images are multiples of this
    published_coop_ignores_upsampler = False

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a `config.json`. Raises ValueError for sizes that cannot work."""
        config = cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in select_fields(cls, raw).items()}
        )
        if len(config.vision_layers) != 4 or len(config.fpn_out) != 3:
            raise ValueError(
                f"vision_layers {list(config.vision_layers)} should be four numbers and fpn_out "
                f"{list(config.fpn_out)} three."
            )
        if config.fpn_out[1] != config.text_width:
            raise ValueError(
                f"fpn_out {list(config.fpn_out)}: its second width must be the text encoder's, "
                f"{config.text_width}."
            )
        for name, width, heads in (
            ("vision_heads", 32 * config.vision_width, config.vision_heads),
            ("text_heads", config.text_width, config.text_heads),
            ("num_head", config.text_width, config.num_head),
        ):  # fmt: skip
            if width % heads:
                raise ValueError(f"{name} is {heads}, which does not divide a width of {width}.")
        return config

    @cached_property
    def text(self):
        return EncoderConfig(
            hidden_size=self.text_width, intermediate_size=4 * self.text_width,
            num_hidden_layers=self.text_layers, num_attention_heads=self.text_heads,
            vocab_size=self.vocab_size, max_position_embeddings=self.context_length,
            eos_token_id=EOS_IS_MAX_ID,
        )  # fmt: skip

    @property
    def projection_dim(self):
        """Return the width of the image embedding: the last map's."""
        return self.embed_dim

    @property
    def upsampler_sizes(self):
        """Return an upsampler's sizes: channels of the features, to how many they are reduced, its factor."""
        return self.text_width, min(64, self.text_width), 16

    def max_prompt_depth(self, encoders, reference=False):
        """Return how many sets of context vectors can act on the logits.

        One may stand over the last layer's output, which the decoder sees.
        """
        return self.text_layers + (not reference)


# 1. Vision: three maps, of strides 8, 16 and 32


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, average pool where the stride is not 1, 1 x 1, and the shortcut."""

    def __init__(self, width, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        if stride > 1 or width != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
            )
        else:
            self.downsample = nn.Identity()

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.pool(self.bn2(self.conv2(y)).relu())
        return (self.bn3(self.conv3(y)) + self.downsample(self.pool(x))).relu()


class AttentionPool(Attention):
    """Self-attention of the last map's pixels, plus a linear path; the map is kept."""

    def __init__(self, c):
        width, side = 32 * c.vision_width, c.image_resolution // 32
        position = noise(side**2 + 1, width, std=width**-0.5)  # row 0 belonged to CLIP's mean token
        super().__init__(width, c.vision_heads, out_dim=c.embed_dim)
        self.positional_embedding = position
        self.connect = nn.Sequential(
            nn.Conv2d(width, c.embed_dim, 1, bias=False), nn.BatchNorm2d(c.embed_dim)
        )

    def forward(self, x):
        h, w = x.shape[-2:]
        position = resize_positions(self.positional_embedding[1:], h, w)
        pixels = x.flatten(2).transpose(1, 2) + position  # [B, h*w, D]
        out = super().forward(pixels, pixels)  # [B, h*w, P]
        return (out.transpose(1, 2).unflatten(2, (h, w)) + self.connect(x)).relu()


class ResNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        half, width = c.vision_width // 2, c.vision_width
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        before = width
        for k, count in enumerate(c.vision_layers):
            planes, blocks = width * 2**k, []
            for j in range(count):
                blocks.append(Bottleneck(before, planes, stride=2 if k and not j else 1))
                before = 4 * planes
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(c)

    def forward(self, x):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = bn(conv(x)).relu()
        c3 = self.layer2(self.layer1(F.avg_pool2d(x, 2)))
        c4 = self.layer3(c3)
        return c3, c4, self.attnpool(self.layer4(c4))


# 2. Neck: the maps joined at stride 16, gated by the text


def conv(a, b, kernel):
    return nn.Sequential(
        nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()
    )


def double(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class CoordConv(nn.Module):
    """A 3 x 3 convolution that sees where it is: two more channels, from -1 to 1 across and down."""

    def __init__(self, d):
        super().__init__()
        self.conv1 = conv(d + 2, d, 3)

    def forward(self, x):
        B, _, h, w = x.shape
        across, down = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (w, h))
        return self.conv1(torch.cat([x, across.expand(B, 1, h, w), down[:, None].expand(B, 1, h, w)], 1))


class Neck(nn.Module):
    def __init__(self, c):
        super().__init__()
        (a, b, d), (i3, i4, i5) = c.fpn_out, (8 * c.vision_width, 16 * c.vision_width, c.embed_dim)
        self.txt_proj = nn.Sequential(nn.Linear(c.embed_dim, d, bias=False), nn.BatchNorm1d(d), nn.ReLU())
        self.f1_v_proj = conv(i5, d, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(d), nn.ReLU())
        self.f2_v_proj, self.f2_cat = conv(i4, b, 3), conv(b + d, b, 1)
        self.f3_v_proj, self.f3_cat = conv(i3, a, 3), conv(a + b, b, 1)
        self.f4_proj3, self.f4_proj4, self.f4_proj5 = conv(b, b, 3), conv(b, b, 3), conv(d, b, 3)
        self.aggr = conv(3 * b, b, 1)
        self.coordconv = nn.Sequential(CoordConv(b), conv(b, b, 3))

    def forward(self, c3, c4, c5, state):
        f5 = self.norm_layer(self.f1_v_proj(c5) * self.txt_proj(state)[:, :, None, None])
        f4 = self.f2_cat(torch.cat([self.f2_v_proj(c4), double(f5)], 1))
        f3 = self.f3_cat(torch.cat([F.avg_pool2d(self.f3_v_proj(c3), 2), f4], 1))
        fq = self.aggr(torch.cat([self.f4_proj3(f3), self.f4_proj4(f4), double(self.f4_proj5(f5))], 1))
        return self.coordconv(fq)


# 3. Decoder: pixels attend to each other and to the words


def sinusoids(length, d, device):
    """Return fixed positions `[length, d]`: sine and cosine in turn."""
    rate = 10000 ** (-torch.arange(0, d, 2, device=device) / d)
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def pixel_positions(h, w, d, device):
    """Return positions `[h*w, d]`: half of the channels from the column, then half from the row."""
    across, down = sinusoids(w, d // 2, device), sinusoids(h, d // 2, device)
    return torch.cat([across.expand(h, -1, -1), down[:, None].expand(-1, w, -1)], 2).flatten(0, 1)


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.fpn_out[1]
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        self.self_attn_norm, self.cross_attn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attn = Attention(d, c.num_head, c.dropout, normal_start=True)
        self.multihead_attn = Attention(d, c.num_head, c.dropout, normal_start=True)
        inner = (
            nn.Linear(d, c.dim_ffn),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            nn.LayerNorm(c.dim_ffn),
            nn.Linear(c.dim_ffn, d),
        )
        self.ffn = nn.Sequential(*inner)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, words, visible, pixel_at, word_at):
        y = self.norm1(x)
        at = y + pixel_at
        x = x + self.drop(self.self_attn_norm(self.self_attn(at, at, y)))
        at = self.norm2(x) + pixel_at
        x = x + self.drop(self.cross_attn_norm(self.multihead_attn(at, words + word_at, words, mask=visible)))
        return x + self.drop(self.ffn(self.norm3(x)))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.fpn_out[1])

    def forward(self, fq, words, visible):
        h, w = fq.shape[-2:]
        pixel_at = pixel_positions(h, w, fq.shape[1], fq.device).to(fq.dtype)
        word_at = sinusoids(words.shape[1], words.shape[2], fq.device).to(words.dtype)
        x = fq.flatten(2).transpose(1, 2)  # [B, h*w, D]
        for layer in self.layers:
            x = layer(x, words, visible[:, None, None], pixel_at, word_at)
        return self.norm(x).transpose(1, 2).unflatten(2, (h, w))


# 4. Projector: a kernel of its own for each prompt


class Projector(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.fpn_out[1]
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.vis = nn.Sequential(up, conv(d, d, 3), up, conv(d, d // 2, 3), nn.Conv2d(d // 2, d // 2, 1))
        self.txt = nn.Linear(c.embed_dim, 9 * (d // 2) + 1)

    def forward(self, x, state):
        """Return logits `[B, 1, 4h, 4w]` of features `[B, D, h, w]` and states `[B, P]`.

        A 3 x 3 convolution for each sample: products over channels first, then the nine maps are shifted and
        added, which takes an eighth of a grouped convolution's time (8 maps of 256 x 104 x 104 on a CPU, with
        gradients).
        """
        x, kernels = self.vis(x), self.txt(state)
        weight, bias = kernels[:, :-1].unflatten(1, (-1, 3, 3)), kernels[:, -1]
        taps = torch.einsum("bchw,bcij->bijhw", x, weight.flip(2, 3))  # [B, 3, 3, h, w]
        return F.fold(taps.flatten(3).flatten(1, 2), x.shape[2:], 3, padding=1) + bias[:, None, None, None]


class CRIS(Network):
    """CRIS of a `CRISConfig`.

    Padding tokens are hidden from the decoder, BatchNorm keeps the running statistics of its checkpoint while
    its weights are trained, and prompts may have any length up to the window. With `reference`, as the
    published code has it: the decoder sees all 77 tokens but those of id 0 (the word "!"), and BatchNorm
    takes the batch's statistics and moves its own.
    """

    name = "CRIS"
    model_types = ("cris",)
    mean, std = CLIP_MEAN, CLIP_STD
    methods = ("none", "decoder", "full", "coop", "cocoop")
    unsupported_reason = (
        "CRIS's image encoder is a ResNet: it has no transformer blocks that adapters, LoRA or visual "
        "prompts go into. The paper adapts CLIPSeg, and trains CRIS whole (--peft full)."
    )
    Config = CRISConfig
    renames = (
        *OPENAI_BLOCK,
        ("layers.#.self_attn.in_proj_", "layers.#.self_attn.qkv_proj."),
        ("layers.#.multihead_attn.in_proj_", "layers.#.multihead_attn.qkv_proj."),
        ("attnpool.c_proj.", "attnpool.out_proj."),
    )

    def __init__(self, config, reference=False):
        super().__init__(config, reference)
        self.backbone = CLIP(ResNet(config), config.text, config.embed_dim)
        self.neck = Neck(config)
        self.decoder = Decoder(config)
        self.proj = Projector(config)
        self.keeps_padding, self.without_statistics = reference, set()

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Return three maps, `[B, 8w, H/8, W/8]`, `[B, 16w, H/16, W/16]`, `[B, P, H/32, W/32]`.

        The embedding is the mean of the last map.
        """
        maps = self.backbone.visual(pixel_values)
        embedding = maps[-1].mean((2, 3)) if tuner.needs_image_embedding else None
        return ImageFeatures(list(maps), embedding, tuple(pixel_values.shape[-2:]))

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return (state `[B, P]`, words `[B, S, D]`, bool `[B, S]`: which words the decoder may see)."""
        published = self.reference and not contexts  # VLSM-Adapter's, that is; TuneVLSeg's code hides padding
        if published:
            attention_mask = None
        elif self.reference:  # the first set enters twice, the last one stands over the last layer's output
            contexts = [contexts[0], *contexts]
        states, end, seen = self.run_text_blocks(input_ids, attention_mask, tuner, contexts)
        words = self.backbone.ln_final(states[-1])
        pooled = words[torch.arange(end.shape[0], device=end.device), end]
        state = pooled @ self.backbone.text_projection
        if published:
            return state, words, input_ids.to(words.device) != 0
        visible = torch.arange(words.shape[1], device=end.device) <= end[:, None]
        return state, words, visible if seen is None else visible & seen

    def decode(self, image_features, text_features, tuner, pixel_values=None):
        state, words, visible = text_features
        if self.neck.txt_proj[1].training and len(state) == 1:
            raise ValueError(
                "With --reference BatchNorm takes the statistics of a batch, and this batch holds one "
                "image. Choose a --batch-size that leaves no single one at an epoch's end."
            )
        features = self.decoder(self.neck(*image_features.activations, state), words, visible)
        logits = self.proj(features, state)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, size=image_features.size, mode="bicubic", align_corners=True)
        return tuner.adapt_logits(logits, features)

    def text_transformer(self):
        return self.backbone.text_transformer()

    def decoder_names(self):
        return [name for name, _ in self.named_parameters() if not name.startswith("backbone.")]

    def full_tuning_names(self):
        return [
            name for name, _ in self.named_parameters() if self.reference or name != "backbone.logit_scale"
        ]

    def compilable_blocks(self):
        visual = self.backbone.visual
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        bottlenecks = [block for stage in stages for block in stage]
        return [*bottlenecks, *self.backbone.transformer.resblocks, *self.decoder.layers]

    # BatchNorm

    def batch_norms(self):
        """Return the BatchNorm modules by name."""
        return {
            name: m for name, m in self.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
        }

    def on_weights_loaded(self):
        """Note which BatchNorm modules have no statistics yet: mean 0, variance 1, as at a random start."""
        self.without_statistics = {
            name
            for name, norm in self.batch_norms().items()
            if not norm.running_mean.any() and (norm.running_var == 1).all()
        }

    def updates_statistics(self, name, norm):
        """Tell whether a BatchNorm takes the batch's statistics in training, and moves its own.

        With `reference` any does; else one that is trained and has none yet, but never the text gate's: there
        equal prompts have no variance, and their text would be lost.
        """
        learns = name in self.without_statistics and norm.weight.requires_grad and name != "neck.txt_proj.1"
        return self.reference or learns

    def updated_buffers(self):
        names = [name for name, norm in self.batch_norms().items() if self.updates_statistics(name, norm)]
        return [f"{name}.{buffer}" for name in names for buffer in ("running_mean", "running_var")]

    def train(self, mode=True):
        super().train(mode)
        for name, norm in self.batch_norms().items():
            norm.train(mode and self.updates_statistics(name, norm))
        return self
