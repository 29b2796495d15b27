"""CLIP in OpenAI's tree of names (`visual.*`, `transformer.resblocks.*`, ...), for CRIS and SAN.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).
"""

import torch
from torch import nn

from vlsm.networks.transformer import TextEncoder, encoder_blocks, noise, patch_tokens, tree
from vlsm.networks.weights import OPENAI_BLOCK, to_own, to_published

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SIZE_TENSORS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's files hold them, too


class VisionTransformer(nn.Module):
    """CLIP's image encoder; SAN runs its blocks."""

    def __init__(self, config, projection_dim):
        super().__init__()
        c = config
        width = c.hidden_size
        self.conv1 = nn.Conv2d(c.num_channels, width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = noise(width)
        self.positional_embedding = noise((c.image_size // c.patch_size) ** 2 + 1, width)
        self.ln_pre = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.transformer = tree(resblocks=encoder_blocks(c, normal_start=True))
        self.ln_post = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.proj = noise(width, projection_dim, std=width**-0.5)

    def embed(self, pixel_values):
        """Embed images `[B, 3, H, W]` as the first block's tokens `[B, 1+N, D]`.

        A border narrower than a patch is left out.
        """
        patches = self.conv1(pixel_values)  # [B, D, h, w]
        tokens = patch_tokens(patches, self.class_embedding, self.positional_embedding)
        return self.ln_pre(tokens)


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


# Hugging Face's names outside of blocks -> OpenAI's
HUGGING_FACE = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
}


def from_hugging_face(tensors):
    """Return a Hugging Face CLIP's tensors under OpenAI's names.

    q, k and v are stacked, the projections transposed, the buffers of position ids dropped.
    """
    tensors = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}
    for name in ("text_projection.weight", "visual_projection.weight"):
        tensors[name] = tensors[name].T.contiguous()
    renamed = to_own(tensors, HUGGING_FACE.items())
    return to_published(renamed, OPENAI_BLOCK)
