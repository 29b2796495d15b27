"""CLIP by OpenAI's names (`visual.*`, `transformer.resblocks.*`, `token_embedding`), as CRIS and SAN keep it.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).
"""

import re

import torch
from torch import nn

from vlsm.networks.transformer import TextEncoder, encoder_blocks, noise, patch_tokens, tree

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIZE_TENSORS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's files besides weights


class VisionTransformer(nn.Module):
    """CLIP's image encoder; SAN runs its blocks."""

    def __init__(self, config, projection_dim):
        super().__init__()
        c, width = config, config.hidden_size
        self.conv1 = nn.Conv2d(c.num_channels, width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = noise(width)
        self.positional_embedding = noise((c.image_size // c.patch_size) ** 2 + 1, width)
        self.ln_pre = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.transformer = tree(resblocks=encoder_blocks(c, normal_start=True))
        self.ln_post = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.proj = noise(width, projection_dim, std=width**-0.5)

    def embed(self, pixel_values):
        """Return the first block's tokens `[B, 1+N, D]`; the border that fills no patch is left out."""
        patches = self.conv1(pixel_values)
        return self.ln_pre(patch_tokens(patches, self.class_embedding, self.positional_embedding))


class CLIP(nn.Module):
    """An image encoder `visual`, and the text encoder of an `EncoderConfig`."""

    def __init__(self, visual, text, projection_dim):
        super().__init__()
        self.visual = visual
        self.transformer = tree(resblocks=encoder_blocks(text, normal_start=True))
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = noise(text.max_position_embeddings, text.hidden_size)
        self.ln_final = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)
        self.text_projection = noise(text.hidden_size, projection_dim, std=text.hidden_size**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # not used; in the checkpoint

    def text_transformer(self):
        return TextEncoder(self.token_embedding, self.positional_embedding, self.transformer.resblocks)


# Hugging Face's names in turn to OpenAI's; `layers.7.self_attn.q_proj` and its like are joined by
# `from_hugging_face`.
NAME_PATTERNS = (
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
    (
        r"\.self_attn\.(?:q_proj|out_proj)\.",
        lambda m: ".attn.in_proj_" if "q_proj" in m[0] else ".attn.out_proj.",
    ),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_projection\.weight", "text_projection"),
    (r"^visual_projection\.weight", "visual.proj"),
)


def from_hugging_face(tensors):
    """Return a Hugging Face CLIP's tensors under OpenAI's names.

    q, k and v are stacked, the projections transposed, the buffers of position ids dropped.
    """
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
        for pattern, ours in NAME_PATTERNS:
            name = re.sub(pattern, ours, name)
        found[name] = tensor
    return found
