"""Tuning methods by name, their options, and several of them at once: `--peft dense+vpt`."""

import inspect
from argparse import BooleanOptionalAction
from itertools import combinations

from vlsm.methods.adapters import DenseAdapters, ShallowAdapters
from vlsm.methods.lora import LoRA
from vlsm.methods.own_weights import DecoderTuner, FullTuner
from vlsm.methods.prompt_learners import (
    DEFAULT_DEPTH,
    VPT,
    CoCoOp,
    CoOp,
    MaPLe,
    PromptLearner,
    SharedAttention,
    SharedSeparate,
)  # fmt: skip
from vlsm.methods.telescopic import TelescopicAdapters
from vlsm.methods.upsampler import Upsampler
from vlsm.networks.hooks import PLAIN_ADDITIONS, PROJECTIONS, Contexts, Tuner

METHODS = {
    "none": Tuner,
    "decoder": DecoderTuner,
    "full": FullTuner,
    "dense": DenseAdapters,
    "shallow": ShallowAdapters,
    "telescopic": TelescopicAdapters,
    "lora": LoRA,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "vpt": VPT,
    "maple": MaPLe,
    "shared_separate": SharedSeparate,
    "shared_attention": SharedAttention,
}


LARGEST = 1 << 16  # of any width, rank or count


def default_options(method):
    """Return the options of one method and their defaults."""
    parameters = inspect.signature(METHODS[method]).parameters
    own = {n: p.default for n, p in parameters.items() if n not in ("config", "reference")}
    return {**own, "upsampler": METHODS[method].default_upsampler}


OPTIONS = tuple(dict.fromkeys(option for method in METHODS for option in default_options(method)))


def add_method_options(parser):
    """Add the options of all methods to an argparse parser."""
    add_adapter_options(parser.add_argument_group("adapters and LoRA").add_argument)
    learners = [name for name, kind in METHODS.items() if issubclass(kind, PromptLearner)]
    add_learner_options(parser.add_argument_group(f"prompt learners ({', '.join(learners)})").add_argument)


def add_adapter_options(add):
    """Declare the options of adapters and LoRA; add: a parser's `add_argument`."""
    dense, shallow, lora, telescopic = map(default_options, ("dense", "shallow", "lora", "telescopic"))
    branches = "any of v (vision), l (language), c (conditional embedding)"
    add(
        "--branches",
        help=f"adapters in: {branches}; default {dense['branches']}, telescopic {telescopic['branches']}",
    )
    widths = f"{dense['dim']} dense, {shallow['dim']} shallow, {telescopic['dim']} telescopic"
    add(
        "--dim",
        type=int,
        help=f"width of an adapter (default: {widths}), rank of LoRA (default {lora['dim']})",
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
        help="dense, telescopic, lora: the blocks that they act on, such as 5-8 or v:5-8,l:9-11; what lies "
        "below the first is computed once",
    )
    alpha, targets = f"{lora['lora_alpha']:g}", " ".join(lora["lora_targets"])
    add("--lora-alpha", type=float, help=f"LoRA's update is alpha / rank times its product (default {alpha})")
    names = f"any of {', '.join(PROJECTIONS)} (default: {targets})"
    add("--lora-targets", nargs="+", metavar="NAME", help=f"attention projections: {names}")


def add_learner_options(add):
    """Declare the options of the prompt learners and the upsampler; add: a parser's `add_argument`."""
    coop, maple, separate, attention = (
        default_options(name) for name in ("coop", "maple", "shared_separate", "shared_attention")
    )
    depth = f"default {DEFAULT_DEPTH} or all; shared_attention {SharedAttention.default_depth}"
    add("--prompt-depth", type=int, metavar="J", help=f"layers that get vectors of their own ({depth})")
    add("--context", type=int, metavar="N", help=f"context vectors a layer (default {coop['context']})")
    start = "text whose tokens the vectors start from, and which sets N; several: a layer each"
    default = 'coop, cocoop: "a photo of a" unless --context is given; else random'
    add("--context-init", nargs="+", metavar="TEXT", help=f"{start} ({default})")
    width = f"cocoop, maple (default {maple['intermediate_dim']}), shared_separate (default 0: one layer)"
    width = f"width inside the projections of {width}; several: more layers"
    add("--intermediate-dim", type=int, nargs="+", metavar="H", help=width)
    for name, meaning in (
        ("lora-proj", "a product of two matrices as projection instead of an MLP (default: no)"),
        ("proj-norm", "LayerNorm behind a projection (default: yes)"),
        ("unified-proj", "one projection for all layers instead of one each (default: no)"),
        ("norm-image-features", "cocoop: image features of length one (default: no)"),
        ("norm-first", "shared_attention: norms before attention and MLP (default: yes)"),
        ("upsampler", "learnable upsampler beside the decoder's last layer (default: with prompt learners)"),
    ):
        add(f"--{name}", action=BooleanOptionalAction, help=meaning)
    shared = f"shared_separate: width of the vectors (default {separate['shared_dim']})"
    add("--shared-dim", type=int, help=shared)
    add("--heads", type=int, help=f"shared_attention: attention heads (default {attention['heads']})")
    hidden = f"shared_attention: hidden width (default {attention['feed_forward']})"
    add("--feed-forward", type=int, help=hidden)
    add("--dropout", type=float, help=f"shared_attention: dropout (default {attention['dropout']})")


def split_methods(method):
    """Return the names in "dense+vpt".

    Raises ValueError for an unknown one, and for two that would act in the same place.
    """
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(
                f"Method '{name}' is not known. Choose one of: {known}; or several, as in dense+vpt."
            )
    for a, b in combinations(names, 2):
        reason = _conflict(a, b)
        if reason:
            raise ValueError(
                f"--peft {method} cannot be: {reason}. Combine methods that act in different places, as in "
                "dense+vpt."
            )
    return names


def _conflict(a, b):
    """Return why two methods cannot work together, or None."""
    kinds = METHODS[a], METHODS[b]
    if a == b:
        return f"{a} stands there twice"
    if Tuner in kinds:
        return "none trains nothing, and so adds nothing to another method"
    if all(issubclass(k, DecoderTuner) for k in kinds):
        return "full trains the decoder already"
    if all(issubclass(k, DenseAdapters) for k in kinds):
        return f"{a} and {b} both act before the residual additions"
    if all(issubclass(k, PromptLearner) for k in kinds):
        shared = [e for e in kinds[0].encoders if e in kinds[1].encoders]
        if shared:
            return (
                f"{a} and {b} both put context vectors into the {shared[0]} encoder, where they would take "
                "each other's places"
            )
    return None


def check_model(method, network):
    """Raise ValueError for a method that cannot act on a network (a subclass of `Network`)."""
    wrong = [
        name for name in split_methods(method) if network.methods is not None and name not in network.methods
    ]
    if wrong:
        raise ValueError(
            f"--peft {' and '.join(wrong)} cannot be used on {network.name}, which takes "
            f"{', '.join(network.methods)}. {network.unsupported_reason}"
        )


def complete_options(method, given, config=None):
    """Return all options of a method, defaults filled in.

    Of a combination: a dictionary for each part, and "upsampler"; an option is for all parts that take it,
    and `vpt=dict(...)` for one. config: the network's; without it, for a network that can have an upsampler.
    Raises ValueError for what is not known.
    """
    names = split_methods(method)
    if config is not None and config.upsampler_sizes is None:
        given = {"upsampler": False, **given}
    known = {name: default_options(name) for name in names}
    for own in known.values():
        check_values({o: v for o, v in given.items() if o in own and v is not None}, own)
    every = list(dict.fromkeys(option for options in known.values() for option in options))
    unknown = sorted(set(given) - set(every) - (set(names) if len(names) > 1 else set()))
    if unknown:
        own = ", ".join(option for option in every if option != "upsampler")
        takes = f"the options {own}" if own else "no options"
        raise ValueError(f"Method '{method}' takes {takes}; it has no {', '.join(unknown)}.")
    if len(names) == 1:
        return {**known[method], **given}
    options = dict(upsampler=given.get("upsampler", any(o["upsampler"] for o in known.values())))
    for name in names:
        own = {o: v for o, v in given.items() if o in known[name]} | given.get(name, {})
        options[name] = {o: v for o, v in complete_options(name, own).items() if o != "upsampler"}
    return options


def check_values(given, defaults):
    """Raise ValueError for options of another type than their defaults, or for numbers that cannot be."""
    for name, value in given.items():
        flag, default = f"--{name.replace('_', '-')}", defaults[name]
        scalar = isinstance(default, (int, float)) and name != "intermediate_dim"
        if isinstance(default, bool) != isinstance(value, bool) and default is not None:
            raise ValueError(
                f"{flag} {value!r}: give {'yes or no' if isinstance(default, bool) else 'a number'}."
            )
        numbers = value if isinstance(value, (list, tuple)) and not scalar else [value]
        for number in numbers:
            wrong = scalar and not isinstance(number, (int, float))
            if wrong or (isinstance(number, (int, float)) and not abs(number) <= LARGEST):
                raise ValueError(f"{flag} {number!r}: give a number of at most {LARGEST}.")


def make_tuner(method, config, reference, options):
    """Return the tuner of a method with all its `options`, as `complete_options` returns them."""
    names, own = split_methods(method), {o: v for o, v in options.items() if o != "upsampler"}
    if len(names) == 1:
        tuner = METHODS[method](config, reference=reference, **own)
    else:
        parts = {name: METHODS[name](config, reference=reference, **own[name]) for name in names}
        tuner = Combination(parts, config, reference)
    if options["upsampler"]:
        if method == "none":
            raise ValueError("--upsampler is trained, and --peft none trains nothing. Choose another method.")
        if config.upsampler_sizes is None:
            raise ValueError(
                "--upsampler: this model's logits are a sum of masks, so there are no features to enlarge. "
                "Leave it out."
            )
        tuner.upsampler = Upsampler(config)
    return tuner


class Combination(Tuner):
    """Several tuners, each under its name; `split_methods` has made sure that they do not act in the same
    place.
    """

    def __init__(self, parts, config, reference=False):
        super().__init__(config, reference)
        self.parts = parts  # plain: the modules are registered below, so that names read "vpt.context"
        for name, part in parts.items():
            setattr(self, name, part)
        self.needs_image_embedding = any(part.needs_image_embedding for part in parts.values())

    def on_attach(self, network, folder):
        return {name: part.on_attach(network, folder) for name, part in self.parts.items()}

    def trained_network_parameters(self, network):
        return [name for part in self.parts.values() for name in part.trained_network_parameters(network)]

    def contexts(self):
        each = [part.contexts() for part in self.parts.values()]
        return Contexts(*(next((c[k] for c in each if c[k]), ()) for k in range(2)))

    def image_conditioned_contexts(self, contexts, image_embedding):
        for part in self.parts.values():
            contexts = part.image_conditioned_contexts(contexts, image_embedding)
        return contexts

    def residual_ops(self, encoder, layer):
        each = (part.residual_ops(encoder, layer) for part in self.parts.values())
        return next((ops for ops in each if ops != PLAIN_ADDITIONS), PLAIN_ADDITIONS)

    def lora_deltas(self, encoder, layer):
        each = (part.lora_deltas(encoder, layer) for part in self.parts.values())
        return next((deltas for deltas in each if deltas is not None), None)

    def adapt_activation(self, k, x):
        for part in self.parts.values():
            x = part.adapt_activation(k, x)
        return x

    def adapt_conditional(self, cond, states):
        for part in self.parts.values():
            cond = part.adapt_conditional(cond, states)
        return cond

    def uses_weight_decay(self, name, tensor):
        part, _, rest = name.partition(".")
        if part in self.parts:
            return self.parts[part].uses_weight_decay(rest, tensor)
        return super().uses_weight_decay(name, tensor)

    def merge_into(self, network):
        if self.upsampler is not None:
            super().merge_into(network)
        for part in self.parts.values():
            part.merge_into(network)
