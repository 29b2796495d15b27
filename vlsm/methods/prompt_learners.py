"""Prompt learners: context vectors that join the tokens of an encoder, n for each of the first `prompt_depth`
layers.

Sources: Adhikari et al., "TuneVLSeg" (ACCV 2024), which measures all six; CoOp: Zhou et al. (IJCV 2022);
CoCoOp: Zhou et al. (CVPR 2022); VPT: Jia et al. (ECCV 2022); MaPLe: Khattak et al. (CVPR 2023).
"""

import copy
from itertools import cycle

import torch
from torch import nn

from vlsm.networks.hooks import Contexts, Tuner
from vlsm.networks.tokenizer import Tokenizer

INIT_STD = 0.02  # of context vectors that start at random
DEFAULT_DEPTH = 9  # layers with context vectors of their own, unless the network has fewer


def projection(d_in, d_out, hidden, low_rank, norm, bias=True):
    """Return a module from width `d_in` to `d_out`.

    hidden: 0 for a linear layer; a width, or a list of widths, for an MLP. low_rank: the product of two
    matrices (of one, if hidden > d_out) instead. norm: a LayerNorm after an MLP or such a product. bias:
    whether that norm, or the last layer, has one. Raises ValueError for widths below 1, and for a list with
    `low_rank`.
    """
    widths = [hidden] if isinstance(hidden, int) else list(hidden or ())
    if low_rank and len(widths) > 1:
        raise ValueError(f"--lora-proj takes one --intermediate-dim, not {len(widths)}.")
    if not any(widths):
        return nn.Linear(d_in, d_out)
    if min(widths) < 1:
        given = " ".join(map(str, widths))
        raise ValueError(f"--intermediate-dim {given}: give 1 or more, or 0 alone for a single layer.")
    layers = []
    if low_rank and widths[0] > d_out:
        layers.append(nn.Linear(d_in, d_out, bias=False))
    else:
        width = d_in
        for next_width in widths:
            layer = nn.Linear(width, next_width, bias=not low_rank)
            layers.append(layer)
            if not low_rank:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layers.append(nn.ReLU())
            width = next_width
        layers.append(nn.Linear(width, d_out, bias=bias and not norm))
    if norm:
        layers.append(nn.LayerNorm(d_out, bias=bias))
    return nn.Sequential(*layers)


class PromptLearner(Tuner):
    """Base of the six: holds `context` `[depth, n, width]`, the context vectors of each layer.

    prompt_depth: number of layers with vectors of their own (default: `default_depth`, at most as many as act
    on the logits). context: n. context_init: a text, or one for each of the first layers; the vectors start
    from its tokens' embeddings, and n is the number of its tokens. Raises ValueError for values that do not
    fit the network.
    """

    default_upsampler = True
    encoders = ("text",)  # whose tokens the vectors join
    default_depth = DEFAULT_DEPTH

    def __init__(self, config, width, prompt_depth, context, context_init=None, reference=False):
        super().__init__(config, reference)
        most = config.max_prompt_depth(self.encoders, reference)
        depth = min(self.default_depth, most) if prompt_depth is None else prompt_depth
        if not 1 <= depth <= most:
            raise ValueError(
                f"--prompt-depth {depth}: of this network's layers, {most} can take context vectors that the "
                f"logits depend on. Give 1 to {most}."
            )
        self.init_texts = [context_init] if isinstance(context_init, str) else list(context_init or ())
        self.context = nn.Parameter(self.random_context(config, depth, context, width))

    def random_context(self, config, depth, n, width):
        """Return random vectors `[depth, n, width]`.

        Raises ValueError if the text encoder has no room for n.
        """
        window = config.text.max_position_embeddings
        room = window - 2 if "text" in self.encoders else n  # start and end token
        if not 1 <= n <= room:
            raise ValueError(
                f"{n} context vectors (--context, or the tokens of --context-init): give 1 or more; for "
                f"the text encoder, give 1 to {window - 2}: its window of {window} tokens also holds two."
            )
        return torch.empty(depth, n, width).normal_(0, INIT_STD)

    def on_attach(self, network, folder):
        if self.init_texts:
            ids = self.encode_init_texts(Tokenizer(folder, limit=1 << 20))
            vectors = self.random_context(
                network.config, len(self.context), ids.shape[1], self.context.shape[2]
            )
            vectors[: len(ids)] = network.text_transformer().tokens(ids).detach()
            self.context = nn.Parameter(vectors)
        depth, n, _ = self.context.shape
        return dict(prompt_depth=depth, context=n)

    def encode_init_texts(self, tokenizer):
        """Return the token ids `[texts, n]` of the first layers' texts.

        Raises ValueError unless all texts have n tokens, at least one.
        """
        texts = self.init_texts[: len(self.context)]
        ids = [tokenizer.encode(text)[1:-1] for text in texts]  # without start and end token
        counts = [len(row) for row in ids]
        if 0 in counts:
            empty = texts[counts.index(0)]
            raise ValueError(f"--context-init '{empty}' holds nothing that the tokenizer knows.")
        if len(set(counts)) > 1:
            raise ValueError(
                "--context-init: texts of equally many tokens are needed, and these have "
                f"{', '.join(map(str, counts))}."
            )
        return torch.tensor(ids)

    def uses_weight_decay(self, name, tensor):
        """Tell whether weight decay acts on a tensor: on matrices and contexts, not on biases and norms.

        With `reference` it does not act on contexts, as in the published code; the paper does not say so.
        """
        published = self.reference and name.endswith("context")
        return super().uses_weight_decay(name, tensor) and tensor.dim() > 1 and not published

    def module_per_layer(self, make, unified):
        """Return `make()` for each layer, each at a random start of its own; one for all if `unified`."""
        count = 1 if unified else len(self.context)
        return nn.ModuleList(make() for _ in range(count))

    def copy_per_layer(self, module, unified):
        """Return a copy of a module for each layer, so that all start alike; one for all if `unified`."""
        return self.module_per_layer(lambda: copy.deepcopy(module), unified)

    def apply_per_layer(self, modules, vectors=None):
        """Return each layer's vectors (default: `context`) put through that layer's module."""
        vectors = self.context if vectors is None else vectors
        return [module(v) for module, v in zip(cycle(modules), vectors)]  # one module may serve all


class CoOp(PromptLearner):
    """Vectors in the text encoder."""

    def __init__(self, config, prompt_depth=None, context=4, context_init=None, reference=False):
        super().__init__(config, config.text.hidden_size, prompt_depth, context, context_init, reference)
        self.ignores_upsampler = reference and config.published_coop_ignores_upsampler

    def contexts(self):
        return Contexts(text=self.context.unbind())

    def adapt_logits(self, logits, features):
        """Return the logits; with `reference` on CLIPSeg the upsampler is built, as published, but unused."""
        return logits if self.ignores_upsampler else super().adapt_logits(logits, features)

    def uses_weight_decay(self, name, tensor):
        unused = self.ignores_upsampler and name.startswith("upsampler")
        return super().uses_weight_decay(name, tensor) and not unused


class CoCoOp(CoOp):
    """Vectors in the text encoder, to which a projection of the image embedding is added: each image has its
    own.

    The embedding is that of the vision tower as it runs, changed by a method that acts in it.
    """

    needs_image_embedding = True

    def __init__(
        self, config, prompt_depth=None, context=4, context_init=None, intermediate_dim=64, lora_proj=False,
        proj_norm=True, unified_proj=False, norm_image_features=False, reference=False,
    ):  # fmt: skip
        super().__init__(config, prompt_depth, context, context_init, reference)
        self.normalise = norm_image_features
        sizes = config.projection_dim, config.text.hidden_size, intermediate_dim, lora_proj, proj_norm
        self.project = self.module_per_layer(lambda: projection(*sizes, bias=False), unified_proj)

    def image_conditioned_contexts(self, contexts, image_embedding):
        if self.normalise:
            image_embedding = image_embedding / image_embedding.norm(dim=-1, keepdim=True)
        shifts = [project(image_embedding)[:, None] for project in self.project]  # [B, 1, D] each
        return [v + shift for v, shift in zip(contexts, cycle(shifts))]  # [B, n, D] each


class VPT(PromptLearner):
    """Vectors in the vision encoder."""

    encoders = ("vision",)

    def __init__(self, config, prompt_depth=None, context=4, reference=False):
        super().__init__(config, config.vision.hidden_size, prompt_depth, context, None, reference)

    def contexts(self):
        return Contexts(vision=self.context.unbind())

    def adapt_logits(self, logits, features):
        """Return the logits; with `reference` both terms are added without the ratio, as published."""
        if self.reference and self.upsampler is not None:
            return logits + self.upsampler.upsample(features)
        return super().adapt_logits(logits, features)


class MaPLe(PromptLearner):
    """Vectors in the text encoder; those in the vision encoder are projected from them."""

    encoders = ("vision", "text")

    def __init__(
        self, config, prompt_depth=None, context=4, context_init=None, intermediate_dim=64, lora_proj=False,
        proj_norm=True, unified_proj=False, reference=False,
    ):  # fmt: skip
        super().__init__(config, config.text.hidden_size, prompt_depth, context, context_init, reference)
        sizes = config.text.hidden_size, config.vision.hidden_size, intermediate_dim, lora_proj, proj_norm
        self.project = self.module_per_layer(lambda: projection(*sizes), unified_proj)

    def contexts(self):
        return Contexts(vision=self.apply_per_layer(self.project), text=self.context.unbind())


class SharedSeparate(PromptLearner):
    """Vectors of a width of their own; two projections make those of the text and of the vision encoder."""

    encoders = ("vision", "text")

    def __init__(
        self, config, prompt_depth=None, context=4, shared_dim=64, intermediate_dim=0, lora_proj=False,
        proj_norm=True, unified_proj=False, reference=False,
    ):  # fmt: skip
        if shared_dim < 1:
            raise ValueError(f"--shared-dim {shared_dim}: give 1 or more (default 64).")
        super().__init__(config, shared_dim, prompt_depth, context, None, reference)

        sizes = intermediate_dim, lora_proj, proj_norm
        to_text = projection(shared_dim, config.text.hidden_size, *sizes)
        self.text_project = self.copy_per_layer(to_text, unified_proj)
        to_vision = projection(shared_dim, config.vision.hidden_size, *sizes)
        self.vision_project = self.copy_per_layer(to_vision, unified_proj)

    def contexts(self):
        return Contexts(
            vision=self.apply_per_layer(self.vision_project), text=self.apply_per_layer(self.text_project)
        )


class SharedAttention(PromptLearner):
    """Vectors as wide as both encoders' tokens together.

    A transformer layer mixes them, then each encoder takes its part.
    """

    encoders = ("vision", "text")
    default_depth = 1  # each layer comes with a mixer of 10.5 million parameters at real size

    def __init__(
        self, config, prompt_depth=None, context=4, heads=16, feed_forward=1536, dropout=0.25,
        norm_first=True, unified_proj=False, reference=False,
    ):  # fmt: skip
        self.text_width = config.text.hidden_size
        width = config.text.hidden_size + config.vision.hidden_size
        super().__init__(config, width, prompt_depth, context, None, reference)
        if heads < 1 or width % heads:
            fitting = ", ".join(str(h) for h in range(1, 65) if width % h == 0)
            raise ValueError(
                f"--heads {heads} does not divide the vectors' width {width}; give one of {fitting}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout {dropout}: give 0 or more, below 1.")
        # with batch_first False the n vectors are a batch of sequences of length one: as in the published
        # code, none attends to another
        mixer = nn.TransformerEncoderLayer(
            width, heads, feed_forward, dropout, norm_first=norm_first, batch_first=not reference
        )
        self.mixer = self.copy_per_layer(mixer, unified_proj)

    def contexts(self):
        # both encoders' parts from one pass: one dropout draw
        mixed = self.apply_per_layer(self.mixer, self.context[:, None])  # [1, n, width] each
        return Contexts(
            vision=[m[0, :, self.text_width :] for m in mixed],
            text=[m[0, :, : self.text_width] for m in mixed],
        )
