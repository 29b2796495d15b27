"""Parse the command line of train.py: its options, the papers' recipes, defaults that depend on others."""

import argparse
from argparse import BooleanOptionalAction
from importlib.util import find_spec
from pathlib import Path

from vlsm.data.cache import default_cache
from vlsm.methods.registry import METHODS, OPTIONS, PromptLearner, add_method_options, split_methods
from vlsm.model import NETWORKS, network_class
from vlsm.system.arguments import Parser, add_machine_arguments, add_split_rules, flag, number
from vlsm.system.console import did_you_mean
from vlsm.system.schema import fits, read_json

EXAMPLES = """examples:
  python train.py --dataset demo --peft dense --dim 64
  python train.py --dataset kvasir --data-root data --peft coop --prompt-depth 11
  python train.py --dataset my-folder --prompts "a polyp" --peft lora --dry-run
  python train.py --dataset my-folder --fold 1/5 --out runs/my-folder-fold1
  python train.py --out runs/kvasir-dense-64-seed42 --resume --epochs 300"""

# The papers' recipes: VLSM-Adapter's for adapters (and LoRA, decoder, full), TuneVLSeg's for prompt learners.
# For several methods (dense+vpt) the first one's applies.
ADAPTER_RECIPE = dict(
    epochs=200, min_epochs=10, patience=20, monitor="dsc", prompts="random", augment=False, weight_decay=1e-3,
    lr_factor=0.3, clip=0.5, dice_weight=1.5, bce_weight=1.0,
)  # fmt: skip
LEARNER_RECIPE = dict(
    epochs=20, min_epochs=10, patience=12, monitor="loss", prompts="class", augment=True, weight_decay=0.0,
    lr_factor=0.2, clip=0.0, dice_weight=1.0, bce_weight=0.2,
)  # fmt: skip
ADAPTER_RATES = dict(
    dense=1e-3, telescopic=1e-3, shallow=3e-4, side=3e-3, lora=1e-3, decoder=1e-3, full=1e-4, none=0.0
)
LEARNER_RATE = 2e-4
NETWORK_RATES = {"cris": 1e-4, "san": 3e-4, "sam3": 1e-4}  # of full and decoder
COOP_INIT = "a photo of a"
BATCH_SIZE = 32
DEMO_RECIPE = dict(epochs=19, batch_size=12, negatives=2)  # of --dataset demo, which is small

# The options that a checkpoint's metadata holds as its recipe.
RECIPE_FIELDS = (
    "epochs", "min_epochs", "patience", "monitor", "batch_size", "lr", "weight_decay", "lr_factor",
    "lr_patience", "clip", "dice_weight", "bce_weight", "ce", "augment", "amp", "limit_train", "seed",
    "negatives", "init",
)  # fmt: skip
# Options of one start of the program, which are not written to config.json.
OF_THE_START = ("out", "resume", "overwrite", "changed_data", "dry_run")
# Options that a run cannot be without; config.json holds them resolved.
NEVER_NULL = {*RECIPE_FIELDS, "dataset", "model", "peft", "prompts"} - {"init"}
# Options that may differ when a run is resumed; any other would make it another run.
FREE_ON_RESUME = {
    *OF_THE_START, "epochs", "patience", "min_epochs", "device", "dataset", "data_root", "cache_dir",
    "weights", "kernels", "compile", "cache_gb", "tensorboard", "checkpoint_activations",
}  # fmt: skip
# Options that have no effect beside others, as `Parser` refuses them.
RULES = (
    ("changed_data", "with", "resume", ""),
    ("overwrite", "without", "resume", ", which continues the run instead of deleting it"),
    ("init", "without", "resume", ", which goes on from the run's own state"),
)


def train_parser():
    """Return the parser; options that the recipe fills in are None by default."""
    description = "Fine-tune a vision-language segmentation model with few trained parameters."
    parser = Parser(description, EXAMPLES, RULES)
    add_data_arguments(parser.add_argument_group("data").add_argument)
    add_model_arguments(parser.add_argument_group("model and method").add_argument)
    add_method_options(parser)
    recipe = "recipe (defaults: the papers'; in brackets those of the prompt learners)"
    add_recipe_arguments(parser.add_argument_group(recipe).add_argument)
    add_run_arguments(parser.add_argument_group("run and memory").add_argument)
    add_machine_arguments(parser)
    return parser


def add_data_arguments(add):
    """Add the options of the training data; add: a group's `add_argument`."""
    add(
        "--dataset",
        default="demo",
        help="demo (default), a name that datasets.py --list shows, or a folder of your own",
    )
    add("--data-root", default="data", help="folder that holds the data sets' folders (default: data)")
    add(
        "--prompts",
        help="random (default: a key from p1.. each time), class (default of the prompt learners), a key "
        'such as p6, or a text: "a polyp"',
    )
    add(
        "--negatives",
        type=number(int, 0, 100),
        metavar="N",
        help="beside each right prompt, train on N of what is not in the image, with an empty mask (default "
        "1; demo 2; 0 for the papers' data sets, whose recipes have none)",
    )
    add(
        "--image-size",
        type=number(int, 1, 8192),
        help="side in pixels (default: the network's own: CLIPSeg 352, CRIS 416, SAN 640, SAM 3 1008)",
    )
    add(
        "--augment",
        action=BooleanOptionalAction,
        help="scale, shift, rotate, brighten a little (default: with prompt learners only, as published)",
    )
    add(
        "--limit-train",
        type=number(float, above=0, high=1),
        default=1.0,
        metavar="FRACTION",
        help="train on this fraction of the training records; fixed, and smaller fractions are subsets of "
        "larger ones (default 1)",
    )
    add("--skip-bad", action="store_true", help="train without the records that cannot be read")
    add_split_rules(add)
    add(
        "--fold",
        metavar="K/N",
        help="hold out the K-th of N parts, by groups: it tests and the next one validates, or it validates "
        "beside a test split of your own (python -m vlsm.tools.repeat --folds N trains all)",
    )
    add("--cache-dir", help="folder of decoded images (default: vlsm in the user's cache folder)")


def method(text):
    """Check the names of methods: a `type=` for argparse. Raises ArgumentTypeError, with a guess."""
    for name in text.split("+"):
        if name.strip() and name not in METHODS:
            guess = did_you_mean(name, METHODS)
            known = ", ".join(METHODS)
            raise argparse.ArgumentTypeError(f"'{name}' is not known.{guess} Choose one of: {known}")
    return text


def add_model_arguments(add):
    """Add the options of the network, its weights and the tuning method; add: a group's `add_argument`."""
    add("--model", default="clipseg", choices=list(NETWORKS), help="network (default: clipseg)")
    add(
        "--weights",
        help="hub id, local folder, or mini, the embedded CLIPSeg (default: mini for the demo, else the "
        f"network's own: {NETWORKS['clipseg'].default_weights} for clipseg); random:CONFIG.json: untrained, "
        "for tests and research",
    )
    add(
        "--peft",
        type=method,
        metavar="METHOD",
        help=f"one of {', '.join(METHODS)}; or several: dense+vpt. Default: dense on clipseg and sam3, full "
        "on cris and san. cris takes none, decoder, full, coop, cocoop; san none, decoder, full; sam3 all "
        "but vpt, maple, shared_*",
    )
    add("--init", metavar="RUN", help="start from another run's tuned tensors (folder, file, hub:OWNER/NAME)")
    add(
        "--reference",
        action="store_true",
        help="do as the published code does where it departs from its paper (implies --ce reference, except "
        "for prompt learners)",
    )


def add_recipe_arguments(add):
    """Add the options of the training recipe; add: a group's `add_argument`."""

    def default(name):
        return f"default {ADAPTER_RECIPE[name]} [{LEARNER_RECIPE[name]}]"

    epochs = number(int, 1, 10**6)
    add("--epochs", type=epochs, help=f"at most so many ({default('epochs')}; demo {DEMO_RECIPE['epochs']})")
    add("--min-epochs", type=number(int, 0), help=f"at least so many ({default('min_epochs')})")
    add(
        "--patience",
        type=number(int, 1),
        help=f"stop after so many epochs without an improvement of 1e-4 ({default('patience')})",
    )
    add(
        "--monitor",
        choices=["dsc", "loss"],
        help=f"validation metric for early stopping; false alarms lower dsc ({default('monitor')})",
    )
    in_demo = f"demo {DEMO_RECIPE['batch_size']}"
    add("--batch-size", type=number(int, 1, 10**6), help=f"images a step (default {BATCH_SIZE}; {in_demo})")
    rates = ", ".join(f"{method} {rate:g}" for method, rate in ADAPTER_RATES.items() if rate)
    add("--lr", type=number(float, 0), help=f"learning rate of AdamW (default: {rates} [{LEARNER_RATE:g}])")
    add("--weight-decay", type=number(float, 0), help=f"of AdamW ({default('weight_decay')})")
    add(
        "--lr-factor",
        type=number(float, above=0, high=1),
        help=f"factor on the learning rate when the validation loss stalls ({default('lr_factor')})",
    )
    add("--lr-patience", type=number(int, 0), default=5, help="epochs it may stall (default 5)")
    add("--clip", type=number(float, 0), help=f"largest gradient norm; 0: no limit ({default('clip')})")
    add("--dice-weight", type=number(float, 0), help=f"of the Dice loss ({default('dice_weight')})")
    add("--bce-weight", type=number(float, 0), help=f"of the cross entropy ({default('bce_weight')})")
    add(
        "--ce",
        choices=["logits", "reference"],
        help="cross entropy on logits (default), or on a second sigmoid as in the published code",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything random (default 42)")


def add_run_arguments(add):
    """Add the options of the run's folder and of its memory; add: a group's `add_argument`."""
    add("--out", help="folder of the run (default: runs/<dataset>-<method>-...)")
    add("--resume", action="store_true", help="continue the run in that folder, with its options")
    add("--overwrite", action="store_true", help="delete the files of the run that is in that folder")
    add(
        "--changed-data",
        action="store_true",
        help="with --resume: continue although the data set's records or pixels have changed",
    )
    add("--tensorboard", action="store_true", help="log for TensorBoard (pip install tensorboard)")
    add(
        "--dry-run",
        action="store_true",
        help="print the numbers of parameters and the memory that a run needs, and stop",
    )
    add(
        "--cache-gb",
        type=number(float, 0),
        help="GB for the output of a frozen image encoder, computed once: GPU memory where it fits, else a "
        "file (default: half of what is free there; 0: compute it in each step)",
    )
    add(
        "--accumulate",
        type=number(int, 1, 4096),
        default=1,
        help="compute a batch in so many parts, one optimizer step: less memory (default 1)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="compute the layers' activations again in the backward pass: far less memory, slower",
    )


def parse_arguments(argv=None):
    """Return the options of a run, all filled in: from the run that is resumed, else by the paper's recipe.

    Raises ValueError for options that are wrong or contradict each other, FileNotFoundError if there is no
    run to resume.
    """
    parser = train_parser()
    args = parser.parse_args(argv)
    peft = args.peft or default_method(args.model)
    out = args.out or default_folder(
        args.dataset, args.model, peft, args.branches, args.dim, args.prompt_depth, args.seed
    )
    if args.resume:
        stored = read_stored(parser, out)
        args = parser.parse_args(argv, argparse.Namespace(**stored))
        refuse_changes(vars(args), stored, out)
        peft = args.peft
    args.out = out
    args.peft = peft
    defaults = recipe(args.model, peft, args.dataset, args.reference, args.context)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dice_weight == 0 and args.bce_weight == 0:
        raise ValueError("--dice-weight 0 and --bce-weight 0 leave no loss; give one of them more than 0.")
    if args.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard.")
    return args


def recipe(model, peft, dataset, reference, context=None):
    """Return the defaults that depend on other options: the paper's recipe, the weights, the cache folder.

    context: the number of context vectors; if it is given, the vectors do not begin as a text's.
    """
    names = split_methods(peft)
    learner = issubclass(METHODS[names[0]], PromptLearner)
    defaults = dict(LEARNER_RECIPE if learner else ADAPTER_RECIPE)
    defaults["lr"] = ADAPTER_RATES.get(names[0], LEARNER_RATE)
    if model in NETWORK_RATES and names[0] in ("decoder", "full"):
        defaults["lr"] = NETWORK_RATES[model]
    # TuneVLSeg's own code computes the cross entropy as its paper says
    defaults["ce"] = "reference" if reference and not learner else "logits"
    defaults["weights"] = network_class(model).default_weights
    defaults["batch_size"] = BATCH_SIZE
    if dataset == "demo":
        defaults.update(DEMO_RECIPE)
        if model == "clipseg":
            defaults["weights"] = "mini"
    if context is None and {"coop", "cocoop"} & set(names):
        defaults["context_init"] = [COOP_INIT]
    defaults["cache_dir"] = default_cache()
    return defaults


def default_method(model):
    """Return the method that is trained unless --peft names one."""
    return "dense" if model in ("clipseg", "sam3") else "full"


def default_folder(dataset, model, peft, branches, dim, prompt_depth, seed):
    """Return the run's folder unless --out names one, such as runs/kvasir-dense-64-seed42."""
    parts = [Path(dataset).name]
    if model != "clipseg":
        parts.append(model)
    parts.append(peft)
    if branches:
        parts.append(branches)
    if dim:
        parts.append(str(dim))
    if prompt_depth:
        parts.append(f"depth{prompt_depth}")
    parts.append(f"seed{seed}")
    return str(Path("runs", "-".join(parts)))


def method_options(values):
    """Select the options of the tuning method that were given from a dictionary of all options."""
    return {name: values[name] for name in OPTIONS if values[name] is not None}


def stored_settings(values):
    """Select the options that are written to config.json from a dictionary of all options."""
    return {name: value for name, value in values.items() if name not in OF_THE_START}


# Resuming


def read_stored(parser, out):
    """Return the options in a run's config.json as a dictionary, each checked like a typed one.

    Raises FileNotFoundError if there is no run, ValueError if config.json is not a run's or holds a value
    that no run can have.
    """
    file = Path(out, "config.json")
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no run to resume in '{out}' (no config.json). Name its folder with --out."
        )
    stored = read_json(file).get("options")
    if not isinstance(stored, dict) or not {"dataset", "peft"} <= set(stored):
        raise ValueError(f"'{file}' is not the config.json of a run: 'options' should name dataset and peft.")
    stored = {"negatives": 0, **stored}  # runs of earlier versions had none
    values = {}
    for name, action in stored_options(parser).items():  # options of older versions are ignored
        values[name] = action.default
        if stored.get(name) is not None:
            try:
                values[name] = checked(action, stored[name])
            except (ValueError, argparse.ArgumentTypeError) as error:
                flag = action.option_strings[0]
                raise ValueError(f"'{file}' holds a value that no run can have: {flag}: {error}") from None
        elif name in stored and name in NEVER_NULL:
            raise ValueError(f"'{file}' holds a value that no run can have: '{name}' is null.")
    return values


def stored_options(parser):
    """Return {name: action} of the options that belong to a run, not to one start of the program."""
    start = (*OF_THE_START, "help", "version")
    return {action.dest: action for action in parser._actions if action.dest not in start}


def checked(action, value):
    """Return the value of an option in a JSON file, by the option's own type and choices.

    action: the option's, of `train_parser`. Raises ValueError or ArgumentTypeError for another value.
    """
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} should be true or false")
        return value
    several = action.nargs == "+" and isinstance(value, list) and value
    parsed = []
    for item in value if several else [value]:
        if not fits(item, (int, float, str)) or not str(item).strip():
            raise ValueError(f"{item!r:.200} should be a number or a text")
        item = (action.type or str)(str(item))
        if action.choices and item not in action.choices:
            raise ValueError(f"{item!r} should be one of {', '.join(action.choices)}")
        parsed.append(item)
    return parsed if action.nargs == "+" else parsed[0]


def refuse_changes(values, stored, out):
    """Raise ValueError for an option that would make a resumed run another one."""
    for name, value in values.items():
        if name not in FREE_ON_RESUME and value != stored[name]:
            raise ValueError(
                f"{flag(name)} {value} differs from the run in '{out}', which has {stored[name]}. Use "
                "another --out."
            )
