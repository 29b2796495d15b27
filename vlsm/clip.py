"""CLIP by OpenAI's names (`visual.*`, `transformer.resblocks.*`, `token_embedding`), as CRIS and SAN keep it in their checkpoints.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from .network import ACTIVATIONS, TextEncoder, patch_tokens

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
NUMBERS = ("input_resolution", "context_length", "vocab_size")  # that OpenAI's files hold as tensors


def noise(*shape, std=0.02):
    """A parameter that starts at random."""
    return nn.Parameter(torch.empty(shape).normal_(std=std))


class Attention(nn.Module):
    """Multi-head attention; the three input projections are stacked, as in torch's `nn.MultiheadAttention`."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = noise(3 * dim, dim, std=dim**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query, key=None, value=None, mask=None, causal=False):
        """`[B, N, D]` attends to itself, or to key (and value, the same unless given) `[B, S, D]`; mask: bool (True is seen) or added."""
        value = key if value is None else value
        if key is None:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)  # each [B, heads, N, D/heads]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.c_fc, self.c_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer layer; `adders` as in the hooks of `Tuner`, whose `updates` it does not take."""

    def __init__(self, c):
        super().__init__()
        self.attn = Attention(c.hidden_size, c.num_attention_heads)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)
        self.ln_1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.ln_2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x, adders=(torch.add, torch.add), mask=None, causal=False, updates=None):
        attn, mlp = adders
        x = attn(self.attn(self.ln_1(x), mask=mask, causal=causal), x)
        return mlp(self.mlp(self.ln_2(x)), x)

    def look(self, x, others, mask):
        """The layer for tokens x `[B, Q, D]` that see themselves and `others` `[B, S, D]`; mask `[B, heads, Q, Q+S]` is added."""
        seen = self.ln_1(torch.cat([x, others], 1))
        x = x + self.attn(seen[:, : x.shape[1]], seen, mask=mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))


class VisionTransformer(nn.Module):
    def __init__(self, c, projection_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = noise(c.hidden_size)
        self.positional_embedding = noise((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)
        self.ln_pre = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.transformer = Transformer(c)
        self.ln_post = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.proj = noise(c.hidden_size, projection_dim, std=c.hidden_size**-0.5)

    def embed(self, pixel_values):
        """The first block's tokens `[B, 1+N, D]`, the class token in front; the border that fills no patch is left out."""
        return self.ln_pre(patch_tokens(self.conv1(pixel_values), self.class_embedding, self.positional_embedding))


class CLIP(nn.Module):
    """An image encoder `visual` and the text encoder of an `EncoderConfig`."""

    def __init__(self, visual, text, projection_dim):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(text)
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = noise(text.max_position_embeddings, text.hidden_size)
        self.ln_final = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)
        self.text_projection = noise(text.hidden_size, projection_dim, std=text.hidden_size**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # not used; in the checkpoint

    def text_encoder(self):
        return TextEncoder(self.token_embedding, self.positional_embedding, self.transformer.resblocks)


# Hugging Face's names in turn to OpenAI's; `layers.7.self_attn.q_proj` and its like are joined by `from_hugging_face`.
PLACES = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.(?:q_proj|out_proj)\.", lambda m: ".attn.in_proj_" if "q_proj" in m[0] else ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_projection\.weight", "text_projection"),
    (r"^visual_projection\.weight", "visual.proj"),
)


def from_hugging_face(tensors):
    """A Hugging Face CLIP's tensors by OpenAI's names: q, k and v stacked, projections transposed, index buffers dropped."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [tensors.get(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            if any(part is None for part in parts):
                continue  # so that it is missed by its name
            tensor = torch.cat(parts)
        elif name in ("text_projection.weight", "visual_projection.weight"):
            tensor = tensor.T.contiguous()
        for pattern, ours in PLACES:
            name = re.sub(pattern, ours, name)
        found[name] = tensor
    return found
