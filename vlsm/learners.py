"""Prompt learners: context vectors that join the tokens of an encoder, a set of n for each of the first `prompt_depth` layers.

Sources: Adhikari et al., "TuneVLSeg" (ACCV 2024), which measures all six; CoOp: Zhou et al. (IJCV 2022); CoCoOp: Zhou et al. (CVPR 2022);
VPT: Jia et al. (ECCV 2022); MaPLe: Khattak et al. (CVPR 2023). `Contexts` and clipseg.py say where the vectors stand.
"""

import copy

import torch
from torch import nn

from .clipseg import CLIPSegConfig
from .text import Tokenizer
from .tuners import Contexts, Tuner

STD = 0.02  # of the random start
DEPTH = 9  # sets of context vectors, unless the network has fewer layers


def projection(into, out, hidden, lora, norm, bias=True):
    """From width `into` to `out`: a linear layer; with `hidden` (a width, or a list of widths) an MLP; with `lora` the product of two
    matrices (of one, where hidden > out). `norm`: a LayerNorm behind an MLP or such a product; without `bias`, neither it nor the last
    layer has one. Raises ValueError for a list with `lora`.
    """
    widths = [hidden] if isinstance(hidden, int) else list(hidden or ())
    if lora and len(widths) > 1:
        raise ValueError(f"--lora-proj takes one --intermediate-dim, not {len(widths)}.")
    if not any(widths):
        return nn.Linear(into, out)
    if min(widths) < 1:
        raise ValueError(f"--intermediate-dim {' '.join(map(str, widths))}: give 1 or more, or 0 alone for a single layer.")
    if lora and widths[0] > out:
        layers = [nn.Linear(into, out, bias=False)]
    elif lora:
        layers = [nn.Linear(into, widths[0], bias=False), nn.Linear(widths[0], out, bias=bias and not norm)]
    else:
        layers = []
        for a, b in zip([into, *widths], widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        layers.append(nn.Linear(widths[-1], out, bias=bias and not norm))
    return nn.Sequential(*layers, *[nn.LayerNorm(out, bias=bias)] * bool(norm))


class Learner(Tuner):
    """What the six share: `context` `[depth, n, width]`, its depth and its start.

    prompt_depth: at most the layers that act on the logits (default `depth`, or as many as there are); context: n; context_init: a text, or
    one for each of the first layers, whose tokens' embeddings the vectors start from (they then set n). Raises ValueError where these do
    not fit the network.
    """

    upsamples = True
    places = ("text",)  # encoders whose tokens the vectors join
    depth = DEPTH  # unless told otherwise

    def __init__(self, config, width, prompt_depth, context, context_init=None, reference=False):
        super().__init__(config, reference)
        deepest = config.deepest(self.places, reference)
        depth = min(self.depth, deepest) if prompt_depth is None else prompt_depth
        if not 1 <= depth <= deepest:
            raise ValueError(
                f"--prompt-depth {depth}: of this network's layers, {deepest} can take context vectors that the logits depend on. "
                f"Give 1 to {deepest}."
            )
        self.words = [context_init] if isinstance(context_init, str) else list(context_init or ())
        self.context = nn.Parameter(self.fresh(config, depth, context, width))

    def fresh(self, config, depth, n, width):
        room = config.text.max_position_embeddings - 2  # start and end token
        if n < 1 or ("text" in self.places and n > room):
            most = f" to {room}, what the text encoder's window of {room + 2} tokens holds besides start and end" * ("text" in self.places)
            raise ValueError(f"{n} context vectors (--context, or the tokens of --context-init): give 1{most or ' or more'}.")
        return torch.empty(depth, n, width).normal_(0, STD)

    def start(self, base, folder):
        if self.words:
            tokenizer = Tokenizer(folder, limit=1 << 20)
            ids = [tokenizer.encode(text)[1:-1] for text in self.words[: len(self.context)]]
            counts = [len(i) for i in ids]
            if not all(counts):
                raise ValueError(
                    f"--context-init '{self.words[counts.index(0)]}' holds nothing that the tokenizer knows. Give a few words."
                )
            if len(set(counts)) > 1:
                raise ValueError(f"--context-init: texts of equally many tokens are needed, and these have {', '.join(map(str, counts))}.")
            vectors = self.fresh(base.config, len(self.context), counts[0], self.context.shape[2])
            vectors[: len(ids)] = base.text_encoder().tokens(torch.tensor(ids)).detach()
            self.context = nn.Parameter(vectors)
        depth, n, _ = self.context.shape
        return dict(prompt_depth=depth, context=n)

    def decays(self, name, tensor):
        """Matrices and contexts decay, biases and norms do not; the published code leaves out the contexts, without saying so."""
        return super().decays(name, tensor) and tensor.dim() > 1 and not (self.reference and name.endswith("context"))

    def each(self, make, unified, copies=False):
        """A module a set of vectors (`make()`, or copies of the first), or one for all."""
        first, rest = make(), 0 if unified else len(self.context) - 1
        return nn.ModuleList([first, *(copy.deepcopy(first) if copies else make() for _ in range(rest))])

    def through(self, modules, vectors=None):
        """Each set of vectors (`context`, or others in its place) through its module."""
        vectors = self.context if vectors is None else vectors
        return [modules[min(i, len(modules) - 1)](v) for i, v in enumerate(vectors)]


class CoOp(Learner):
    """Vectors in the text encoder."""

    def __init__(self, config, prompt_depth=None, context=4, context_init=None, reference=False):
        super().__init__(config, config.text.hidden_size, prompt_depth, context, context_init, reference)
        self.ignores_upsampler = reference and isinstance(config, CLIPSegConfig)

    def contexts(self):
        return Contexts(text=self.context.unbind())

    def output(self, logits, z):
        """On CLIPSeg the published code builds the upsampler and does not call it."""
        return logits if self.ignores_upsampler else super().output(logits, z)

    def decays(self, name, tensor):
        return super().decays(name, tensor) and not (self.ignores_upsampler and name.startswith("upsampler"))


class CoCoOp(CoOp):
    """Vectors in the text encoder, to which a projection of the image's features is added: each image has its own.

    The features are those of the vision tower as it runs: beside a method that acts in it, the changed ones.
    """

    reads_features = True

    def __init__(
        self, config, prompt_depth=None, context=4, context_init=None, intermediate_dim=64, lora_proj=False, proj_norm=True,
        unified_proj=False, norm_image_features=False, reference=False,
    ):  # fmt: skip
        super().__init__(config, prompt_depth, context, context_init, reference)
        self.normalise = norm_image_features
        sizes = config.projection_dim, config.text.hidden_size, intermediate_dim, lora_proj, proj_norm
        self.project = self.each(lambda: projection(*sizes, bias=False), unified_proj)

    def text_contexts(self, contexts, features):
        if self.normalise:
            features = features / features.norm(dim=-1, keepdim=True)
        shifts = [project(features)[:, None] for project in self.project]  # [B, 1, D]
        return [v + shifts[min(i, len(shifts) - 1)] for i, v in enumerate(contexts)]


class VPT(Learner):
    """Vectors in the vision encoder."""

    places = ("vision",)

    def __init__(self, config, prompt_depth=None, context=4, reference=False):
        super().__init__(config, config.vision.hidden_size, prompt_depth, context, None, reference)

    def contexts(self):
        return Contexts(vision=self.context.unbind())

    def output(self, logits, z):
        """The published code adds both terms, without the ratio."""
        if self.reference and self.upsampler is not None:
            return logits + self.upsampler.rise(z)
        return super().output(logits, z)


class MaPLe(Learner):
    """Vectors in the text encoder; those in the vision encoder are projected from them."""

    places = ("vision", "text")

    def __init__(
        self, config, prompt_depth=None, context=4, context_init=None, intermediate_dim=64, lora_proj=False, proj_norm=True,
        unified_proj=False, reference=False,
    ):  # fmt: skip
        super().__init__(config, config.text.hidden_size, prompt_depth, context, context_init, reference)
        sizes = config.text.hidden_size, config.vision.hidden_size, intermediate_dim, lora_proj, proj_norm
        self.project = self.each(lambda: projection(*sizes), unified_proj)

    def contexts(self):
        return Contexts(vision=self.through(self.project), text=self.context.unbind())


class SharedSeparate(Learner):
    """Vectors of a width of their own; two projections make those of the text and of the vision encoder."""

    places = ("vision", "text")

    def __init__(
        self, config, prompt_depth=None, context=4, shared_dim=64, intermediate_dim=0, lora_proj=False, proj_norm=True,
        unified_proj=False, reference=False,
    ):  # fmt: skip
        if shared_dim < 1:
            raise ValueError(f"--shared-dim {shared_dim}: give 1 or more (default 64).")
        super().__init__(config, shared_dim, prompt_depth, context, None, reference)
        kind = intermediate_dim, lora_proj, proj_norm
        self.text_project = self.each(lambda: projection(shared_dim, config.text.hidden_size, *kind), unified_proj, copies=True)
        self.vision_project = self.each(lambda: projection(shared_dim, config.vision.hidden_size, *kind), unified_proj, copies=True)

    def contexts(self):
        return Contexts(vision=self.through(self.vision_project), text=self.through(self.text_project))


class SharedAttention(Learner):
    """Vectors as wide as both encoders' tokens together; a transformer layer mixes them, then each encoder takes its part."""

    places = ("vision", "text")
    depth = 1  # each set comes with a mixer of 10.5 million parameters at real size

    def __init__(
        self, config, prompt_depth=None, context=4, heads=16, feed_forward=1536, dropout=0.25, norm_first=True, unified_proj=False,
        reference=False,
    ):  # fmt: skip
        self.text_width = config.text.hidden_size
        width = config.text.hidden_size + config.vision.hidden_size
        super().__init__(config, width, prompt_depth, context, None, reference)
        if heads < 1 or width % heads:
            some = [h for h in range(1, 65) if width % h == 0]
            raise ValueError(f"--heads {heads} does not divide the vectors' width {width}; give one of {', '.join(map(str, some))}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout {dropout}: give 0 or more, below 1.")
        # the published layer takes the n vectors for a batch of sequences of length one, so that none attends to another
        kind = dict(norm_first=norm_first, batch_first=not reference)
        self.mixer = self.each(lambda: nn.TransformerEncoderLayer(width, heads, feed_forward, dropout, **kind), unified_proj, copies=True)

    def contexts(self):
        mixed = self.through(self.mixer, self.context[:, None])  # each [1, n, width]; both parts of one dropout draw
        return Contexts(vision=[m[0, :, self.text_width :] for m in mixed], text=[m[0, :, : self.text_width] for m in mixed])
