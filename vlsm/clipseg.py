"""CLIPSeg in plain PyTorch: two pre-norm CLIP encoders and a small FiLM-conditioned decoder.

Parameters carry the names of the Hugging Face checkpoint (`clip.vision_model...`, `clip.text_model...`, `decoder...`), so a
checkpoint loads by name. The forward pass computes only what the logits depend on, never detaches, and calls the hooks of a
`Tuner` (see tuners.py) where a tuning method may act.

Sources: Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts" (CVPR 2022); Radford et al., CLIP (2021).
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from .tuners import Tuner

# Buffers that older transformers releases wrote; they hold 0, 1, 2, ... and are not needed.
UNUSED_KEYS = ("clip.text_model.embeddings.position_ids", "clip.vision_model.embeddings.position_ids")


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


VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


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

        def known(kind, values):
            names = {f.name for f in fields(kind)}
            return {k: v for k, v in values.items() if k in names and v is not None}

        def encoder(name, defaults):  # old files repeat the values, and win, under `<name>_dict`
            values = {**defaults, **(raw.get(name) or {}), **(raw.get(f"{name}_dict") or {})}
            return EncoderConfig(**known(EncoderConfig, values))

        top = known(cls, {k: v for k, v in raw.items() if k not in ("text", "vision")})
        top["extract_layers"] = tuple(top.get("extract_layers", cls.extract_layers))
        config = cls(text=encoder("text_config", {}), vision=encoder("vision_config", VISION_DEFAULTS), **top)
        for name, enc in (("text_config", config.text), ("vision_config", config.vision)):
            if enc.hidden_act not in ACTIVATIONS:
                raise ValueError(f"{name}.hidden_act is '{enc.hidden_act}'; known are {', '.join(ACTIVATIONS)}.")
            if enc.hidden_size % enc.num_attention_heads:
                raise ValueError(f"{name}: hidden_size {enc.hidden_size} is no multiple of {enc.num_attention_heads} heads.")
        if not config.extract_layers or not 0 <= min(config.extract_layers) <= max(config.extract_layers) < config.vision.num_hidden_layers:
            raise ValueError(
                f"extract_layers {list(config.extract_layers)} must be indices of the {config.vision.num_hidden_layers} vision layers."
            )
        return config


def quick_gelu(x):
    """x sigmoid(1.702 x), by way of SiLU: one fused operation each way where the formula as written takes three."""
    return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}


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
        patches = self.patch_embedding(pixel_values)  # [B, D, h, w]
        B, D, h, w = patches.shape
        x = torch.cat([self.class_embedding.to(patches.dtype).expand(B, 1, D), patches.flatten(2).transpose(1, 2)], 1)
        return x + self.positions(h, w)  # [B, 1+h*w, D]

    def positions(self, h, w):
        """Position embeddings for an h x w grid `[1+h*w, D]`, resized bicubically if that is not the trained grid."""
        weight = self.position_embedding.weight
        side = round((len(weight) - 1) ** 0.5)
        if (h, w) == (side, side):
            return weight
        grid = weight[1:].T.reshape(1, -1, side, side)  # [1, D, side, side]
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([weight[:1], grid.flatten(2)[0].T])


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


def put(x, at, contexts, over=0):
    """Tokens x `[B, S, D]` with contexts `[n, D]` or `[B, n, D]` at position `at`, in the place of the `over` tokens there."""
    contexts = contexts.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :at], contexts, x[:, at + over :]], 1)


class CLIPSeg(nn.Module):
    """The network. `config` is a `CLIPSegConfig`; weights are uninitialised noise until loaded (see weights.py)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.clip = CLIP(config)
        self.decoder = Decoder(config)

    def encode_image(self, pixel_values, tuner, contexts=()):
        """(activations at the extract layers: a list of `[B, 1+N+n, D]`, in their order; the image's features `[B, P]` or None).

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

    def end_of_text(self, input_ids):
        """Index `[B]` of the pooled token: the first end token, or (legacy `eos_token_id` 2) the highest id."""
        eos = self.config.text.eos_token_id
        return input_ids.argmax(1) if eos == 2 else (input_ids == eos).int().argmax(1)

    def distinct(self, input_ids, attention_mask):
        """Prompts without repetition and needless padding: (input_ids `[U, T]`, attention_mask or None, row `[B]` of each prompt).

        The attention is causal, so what follows the end-of-text token cannot reach it: those columns are cut off, and a padding mask
        stays only where it hides a token before the end. Raises ValueError for a prompt without an end. On a GPU's tensors this
        synchronises; keep `input_ids` on the CPU.
        """
        eos = self.config.text.eos_token_id
        missing = (input_ids != eos).all(1)
        if eos != 2 and missing.any():
            raise ValueError(
                f"Prompt {int(missing.nonzero()[0])} of the batch holds no end-of-text token (id {eos}), so there is nothing to pool. "
                "Was it cut by hand, or made with another model's tokenizer?"
            )
        pairs = input_ids if attention_mask is None else torch.stack([input_ids, attention_mask.to(input_ids)], -1)
        pairs, row = torch.unique(pairs, dim=0, return_inverse=True)
        input_ids, attention_mask = (pairs, None) if attention_mask is None else pairs.unbind(-1)
        end = self.end_of_text(input_ids)
        T = int(end.max()) + 1
        input_ids = input_ids[:, :T]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :T]
            if attention_mask[torch.arange(T, device=end.device) <= end[:, None]].all():
                attention_mask = None
        return input_ids, attention_mask, row

    def encode_text(self, input_ids, attention_mask, tuner, contexts=()):
        """(conditional embedding `[B, P]`, the pooled token's state `[B, D]` after each extract layer) of prompts `[B, T]`.

        The n contexts stand behind the start token; those of layer i are put over the output of layer i - 1. Where a prompt and its
        contexts exceed the encoder's window, the prompt loses its last words, never its end token.
        """
        text, limit = self.clip.text_model, self.config.text.max_position_embeddings
        n = contexts[0].shape[-2] if contexts else 0
        input_ids = input_ids.to(text.embeddings.token_embedding.weight.device)
        seen = None if attention_mask is None else attention_mask.to(input_ids.device).bool()
        end, rows, keep = self.end_of_text(input_ids), torch.arange(len(input_ids), device=input_ids.device), limit - n
        if input_ids.shape[1] > keep:
            if not n:
                raise ValueError(f"A prompt has {input_ids.shape[1]} tokens; the text encoder takes at most {limit}.")
            cut = [None if t is None else torch.cat([t[:, : keep - 1], t[rows, end][:, None]], 1) for t in (input_ids, seen)]
            (input_ids, seen), end = cut, end.clamp(max=keep - 1)
        mask, S = None, input_ids.shape[1] + n
        if seen is not None:
            causal = torch.ones(S, S, dtype=torch.bool, device=input_ids.device).tril()
            mask = F.pad(seen, (n, 0), value=True)[:, None, None] & causal
        x = text.embeddings.token_embedding(input_ids)  # [B, T, D]
        if contexts:
            x = put(x, 1, contexts[0])
        x = x + text.embeddings.position_embedding.weight[:S]  # [B, S, D]
        states = []
        for i, block in enumerate(text.encoder.layers):
            x = block(x, tuner.adders("text", i), mask, causal=mask is None, updates=tuner.updates("text", i))
            if i + 1 < len(contexts):
                x = put(x, 1, contexts[i + 1], over=n)
            states.append(x[rows, end + n])  # [B, D]
        cond = self.clip.text_projection(text.final_layer_norm(states[-1]))
        return cond, [states[i] for i in self.config.extract_layers if i < len(states)]

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
        cond, states = self.encode_text(input_ids, attention_mask, tuner, contexts)
        row = row.to(cond.device)
        return cond[row], [s[row] for s in states]

    def decode(self, activations, cond, states, grid, tuner):
        """Logits `[B, 1, H, W]` of what the encoders return, and the patches' grid (rows, columns)."""
        activations = [tuner.activation(k, x) for k, x in enumerate(activations)]
        return tuner.output(*self.decoder(activations, tuner.condition(cond, states), grid))

    def grid(self, H, W):
        """(rows, columns) of patches. Raises ValueError for sizes that do not divide into them."""
        patch = self.config.vision.patch_size
        if H % patch or W % patch:
            raise ValueError(f"Images of {H} x {W} pixels do not divide into patches of {patch}; resize them to multiples of {patch}.")
        return H // patch, W // patch

    def forward(self, pixel_values, input_ids, attention_mask=None, tuner=None):
        """`[B, 3, H, W]`, `[B, T]`, `[B, T]` -> logits `[B, 1, H, W]` (foreground where > 0). H, W: multiples of the patch size."""
        tuner = tuner or Tuner()
        grid = self.grid(*pixel_values.shape[-2:])
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} images came with {len(input_ids)} prompts; each image needs one.")
        contexts = tuner.contexts()
        activations, features = self.encode_image(pixel_values, tuner, contexts.vision)
        text = self.encode_prompts(input_ids, attention_mask, tuner, contexts.text, features)
        return self.decode(activations, *text, grid, tuner)
