"""Train the same run with several seeds, or on each fold of a cross-validation, in folders below one."""

from pathlib import Path

import train
from vlsm.system import parallel
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say
from vlsm.training.arguments import parse_arguments

EXAMPLES = """examples:
  python -m vlsm.tools.repeat --seeds 41 42 43 -- --dataset kvasir --peft dense
  python -m vlsm.tools.repeat --folds 5 -- --dataset my-folder --prompts "a polyp"
  python -m vlsm.tools.repeat --folds 5 --out runs/five --resume -- --dataset my-folder --peft dense
what follows -- goes to train.py. Evaluate all runs with: python evaluate.py --ckpt FOLDER"""


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
    parser.add_argument("--resume", action="store_true", help="continue runs that were begun")
    parser.add_argument("train", nargs="*", metavar="-- OPTIONS", help="options of train.py")
    args = parser.parse_args(argv)
    repeats = {f"seed{seed}": f"--seed={seed}" for seed in args.seeds or ()}
    for i in range(1, 1 + (args.folds or 0)):
        repeats[f"fold{i}"] = f"--fold={i}/{args.folds}"
    first, *_ = repeats.values()
    run = parse_arguments([*args.train, first])  # reject bad options before anything is trained
    ending = "folds" if args.folds else "seeds"
    group = args.out or run.out.removesuffix(f"seed{run.seed}") + ending
    for name, option in repeats.items():
        out = Path(group, name)
        words = [*args.train, option, f"--out={out}"]
        if args.resume and (out / "config.json").is_file():
            words.append("--resume")
        say(f"\n{name}: {out}")
        train.main(words)
    say(f"All runs are done. Evaluate them with:\n  python evaluate.py --ckpt {group}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
