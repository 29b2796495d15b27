"""A frozen network and a tuner as one module; building it from weights."""

import copy
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import kernels
from vlsm.methods.registry import check_model, complete_options, make_tuner
from vlsm.networks import weights as weights_io
from vlsm.networks.clipseg import CLIPSeg
from vlsm.networks.cris import CRIS
from vlsm.networks.sam3 import SAM3
from vlsm.networks.san import SAN
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.transformer import Attention
from vlsm.system.files import read_json

NETWORKS = {"clipseg": CLIPSeg, "cris": CRIS, "san": SAN, "sam3": SAM3}
# Gradients that are zero by nature: a key bias shifts all of a query's scores alike, which softmax ignores;
# the first matrix of a LoRA update learns nothing before the second has left zero.
ZERO_BY_NATURE = re.compile(r"k_proj\.bias$|\.(q|k|v|out)\.down\.weight$")


class VLSM(nn.Module):
    """Image and prompt in, logits out.

    Only what the tuner names is trained; all else has `requires_grad` False.

    A base of which nothing is trained stays in evaluation mode: no dropout, no statistics that drift.
    Attributes: `base`, the network; `tuner`; `info`, a dictionary with model, weights, fingerprint, method,
    options, reference, folder, config; `about`, the metadata of the checkpoint that it was loaded from, or
    None.
    """

    def __init__(self, base, tuner, info, about=None):
        super().__init__()
        self.base, self.tuner, self.info, self.about = base, tuner, info, about
        self.base.requires_grad_(False)
        names = tuner.trained_network_parameters(base)
        for name in names:
            base.get_parameter(name).requires_grad_(True)
        self.updated_buffers = base.updated_buffers() if names else []  # names

    def forward(self, pixel_values, input_ids, attention_mask=None, image_features=None, text_features=None):
        """Segment images by prompts: `[B, 3, H, W]`, `[B, T]`, `[B, T]` -> logits `[B, 1, H, W]`.

        For `image_features` and `text_features`, kept from before, see `Network.forward`.
        """
        return self.base(pixel_values, input_ids, attention_mask, self.tuner, image_features, text_features)

    def train(self, mode=True):
        super().train(mode)
        self.base.train(mode and any(p.requires_grad for p in self.base.parameters()))
        return self

    def tokenizer(self):
        """Return the base's tokenizer, which cuts prompts to what its window holds besides context vectors.

        Raises ValueError where it knows tokens that the base does not.
        """
        contexts, text = self.tuner.contexts().text, self.base.config.text
        limit = text.max_position_embeddings - (contexts[0].shape[-2] if contexts else 0)
        tokenizer = Tokenizer(self.info["folder"], limit, self.base.keeps_padding)
        if tokenizer.end >= text.vocab_size:
            raise ValueError(
                f"The tokenizer in '{self.info['folder']}' has {tokenizer.end + 1} tokens, and the network's "
                f"vocabulary holds {text.vocab_size}. Put the vocab.json and merges.txt that it was trained "
                "with there."
            )
        return tokenizer

    # What was trained

    def tuned_parameters(self):
        """Return what training changes: a dictionary from tensor name (as in the checkpoint) to parameter."""
        names = self.tuner.trained_network_parameters(self.base)
        return {
            **dict(self.tuner.named_parameters()),
            **{name: self.base.get_parameter(name) for name in names},
        }

    def _tuned_tensors(self):
        return {
            **self.tuned_parameters(),
            **{name: self.base.get_buffer(name) for name in self.updated_buffers},
        }

    def tuned_state_dict(self):
        """Return copies of the tuned tensors on the CPU, in float32, by name; nothing of the frozen base."""
        return {
            name: p.detach().float().cpu().clone().contiguous() for name, p in self._tuned_tensors().items()
        }

    @torch.no_grad()
    def load_tuned(self, tensors):
        """Set the tuned tensors.

        Raises ValueError unless names and shapes are those of `tuned_state_dict()`.
        """
        own = self._tuned_tensors()
        mismatch = weights_io.describe_mismatch(own, tensors)
        if mismatch:
            method, options = self.info["method"], self.info["options"]
            raise ValueError(f"These tensors are not those of --peft {method} with {options}: {mismatch}.")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def merged_state_dict(self):
        """Return the base in float32 with what was learnt merged in, by the checkpoint's own names.

        Raises ValueError where no change of the base's weights does the same.
        """
        base = copy.deepcopy(self.base).float().cpu()
        copy.deepcopy(self.tuner).cpu().merge_into(base)
        return {name: t.contiguous() for name, t in base.state_dict().items()}

    def count_parameters(self):
        """Return (trained, total) numbers of parameters."""
        trained, every = self.tuned_parameters().values(), self.parameters()
        return sum(p.numel() for p in trained), sum(p.numel() for p in every)

    def check_gradients(self):
        """Return a line on the gradients: each trained tensor needs a finite one, no frozen one has any.

        Raises ValueError where a gradient is missing, not finite, or where none should be.
        """
        tuned = self.tuned_parameters()
        trained = {id(p) for p in tuned.values()}
        absent = [n for n, p in tuned.items() if p.grad is None]
        broken = [n for n, p in tuned.items() if p.grad is not None and not p.grad.isfinite().all()]
        if not self.info["reference"]:  # published code trains some tensors that nothing reads
            broken, absent = absent + broken, []
        present = [n for n in tuned if n not in broken + absent]
        zero = absent + [n for n in present if not ZERO_BY_NATURE.search(n) and not tuned[n].grad.any()]
        leaking = [n for n, p in self.named_parameters() if id(p) not in trained and p.grad is not None]
        if broken or leaking:
            raise ValueError(
                f"First step: {len(broken)} trained tensors without a finite gradient "
                f"({', '.join(broken[:3])}), {len(leaking)} frozen ones with one ({', '.join(leaking[:3])}). "
                "Training would be wrong; please report this."
            )
        frozen = sum(1 for _ in self.parameters()) - len(tuned)
        counts = f"{len(tuned) - len(zero)} of {len(tuned)} trained tensors finite and non-zero"
        line = f"gradients at the first step: {counts}, 0 of {frozen} frozen ones have any"
        if zero:
            line += f"; ZERO, so not learning yet: {', '.join(zero[:4])}{', ...' if len(zero) > 4 else ''}"
        return line

    # Where it runs

    def place_on(self, device, dtype, use_kernels="auto", compile_blocks="auto"):
        """Move to a device, in place: frozen matrices in the compute dtype, kernels chosen, layers compiled.

        use_kernels, compile_blocks: the options `--kernels` and `--compile`. Raises ValueError where what is
        asked for cannot be.
        """
        triton = kernels.use_kernels(use_kernels)
        if dtype is not None:
            self.hold_frozen_weights_in(dtype)
        self.to(device)
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if compile_blocks == "on" and device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise ValueError(
                "--compile on needs a C++ compiler for a CPU, and there is none on the PATH (apt install "
                "g++). Use --compile off."
            )
        if compile_blocks == "on" or (compile_blocks == "auto" and device.type == "cuda" and triton):
            self.compile_blocks()
        return self

    def recompute_activations(self, recompute=True):
        """Keep no activations of the transformer layers for the backward pass, but compute them again; in
        place.
        """
        for block in self.base.compilable_blocks():
            block.recompute = recompute

    def compile_blocks(self):
        """Have `torch.compile` build the transformer layers, once for each kind of layer; in place.

        Where the network allows it sizes are left open: another batch or prompt length compiles nothing anew.
        """
        # a layer's variants: encoder, adapters or none, gradient on its input or none, training or not
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in self.base.compilable_blocks():
            block.compile(dynamic=self.base.compile_dynamic)

    def hold_frozen_weights_in(self, dtype):
        """Keep frozen matrices in the compute dtype; norms, positions and the trained stay float32."""
        heavy = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Attention)
        for module in self.base.modules():
            if type(module) in heavy and not any(p.requires_grad for p in module.parameters()):
                module.to(dtype)
        return self


def network_class(model):
    """Return the class of a name in `NETWORKS`. Raises ValueError for others."""
    if model not in NETWORKS:
        raise ValueError(f"Model '{model}' is not known. Choose one of: {', '.join(NETWORKS)}.")
    return NETWORKS[model]


def read_config(model, weights):
    """Return (folder, dictionary of the `config.json`, the network's configuration) of some weights.

    Downloads what is on the hub. Raises ValueError where the file describes another network.
    """
    kind = network_class(model)
    folder, file = weights_io.locate_weights(weights, kind)
    raw = read_json(file)
    model_type = raw.get("model_type", kind.model_types[0])
    if model_type not in kind.model_types:
        wanted = " or ".join(kind.model_types)
        fitting = "".join(
            f"That is --model {n}." for n, other in NETWORKS.items() if model_type in other.model_types
        )
        raise ValueError(
            f"'{file}' describes a '{model_type}' model; --model {model} needs a {wanted} one. "
            f"{fitting}".rstrip()
        )
    return folder, raw, kind.Config.from_dict(raw)


@dataclass
class Base:
    """A network with its weights, before a method is chosen.

    fresh: names of the tensors that its checkpoint lacks and that started at random.
    """

    network: nn.Module
    model: str
    weights: str
    folder: Path
    config: dict
    fingerprint: str
    fresh: frozenset


def load_base(model="clipseg", weights=None, reference=False):
    """Return the `Base` of a model's name and some weights; arguments and errors as those of `build`."""
    kind = network_class(model)
    weights = weights or kind.default_weights
    folder, raw, config = read_config(model, weights)
    fresh = {}
    if weights_io.is_random(weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights for all runs, which are known by their fingerprint
            network = kind(config, reference)
            network.initialise()
        tensors = network.state_dict()
    else:
        with torch.device("meta"):
            network = kind(config, reference)
        in_file = weights_io.read_tensors(folder)
        tensors = kind.rename(in_file)
        fresh = network.fresh_tensors(tensors)
        weights_io.load_strictly(network, {**tensors, **fresh}, f"The checkpoint in '{folder}'", in_file)
    network.on_weights_loaded()
    return Base(network, model, str(weights), folder, raw, weights_io.fingerprint(tensors), frozenset(fresh))


def attach_tuner(base, method="none", options=None, about=None):
    """Return a VLSM of a `Base`, which several may share, and a fresh tuner, in eval mode.

    options: of the method, a dictionary. about: metadata of the checkpoint that is loaded into it. Errors as
    `build`.
    """
    network = base.network
    check_model(method, type(network))
    reference, options = network.reference, complete_options(method, options or {}, network.config)
    tuner = make_tuner(method, network.config, reference, options)
    if not base.fresh <= set(tuner.trained_network_parameters(network)):
        raise ValueError(
            f"The weights in '{base.folder}' are {network.name}'s frozen part alone; the rest starts at "
            f"random, so --peft {method}, which does not train it, would leave noise. Use --peft full or "
            "decoder."
        )
    for name, value in tuner.on_attach(network, base.folder).items():
        options[name] = {**options[name], **value} if isinstance(value, dict) else value
    info = dict(
        model=base.model, weights=base.weights, fingerprint=base.fingerprint, method=method, options=options,
        reference=reference, folder=base.folder, config=base.config,
    )  # fmt: skip
    return VLSM(network, tuner, info, about).eval()


def build(model="clipseg", weights=None, method="none", reference=False, **options):
    """Return a VLSM with frozen `weights` and a fresh tuner, in float32 on the CPU, in eval mode.

    model: a key of `NETWORKS`. weights: a local folder in Hugging Face layout, or a hub id (default: the
    model's own, if it has one); "mini", an embedded CLIPSeg; "random:CONFIG.json", for tests and research.
    method: a key of `METHODS`, or several ("dense+vpt"); its options follow as keywords (`branches="vl",
    dim=64`; for one part of several: `vpt=dict(context=8)`; `upsampler=True` for any). reference: do as the
    published code does where it departs from its paper. Raises ValueError or FileNotFoundError with a
    sentence to act on.
    """
    check_model(method, network_class(model))
    complete_options(method, options)  # mistakes in them are said before anything is read
    return attach_tuner(load_base(model, weights, reference), method, options)
