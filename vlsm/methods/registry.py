"""Tuning methods by name, their options, and several of them at once: `--peft dense+vpt`."""

import inspect
from argparse import BooleanOptionalAction
from itertools import combinations

from vlsm.methods.adapters import DenseAdapters, ShallowAdapters
from vlsm.methods.baselines import DecoderTuner, FullTuner, LoRA, TelescopicAdapters
from vlsm.methods.prompt_learners import (
    VPT,
    CoCoOp,
    CoOp,
    MaPLe,
    PromptLearner,
    SharedAttention,
    SharedSeparate,
)
from vlsm.methods.side import SideLadder
from vlsm.methods.upsampler import Upsampler
from vlsm.networks.hooks import PLAIN_ADDITIONS, Contexts, Tuner

METHODS = {
    "none": Tuner,
    "decoder": DecoderTuner,
    "full": FullTuner,
    "dense": DenseAdapters,
    "shallow": ShallowAdapters,
    "telescopic": TelescopicAdapters,
    "lora": LoRA,
    "side": SideLadder,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "vpt": VPT,
    "maple": MaPLe,
    "shared_separate": SharedSeparate,
    "shared_attention": SharedAttention,
}
LARGEST = 1 << 16  # limit of any width, rank or count


def default_options(method):
    """Return the options of one method and their defaults."""
    tuner_class = METHODS[method]
    defaults = {}
    for name, parameter in inspect.signature(tuner_class).parameters.items():
        if name not in ("config", "reference"):
            defaults[name] = parameter.default
    defaults["upsampler"] = tuner_class.default_upsampler
    return defaults


def known_options(methods):
    """Return the names of all options of some methods, each once, in their order."""
    names = {}
    for method in methods:
        names.update(default_options(method))
    return tuple(names)


OPTIONS = known_options(METHODS)


def add_method_options(parser):
    """Add the options of all methods to an argparse parser."""
    add_adapter_options(parser.add_argument_group("adapters, LoRA, side").add_argument)
    learners = "coop, cocoop, vpt, maple, shared_separate, shared_attention"
    add_learner_options(parser.add_argument_group(f"prompt learners ({learners})").add_argument)


def add_adapter_options(add):
    """Declare the options of adapters and LoRA; add: a group's `add_argument`."""
    add(
        "--branches",
        help="adapters in: any of v (vision), l (language), c (conditional embedding); default vl, "
        "telescopic vlc",
    )
    add(
        "--dim",
        type=int,
        help="width of an adapter or ladder (default: 64 dense, side; 512 shallow; 16 telescopic), rank of "
        "LoRA (default 16)",
    )
    add(
        "--dims",
        type=int,
        nargs="+",
        metavar="DIM",
        help="dense, telescopic: a width for each block instead (telescopic: of the vision encoder)",
    )
    add(
        "--blocks",
        metavar="RANGE",
        help="dense, telescopic, lora: the blocks that they act on, such as 5-8 or v:5-8,l:9-11; frozen "
        "blocks below the first are computed once for all epochs",
    )
    add(
        "--lora-alpha",
        type=float,
        help="LoRA's update is alpha / rank times its product (default 32)",
    )
    add(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="attention projections: any of q, k, v, out (default: q v)",
    )


def add_learner_options(add):
    """Declare the options of the prompt learners and the upsampler; add: a group's `add_argument`."""
    add(
        "--prompt-depth",
        type=int,
        metavar="J",
        help="layers with context vectors of their own (default 9 or all; shared_attention 1)",
    )
    add("--context", type=int, metavar="N", help="context vectors a layer (default 4)")
    add(
        "--context-init",
        nargs="+",
        metavar="TEXT",
        help="text whose tokens the vectors start from, and which sets N; several: a layer each (default: "
        'coop, cocoop: "a photo of a" unless --context is given; else random)',
    )
    add(
        "--intermediate-dim",
        type=int,
        nargs="+",
        metavar="H",
        help="width inside the projections of cocoop, maple (default 64), shared_separate (default 0: one "
        "layer); several: more layers",
    )
    add(
        "--lora-proj",
        action=BooleanOptionalAction,
        help="a product of two matrices as projection instead of an MLP (default: no)",
    )
    add(
        "--proj-norm",
        action=BooleanOptionalAction,
        help="LayerNorm after a projection (default: yes)",
    )
    add(
        "--unified-proj",
        action=BooleanOptionalAction,
        help="one projection for all layers instead of one each (default: no)",
    )
    add(
        "--norm-image-features",
        action=BooleanOptionalAction,
        help="cocoop: image features of length one (default: no)",
    )
    add(
        "--norm-first",
        action=BooleanOptionalAction,
        help="shared_attention: norms before attention and MLP (default: yes)",
    )
    add(
        "--upsampler",
        action=BooleanOptionalAction,
        help="learnable upsampler next to the decoder's last layer (default: with prompt learners)",
    )
    add("--shared-dim", type=int, help="shared_separate: width of the vectors (default 64)")
    add("--heads", type=int, help="shared_attention: attention heads (default 16)")
    add("--feed-forward", type=int, help="shared_attention: hidden width (default 1536)")
    add("--dropout", type=float, help="shared_attention: dropout (default 0.25)")


# Checks


def split_methods(method):
    """Return the names in "dense+vpt".

    Raises ValueError for an unknown one, and for two that would act in the same place.
    """
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"Method '{name}' is not known. Choose one of: {', '.join(METHODS)}; or several, as in "
                "dense+vpt."
            )
    for a, b in combinations(names, 2):
        reason = _conflict(a, b)
        if reason:
            raise ValueError(
                f"--peft {method} is not possible: {reason}. Combine methods that act in different places, "
                "as in dense+vpt."
            )
    return names


def _conflict(a, b):
    """Return why two methods cannot work together, or None."""
    if a == b:
        return f"{a} is named twice"
    if "none" in (a, b):
        return "none trains nothing, and so adds nothing to another method"
    if _both(a, b, DecoderTuner):
        return "full trains the decoder already"
    if _both(a, b, DenseAdapters):
        return f"{a} and {b} both act before the residual additions"
    if _both(a, b, PromptLearner):
        for encoder in METHODS[a].encoders:
            if encoder in METHODS[b].encoders:
                return f"{a} and {b} both put context vectors into the {encoder} encoder, in the same places"
    return None


def _both(a, b, tuner_class):
    return issubclass(METHODS[a], tuner_class) and issubclass(METHODS[b], tuner_class)


def check_model(method, network):
    """Raise ValueError for a method that cannot act on a network (a subclass of `Network`)."""
    names = split_methods(method)
    if network.methods is None:
        return
    refused = [name for name in names if name not in network.methods]
    if refused:
        raise ValueError(
            f"--peft {' and '.join(refused)} cannot be used on {network.name}, which takes "
            f"{', '.join(network.methods)}. {network.unsupported_reason}"
        )


def complete_options(method, given, config):
    """Return all options of a method: those `given`, checked, and the defaults of the others.

    For a combination: {method: its options, ..., "upsampler": bool}; a given option goes to every method that
    accepts it, and `vpt=dict(...)` to one. config: the network's. Raises ValueError for unknown options and
    for values of another type than the default's.
    """
    names = split_methods(method)
    if config.upsampler_sizes is None:
        given = {"upsampler": False, **given}
    if len(names) == 1:
        _check_names(method, given, default_options(method))
        return _fill(method, given)
    _check_names(method, given, [*known_options(names), *names])
    settings = {"upsampler": False}
    for name in names:
        for_one = given.get(name, {})
        _check_names(name, for_one, default_options(name))
        options = _fill(name, {**given, **for_one})
        settings["upsampler"] |= options.pop("upsampler")
        settings[name] = options
    return settings


def _check_names(method, given, accepted):
    """Raise ValueError for options that a method does not have."""
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        listed = ", ".join(option for option in accepted if option != "upsampler")
        takes = f"the options {listed}" if listed else "no options"
        raise ValueError(f"Method '{method}' takes {takes}; it has no {', '.join(unknown)}.")


def _fill(method, given):
    """Return all options of one method: values from `given` (which may hold others, too), else defaults."""
    options = default_options(method)
    for name, default in options.items():
        if name in given:
            _check_type(name, given[name], default)
            options[name] = given[name]
    return options


def _check_type(name, value, default):
    """Raise ValueError for a value of another type than the default's, and for a number below 0 or above
    `LARGEST`.
    """
    if value is None:
        return
    flag = f"--{name.replace('_', '-')}"
    if default is not None and isinstance(default, bool) != isinstance(value, bool):
        wanted = "yes or no" if isinstance(default, bool) else "a number"
        raise ValueError(f"{flag} {value!r}: give {wanted}.")
    one_number = isinstance(default, (int, float)) and name != "intermediate_dim"
    several = isinstance(value, (list, tuple)) and not one_number
    for number in value if several else [value]:
        wrong = one_number
        if isinstance(number, (int, float)):
            wrong = not 0 <= number <= LARGEST  # NaN is refused, too
        if wrong:
            raise ValueError(f"{flag} {number!r}: give a number from 0 to {LARGEST}.")


# Building


def make_tuner(method, config, reference, settings):
    """Return the tuner of a method with all its options, as `complete_options` returns them.

    Raises ValueError for values out of range, and for an upsampler that the method or network cannot take.
    """
    names = split_methods(method)
    if len(names) == 1:
        tuner = _make_one(method, config, reference, settings)
    else:
        tuners = {name: _make_one(name, config, reference, settings[name]) for name in names}
        tuner = Combination(tuners, config, reference)
    if settings["upsampler"]:
        if method == "none":
            raise ValueError("--upsampler is trained, and --peft none trains nothing. Choose another method.")
        if config.upsampler_sizes is None:
            raise ValueError(
                "--upsampler: this model's logits are a sum of masks, so there are no features to enlarge. "
                "Leave it out."
            )
        tuner.upsampler = Upsampler(config)
    return tuner


def _make_one(method, config, reference, settings):
    settings = dict(settings)
    settings.pop("upsampler", None)
    return METHODS[method](config, reference=reference, **settings)


class Combination(Tuner):
    """Several tuners, each under its name; `split_methods` makes sure that they act in different places."""

    def __init__(self, tuners, config, reference=False):
        super().__init__(config, reference)
        self.tuners = tuners  # a plain dict; `setattr` registers them, so that names read "vpt.context"
        for name, tuner in tuners.items():
            setattr(self, name, tuner)
        self.needs_image_embedding = any(tuner.needs_image_embedding for tuner in tuners.values())
        self.needs_ladder_blocks = any(tuner.needs_ladder_blocks for tuner in tuners.values())

    def on_attach(self, network, folder):
        return {name: tuner.on_attach(network, folder) for name, tuner in self.tuners.items()}

    def trained_network_parameters(self, network):
        names = []
        for tuner in self.tuners.values():
            names += tuner.trained_network_parameters(network)
        return names

    def contexts(self):
        vision = text = ()
        for tuner in self.tuners.values():
            contexts = tuner.contexts()
            vision = vision or contexts.vision
            text = text or contexts.text
        return Contexts(vision, text)

    def image_conditioned_contexts(self, contexts, image_embedding):
        for tuner in self.tuners.values():
            contexts = tuner.image_conditioned_contexts(contexts, image_embedding)
        return contexts

    def residual_ops(self, encoder, layer):
        for tuner in self.tuners.values():
            ops = tuner.residual_ops(encoder, layer)
            if ops != PLAIN_ADDITIONS:
                return ops
        return PLAIN_ADDITIONS

    def lora_deltas(self, encoder, layer):
        for tuner in self.tuners.values():
            deltas = tuner.lora_deltas(encoder, layer)
            if deltas is not None:
                return deltas
        return None

    def adapt_blocks(self, by_block):
        for tuner in self.tuners.values():
            by_block = tuner.adapt_blocks(by_block)
        return by_block

    def adapt_activation(self, k, x):
        for tuner in self.tuners.values():
            x = tuner.adapt_activation(k, x)
        return x

    def adapt_conditional(self, cond, states):
        for tuner in self.tuners.values():
            cond = tuner.adapt_conditional(cond, states)
        return cond

    def uses_weight_decay(self, name, tensor):
        first, _, rest = name.partition(".")
        if first in self.tuners:
            return self.tuners[first].uses_weight_decay(rest, tensor)
        return super().uses_weight_decay(name, tensor)

    def merge_into(self, network):
        if self.upsampler is not None:
            super().merge_into(network)
        for tuner in self.tuners.values():
            tuner.merge_into(network)
