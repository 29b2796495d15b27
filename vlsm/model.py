"""A frozen network and a tuner as one module; building it from weights."""

import copy
import os
import shutil

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
from vlsm.segment import segment_image
from vlsm.system.schema import naming, read_json

NETWORKS = {"clipseg": CLIPSeg, "cris": CRIS, "san": SAN, "sam3": SAM3}


class VLSM(nn.Module):
    """A frozen `network` and a `tuner`: segments images by prompts.

    The tuner's parameters are trained, and those of the network that the tuner names; all others have
    `requires_grad` False. If none of the network's is trained, it stays in evaluation mode: without dropout,
    with fixed BatchNorm statistics.

    Attributes: `info`, a dictionary with model, weights, fingerprint, method, options, reference, folder,
    config; `metadata`, that of the checkpoint that was loaded, or None.
    """

    def __init__(self, network, tuner, info):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.tuner = tuner
        self.info = info
        self.metadata = None
        self.compute_dtype = None  # autocast's, see `place_on`
        self.tuned_names = tuner.trained_network_parameters(network)
        for name in self.tuned_names:
            network.get_parameter(name).requires_grad_(True)
        # names of the buffers that training changes
        self.updated_buffers = network.updated_buffers() if self.tuned_names else []

    def forward(self, pixel_values, input_ids, attention_mask=None, image_features=None, text_features=None):
        """Segment images by prompts: `[B, 3, H, W]`, `[B, T]`, `[B, T]` -> logits `[B, 1, H, W]`.

        For several prompts of each image, and for features computed before, see `Network.forward`.
        """
        return self.network(
            pixel_values, input_ids, attention_mask, self.tuner, image_features, text_features
        )

    def predict(self, image, prompts, threshold=0.5, probability=False):
        """Segment an image of any size by a prompt, or by a list of P prompts, in evaluation mode.

        image: a path, a Pillow image, or a numpy array uint8 `[H, W, 3]` or `[H, W]`. Returns numpy arrays of
        the image's own size. Of a prompt: the mask, bool `[H, W]`, where its probability is above `threshold`
        (default 0.5). Of a list: a label map, uint8 `[H, W]`: 0 for background, else 1 + the index of the
        most probable prompt among those above `threshold`. With `probability`: float32 `[H, W]`, or
        `[P, H, W]` of a list. The image is encoded once for all prompts. Raises ValueError for an image that
        cannot be read, a threshold outside of 0 and 1, and lists of no prompt or of more than 255.
        """
        return segment_image(self, image, prompts, threshold, probability)

    def train(self, mode=True):
        """Set training mode, as `nn.Module.train`; the network follows only if a part of it is trained."""
        super().train(mode)
        self.network.train(mode and bool(self.tuned_names))
        return self

    def tokenizer(self):
        """Return the network's tokenizer; it cuts prompts to the window of the text encoder, less n context
        vectors.

        Raises ValueError if the tokenizer has more tokens than the network's vocabulary.
        """
        text = self.network.config.text
        limit = text.max_position_embeddings
        contexts = self.tuner.contexts().text
        if contexts:
            limit -= contexts[0].shape[-2]
        tokenizer = Tokenizer(self.info["folder"], limit, self.network.keeps_padding)
        if tokenizer.end >= text.vocab_size:
            raise ValueError(
                f"The tokenizer in '{self.info['folder']}' has {tokenizer.end + 1} tokens, and the network's "
                f"vocabulary holds {text.vocab_size}. Put the vocab.json and merges.txt that it was trained "
                "with there."
            )
        return tokenizer

    # What is trained

    def tuned_parameters(self):
        """Return the trained parameters by their names in the checkpoint."""
        parameters = dict(self.tuner.named_parameters())
        for name in self.tuned_names:
            parameters[name] = self.network.get_parameter(name)
        return parameters

    def tuned_tensors(self):
        """Return the trained parameters, and the buffers that training changes, by name."""
        tensors = self.tuned_parameters()
        for name in self.updated_buffers:
            tensors[name] = self.network.get_buffer(name)
        return tensors

    def tuned_state_dict(self):
        """Return copies of the tuned tensors by name, in float32 on the CPU."""
        state = {}
        for name, tensor in self.tuned_tensors().items():
            state[name] = tensor.detach().float().cpu().clone().contiguous()
        return state

    @torch.no_grad()
    def load_tuned(self, tensors):
        """Copy a checkpoint's tensors into the tuned ones.

        Raises ValueError unless names and shapes are those of `tuned_state_dict()`.
        """
        tensors = self.network.own_names(tensors)  # runs of earlier versions hold the published names
        tuned = self.tuned_tensors()
        mismatch = weights_io.describe_mismatch(tuned, tensors)
        if mismatch:
            raise ValueError(
                f"These tensors are not those of --peft {self.info['method']} with {self.info['options']}: "
                f"{mismatch}."
            )
        for name, tensor in tuned.items():
            tensor.copy_(tensors[name])

    def count_parameters(self):
        """Return (trained, total) numbers of parameters."""
        trained = sum(p.numel() for p in self.tuned_parameters().values())
        return trained, sum(p.numel() for p in self.parameters())

    def parameter_groups(self, weight_decay):
        """Return the optimizer's groups: parameters with weight decay, by the tuner's rule, and without."""
        decayed = []
        others = []
        for name, tensor in self.tuned_parameters().items():
            group = decayed if self.tuner.uses_weight_decay(name, tensor) else others
            group.append(tensor)
        groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
        return [group for group in groups if group["params"]]

    # Where it runs

    def place_on(self, device, dtype, use_kernels="auto", compile_blocks="auto"):
        """Move to a device, in place, and return self; choose the kernels, compile the transformer layers.

        dtype: of frozen matrices, or None to leave them as they are. use_kernels, compile_blocks: the options
        `--kernels` and `--compile`. Raises ValueError for a choice that is not available.
        """
        triton = kernels.use_kernels(use_kernels, device.type)
        self.compute_dtype = dtype
        if dtype is not None:
            self.hold_frozen_weights_in(dtype)
        self.to(device)
        if compile_blocks == "on" and device.type == "cpu":
            compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
            if not any(map(shutil.which, compilers)):
                raise ValueError(
                    "--compile on needs a C++ compiler for a CPU, and none is on the PATH (apt install g++). "
                    "Use --compile off."
                )
        if compile_blocks == "on" or (compile_blocks == "auto" and device.type == "cuda" and triton):
            self.compile_blocks()
        return self

    def describe_place(self):
        """Return in words where the model runs and how; call it after `place_on`."""
        from kernels.dispatch import runs_triton  # it imports Triton

        weight = next(self.parameters())
        name = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
        if weight.is_cuda:
            name = torch.cuda.get_device_name(weight.device)
        language = "Triton" if runs_triton(weight) else "PyTorch"
        compiled = any(module._compiled_call_impl for module in self.modules())
        return f"{name}; {self.compute_dtype or 'torch.float32'}; {language} kernels; compiled: {compiled}"

    def recompute_activations(self, recompute=True):
        """Compute the transformer layers' activations again in the backward pass: less memory, more time."""
        for block in self.network.compilable_blocks():
            block.recompute = recompute

    def compile_blocks(self):
        """Compile the transformer layers in place.

        Shapes are dynamic where the network allows it, so that another batch size or prompt length does not
        compile again.
        """
        # variants of a layer: encoder, with or without adapters, with or without gradients, training or not
        torch._dynamo.reset()  # those of models before, as in a sweep, do not count towards the limit
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in self.network.compilable_blocks():
            block.compile(dynamic=self.network.compile_dynamic)

    def hold_frozen_weights_in(self, dtype):
        """Cast frozen matrices to the compute dtype; norms, positions and trained layers stay float32."""
        heavy = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Attention)
        for module in self.network.modules():
            frozen = not any(p.requires_grad for p in module.parameters())
            if type(module) in heavy and frozen:
                module.to(dtype)


def network_class(model):
    """Return the network class of a name. Raises ValueError for a name that is not in `NETWORKS`."""
    if model not in NETWORKS:
        raise ValueError(f"Model '{model}' is not known. Choose one of: {', '.join(NETWORKS)}.")
    return NETWORKS[model]


def read_config(model, weights):
    """Return (folder, contents of config.json, the network's `Config`) of some weights.

    Downloads weights that are on the hub. Raises ValueError if the file describes another network.
    """
    wanted = network_class(model)
    folder, file = weights_io.locate_weights(weights, wanted)
    raw = read_json(file)
    model_type = raw.get("model_type", wanted.model_types[0])
    if model_type not in wanted.model_types:
        others = [name for name, other in NETWORKS.items() if model_type in other.model_types]
        advice = f" That is --model {others[0]}." if others else ""
        raise ValueError(
            f"'{file}' describes a '{model_type}' model; --model {model} needs a "
            f"{' or '.join(wanted.model_types)} one.{advice}"
        )
    with naming(file):
        return folder, raw, wanted.Config.from_dict(raw)


def read_network(model, weights, reference=False):
    """Return (network with its weights, dictionary that describes them).

    The dictionary is the first part of `VLSM.info`, with `fresh` besides: names of the tensors that the
    checkpoint lacks and that started at random. Raises as `build`.
    """
    wanted = network_class(model)
    weights = weights or wanted.default_weights
    folder, raw, config = read_config(model, weights)
    fresh = {}
    if weights_io.is_random(weights):
        with torch.random.fork_rng(devices=[]), naming(weights):
            torch.manual_seed(0)  # the same weights in every run, so that a checkpoint's fingerprint fits
            network = wanted(config, reference)
            network.initialise()
        tensors = network.published_names(network.state_dict())
    else:
        # without memory; `load_strictly` puts the file's tensors in place
        with torch.device("meta"), naming(folder / "config.json"):
            network = wanted(config, reference)
        in_file = weights_io.read_tensors(folder)
        tensors = wanted.rename(in_file)
        fresh = network.fresh_tensors(tensors)
        own = {**network.own_names(tensors), **fresh}
        weights_io.load_strictly(network, own, f"The checkpoint in '{folder}'", in_file)
    description = dict(
        model=model, weights=str(weights), fingerprint=weights_io.fingerprint(tensors), reference=reference,
        folder=folder, config=raw, fresh=list(fresh),
    )  # fmt: skip
    return network, description


def attach(network, description, method, given, share=False):
    """Return the `VLSM` of a network and a fresh tuner, in eval mode.

    description: of the network's weights, as `read_network` returns it. given: options of the method. share:
    leave the network as it is, and tune a copy that shares its frozen parameters in memory. Raises as
    `build`.
    """
    check_model(method, type(network))
    settings = complete_options(method, given, network.config)
    tuner = make_tuner(method, network.config, network.reference, settings)
    tuned_names = tuner.trained_network_parameters(network)
    if not set(description["fresh"]) <= set(tuned_names):
        raise ValueError(
            f"The weights in '{description['folder']}' are {network.name}'s frozen part alone; the rest "
            f"starts at random, and --peft {method} would not train it. Use --peft full or decoder."
        )
    if share:  # deepcopy takes what is in its memo as it is, and copies the rest: trained tensors, buffers
        memo = {id(p): p for name, p in network.named_parameters() if name not in tuned_names}
        network = copy.deepcopy(network, memo)
        for name in tuned_names:  # the shared network may be held in 16 bits; trained tensors are float32
            parameter = network.get_parameter(name)
            parameter.data = parameter.data.float()
    for name, value in tuner.on_attach(network, description["folder"]).items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    return VLSM(network, tuner, dict(description, method=method, options=settings)).eval()


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
    network, description = read_network(model, weights, reference)
    return attach(network, description, method, options)
