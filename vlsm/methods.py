"""Tuning methods by name, their options, and several of them at once: `--peft dense+vpt`."""

import inspect
from argparse import BooleanOptionalAction
from itertools import combinations

from .learners import DEPTH, VPT, CoCoOp, CoOp, Learner, MaPLe, SharedAttention, SharedSeparate
from .tuners import TARGETS, Contexts, DecoderTuner, DenseAdapters, FullTuner, LoRA, ShallowAdapters, Tuner
from .upsampler import Upsampler

METHODS = {
    "none": Tuner, "decoder": DecoderTuner, "full": FullTuner, "dense": DenseAdapters, "shallow": ShallowAdapters, "lora": LoRA,
    "coop": CoOp, "cocoop": CoCoOp, "vpt": VPT, "maple": MaPLe, "shared_separate": SharedSeparate, "shared_attention": SharedAttention,
}  # fmt: skip


def takes(method):
    """The options of one method and their defaults."""
    own = {n: p.default for n, p in inspect.signature(METHODS[method]).parameters.items() if n not in ("config", "reference")}
    return {**own, "upsampler": METHODS[method].upsamples}


OPTIONS = tuple(dict.fromkeys(option for method in METHODS for option in takes(method)))


def given(args):
    """Those of the options of all methods that were given, as keywords for `vlsm.build`."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


def add_arguments(parser):
    """The options of all methods; None where the method's own default holds."""
    g = parser.add_argument_group("adapters and LoRA")
    g.add_argument("--branches", help="adapters in: any of v (vision), l (language), c (conditional embedding); default vl")
    g.add_argument("--dim", type=int, help="hidden width of an adapter (default: 64 dense, 512 shallow), rank of LoRA (default 16)")
    g.add_argument("--lora-alpha", type=float, help="LoRA's update is alpha / rank times its product (default 32)")
    g.add_argument("--lora-targets", nargs="+", metavar="NAME", help=f"attention projections: any of {', '.join(TARGETS)} (default: q v)")
    g = parser.add_argument_group("prompt learners (coop, cocoop, vpt, maple, shared_separate, shared_attention)")
    g.add_argument(
        "--prompt-depth", type=int, metavar="J", help=f"layers that get vectors of their own (default {DEPTH} or all; shared_attention 1)"
    )
    g.add_argument("--context", type=int, metavar="N", help="context vectors a layer (default 4)")
    start = "text whose tokens the vectors start from, and which sets N; several: a layer each"
    g.add_argument(
        "--context-init", nargs="+", metavar="TEXT", help=f'{start} (coop, cocoop: "a photo of a" unless --context is given; else random)'
    )
    width = "width inside the projections of cocoop, maple (default 64), shared_separate (default 0: one linear layer)"
    g.add_argument("--intermediate-dim", type=int, nargs="+", metavar="H", help=f"{width}; several: more layers")
    for name, what in (
        ("lora-proj", "a product of two matrices as projection instead of an MLP (default: no)"),
        ("proj-norm", "LayerNorm behind a projection (default: yes)"),
        ("unified-proj", "one projection for all layers instead of one each (default: no)"),
        ("norm-image-features", "cocoop: image features of length one (default: no)"),
        ("norm-first", "shared_attention: norms before attention and MLP (default: yes)"),
        ("upsampler", "learnable upsampler beside the decoder's last layer, with any method (default: with prompt learners)"),
    ):
        g.add_argument(f"--{name}", action=BooleanOptionalAction, help=what)
    g.add_argument("--shared-dim", type=int, help="shared_separate: width of the vectors (default 64)")
    g.add_argument("--heads", type=int, help="shared_attention: attention heads (default 16)")
    g.add_argument("--feed-forward", type=int, help="shared_attention: hidden width (default 1536)")
    g.add_argument("--dropout", type=float, help="shared_attention: dropout (default 0.25)")


def check_model(method, network):
    """Raise ValueError for a method that cannot act on a network (a class of model.py's `NETWORKS`)."""
    wrong = [name for name in parts_of(method) if network.methods is not None and name not in network.methods]
    if wrong:
        raise ValueError(
            f"--peft {' and '.join(wrong)} cannot be used on {network.name}, which takes {', '.join(network.methods)}. {network.why}"
        )


def parts_of(method):
    """The names in "dense+vpt". Raises ValueError for an unknown one, and for two that would act in the same place."""
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"Method '{name}' is not known. Choose one of: {', '.join(METHODS)}; or several, as in dense+vpt.")
    for a, b in combinations(names, 2):
        reason = _conflict(a, b)
        if reason:
            raise ValueError(f"--peft {method} cannot be: {reason}. Combine methods that act in different places, as in dense+vpt.")
    return names


def _conflict(a, b):
    """Why two methods cannot work together, or None."""
    kinds = METHODS[a], METHODS[b]
    if a == b:
        return f"{a} stands there twice"
    if Tuner in kinds:
        return "none trains nothing, and so adds nothing to another method"
    if all(issubclass(k, DecoderTuner) for k in kinds):
        return "full trains the decoder already"
    if all(issubclass(k, Learner) for k in kinds):
        shared = [p for p in kinds[0].places if p in kinds[1].places]
        if shared:
            return f"{a} and {b} both put context vectors into the {shared[0]} encoder, where they would take each other's places"
    return None


def method_options(method, given):
    """All options of a method, its defaults filled in. Of a combination: a dictionary for each part, and "upsampler"; an option is for
    all parts that take it, and `vpt=dict(...)` for one. Raises ValueError for what is not known.
    """
    names = parts_of(method)
    known = {name: takes(name) for name in names}
    every = list(dict.fromkeys(option for options in known.values() for option in options))
    unknown = sorted(set(given) - set(every) - (set(names) if len(names) > 1 else set()))
    if unknown:
        own = ", ".join(option for option in every if option != "upsampler")
        raise ValueError(f"Method '{method}' takes {f'the options {own}' if own else 'no options'}; it has no {', '.join(unknown)}.")
    if len(names) == 1:
        return {**known[method], **given}
    options = dict(upsampler=given.get("upsampler", any(o["upsampler"] for o in known.values())))
    for name in names:
        own = given.get(name, {})
        parts = method_options(name, {**{o: v for o, v in given.items() if o in known[name]}, **own})
        options[name] = {o: v for o, v in parts.items() if o != "upsampler"}
    return options


def make_tuner(method, config, reference, options):
    """The tuner of a method with all its `options`, as `method_options` returns them."""
    names, own = parts_of(method), {o: v for o, v in options.items() if o != "upsampler"}
    if len(names) == 1:
        tuner = METHODS[method](config, reference=reference, **own)
    else:
        tuner = Combination({name: METHODS[name](config, reference=reference, **own[name]) for name in names}, config, reference)
    if options["upsampler"]:
        if method == "none":
            raise ValueError("--upsampler is trained, and --peft none trains nothing. Choose another method.")
        if config.upsampler is None:
            raise ValueError("--upsampler: this model's logits are a sum of masks, so there are no features to enlarge. Leave it out.")
        tuner.upsampler = Upsampler(config)
    return tuner


class Combination(Tuner):
    """Several tuners, each under its name; `parts_of` has made sure that they do not act in the same place."""

    def __init__(self, parts, config, reference=False):
        super().__init__(config, reference)
        self.parts = parts  # a plain dictionary: the modules are registered below, that names read "vpt.context"
        for name, part in parts.items():
            setattr(self, name, part)
        self.reads_features = any(part.reads_features for part in parts.values())

    def start(self, base, folder):
        return {name: part.start(base, folder) for name, part in self.parts.items()}

    def base_parameters(self, base):
        return [name for part in self.parts.values() for name in part.base_parameters(base)]

    def contexts(self):
        each = [part.contexts() for part in self.parts.values()]
        return Contexts(*(next((c[k] for c in each if c[k]), ()) for k in range(2)))

    def text_contexts(self, contexts, features):
        for part in self.parts.values():
            contexts = part.text_contexts(contexts, features)
        return contexts

    def adders(self, branch, layer):
        return next((p for p in self.parts.values() if type(p).adders is not Tuner.adders), super()).adders(branch, layer)

    def updates(self, branch, layer):
        return next((u for u in (p.updates(branch, layer) for p in self.parts.values()) if u is not None), None)

    def activation(self, k, x):
        for part in self.parts.values():
            x = part.activation(k, x)
        return x

    def condition(self, cond, states):
        for part in self.parts.values():
            cond = part.condition(cond, states)
        return cond

    def decays(self, name, tensor):
        part, _, rest = name.partition(".")
        return self.parts[part].decays(rest, tensor) if part in self.parts else super().decays(name, tensor)

    def merge(self, base):
        if self.upsampler is not None:
            super().merge(base)
        for part in self.parts.values():
            part.merge(base)
