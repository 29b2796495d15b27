"""The options of train.py, the papers' recipes, and what follows from other options."""

from argparse import BooleanOptionalAction
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from vlsm.data.cache import default_cache
from vlsm.methods.registry import (
    METHODS,
    OPTIONS,
    PromptLearner,
    add_method_options,
    complete_options,
    split_methods,
)
from vlsm.model import NETWORKS, network_class
from vlsm.system.device import MachineOptions
from vlsm.system.files import field as field_of
from vlsm.system.files import read_json
from vlsm.system.options import Limits, add_options, check_fields, option, option_parser
from vlsm.training.run_folder import restore_options

# The papers' recipes: VLSM-Adapter's for adapters (and LoRA, decoder, full), TuneVLSeg's for prompt learners.
# Of several methods (dense+vpt) the first one's holds.
ADAPTER_RECIPE = dict(
    epochs=200, min_epochs=10, patience=20, monitor="dsc", prompts="random", augment=False, weight_decay=1e-3,
    lr_factor=0.3, clip=0.5, dice_weight=1.5, bce_weight=1.0,
)  # fmt: skip
LEARNER_RECIPE = dict(
    epochs=20, min_epochs=10, patience=12, monitor="loss", prompts="class", augment=True, weight_decay=0.0,
    lr_factor=0.2, clip=0.0, dice_weight=1.0, bce_weight=0.2,
)  # fmt: skip
LEARNING_RATES = {
    "dense": 1e-3, "shallow": 3e-4, "decoder": 1e-3, "full": 1e-4, "none": 0.0, "lora": 1e-3,
    "telescopic": 1e-3,
}  # fmt: skip
LEARNER_RATE = 2e-4
NETWORK_RATES = {"cris": 1e-4, "san": 3e-4, "sam3": 1e-4}  # of full and decoder
COOP_INIT = "a photo of a"
DEMO_EPOCHS = 40  # of --dataset demo, which is small
# What a checkpoint's metadata call the recipe.
RECIPE_FIELDS = (
    "epochs", "min_epochs", "patience", "monitor", "batch_size", "lr", "weight_decay", "lr_factor",
    "lr_patience", "clip", "dice_weight", "bce_weight", "ce", "augment", "amp", "limit_train", "seed",
)  # fmt: skip
UNSAVED = {
    "out", "seeds", "resume", "overwrite", "changed_data", "dry_run", "given", "sweep_space", "sweep_folder",
    "method_options",
}  # fmt: skip


def _default(name):
    """Format a recipe's default for a help text; in brackets the prompt learners', where it differs."""
    ours, learners = ADAPTER_RECIPE[name], LEARNER_RECIPE[name]
    return f"default {ours:g}" + (f" [{learners:g}]" if learners != ours else "")


@dataclass
class DataOptions:
    """Which records are trained on, and how they are read."""

    dataset: str = option(
        "demo", "demo (default), a name that datasets.py --list shows, or a folder of your own"
    )
    data_root: str = option("data", "folder that holds the data sets' folders (default: data)")
    prompts: str | None = option(
        None,
        "random (default: a key from p1.. each time), class (default of prompt learners), a key such as p6, "
        "or a "
        'text: "a polyp"',
    )
    image_size: int | None = option(
        None,
        "side in pixels (default: the base's own: 352 for CLIPSeg, 416 CRIS, 640 SAN)",
        type=int,
        limits=Limits(1, 8192),
    )
    augment: bool | None = option(
        None,
        "scale, shift, rotate, brighten a little (default: with prompt learners only, as published)",
        action=BooleanOptionalAction,
    )
    limit_train: float = option(
        1.0,
        "train on this share of the training records, always the same ones (default 1)",
        metavar="FRACTION",
        limits=Limits(above=0, high=1),
    )
    skip_bad: bool = option(False, "train without the records that cannot be used, instead of stopping")
    split_seed: int = option(0, "of the 80/10/10 split of your own folder (default 0)", limits=Limits(0))
    cache_dir: str | None = option(
        None, "folder of the decoded images (default: vlsm in the user's cache folder)"
    )
    shard_cache: bool = option(
        False,
        "of several processes (torchrun) each keeps a share of the images, and passes on what a batch needs",
    )


@dataclass
class ModelOptions:
    """The network, its weights and the tuning method; the method's own options stand in `registry.py`."""

    model: str = option("clipseg", "clipseg (default), cris, san or sam3", choices=list(NETWORKS))
    weights: str | None = option(
        None,
        "hub id, local folder, or mini, the embedded CLIPSeg (default: mini for the demo, else "
        f"{NETWORKS['clipseg'].default_weights}; san: {NETWORKS['san'].default_weights}); "
        "random:CONFIG.json: none, for tests and research",
    )
    peft: str | None = option(
        None,
        f"dense (default on clipseg), {', '.join(m for m in METHODS if m != 'dense')}; or several: "
        "dense+vpt. cris, san: full (default), decoder, none; sam3: dense (default)",
    )
    reference: bool = option(
        False,
        "do as the published code does, where it departs from its paper (but for prompt learners, implies "
        "--ce reference)",
    )


@dataclass
class Recipe:
    """How long and by which steps the method is trained."""

    epochs: int | None = option(
        None, f"at most so many ({_default('epochs')}; demo {DEMO_EPOCHS})", type=int, limits=Limits(1, 10**6)
    )
    min_epochs: int | None = option(
        None, f"at least so many ({_default('min_epochs')})", type=int, limits=Limits(0)
    )
    patience: int | None = option(
        None,
        f"stop after so many epochs without 1e-4 of progress ({_default('patience')})",
        type=int,
        limits=Limits(1),
    )
    monitor: str | None = option(
        None, "what of the validation split is to progress (default dsc [loss])", choices=["dsc", "loss"]
    )
    batch_size: int = option(32, "images a step (default 32)", limits=Limits(1, 10**6))
    lr: float | None = option(
        None,
        "learning rate of AdamW (default: "
        + ", ".join(f"{m} {r:g}" for m, r in LEARNING_RATES.items() if r)
        + f" [{LEARNER_RATE:g}])",
        type=float,
        limits=Limits(0),
    )
    weight_decay: float | None = option(
        None, f"of AdamW ({_default('weight_decay')})", type=float, limits=Limits(0)
    )
    lr_factor: float | None = option(
        None,
        f"factor on the learning rate when validation loss stalls ({_default('lr_factor')})",
        type=float,
        limits=Limits(above=0, high=1),
    )
    lr_patience: int = option(5, "epochs that it may stall (default 5)", limits=Limits(0))
    clip: float | None = option(
        None, f"largest gradient norm; 0: any ({_default('clip')})", type=float, limits=Limits(0)
    )
    dice_weight: float | None = option(
        None, f"of the Dice loss ({_default('dice_weight')})", type=float, limits=Limits(0)
    )
    bce_weight: float | None = option(
        None, f"of the cross entropy ({_default('bce_weight')})", type=float, limits=Limits(0)
    )
    ce: str | None = option(
        None,
        "cross entropy on logits (default), or on a second sigmoid as in the published code",
        choices=["logits", "reference"],
    )
    seed: int = option(42, "of everything random (default 42)", limits=Limits(0, 2**32 - 1))
    seeds: list | None = option(
        None,
        "a run for each of these seeds, in one folder",
        type=int,
        nargs="+",
        metavar="SEED",
        limits=Limits(0, 2**32 - 1),
    )


@dataclass
class SearchOptions:
    """The search for hyper-parameters."""

    sweep: int | None = option(
        None,
        "search hyper-parameters in so many runs (needs: pip install optuna); what is given as an option is "
        "not searched",
        type=int,
        metavar="TRIALS",
        limits=Limits(1),
    )
    sweep_space: str | None = option(
        None,
        'what to search: {"lr": {"low": 1e-5, "high": 5e-3, "log": true}, "prompt_depth": {"low": 1, "high": '
        "9}, "
        '"dim": [16, 64]} (default: the paper\'s Table 2)',
        metavar="FILE.json",
    )


@dataclass
class MemoryOptions:
    """Where images, and what a frozen encoder makes of them, are kept."""

    cache_gb: float | None = option(
        None,
        "GB for what a frozen image encoder returns, computed once: GPU, then RAM, then disk (default: half "
        "of what is free there; 0: computed at each step)",
        type=float,
        limits=Limits(0),
    )
    accumulate: int = option(
        1, "compute a batch in so many parts, one step: less memory (default 1)", limits=Limits(1, 4096)
    )
    checkpoint_activations: bool = option(
        False, "compute the layers' activations again in the backward pass: far less memory, slower"
    )
    data_device: str = option(
        "auto", "where the images lie (auto: on the GPU if there is room)", choices=["auto", "cpu", "cuda"]
    )


@dataclass
class FolderOptions:
    """The run's folder."""

    out: str | None = option(None, "folder of the run (default: runs/<dataset>-<method>-...)")
    resume: bool = option(False, "go on where the run in that folder was stopped, with its options")
    overwrite: bool = option(False, "delete the files of the run that is in that folder")
    changed_data: bool = option(False, "with --resume: go on although the data set's records are others now")
    tensorboard: bool = option(False, "also log for TensorBoard (needs: pip install tensorboard)")
    dry_run: bool = option(False, "print the numbers of parameters, the memory that a run needs, and stop")


@dataclass
class TrainOptions(
    DataOptions, ModelOptions, Recipe, SearchOptions, MemoryOptions, MachineOptions, FolderOptions
):
    """All options of a run.

    method_options: those of the tuning method that were given. given: names of what stood on the command
    line. sweep_folder: of the sweep that the run belongs to.
    """

    method_options: dict = field(default_factory=dict)
    given: frozenset = frozenset()
    sweep_folder: str | None = None

    def updated(self, **values):
        """Return a copy with other values, the method's options among them."""
        own = {name: value for name, value in values.items() if name not in OPTIONS}
        method_options = {**self.method_options, **{n: v for n, v in values.items() if n in OPTIONS}}
        return replace(self, method_options={n: v for n, v in method_options.items() if v is not None}, **own)

    def saved(self):
        """Return what config.json keeps: one dictionary, the method's options among the others."""
        own = {name: value for name, value in asdict(self).items() if name not in UNSAVED}
        return {**own, **{name: self.method_options.get(name) for name in OPTIONS}}

    def part_size(self):
        """Return how many images of a batch go through the network at once."""
        return -(-self.batch_size // self.accumulate)

    def loss(self):
        """Return the loss's weights and its kind of cross entropy, as `dice_bce_loss` takes them."""
        return dict(dice_weight=self.dice_weight, bce_weight=self.bce_weight, ce=self.ce)

    def recipe(self):
        """Return the part that a checkpoint's metadata call recipe."""
        return {name: getattr(self, name) for name in RECIPE_FIELDS}


def parse_options(argv=None):
    """Return the `TrainOptions` of a command line."""
    parser = option_parser("Fine-tune a vision-language segmentation model, by few parameters.")
    add_options(parser, DataOptions, "data")
    add_options(parser, ModelOptions, "model and method")
    add_method_options(parser)
    add_options(parser, Recipe, "recipe (defaults: the paper's; in brackets those of prompt learners)")
    add_options(parser, SearchOptions, "search")
    add_options(parser, FolderOptions, "run")
    add_options(parser, MemoryOptions, "memory")
    add_options(parser, MachineOptions, "machine")
    values = vars(parser.parse_args(argv))
    return TrainOptions(given=frozenset(values)).updated(**values)


def check_options(options):
    """Raise ValueError for values out of range and for options that contradict each other."""
    check_fields(options)
    if options.prompts is not None and not options.prompts.strip():
        raise ValueError('--prompts "": give random, class, a key such as p6, or a text.')
    if options.dice_weight == 0 and options.bce_weight == 0:
        raise ValueError("--dice-weight 0 and --bce-weight 0 leave no loss; give one of them more than 0.")
    if options.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard.")
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; give one of them.")
    if options.shard_cache and options.data_device == "cuda":
        raise ValueError(
            "--shard-cache passes images between processes, which --data-device cuda cannot hold; leave one "
            "of them out."
        )


def complete(options):
    """Return the options with everything filled in: from the run that is resumed, else by the paper's recipe.

    Raises ValueError or FileNotFoundError for what cannot be.
    """
    options = replace(options, peft=options.peft or default_method(options))
    split_methods(options.peft)
    check_options(options)
    options = replace(options, out=options.out or default_folder(options, f"seed{options.seed}"))
    if not options.resume:
        return fill_defaults(options)
    options = restore_options(options)
    try:
        check_options(options)
        complete_options(options.peft, options.method_options)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"'{Path(options.out) / 'config.json'}' holds what no run can have: {error}"
        ) from None
    return fill_defaults(options)


def fill_defaults(options):
    """Return the options with what depends on others filled in: the base, the paper's recipe."""
    names = split_methods(options.peft)
    learner = issubclass(METHODS[names[0]], PromptLearner)
    rate = LEARNING_RATES.get(names[0], LEARNER_RATE)
    if options.model in NETWORK_RATES and names[0] in ("decoder", "full"):
        rate = NETWORK_RATES[options.model]
    demo = options.dataset == "demo"
    # TuneVLSeg's own loss is right
    published_ce = options.reference and not learner
    defaults = {
        **(LEARNER_RECIPE if learner else ADAPTER_RECIPE),
        **(dict(epochs=DEMO_EPOCHS) if demo else {}),
        "lr": rate,
        "ce": "reference" if published_ce else "logits",
        "weights": "mini"
        if demo and options.model == "clipseg"
        else network_class(options.model).default_weights,
        "cache_dir": default_cache(),
    }
    if "context" not in options.method_options and {"coop", "cocoop"} & set(names):
        defaults["context_init"] = [COOP_INIT]
    present = options.saved()
    return options.updated(**{name: value for name, value in defaults.items() if present[name] is None})


def default_method(options):
    """Return the method that is trained unless --peft names one."""
    return "dense" if options.model in ("clipseg", "sam3") else "full"


def default_folder(options, seed):
    """Return the run's folder unless --out names one; seed: how the name says it."""
    given = options.method_options
    parts = [
        Path(options.dataset).name,
        "" if options.model == "clipseg" else options.model,
        options.peft or default_method(options),
        given.get("branches") or "",
        str(given.get("dim") or ""),
        f"depth{given['prompt_depth']}" if given.get("prompt_depth") else "",
        seed,
        "sweep" if options.sweep else "",
    ]
    return str(Path("runs") / "-".join(p for p in parts if p))


def image_side(model, asked):
    """Return the side of the images: as asked for, else the network's own, else its processor's, else 352.

    Raises ValueError for a side that is no multiple of the network's stride.
    """
    config, file = model.network.config, model.info["folder"] / "preprocessor_config.json"
    side = asked or getattr(config, "img_size", None)
    if side is None:
        found = read_json(file) if file.is_file() else {}
        size = found.get("size", 352)
        if isinstance(size, dict):
            key = next((k for k in ("height", "shortest_edge") if k in size), "height")
            side = field_of(file, size, key, kind=int, words="a side in pixels")
        else:
            side = field_of(file, dict(found, size=size), "size", kind=int, words="a side in pixels")
        if not 1 <= side <= 8192:
            raise ValueError(f"'{file}': a side of {side} pixels cannot be.")
    stride = config.stride
    if side % stride:
        fitting = round(side / stride) * stride or stride
        raise ValueError(
            f"--image-size {side} is no multiple of the model's patch size {stride}; try {fitting}."
        )
    return side
