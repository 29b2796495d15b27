"""CRIS in plain PyTorch: CLIP's modified ResNet and text transformer, a text-gated pyramid, a cross-modal
decoder, a convolution kernel made from the text.

Parameters carry the names of the published checkpoint (`backbone.visual...`, `neck...`, `decoder...`,
`proj...`) except in attention and MLPs (`CRIS.renames`). Shapes: B images, D the decoder's width, P that of
the embeddings, S words.

Source: Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation" (CVPR 2022).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.networks.base import EOS_IS_MAX_ID, ImageFeatures, Network
from vlsm.networks.clip import CLIP, CLIP_MEAN, CLIP_STD
from vlsm.networks.transformer import (
    Attention,
    EncoderConfig,
    noise,
    resize_positions,
    select_fields,
    to_map,
    to_tokens,
    tokens_at,
)
from vlsm.networks.weights import OPENAI_BLOCK


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

    stride = 32  # image sides must be multiples of it
    published_coop_ignores_upsampler = False

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a `config.json`. Raises ValueError for sizes that cannot work."""
        config = cls(**select_fields(cls, raw))
        if len(config.vision_layers) != 4 or len(config.fpn_out) != 3:
            raise ValueError(
                f"vision_layers {config.vision_layers} should be four numbers and fpn_out {config.fpn_out} "
                "three."
            )
        if config.fpn_out[1] != config.text_width:
            raise ValueError(
                f"fpn_out {config.fpn_out}: its second width must be the text encoder's, {config.text_width}."
            )
        config.check_heads("vision_heads", 32 * config.vision_width)
        config.check_heads("text_heads", config.text_width)
        config.check_heads("num_head", config.text_width)
        return config

    def check_heads(self, name, width):
        """Raise ValueError unless the number of heads in the field `name` divides a width."""
        heads = getattr(self, name)
        if width % heads:
            raise ValueError(f"{name} is {heads}, which does not divide a width of {width}.")

    @cached_property
    def text(self):
        """Return the text encoder's `EncoderConfig`."""
        return EncoderConfig(
            hidden_size=self.text_width,
            intermediate_size=4 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context_length,
            eos_token_id=EOS_IS_MAX_ID,
        )

    @property
    def projection_dim(self):
        """Return the width of the image embedding: the last map's."""
        return self.embed_dim

    @property
    def upsampler_sizes(self):
        """Return an upsampler's sizes: channels of the features, channels after reduction, factor."""
        return self.text_width, min(64, self.text_width), 16

    def max_prompt_depth(self, encoders, reference=False):
        """Return how many sets of context vectors can act on the logits.

        One more than layers: the last set may replace outputs of the last layer, which the decoder sees.
        """
        return self.text_layers + (not reference)


# Vision: three maps, of strides 8, 16 and 32


def plain_conv(a, b, kernel, stride=1):
    """Return a convolution from `a` to `b` channels, without bias, that keeps the size at stride 1."""
    return nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, average pool where the stride is not 1, 1 x 1, and the shortcut."""

    def __init__(self, width, planes, stride):
        super().__init__()
        out = 4 * planes
        self.conv1 = plain_conv(width, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = plain_conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = plain_conv(planes, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or width != out:
            self.downsample = nn.Sequential(plain_conv(width, out, 1), nn.BatchNorm2d(out))

    def forward(self, x):
        """Transform a map `[B, C, h, w]` -> `[B, 4 planes, h/stride, w/stride]`."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(self.pool(y)))
        return (y + self.downsample(self.pool(x))).relu()


class AttentionPool(Attention):
    """CLIP's attention pool without pooling: self-attention of the last map's pixels, plus a linear path."""

    def __init__(self, c):
        width = 32 * c.vision_width
        side = c.image_resolution // 32
        position = noise(side**2 + 1, width, std=width**-0.5)  # row 0 is that of CLIP's mean token, not used
        super().__init__(width, c.vision_heads, out_dim=c.embed_dim)
        self.positional_embedding = position
        self.connect = nn.Sequential(plain_conv(width, c.embed_dim, 1), nn.BatchNorm2d(c.embed_dim))

    def forward(self, x):
        """Transform a map `[B, 32w, h, w]` -> `[B, P, h, w]`."""
        h, w = x.shape[-2:]
        position = resize_positions(self.positional_embedding[1:], h, w)
        pixels = to_tokens(x) + position  # [B, h*w, 32w]
        out = super().forward(pixels, pixels)  # [B, h*w, P]
        return (to_map(out, (h, w)) + self.connect(x)).relu()


class ResNet(nn.Module):
    """CLIP's modified ResNet, which keeps the maps of its last three stages."""

    def __init__(self, c):
        super().__init__()
        width = c.vision_width
        half = width // 2
        self.conv1 = plain_conv(3, half, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = plain_conv(half, half, 3)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = plain_conv(half, width, 3)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, c.vision_layers[0], stride=1)
        self.layer2 = stage(4 * width, 2 * width, c.vision_layers[1], stride=2)
        self.layer3 = stage(8 * width, 4 * width, c.vision_layers[2], stride=2)
        self.layer4 = stage(16 * width, 8 * width, c.vision_layers[3], stride=2)
        self.attnpool = AttentionPool(c)

    def forward(self, x):
        """Encode images `[B, 3, H, W]` to maps `[B, 8w, H/8, W/8]`, `[B, 16w, H/16, W/16]`, `[B, P, H/32,
        W/32]`.
        """
        x = self.bn1(self.conv1(x)).relu()  # [B, w/2, H/2, W/2]
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        x = F.avg_pool2d(x, 2)  # [B, w, H/4, W/4]
        c3 = self.layer2(self.layer1(x))
        c4 = self.layer3(c3)
        return c3, c4, self.attnpool(self.layer4(c4))


def stage(width, planes, count, stride):
    """Return `count` bottlenecks, the first with the given input width and stride."""
    blocks = [Bottleneck(width, planes, stride)]
    for _ in range(count - 1):
        blocks.append(Bottleneck(4 * planes, planes, 1))
    return nn.Sequential(*blocks)


# Neck: the maps joined at stride 16, gated by the text


def conv(a, b, kernel):
    """Return a convolution from `a` to `b` channels that keeps the size, with BatchNorm and ReLU."""
    return nn.Sequential(plain_conv(a, b, kernel), nn.BatchNorm2d(b), nn.ReLU())


def double(x):
    """Enlarge a map bilinearly: `[B, C, h, w]` -> `[B, C, 2h, 2w]`."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class CoordConv(nn.Module):
    """A 3 x 3 convolution that sees its position: two more channels, from -1 to 1 across and down."""

    def __init__(self, d):
        super().__init__()
        self.conv1 = conv(d + 2, d, 3)

    def forward(self, x):
        """Transform a map `[B, D, h, w]` -> `[B, D, h, w]`."""
        B, _, h, w = x.shape
        across = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype)
        down = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        across = across.expand(B, 1, h, w)
        down = down[:, None].expand(B, 1, h, w)
        return self.conv1(torch.cat([x, across, down], 1))


class Neck(nn.Module):
    """Joins the three maps and gates them by the prompt."""

    def __init__(self, c):
        super().__init__()
        a, b, d = c.fpn_out
        self.txt_proj = nn.Sequential(nn.Linear(c.embed_dim, d, bias=False), nn.BatchNorm1d(d), nn.ReLU())
        self.f1_v_proj = conv(c.embed_dim, d, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(d), nn.ReLU())
        self.f2_v_proj = conv(16 * c.vision_width, b, 3)
        self.f2_cat = conv(b + d, b, 1)
        self.f3_v_proj = conv(8 * c.vision_width, a, 3)
        self.f3_cat = conv(a + b, b, 1)
        self.f4_proj3 = conv(b, b, 3)
        self.f4_proj4 = conv(b, b, 3)
        self.f4_proj5 = conv(d, b, 3)
        self.aggr = conv(3 * b, b, 1)
        self.coordconv = nn.Sequential(CoordConv(b), conv(b, b, 3))

    def forward(self, c3, c4, c5, state):
        """Join maps of strides 8, 16, 32 by the prompt's state `[B, P]` -> `[B, D, H/16, W/16]`."""
        gate = self.txt_proj(state)[:, :, None, None]
        f5 = self.norm_layer(self.f1_v_proj(c5) * gate)  # [B, d, H/32, W/32]
        f4 = self.f2_cat(torch.cat([self.f2_v_proj(c4), double(f5)], 1))  # [B, D, H/16, W/16]
        halved = F.avg_pool2d(self.f3_v_proj(c3), 2)
        f3 = self.f3_cat(torch.cat([halved, f4], 1))
        maps = [self.f4_proj3(f3), self.f4_proj4(f4), double(self.f4_proj5(f5))]
        return self.coordconv(self.aggr(torch.cat(maps, 1)))


# Decoder: pixels attend to each other and to the words


def sinusoids(length, d, device):
    """Return fixed positions `[length, d]`: sine and cosine in turn."""
    rate = 10000 ** (-torch.arange(0, d, 2, device=device) / d)
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def pixel_positions(h, w, d, device):
    """Return positions `[h*w, d]`: half of the channels from the column, then half from the row."""
    across = sinusoids(w, d // 2, device).expand(h, -1, -1)
    down = sinusoids(h, d // 2, device)[:, None].expand(-1, w, -1)
    return torch.cat([across, down], 2).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Self-attention of pixels, cross-attention to words, MLP."""

    def __init__(self, c):
        super().__init__()
        d = c.fpn_out[1]
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.norm3 = nn.LayerNorm(d)
        self.self_attn_norm = nn.LayerNorm(d)
        self.cross_attn_norm = nn.LayerNorm(d)
        self.self_attn = Attention(d, c.num_head, c.dropout, normal_start=True)
        self.multihead_attn = Attention(d, c.num_head, c.dropout, normal_start=True)
        self.ffn = nn.Sequential(
            nn.Linear(d, c.dim_ffn),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            nn.LayerNorm(c.dim_ffn),
            nn.Linear(c.dim_ffn, d),
        )
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, words, visible, pixel_at, word_at):
        """Transform pixels `[B, h*w, D]` by words `[B, S, D]`.

        visible: bool `[B, 1, 1, S]`; pixel_at, word_at: positions.
        """
        y = self.norm1(x)
        at = y + pixel_at
        y = self.self_attn(at, at, y)
        x = x + self.drop(self.self_attn_norm(y))
        at = self.norm2(x) + pixel_at
        y = self.multihead_attn(at, words + word_at, words, mask=visible)
        x = x + self.drop(self.cross_attn_norm(y))
        return x + self.drop(self.ffn(self.norm3(x)))  # [B, h*w, D]


class Decoder(nn.Module):
    """Transformer decoder: pixels attend to each other and to the prompt's words."""

    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.fpn_out[1])

    def forward(self, fq, words, visible):
        """Transform a map `[B, D, h, w]` by words `[B, S, D]`, those that are `visible` `[B, S]`."""
        h, w = fq.shape[-2:]
        pixel_at = pixel_positions(h, w, fq.shape[1], fq.device).to(fq.dtype)
        word_at = sinusoids(words.shape[1], words.shape[2], fq.device).to(words.dtype)
        x = to_tokens(fq)  # [B, h*w, D]
        for layer in self.layers:
            x = layer(x, words, visible[:, None, None], pixel_at, word_at)
        return to_map(self.norm(x), (h, w))  # [B, D, h, w]


# Projector: a kernel of its own for each prompt


class Projector(nn.Module):
    """Convolves the features by a 3 x 3 kernel that it makes from the prompt."""

    def __init__(self, c):
        super().__init__()
        d = c.fpn_out[1]
        half = d // 2
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.vis = nn.Sequential(up, conv(d, d, 3), up, conv(d, half, 3), nn.Conv2d(half, half, 1))
        self.txt = nn.Linear(c.embed_dim, 9 * half + 1)

    def forward(self, x, state):
        """Convolve features `[B, D, h, w]` by kernels of states `[B, P]` -> logits `[B, 1, 4h, 4w]`.

        A 3 x 3 convolution for each sample: products over channels first, then the nine maps are shifted and
        added, an eighth of a grouped convolution's time (8 maps of 256 x 104 x 104 on a CPU, with gradients).
        """
        x = self.vis(x)  # [B, D/2, 4h, 4w]
        kernels = self.txt(state)
        weight = kernels[:, :-1].unflatten(1, (-1, 3, 3))  # [B, D/2, 3, 3]
        bias = kernels[:, -1]
        taps = torch.einsum("bchw,bcij->bijhw", x, weight.flip(2, 3))  # [B, 3, 3, 4h, 4w]
        taps = taps.flatten(3).flatten(1, 2)  # [B, 9, 4h*4w]
        return F.fold(taps, x.shape[2:], 3, padding=1) + bias[:, None, None, None]


class CRIS(Network):
    """CRIS of a `CRISConfig`.

    Padding tokens are hidden from the decoder, BatchNorm keeps the running statistics of its checkpoint while
    its weights are trained, and prompts may have any length up to the window. With `reference`, as in the
    published code, the decoder sees all 77 tokens except those of id 0 (the word "!"), and BatchNorm takes
    the batch's statistics in training and updates its own.
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
        self.keeps_padding = reference
        self.updated_norms = set()  # names of BatchNorm modules, see `updated_buffers`

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Encode images `[B, 3, H, W]` to three maps; the embedding is the mean of the last one."""
        maps = self.backbone.visual(pixel_values)
        embedding = maps[-1].mean((2, 3)) if tuner.needs_image_embedding else None  # [B, P]
        return ImageFeatures(list(maps), embedding, pixel_values.shape[-2:])

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """Return (state `[B, P]`, words `[B, S, D]`, bool `[B, S]`: which words the decoder may see)."""
        published = self.reference and not contexts  # VLSM-Adapter's code; TuneVLSeg's hides padding
        if published:
            attention_mask = None
        elif self.reference:  # the first set enters twice, the last one replaces the last layer's output
            contexts = [contexts[0], *contexts]
        states, end, seen = self.run_text_blocks(input_ids, attention_mask, tuner, contexts)
        words = self.backbone.ln_final(states[-1])  # [B, S, D]
        state = tokens_at(words, end) @ self.backbone.text_projection  # [B, P]
        if published:
            visible = input_ids.to(words.device, non_blocking=True) != 0
        else:
            visible = torch.arange(words.shape[1], device=end.device) <= end[:, None]
            if seen is not None:
                visible = visible & seen
        return state, words, visible

    def decode(self, image_features, text_features, tuner):
        state, words, visible = text_features
        if self.neck.txt_proj[1].training and len(state) == 1:
            raise ValueError(
                "With --reference BatchNorm takes the statistics of a batch, and this batch holds one "
                "image. Choose a --batch-size that leaves no single one at an epoch's end."
            )
        fq = self.neck(*image_features.activations, state)
        features = self.decoder(fq, words, visible)  # [B, D, H/16, W/16]
        logits = self.proj(features, state)  # [B, 1, H/4, W/4]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, size=image_features.size, mode="bicubic", align_corners=True)
        return tuner.adapt_logits(logits, features)

    def text_transformer(self):
        return self.backbone.text_transformer()

    def decoder_names(self):
        return self.parameter_names("neck.", "decoder.", "proj.")

    def full_tuning_names(self):
        names = self.parameter_names()
        if not self.reference:
            names.remove("backbone.logit_scale")  # not used
        return names

    def compilable_blocks(self):
        visual = self.backbone.visual
        bottlenecks = [*visual.layer1, *visual.layer2, *visual.layer3, *visual.layer4]
        return [*bottlenecks, *self.backbone.transformer.resblocks, *self.decoder.layers]

    # BatchNorm

    def batch_norms(self):
        """Return the BatchNorm modules by name."""
        norms = {}
        for name, module in self.named_modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                norms[name] = module
        return norms

    def updated_buffers(self):
        """Choose which BatchNorm modules take the batch's statistics in training and update their own.

        With `reference` all do; else those that are trained and have no statistics yet (mean 0, variance 1),
        except the text gate's: there equal prompts have no variance, and their text would be lost. Returns
        the names of their statistics.
        """
        self.updated_norms = set()
        buffers = []
        for name, norm in self.batch_norms().items():
            untouched = not norm.running_mean.any() and (norm.running_var == 1).all()
            learns = untouched and norm.weight.requires_grad and name != "neck.txt_proj.1"
            if self.reference or learns:
                self.updated_norms.add(name)
                buffers += [f"{name}.running_mean", f"{name}.running_var"]
        return buffers

    def train(self, mode=True):
        """Set training mode; BatchNorm takes a batch's statistics only where `updated_buffers` chose it."""
        super().train(mode)
        for name, norm in self.batch_norms().items():
            norm.train(mode and name in self.updated_norms)
        return self
