"""Train the same run with several seeds, or on each fold of a cross-validation, in folders below one."""

from pathlib import Path

import torch

import train
from vlsm.system import parallel
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import atomic_write, write_json
from vlsm.system.schema import field, read_json
from vlsm.training.arguments import parse_arguments, refuse_changes
from vlsm.training.claims import claim
from vlsm.training.run import Diverged

EXAMPLES = """examples:
  python -m vlsm.tools.repeat --seeds 41 42 43 -- --dataset kvasir --peft dense
  python -m vlsm.tools.repeat --folds 5 -- --dataset my-folder --prompts "a polyp"
  python -m vlsm.tools.repeat --folds 5 --out runs/five --resume
what follows -- goes to train.py. Evaluate all runs with: python evaluate.py --ckpt FOLDER

several processes: start the same command with --resume once for each, such as one for each GPU:
  CUDA_VISIBLE_DEVICES=0 python -m vlsm.tools.repeat --folds 5 --out runs/five --resume -- --dataset kvasir &
  CUDA_VISIBLE_DEVICES=1 python -m vlsm.tools.repeat --folds 5 --out runs/five --resume -- --dataset kvasir &
Each takes the next run that no other process has, and continues those whose process was killed."""


def group_words(group, words, repeat, run):
    """Return the options of train.py that the runs of a group share, as the config.json of its folder says.

    words: those given now, if any; they are written there. repeat: an option of one run. run: both, parsed.
    Raises ValueError for words that would make the runs that were begun others, and for the config.json of
    something else.
    """
    file = group / "config.json"
    begun = any(group.glob("*/config.json"))
    stored = words
    if file.is_file():
        stored = field(file, read_json(file), "arguments", kind=[str], words="the options of a group")
    elif begun and not words:
        raise ValueError(f"'{file}' is missing: give the options of the runs behind --.")
    if begun and words:
        refuse_changes(vars(run), vars(parse_arguments([*stored, repeat])), group)
    words = words or stored
    write_json(file, dict(arguments=words), atomic_write)
    return words


def claim_next(group, names, device):
    """Return the first of the runs that no other process has claimed, or None; the same in every rank.

    device: of this rank.
    """
    number = 0
    if not parallel.rank():
        number = next((i for i, name in enumerate(names, 1) if claim(group / name)), 0)
    (number,) = parallel.all_reduce_sum([number], device)
    return names[int(number) - 1] if number else None


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.repeat")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--seeds", type=number(int, 0, 2**32 - 1), nargs="+", metavar="SEED", help="a run each")
    add(
        "--folds",
        type=number(int, 2, 99),
        metavar="K",
        help="K runs, each tested on another part of the data",
    )
    parser.add_argument(
        "--out", help="folder of the runs (default: runs/<dataset>-<method>-...-seeds or -folds)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue runs that were begun, and leave out those that other processes have",
    )
    parser.add_argument("train", nargs="*", metavar="-- OPTIONS", help="options of train.py")
    args = parser.parse_args(argv)
    repeats = {f"seed{seed}": f"--seed={seed}" for seed in args.seeds or ()}
    for i in range(1, 1 + (args.folds or 0)):
        repeats[f"fold{i}"] = f"--fold={i}/{args.folds}"
    first, *_ = repeats.values()
    run = parse_arguments([*args.train, first])  # reject bad options before anything is trained
    ending = "folds" if args.folds else "seeds"
    group = Path(args.out or run.out.removesuffix(f"seed{run.seed}") + ending)
    train_words = group_words(group, args.train, first, run)
    run = parse_arguments([*train_words, first])
    device, _ = parallel.choose_device(parallel.join_processes(run.device), "off")
    failed = []
    while name := claim_next(group, list(repeats), device):
        out = group / name
        words = [*train_words, repeats.pop(name), f"--out={out}"]
        if args.resume and (out / "config.json").is_file():
            words.append("--resume")
        say(f"\n{name}: {out}")
        try:
            train.main(words)
        except (Diverged, torch.OutOfMemoryError) as error:
            if parallel.world_size() > 1:  # the other ranks are in the midst of a step
                raise
            say(f"failed: {error}")
            failed.append(name)
    if failed:
        raise ValueError(f"{', '.join(failed)}: failed, as the lines above say.")
    if repeats:
        say(f"Other processes have {', '.join(repeats)}.")
    else:
        say(f"All runs are done. Evaluate them with:\n  python evaluate.py --ckpt {group}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
