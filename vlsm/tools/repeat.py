"""Train the same run with several seeds, each in a folder of its own below one."""

from pathlib import Path

import train
from vlsm.system import parallel
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say
from vlsm.training.arguments import default_folder, parse_arguments

EXAMPLES = """examples:
  python -m vlsm.tools.repeat --seeds 41 42 43 -- --dataset kvasir --peft dense
  python -m vlsm.tools.repeat --seeds 41 42 43 --out runs/three --resume -- --dataset kvasir --peft dense
what follows -- goes to train.py. Evaluate all runs with: python evaluate.py --ckpt FOLDER"""


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.repeat")
    parser.add_argument(
        "--seeds", type=number(int, 0, 2**32 - 1), nargs="+", required=True, metavar="SEED", help="a run each"
    )
    parser.add_argument("--out", help="folder of the runs (default: runs/<dataset>-<method>-...-seeds)")
    parser.add_argument("--resume", action="store_true", help="continue runs that were begun")
    parser.add_argument("train", nargs="*", metavar="-- OPTIONS", help="options of train.py")
    args = parser.parse_args(argv)
    values = vars(parse_arguments(args.train))
    group = args.out or default_folder(
        values["dataset"], values["model"], values["peft"], values["branches"], values["dim"],
        values["prompt_depth"], "seeds",
    )  # fmt: skip
    for seed in dict.fromkeys(args.seeds):
        out = Path(group, f"seed{seed}")
        words = [*args.train, f"--seed={seed}", f"--out={out}"]
        if args.resume and (out / "config.json").is_file():
            words.append("--resume")
        say(f"seed {seed}: {out}")
        train.main(words)
    say(f"All seeds are done. Evaluate them with: python evaluate.py --ckpt {group}")
    parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
