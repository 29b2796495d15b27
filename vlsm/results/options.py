"""The options of evaluate.py."""

import re
from dataclasses import dataclass

from vlsm.data.cache import default_cache
from vlsm.system.device import MachineOptions
from vlsm.system.options import Limits, add_options, check_fields, option, option_parser


@dataclass
class WhatOptions:
    """What is evaluated."""

    ckpt: list | None = option(
        None,
        "a run's folder (its best.safetensors), a folder of runs (of --seeds), or a checkpoint file; "
        "several: for --images",
        nargs="+",
    )
    compare: list | None = option(
        None,
        "several runs on the same records: a sheet of pictures and a paired test",
        nargs="+",
        metavar="CKPT",
    )
    report: str | None = option(
        None, "the table of all evaluated runs below DIR, means over seeds, and two charts", metavar="DIR"
    )
    transfer: bool = option(
        False,
        "with --report: DSC on the runs' own data set, on others, the harmonic mean; and the curve over "
        "--limit-train",
    )
    ensemble: bool = option(
        False, "the mean of the probabilities of several --ckpt, or of a folder of runs, as one model"
    )
    mirror: bool = option(
        False,
        "the mean of the probabilities of each picture and of its mirror image (left and right exchanged "
        "in the prompt)",
    )
    split: str = option("test", "default: test", choices=["train", "val", "test"])
    dataset: str | None = option(None, "another data set than the run's own: a name or a folder")
    data_root: str | None = option(None, "folder that holds the data sets' folders (default: the run's)")
    prompts: str | None = option(
        None, 'another way than the run\'s: random, class, a key such as p6, or a text: "a polyp"'
    )
    all_prompts: bool = option(False, "evaluate every key p0, p1, ... and print a table")
    audit_prompts: bool = option(
        False,
        "DSC under right, other, swapped, contradictory, absent and senseless prompts: is the text read?",
    )
    audit_blocks: bool = option(False, "switch each block's adapters (or LoRA) off in turn: what DSC loses")
    risk: list | None = option(
        None,
        "fn 0.1: fit a threshold on the validation split so that the expected share of missed foreground "
        "stays below 0.1, and say what it does to the test split",
        nargs=2,
        metavar=("fn", "LEVEL"),
    )
    nsd_tolerance: float = option(2.0, "of NSD, in pixels (default 2)", limits=Limits(0))
    group: str | None = option(
        None,
        "intervals draw whole groups: what this regular expression finds in an image's name (default: the "
        "patient of camus and chexlocalize, else the image)",
        metavar="REGEX",
    )
    upsample: str = option(
        "logits",
        "logits: enlarge bilinearly, then threshold (default); mask: threshold, then enlarge, as the "
        "published code does",
        choices=["logits", "mask"],
    )
    seed: int | None = option(None, "of random prompts (default: the run's)", type=int, limits=Limits(0))
    weights: str | None = option(None, "the base's folder or hub id, if it has moved")


@dataclass
class OutputOptions:
    """What is written."""

    out: str | None = option(
        None, "folder of metrics.csv and metrics.json (default: eval-SPLIT in the run's folder)"
    )
    format: str = option("md", "of --report (default: md)", choices=["md", "csv", "tex"])
    layout: str = option(
        "datasets",
        "of --report: a row for each data set and metric (default, as VLSM-Adapter prints them), or for "
        "each method (as TuneVLSeg)",
        choices=["datasets", "methods"],
    )
    published: str | None = option(
        None,
        "a paper's figures beside ours: vlsm-adapter, tunevlseg or another of vlsm/results/published, or a "
        "file like them",
        metavar="NAME",
    )
    save_masks: str | None = option(
        None,
        "write predicted masks as 0/255 PNGs of original size, under the masks' own names",
        metavar="DIR",
    )
    overwrite: bool = option(
        False, "replace files that this program did not write; inputs are never replaced"
    )
    save_probabilities: str | None = option(
        None,
        "write the foreground's probabilities as 16-bit PNGs of original size (65535 is 1)",
        metavar="DIR",
    )
    gallery: bool = option(
        False, "write gallery/index.html: every record, worst first, for a browser; two runs with --compare"
    )
    figure_format: str = option(
        "png", "of --figure and of --report's charts (default png)", choices=["png", "pdf", "svg"]
    )
    serve: bool = option(
        False, "instead of evaluating, a page to try pictures and prompts on (needs: pip install gradio)"
    )
    share_host: str = option("127.0.0.1", "address of --serve (default 127.0.0.1: this machine alone)")
    port: int = option(7860, "of --serve (default 7860)", limits=Limits(0, 65535))
    figure: int | None = option(
        None,
        "write figure.png: N rows, the best, median and worst cases",
        type=int,
        metavar="N",
        limits=Limits(1),
    )
    merge: str | None = option(
        None,
        "instead of evaluating, write a plain folder of weights (Hugging Face's for CLIPSeg) with what "
        "lora, decoder or full has learnt",
        metavar="DIR",
    )
    export: str | None = option(
        None,
        "instead of evaluating, write the network with --prompt built in, for other programs (needs: pip "
        "install onnxscript onnxruntime)",
        metavar="FILE.onnx",
    )


@dataclass
class InputOptions:
    """Inputs other than a data set."""

    pred: str | None = option(None, "folder of predicted masks, scored without a network against --target")
    target: str | None = option(None, "folder of true masks for --pred; files are paired by stem")
    images: str | None = option(
        None, "picture or folder of pictures to segment, with --prompt and --save-masks"
    )
    prompt: str | None = option(None, 'what to segment in --images: "polyp"')
    route: str | None = option(
        None,
        "which of several --ckpt: a run's name (default: the one whose class word --prompt holds)",
        metavar="NAME",
    )
    overlay: bool = option(False, "with --images: also write NAME.overlay.png")


@dataclass
class BatchOptions:
    """How images are read."""

    batch_size: int = option(32, "images at a time (default 32)", limits=Limits(1, 10**6))
    cache_dir: str | None = option(
        None, "folder of the decoded images (default: vlsm in the user's cache folder)"
    )
    shard_cache: bool = option(False, "of several processes (torchrun) each keeps a share of the images")


@dataclass
class EvaluateOptions(WhatOptions, OutputOptions, InputOptions, BatchOptions, MachineOptions):
    """All options of evaluate.py."""


def parse_options(argv=None):
    """Return the `EvaluateOptions` of a command line."""
    parser = option_parser(
        "DSC, IoU and HD95 of a run at the original resolution; masks and pictures. HD95 is in pixels: the "
        "larger of both directions' 95th percentiles of boundary distances."
    )
    add_options(parser, WhatOptions, "what to evaluate")
    add_options(parser, OutputOptions, "what to write")
    add_options(parser, InputOptions, "other inputs")
    add_options(parser, BatchOptions, "reading")
    add_options(parser, MachineOptions, "machine")
    options = EvaluateOptions(**vars(parser.parse_args(argv)))
    check_fields(options)
    _check_values(options)
    options.cache_dir = options.cache_dir or default_cache()
    return options


def _check_values(options):
    """Turn --risk into (kind, level). Raises ValueError for values that cannot be, and for contradictions."""
    if options.risk:
        kind, level = options.risk
        try:
            options.risk = kind, float(level)
        except ValueError:
            options.risk = kind, -1.0
        if kind != "fn" or not 0 < options.risk[1] < 1:
            raise ValueError(f"--risk {kind} {level}: give fn and a share between 0 and 1, such as: fn 0.1.")
        if options.split == "val":
            raise ValueError(
                "--risk fits on the validation split, so it cannot be judged there: --split test."
            )
    try:
        re.compile(options.group or "")
    except re.error as error:
        raise ValueError(f"--group '{options.group}' is no regular expression ({error}).") from None
    alone = ("merge", "export", "serve", "all_prompts", "audit_blocks")
    if options.ensemble and any(getattr(options, name) for name in alone):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in alone)
        raise ValueError(f"--ensemble goes with none of {flags}.")
    if options.transfer and not options.report:
        raise ValueError("--transfer is a kind of --report.")
