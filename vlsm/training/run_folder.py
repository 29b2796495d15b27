"""A run's folder: its config.json, its checkpoints and log, going on with the run in it."""

import hashlib
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

from vlsm.system import parallel
from vlsm.system.console import say
from vlsm.system.files import LEDGER, atomic_write, is_filled, locked, read_json, write_json

# Options that may differ when a run is resumed; all others would make it another run.
FREE_ON_RESUME = {
    "epochs", "patience", "min_epochs", "sweep", "device", "data_root", "cache_dir", "weights", "kernels",
    "compile", "cache_gb", "data_device", "shard_cache", "tensorboard", "checkpoint_activations",
}  # fmt: skip

# What a run, a sweep and evaluations of a run write.
RUN_FILES = (
    "config.json", "best.safetensors", "last.safetensors", "log.csv", "curves.png", "state.pt", "sweep.csv",
    "sweep.png", "study.db", "tensorboard/events.out.tfevents.*", "eval-*/**/metrics.csv",
    "eval-*/**/metrics.json", "eval-*/prompts.json", "eval-*/risk.json", "eval-*/audit.json",
    "eval-*/blocks.json",
    *(f"eval-*/{name}.{kind}" for name in ("figure", "audit") for kind in ("png", "pdf", "svg")),
    "eval-*/gallery/index.html", "eval-*/gallery/thumbs/[0-9]*.jpg", "eval-*/gallery/thumbs/[0-9]*-*.png",
    f"eval-*/**/{LEDGER}",
    ".vlsm-*.tmp",
)  # fmt: skip


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
    saved = _saved_options(options.out)
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


def _saved_options(out):
    """Return the options in a run's config.json. Raises ValueError where it is no run's."""
    file = Path(out) / "config.json"
    saved = read_json(file).get("options")
    if not isinstance(saved, dict) or not {"dataset", "peft"} <= set(saved):
        raise ValueError(f"'{file}' is not the config.json of a run: 'options' should name dataset and peft.")
    return saved


@contextmanager
def held_folder(options):
    """Check a run's folder in every process, and hold its lock in the first while a run is written there."""
    out = Path(options.out)
    made = not out.exists()
    lock = nullcontext() if parallel.rank() else locked(out, "is writing a run into")
    try:
        with lock:
            check_folder(options)
            yield
    finally:
        if made and not parallel.rank() and out.is_dir() and not is_filled(out):  # nothing came of it
            out.rmdir()


def check_folder(options):
    """Refuse a folder that holds another run, or something else, before any work is done.

    Raises FileExistsError, or ValueError for a run that cannot go on.
    """
    out = Path(options.out)
    if not is_filled(out):
        return
    if options.resume:
        if (out / "log.csv").is_file() and not (out / "state.pt").is_file():
            raise ValueError(
                f"'{out}' has a log.csv and no state.pt, so the run in it cannot go on where it stopped. Put "
                "state.pt back, or start again with --overwrite."
            )
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
    _saved_options(out)


def check_records(options, fingerprint):
    """Refuse to go on with other records than the run's, unless --changed-data says so. Raises ValueError."""
    before = read_json(Path(options.out) / "config.json").get("records")
    if before not in (None, fingerprint) and not options.changed_data:
        raise ValueError(
            f"The records of '{options.dataset}' are others than when the run in '{options.out}' began "
            "(added, removed, renamed or with other prompts). Put them back, or go on with --changed-data."
        )


def fingerprint_records(data):
    """Return {split: 16 hex digits of its records' names and prompts}; data: {split: `CachedSplit`}."""
    found = {}
    for split, cached in data.items():
        rows = json.dumps([[r.name, r.mask_name, r.prompts] for r in cached.records])
        found[split] = hashlib.blake2b(rows.encode(), digest_size=8).hexdigest()
    return found


def delete_run(out):
    """Delete the files that a run, a sweep and its evaluations write, by name, and no others.

    Says what is left. Links are removed, not followed.
    """
    for trial in out.glob("trial-[0-9][0-9][0-9]"):
        if trial.is_dir() and not trial.is_symlink():
            delete_run(trial)
    for file in [f for pattern in RUN_FILES for f in out.glob(pattern) if f.is_file() or f.is_symlink()]:
        file.unlink()
    for folder in sorted((f for f in out.rglob("*") if f.is_dir() and not f.is_symlink()), reverse=True):
        if folder.relative_to(out).parts[0].startswith(("eval-", "tensorboard", "trial-")):
            if not is_filled(folder):
                folder.rmdir()
    left = sorted(f.name for f in out.iterdir())
    if left:
        say(f"'{out}' also holds {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}; this stays.")


def make_folder(options, about):
    """Make the run's folder with its config.json; with --overwrite, without the run that was there.

    Returns its path.
    """
    out = Path(options.out)
    if options.overwrite and is_filled(out):
        delete_run(out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".vlsm-*.tmp"):  # of a run that was killed while writing
        left.unlink()
    write_json(out / "config.json", dict(options=options.saved(), **about), atomic_write)
    return out
