"""A frozen base and a tuner, as one module; building it from weights and loading it from a run's checkpoint."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import weights as weights_io
from .clip import Attention
from .clipseg import CLIPSeg
from .cris import CRIS
from .methods import check_model, make_tuner, method_options
from .san import SAN
from .text import Tokenizer

NETWORKS = {"clipseg": CLIPSeg, "cris": CRIS, "san": SAN}
# Gradients that are zero by nature: a key bias shifts all of a query's scores alike, which softmax ignores; the first matrix of a LoRA
# update learns nothing before the second has left zero.
ZERO = re.compile(r"k_proj\.bias$|\.(q|k|v|out)\.down\.weight$")


class VLSM(nn.Module):
    """Image and prompt in, logits out. Only what the tuner names is trained; all else has `requires_grad` False.

    A base of which nothing is trained stays in evaluation mode: no dropout, no statistics that drift. Attributes: `base`, `tuner`;
    `info`, a dictionary with model, weights, fingerprint, method, options, reference, folder, config.
    """

    def __init__(self, base, tuner, info):
        super().__init__()
        self.base, self.tuner, self.info = base, tuner, info
        self.base.requires_grad_(False)
        names = tuner.base_parameters(base)
        for name in names:
            base.get_parameter(name).requires_grad_(True)
        self.moving = base.moving_buffers() if names else []  # buffers that training changes

    def forward(self, pixel_values, input_ids, attention_mask=None):
        """`[B, 3, H, W]`, `[B, T]`, `[B, T]` -> logits `[B, 1, H, W]`; see the base's forward."""
        return self.base(pixel_values, input_ids, attention_mask, self.tuner)

    def train(self, mode=True):
        super().train(mode)
        self.base.train(mode and any(p.requires_grad for p in self.base.parameters()))
        return self

    def tokenizer(self):
        """The base's tokenizer; prompts are cut to what its window holds besides context vectors.

        Raises ValueError where it knows tokens that the base does not.
        """
        contexts, text = self.tuner.contexts().text, self.base.config.text
        limit = text.max_position_embeddings - (contexts[0].shape[-2] if contexts else 0)
        tokenizer = Tokenizer(self.info["folder"], limit, padded=self.base.keeps_padding)
        if tokenizer.end >= text.vocab_size:
            raise ValueError(
                f"The tokenizer in '{self.info['folder']}' has {tokenizer.end + 1} tokens, and the network's vocabulary holds "
                f"{text.vocab_size}. Put the vocab.json and merges.txt that it was trained with there."
            )
        return tokenizer

    def merged(self):
        """The base with what was learnt added to its weights: a state dictionary in float32, by the names of the Hugging Face checkpoint.

        Raises ValueError where no change of the base's weights does the same.
        """
        base = copy.deepcopy(self.base).float().cpu()
        copy.deepcopy(self.tuner).cpu().merge(base)
        return {name: t.contiguous() for name, t in base.state_dict().items()}

    def tuned_parameters(self):
        """What training changes: a dictionary from tensor name (as in the checkpoint) to parameter."""
        tuned = dict(self.tuner.named_parameters())
        tuned.update({name: self.base.get_parameter(name) for name in self.tuner.base_parameters(self.base)})
        return tuned

    def _tuned(self):
        return {**self.tuned_parameters(), **{name: self.base.get_buffer(name) for name in self.moving}}

    def tuned_state_dict(self):
        """Copies of the tuned tensors on the CPU, in float32, by name. Nothing of the frozen base is among them."""
        return {name: p.detach().float().cpu().clone().contiguous() for name, p in self._tuned().items()}

    @torch.no_grad()
    def load_tuned(self, tensors):
        """Set the tuned tensors. Raises ValueError unless names and shapes are exactly those of `tuned_state_dict()`."""
        own = self._tuned()
        found = weights_io.differences(own, tensors)
        if found:
            raise ValueError(f"These tensors are not those of --peft {self.info['method']} with {self.info['options']}: {found}.")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def count(self):
        """(trained, total) numbers of parameters."""
        return sum(p.numel() for p in self.tuned_parameters().values()), sum(p.numel() for p in self.parameters())

    def check_gradients(self):
        """One line on the first backward pass: each trained tensor needs a finite, non-zero gradient and no frozen one may have any.

        Raises ValueError where a gradient is missing, not finite, or where none should be.
        """
        tuned = self.tuned_parameters()
        trained = {id(p) for p in tuned.values()}
        absent = [n for n, p in tuned.items() if p.grad is None]
        broken = [n for n, p in tuned.items() if p.grad is not None and not p.grad.isfinite().all()]
        if not self.info["reference"]:  # published code trains some tensors that nothing reads
            broken, absent = absent + broken, []
        zero = absent + [n for n, p in tuned.items() if n not in broken + absent and not ZERO.search(n) and not p.grad.any()]
        leaking = [n for n, p in self.named_parameters() if id(p) not in trained and p.grad is not None]
        if broken or leaking:
            raise ValueError(
                f"First step: {len(broken)} trained tensors without a finite gradient ({', '.join(broken[:3])}), "
                f"{len(leaking)} frozen ones with one ({', '.join(leaking[:3])}). Training would be wrong; please report this."
            )
        frozen = sum(1 for _ in self.parameters()) - len(tuned)
        line = f"{len(tuned) - len(zero)} of {len(tuned)} trained tensors finite and non-zero, 0 of {frozen} frozen ones have any"
        dead = f"; ZERO, so not learning yet: {', '.join(zero[:4])}{', ...' if len(zero) > 4 else ''}" if zero else ""
        return f"gradients at the first step: {line}{dead}"

    def compile_blocks(self):
        """Have `torch.compile` build the transformer layers: once for each kind of layer, whatever their number; in place.

        Sizes are left open, so that another batch or prompt length compiles nothing anew.
        """
        # a layer's variants: encoder, adapters or none, gradient on its input or none, training or not
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in self.base.compilable():
            block.compile(dynamic=True)
        return self

    def hold_frozen_weights_in(self, dtype):
        """Keep the frozen matrices in the compute dtype; norms, embeddings of positions and everything trained stay float32."""
        heavy = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Attention)
        for module in self.base.modules():
            if isinstance(module, heavy) and not any(p.requires_grad for p in module.parameters()):
                module.to(dtype)
        return self


def network(model):
    """The class of a name in `NETWORKS`. Raises ValueError for others."""
    if model not in NETWORKS:
        raise ValueError(f"Model '{model}' is not known. Choose one of: {', '.join(NETWORKS)}.")
    return NETWORKS[model]


def read_config(model, weights):
    """(folder, dictionary of the `config.json`, the network's configuration) of some weights, which are downloaded if need be."""
    kind = network(model)
    folder, file = weights_io.resolve(weights, kind)
    raw = weights_io.read_json(file)
    if raw.get("model_type", kind.model_types[0]) not in kind.model_types:
        raise ValueError(
            f"'{file}' describes a '{raw['model_type']}' model; --model {model} needs a {' or '.join(kind.model_types)} one. "
            f"{weights_io.advice(NETWORKS, raw['model_type'])}".rstrip()
        )
    return folder, raw, kind.Config.from_dict(raw)


@dataclass
class Base:
    """A network with its weights, before a method is chosen. `fresh`: names of what its checkpoint lacks, and started at random."""

    network: nn.Module
    model: str
    weights: str
    folder: Path
    config: dict
    fingerprint: str
    fresh: frozenset


def load_base(model="clipseg", weights=None, reference=False):
    """The `Base` of a model's name and some weights; arguments and errors as those of `build`."""
    kind = network(model)
    weights = weights or kind.default_weights
    folder, raw, config = read_config(model, weights)
    fresh = {}
    if weights_io.is_random(weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights for all runs, which are known by their fingerprint
            base = kind(config, reference)
            base.initialise()
        tensors = base.state_dict()
    else:
        with torch.device("meta"):
            base = kind(config, reference)
        given = weights_io.read_tensors(folder)
        tensors = kind.rename(given)
        fresh = base.fresh(tensors)
        weights_io.load_strictly(base, {**tensors, **fresh}, f"The checkpoint in '{folder}'", given)
    base.settle()
    return Base(base, model, str(weights), folder, raw, weights_io.fingerprint(tensors), frozenset(fresh))


def tune(base, method="none", **options):
    """A VLSM of a `Base`, which several may share, and a fresh tuner; arguments and errors as those of `build`."""
    kind = type(base.network)
    check_model(method, kind)
    options, reference = method_options(method, options), base.network.reference
    tuner = make_tuner(method, base.network.config, reference, options)
    if not base.fresh <= set(tuner.base_parameters(base.network)):
        raise ValueError(
            f"The weights in '{base.folder}' are {kind.name}'s frozen part alone; the rest starts at random, so --peft {method}, which "
            "does not train it, would leave noise. Use --peft full or decoder."
        )
    for name, value in tuner.start(base.network, base.folder).items():
        options[name] = {**options[name], **value} if isinstance(value, dict) else value
    info = dict(
        model=base.model, weights=base.weights, fingerprint=base.fingerprint, method=method, options=options, reference=reference,
        folder=base.folder, config=base.config,
    )  # fmt: skip
    return VLSM(base.network, tuner, info).eval()


def build(model="clipseg", weights=None, method="none", reference=False, **options):
    """A VLSM with frozen `weights` and a fresh tuner, in float32 on the CPU, in eval mode.

    model: a key of `NETWORKS`. weights: a local folder in Hugging Face layout, or a hub id (default: the model's own, if it has one);
    "mini", an embedded CLIPSeg; "random:CONFIG.json", for tests and research. method: a key of
    `vlsm.methods.METHODS`, or several ("dense+vpt"); options follow as keywords (`branches="vl", dim=64`; for one part of several:
    `vpt=dict(context=8)`; `upsampler=True` for any). reference: do as the published code does where it departs from
    its paper. Raises ValueError or FileNotFoundError with a sentence to act on.
    """
    check_model(method, network(model))
    method_options(method, options)  # mistakes in them are said before anything is read
    return tune(load_base(model, weights, reference), method, **options)
