"""CLIPSeg in plain PyTorch: two pre-norm CLIP encoders and a small FiLM-conditioned decoder.

Parameters carry the names of the Hugging Face checkpoint (`clip.vision_model...`, `clip.text_model...`, `decoder...`), so a
checkpoint loads by name. The forward pass computes only what the logits depend on, never detaches, and calls the hooks of a
`Tuner` (see tuners.py) where a tuning method may act.

Sources: Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts" (CVPR 2022); Radford et al., CLIP (2021).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .network import ACTIVATIONS, VISION_DEFAULTS, EncoderConfig, Network, TextEncoder, known, patch_tokens, put

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

    @classmethod
    def from_dict(cls, raw):
        """Read the dictionary of a Hugging Face `config.json`. Raises ValueError for sizes that cannot work."""

        def encoder(name, defaults):  # old files repeat the values, and win, under `<name>_dict`
            values = {**defaults, **(raw.get(name) or {}), **(raw.get(f"{name}_dict") or {})}
            return EncoderConfig.from_dict(values, name)

        top = known(cls, {k: v for k, v in raw.items() if k not in ("text", "vision")})
        top["extract_layers"] = tuple(top.get("extract_layers", cls.extract_layers))
        config = cls(text=encoder("text_config", {}), vision=encoder("vision_config", VISION_DEFAULTS), **top)
        if not config.extract_layers or not 0 <= min(config.extract_layers) <= max(config.extract_layers) < config.vision.num_hidden_layers:
            raise ValueError(
                f"extract_layers {list(config.extract_layers)} must be indices of the {config.vision.num_hidden_layers} vision layers."
            )
        return config

    @property
    def stride(self):
        """Sides of pictures are multiples of this."""
        return self.vision.patch_size

    @property
    def upsampler(self):
        """Of a learnable upsampler: the channels of the decoder's last features, to how many it reduces them (None: not), its factor."""
        return self.reduce_dim, None, self.vision.patch_size

    def deepest(self, places, reference=False):
        """How many sets of context vectors can act on the logits; the published code has as many as layers.

        In the vision encoder a set may stand over the last extracted output: the decoder sees it.
        """
        vision, text = self.vision.num_hidden_layers, self.text.num_hidden_layers
        if reference:
            return min(vision, text)
        limits = dict(vision=max(self.extract_layers) + 2, text=text)
        return min(limits[place] for place in places)


class Attention(nn.Module):
    """Multi-head self-attention; one product makes q, k and v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None, causal=False, updates=None):
        B, N, D = x.shape
        updates = updates or {}
        parts = (self.q_proj, self.k_proj, self.v_proj)
        qkv = F.linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))  # [B, N, 3D]
        each = [t + updates[n](x) if n in updates else t for n, t in zip("qkv", qkv.chunk(3, -1))]
        q, k, v = (t.view(B, N, self.heads, D // self.heads).transpose(1, 2) for t in each)  # each [B, heads, N, D/heads]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).reshape(B, N, D)
        return self.out_proj(out) + updates["out"](out) if "out" in updates else self.out_proj(out)


class MLP(nn.Module):
    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer layer of an encoder; for `adders` and `updates` see the hooks of `Tuner`."""

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x, adders, mask=None, causal=False, updates=None):
        attn, mlp = adders
        x = attn(self.self_attn(self.layer_norm1(x), mask, causal, updates), x)
        return mlp(self.mlp(self.layer_norm2(x)), x)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))


class VisionEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixel_values):
        return patch_tokens(self.patch_embedding(pixel_values), self.class_embedding, self.position_embedding.weight)  # [B, 1+h*w, D]


class VisionModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)  # spelt so in the checkpoint
        self.encoder = Encoder(c)
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class TextEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)


class TextModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class CLIP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.text_model = TextModel(c.text)
        self.vision_model = VisionModel(c.vision)
        self.visual_projection = nn.Linear(c.vision.hidden_size, c.projection_dim, bias=False)
        self.text_projection = nn.Linear(c.text.hidden_size, c.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))


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
    """Reduces the extracted activations, deepest first, modulates them by the prompt (FiLM) and upsamples to pixels."""

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
        """(logits `[B, 1, H, W]`, the features `[B, r, h, w]` that they are made of)."""
        x = 0
        for k, (activation, reduce, layer) in enumerate(zip(reversed(activations), self.reduces, self.layers)):
            x = x + reduce(activation)  # [B, 1+N(+n), r]
            if k == self.conditional_layer:
                x = self.film_mul(cond)[:, None] * x + self.film_add(cond)[:, None]
            x = layer(x)
        h, w = grid
        z = x[:, 1 : 1 + h * w].transpose(1, 2).unflatten(2, grid)  # class token and contexts dropped: [B, r, h, w]
        return self.transposed_convolution(z), z


class CLIPSeg(Network):
    """The network. `config` is a `CLIPSegConfig`; weights are uninitialised noise until loaded (see weights.py)."""

    name = "CLIPSeg"
    model_types = ("clipseg",)
    default_weights = "CIDAS/clipseg-rd64-refined"
    Config = CLIPSegConfig

    def __init__(self, config, reference=False):
        super().__init__(config, reference)
        self.clip = CLIP(config)
        self.decoder = Decoder(config)

    @classmethod
    def rename(cls, tensors):
        return {name: t for name, t in tensors.items() if name not in UNUSED_KEYS}

    def initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.clip.vision_model.embeddings.class_embedding, std=0.02)

    def text_encoder(self):
        text = self.clip.text_model
        return TextEncoder(text.embeddings.token_embedding, text.embeddings.position_embedding.weight, text.encoder.layers)

    def decoder_names(self):
        return [name for name, _ in self.named_parameters() if name.startswith("decoder.")]

    def useful_names(self):
        """All that the logits depend on. The published end-to-end baseline trains the decoder alone, without meaning to: it runs both
        encoders without gradients.
        """
        if self.reference:
            return self.decoder_names()
        unused = ["clip.logit_scale", "clip.visual_projection.", "clip.vision_model.post_layernorm."]
        layers = range(max(self.config.extract_layers) + 1, self.config.vision.num_hidden_layers)
        unused += [f"clip.vision_model.encoder.layers.{i}." for i in layers]
        return [name for name, _ in self.named_parameters() if not name.startswith(tuple(unused))]

    def compilable(self):
        return [*self.clip.vision_model.encoder.layers, *self.clip.text_model.encoder.layers, *self.decoder.layers]

    def encode_image(self, pixel_values, tuner, contexts=()):
        """Activations at the extract layers: a list of `[B, 1+N+n, D]`, in their order; and the features.

        Stops after the deepest one, as nothing above it reaches the logits, unless the tuner reads the features. The n contexts stand
        behind the patches; those of layer i are put over the output of layer i - 1, and so are seen by the decoder too.
        """
        vision, wanted = self.clip.vision_model, self.config.extract_layers
        x = vision.embeddings(pixel_values)
        at, n = x.shape[1], contexts[0].shape[-2] if contexts else 0
        if contexts:
            x = put(x, at, contexts[0])
        x = vision.pre_layrnorm(x)
        states = []
        for i, block in enumerate(vision.encoder.layers[: None if tuner.reads_features else max(wanted) + 1]):
            x = block(x, tuner.adders("vision", i), updates=tuner.updates("vision", i))
            if i + 1 < len(contexts):
                x = put(x, at, contexts[i + 1], over=n)
            states.append(x)
        features = self.clip.visual_projection(vision.post_layernorm(x[:, 0])) if tuner.reads_features else None
        return [states[i] for i in wanted], features

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """(conditional embedding `[B, P]`, and the pooled token's state `[B, D]` after each extract layer) of prompts `[B, T]`."""
        states, end, _ = self.read(input_ids, attention_mask, tuner, contexts)
        rows = torch.arange(end.shape[0], device=end.device)
        pooled = [x[rows, end] for x in states]
        cond = self.clip.text_projection(self.clip.text_model.final_layer_norm(pooled[-1]))
        return cond, *(pooled[i] for i in self.config.extract_layers if i < len(pooled))

    def decode(self, activations, text, size, tuner, pixel_values=None):
        cond, *states = text
        grid = tuple(side // self.config.vision.patch_size for side in size)
        activations = [tuner.activation(k, x) for k, x in enumerate(activations)]
        return tuner.output(*self.decoder(activations, tuner.condition(cond, states), grid))
