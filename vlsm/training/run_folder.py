"""A run's folder: its config.json, its checkpoints and log, going on with the run in it."""

import shutil
from pathlib import Path

from vlsm.system.files import atomic_write, is_filled, read_json, write_json

# Options that may differ when a run is resumed; all others would make it another run.
FREE_ON_RESUME = {
    "epochs", "patience", "min_epochs", "sweep", "device", "data_root", "cache_dir", "weights", "kernels",
    "compile", "cache_gb", "data_device", "shard_cache", "tensorboard",
}  # fmt: skip


def restore_options(options):
    """Return the options of the run in `options.out`, but for those that were given on the command line.

    Raises FileNotFoundError where there is no run, ValueError for a given option that would make it another
    run.
    """
    file = Path(options.out) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no run to resume in '{options.out}' (no config.json). Name its folder with --out."
        )
    saved = read_json(file)["options"]
    present, values = options.saved(), {}
    for name in present:
        if name not in saved:
            continue
        if name not in options.given:
            values[name] = saved[name]
        elif name not in FREE_ON_RESUME and present[name] != saved[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {present[name]} differs from the run in '{options.out}', which "
                f"has {saved[name]}. Use another --out."
            )
    return options.updated(**values)


def check_folder(options):
    """Refuse a folder that holds another run, or something else, before any work is done.

    Raises FileExistsError.
    """
    out = Path(options.out)
    if options.resume or not is_filled(out):
        return
    if not options.overwrite:
        raise FileExistsError(
            f"'{out}' exists and is not empty. Use --resume to go on with that run, --overwrite to delete "
            "it, or another --out."
        )
    if not (out / "config.json").is_file():
        raise FileExistsError(
            f"'{out}' holds no run of this program (no config.json), so --overwrite does not delete it. Use "
            "another --out."
        )


def make_folder(options, about):
    """Make the run's folder with its config.json; with --overwrite, without what was there.

    Returns its path.
    """
    out = Path(options.out)
    if options.overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".*.tmp"):  # of a run that was killed while writing
        left.unlink()
    write_json(out / "config.json", dict(options=options.saved(), **about), atomic_write)
    return out
