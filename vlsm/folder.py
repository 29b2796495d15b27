"""A run's folder: its name, its config.json, going on with the run in it, never deleting what is no run."""

import json
import shutil
from pathlib import Path

from .checkpoint import write_text
from .weights import read_json

# Options that may differ when a run is resumed; all others would make it another run.
FREE_ON_RESUME = {
    "epochs", "patience", "min_epochs", "sweep", "device", "data_root", "cache_dir", "weights", "kernels", "compile", "cache_gb",
    "data_device", "shard_cache", "tensorboard",
}  # fmt: skip
UNSAVED = {"out", "seeds", "resume", "overwrite", "dry_run", "given", "sweep_space", "sweep_folder"}


def default_method(args):
    return "dense" if args.model == "clipseg" else "full"


def default_out(args, seed):
    depth = f"depth{args.prompt_depth}" if args.prompt_depth else ""
    model, method = "" if args.model == "clipseg" else args.model, args.peft or default_method(args)
    parts = [Path(args.dataset).name, model, method, args.branches or "", str(args.dim or ""), depth, seed, "sweep" * bool(args.sweep)]
    return str(Path("runs") / "-".join(p for p in parts if p))


def adopt(args):
    """Take the options of the run in --out; refuse those on the command line that would make it another run."""
    file = Path(args.out) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"There is no run to resume in '{args.out}' (no config.json). Name its folder with --out.")
    for name, value in read_json(file)["options"].items():
        if name not in args.given:
            setattr(args, name, value)
        elif name not in FREE_ON_RESUME and getattr(args, name) != value:
            given = getattr(args, name)
            raise ValueError(
                f"--{name.replace('_', '-')} {given} differs from the run in '{args.out}', which has {value}. Use another --out."
            )


def check_folder(args):
    """Refuse a folder that holds another run, or something else, before any work is done."""
    out = Path(args.out)
    if args.resume or not out.exists() or not any(out.iterdir()):
        return
    if not args.overwrite:
        raise FileExistsError(
            f"'{out}' exists and is not empty. Use --resume to go on with that run, --overwrite to delete it, or another --out."
        )
    if not (out / "config.json").is_file():
        raise FileExistsError(
            f"'{out}' holds no run of this program (no config.json), so --overwrite does not delete it. Use another --out."
        )


def make_folder(args, about):
    """The run's folder with its config.json; with --overwrite, without what was there."""
    out = Path(args.out)
    if args.overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".*.tmp"):  # of a run that was killed while writing
        left.unlink()
    options = {k: v for k, v in vars(args).items() if k not in UNSAVED}
    write_text(out / "config.json", json.dumps(dict(options=options, **about), indent=1))
    return out
