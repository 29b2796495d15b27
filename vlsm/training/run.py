"""A training run: its folder, history and checkpoints, and how it is resumed."""

import json
import math
import platform
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from vlsm.checkpoint import save_state, save_tuned
from vlsm.networks.weights import load_safely
from vlsm.system import parallel, plots
from vlsm.system.console import first_few, say, say_once
from vlsm.system.files import (
    LEDGER,
    atomic_write,
    check_targets,
    delete_owned,
    digest,
    is_filled,
    is_owned,
    locked,
    owned_write,
    refuse_changed,
    write_csv,
    write_json,
)
from vlsm.system.schema import NUMBER, check_fields, read_json

# The options that say which data a run reads
DATA_FIELDS = (
    "dataset", "data_root", "split_seed", "group", "fold", "no_mask_is_empty", "skip_bad", "prompts",
)  # fmt: skip
# Stamps of the data in config.json, and what each is of
STAMPS = dict(records="names or prompts", contents="pixels")
PROGRESS = 1e-4  # by which the monitored value must improve
COLUMNS = (
    "epoch", "train_loss", "train_dsc", "val_loss", "val_dsc", "val_iou", "val_alarms", "lr", "seconds",
    "images_per_second",
)  # fmt: skip
SCHEDULER_FIELDS = (
    "best", "num_bad_epochs", "cooldown_counter", "last_epoch", "factor", "patience", "threshold", "eps",
)  # fmt: skip
# The schemas of state.pt, of its optimizer's groups and of a row of its history, see `check_fields`
GROUP = dict.fromkeys(("lr", "eps", "weight_decay"), NUMBER)
GROUP["betas"] = ([(int, float)] * 2, "two numbers")
STATE = {
    **dict.fromkeys(("tuned", "optimizer", "scheduler", "scaler"), (dict, "a dictionary")),
    "base": (str, "a text"),
    **{f"scheduler.{name}": NUMBER for name in SCHEDULER_FIELDS},
    "rng": (torch.Tensor, "a tensor"),
    "cuda_rng?": (torch.Tensor, "a tensor"),
    "history": ([dict], "a list of rows"),
    "stalled": (int, "a number of epochs", 0),
    "mark": (*NUMBER, -math.inf),
}
ROW = {name: NUMBER for name in COLUMNS if name != "val_alarms"}
ROW["val_alarms?"] = ROW["val_dsc"]  # runs of earlier versions have none
ROW["epoch"] = (int, "a whole number", 1)
# What `Run` writes from its state after each epoch, and all its files but config.json, in the order in which
# they are deleted; files of evaluations are in their folder's ledger.
RESULTS = ("log.csv", "curves.png", "best.safetensors", "last.safetensors")
FILES = (*RESULTS, "state.pt", LEDGER)


class Run:
    """A run in progress.

    dtype: of autocast, or None. metadata: the run's data, recipe and versions, for config.json and the
    checkpoints, see `describe_run`. monitor: "dsc" or "loss", the validation metric for early stopping.

    Attributes: `history`, a row of log.csv for each epoch; `stalled`, the epochs since the monitored metric
    last improved by `PROGRESS`; `mark`, its value then (of the loss, negated).
    """

    def __init__(self, out, model, optimizer, scheduler, dtype, metadata, monitor="dsc"):
        self.out = Path(out)
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.metadata = metadata
        self.monitor = monitor
        self.history = []
        self.stalled = 0
        self.mark = -math.inf
        self.times = []  # in seconds: the start of this program's first epoch, and the end of each
        self.gradients_checked = False
        self.writer = None  # TensorBoard's

    @property
    def device(self):
        """Return the device of the model."""
        return next(self.model.parameters()).device

    @property
    def next_epoch(self):
        """Return the number of the next epoch; the first one is 1."""
        return len(self.history) + 1

    def start(self, settings, resume=False, overwrite=False, changed_data=False, tensorboard=False):
        """Continue the run in its folder, or make the folder with its config.json.

        settings: the options for config.json. changed_data: continue with other records or pixels. Raises
        ValueError for a run that cannot continue.
        """
        if resume and (self.out / "state.pt").is_file():
            if not changed_data:
                check_stamps(self.out, self.metadata)
            self.resume()
            if settings["epochs"] < len(self.history):
                raise ValueError(
                    f"'{self.out}' has {len(self.history)} epochs already; --epochs counts them, too."
                )
            say(f"Resuming '{self.out}' after epoch {len(self.history)}. {self.describe_best()}")
        if parallel.rank():
            return
        targets = RESULTS[:2] if resume else RESULTS  # of --resume the checkpoints may have been read
        check_targets([self.out / name for name in targets], overwrite=True)
        make_folder(self.out, settings, self.metadata, overwrite)  # only once the saved state matches
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.out / "tensorboard")  # rows from the last saved epoch on are purged
            self.writer = SummaryWriter(folder, purge_step=max(1, len(self.history)), flush_secs=20)
        if self.history:
            self.write_results()  # it may have been stopped between its state and these

    @property
    def best_row(self):
        """Return the log's row of the best epoch by `selection_score`."""
        return max(self.history, key=selection_score)

    @property
    def best(self):
        """Return the validation DSC of the best epoch; None before the first."""
        return self.best_row["val_dsc"] if self.history else None

    @property
    def improved(self):
        """Tell whether the last epoch is the best so far."""
        return self.history[-1] is self.best_row

    def describe_best(self):
        """Return the best epoch in words."""
        return f"Best epoch: {self.best_row['epoch']}, validation DSC {100 * self.best:.2f}."

    # An epoch

    def end_epoch(self, **row):
        """Add a row to the log, and lower the learning rate if the validation loss stalls."""
        self.history.append(row)
        self.scheduler.step(row["val_loss"])
        value = selection_score(row) if self.monitor == "dsc" else -row["val_loss"]
        if value > self.mark + PROGRESS:
            self.stalled = 0
            self.mark = value
        else:
            self.stalled += 1

    def describe_epoch(self, epochs):
        """Return the last epoch as a line that fits into 80 columns; epochs: those of the whole run."""
        row = self.history[-1]
        line = f"epoch {row['epoch']:3d}/{epochs}  loss {row['train_loss']:.3f}  "
        line += f"val DSC {100 * row['val_dsc']:4.1f}  "
        if row["val_alarms"] is not None:
            line += f"alarms {100 * row['val_alarms']:3.0f} %  "
        line += describe_time(self.times, epochs - row["epoch"])
        return line + ("  *" if self.improved else "")

    def save(self):
        """Write every file of the run, in the first process alone.

        state.pt comes first, as all others follow from it: a run that is stopped before it repeats the epoch.
        """
        if parallel.rank():
            return
        save_state(self.out / "state.pt", self.state())
        self.write_results()

    def write_results(self):
        """Write the files that follow from the state."""
        self.save_checkpoint("last")
        if self.improved:
            self.save_checkpoint("best")
        table = [COLUMNS]
        for row in self.history:
            table.append([row.get(name, "") for name in COLUMNS])
        log = self.out / "log.csv"
        try:
            write_csv(log, table)
        except FileExistsError:  # the run goes on: all rows are in state.pt
            say_once(
                log, f"'{log}' was changed, and is left so. Rename it: then all epochs are written again."
            )
        with owned_write(self.out / "curves.png") as temporary:
            plots.curves(self.history, self.best_row["epoch"], self.out.absolute().name, temporary)
        if self.writer:
            for name in COLUMNS[1:]:
                value = self.history[-1].get(name)
                if value is not None:
                    self.writer.add_scalar(name, value, len(self.history))

    def check_results(self):
        """Raise ValueError, at the end of a run, if a file of its folder was deleted meanwhile."""
        missing = [name for name in RESULTS if not (self.out / name).is_file()]
        if missing and not parallel.rank():
            raise ValueError(
                f"'{self.out}' lacks {first_few(missing, 4)} at the end of the run. Were they deleted "
                "meanwhile? Those of the last epoch come back with --resume, an earlier best one does not."
            )

    def save_checkpoint(self, name):
        """Write the tuned tensors with the run's metadata, in the first process alone."""
        if parallel.rank():
            return
        path = self.out / f"{name}.safetensors"
        save_tuned(path, self.model, **self.metadata, best_val_dsc=self.best, epoch=len(self.history))

    def refuse_nonfinite(self, loss, description):
        """Raise Diverged for a loss of nan or infinity, before anything of that epoch is written."""
        if math.isfinite(loss):
            return
        saved = "No epoch was finished."
        if self.history:
            saved = f"The last good state, after epoch {len(self.history)}, is kept in '{self.out}'."
        lr = self.optimizer.param_groups[0]["lr"]
        raise Diverged(
            f"The {description} became {loss}, at learning rate {lr:.3g}. {saved} Try a smaller --lr, or "
            "--amp off."
        )

    def describe_saved(self):
        """Return a sentence on which epoch is saved, and how to continue."""
        saved = f"epoch {len(self.history)} is saved" if self.history else "no epoch was finished yet"
        return f"{saved}. Continue with: python train.py --out {self.out} --resume"

    # Resuming

    def state(self):
        """Return the content of state.pt: all that resuming needs besides config.json."""
        on_gpu = self.device.type == "cuda"
        return dict(
            tuned=self.model.tuned_state_dict(),
            base=self.model.info["fingerprint"],
            rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state(self.device) if on_gpu else None,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
            history=self.history,
            stalled=self.stalled,
            mark=self.mark,
        )

    def resume(self):
        """Continue from state.pt. Raises ValueError if it is broken, or belongs to another base."""
        file = self.out / "state.pt"
        state = load_safely(file, "Start again with --overwrite.")
        check_fields(file, state, STATE)
        for row in state["history"] or [{}]:  # an empty history is refused
            check_fields(f"{file}, history", row, ROW)
        if state["base"] != self.model.info["fingerprint"]:
            raise ValueError(
                f"The run in '{self.out}' was started on another base than '{self.model.info['weights']}'. "
                "Pass its own with --weights."
            )
        try:
            self.model.load_tuned(state["tuned"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            for group in self.optimizer.param_groups:
                check_fields("optimizer", group, GROUP)
        except Exception as error:  # PyTorch raises unrelated types for a state that does not fit
            raise ValueError(
                f"'{file}' does not fit this run ({error}). Start again with --overwrite."
            ) from error
        self.history = state["history"]
        self.stalled = state["stalled"]
        self.mark = state["mark"]


def selection_score(row):
    """Return by what epochs are compared: the validation DSC, of which false alarms cost up to half.

    So a model that answers any word is worth less than one that listens, but more than one that finds
    nothing.
    """
    alarms = row.get("val_alarms") or 0
    return row["val_dsc"] * (1 - alarms / 2)


def describe_time(times, epochs_left):
    """Return the time since the start, and what is left at most, such as "01:02, 05:14 left".

    times: in seconds, of the start and of the end of each epoch.
    """
    elapsed = tqdm.format_interval(times[-1] - times[0])
    left = tqdm.format_interval(epochs_left * (times[-1] - times[-2]))
    return f"{elapsed}, {left} left"


# The folder


@contextmanager
def held_folder(out, resume, overwrite):
    """Check a run's folder in every process, and hold its lock in the first while the run writes there.

    Raises FileExistsError or ValueError before any work is done, see `check_folder`.
    """
    out = Path(out)
    if parallel.rank():
        check_folder(out, resume, overwrite)
        yield
        return
    created = not out.exists()
    try:
        with locked(out, "is writing a run into"):
            check_folder(out, resume, overwrite)
            yield
    finally:
        if created and out.is_dir() and not is_filled(out):  # the run ended before its first file
            out.rmdir()


def check_folder(out, resume, overwrite):
    """Refuse a folder that holds another run, or other files.

    Raises FileExistsError, or ValueError for a run that cannot continue.
    """
    if not is_filled(out):
        return
    if resume:
        written = [name for name in RESULTS if (out / name).is_file()]
        if written and not (out / "state.pt").is_file():
            raise ValueError(
                f"'{out}' has a {written[0]} and no state.pt, so the run in it cannot continue where it "
                "stopped. Put state.pt back, or start again with --overwrite."
            )
        refuse_changed(out / "log.csv")
        return
    if not overwrite:
        raise FileExistsError(
            f"'{out}' exists and is not empty. Use --resume to continue that run, --overwrite to delete it, "
            "or another --out."
        )
    config = out / "config.json"
    if not config.is_file() or not isinstance(read_json(config).get("options"), dict):
        raise FileExistsError(
            f"'{out}' holds no run of this program (config.json is missing or is not the config.json of a "
            "run), so --overwrite does not delete it. Use another --out."
        )


def make_folder(out, settings, metadata, overwrite):
    """Make a run's folder with its config.json; with `overwrite`, delete the run that is there first."""
    if overwrite and is_filled(out):
        delete_run(out)
    write_json(out / "config.json", dict(options=settings, **metadata), atomic_write)


def delete_run(out):
    """Delete the files that a run and its evaluations wrote, and no others; print which files stay.

    Links are neither followed nor deleted. config.json stays for the new run to replace: with it the folder
    is still known as a run's if this is interrupted.
    """
    for folder in out.glob("eval-*"):
        if folder.is_dir():
            delete_owned(folder)
    events = out / "tensorboard"
    files = [path for path in sorted(out.iterdir()) if path.name not in FILES and is_owned(path)]
    files += [out / name for name in FILES]
    if not events.is_symlink():
        files += events.glob("events.out.tfevents.*")
    for file in files:
        if file.is_file() and not file.is_symlink():
            file.unlink()
    if events.is_dir() and not is_filled(events):
        events.rmdir()
    left = sorted(path.name for path in out.iterdir() if path.name != "config.json")
    if left:
        say(f"'{out}' also holds {first_few(left, 5)}; this stays.")


# The metadata of a run


def describe_run(model, data, side, settings, recipe_fields):
    """Return the metadata of a run: data set, image size, normalisation, recipe, versions.

    data: {split: `CachedSplit`}. side: of the images, in pixels. settings: all options by name.
    """
    words = set()
    for split in data.values():
        words.update(record.class_word for record in split.records if record.class_word)
    return dict(
        {name: settings[name] for name in DATA_FIELDS},
        image_size=side,
        mean=model.network.mean,
        std=model.network.std,
        recipe={name: settings[name] for name in recipe_fields},
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        class_words=sorted(words),
        records={name: fingerprint_records(split.records) for name, split in data.items()},
        contents={name: split.checksum for name, split in data.items()},
    )


def fingerprint_records(records):
    """Return 16 hex digits of the names and prompts of records."""
    rows = json.dumps([[record.name, record.mask_name, record.prompts] for record in records])
    return digest(rows.encode())


def check_stamps(out, metadata):
    """Raise ValueError if names, prompts or pixels of the data differ from those of the run in `out`."""
    stored = read_json(out / "config.json")
    for stamp, words in STAMPS.items():
        if stamp not in stored:  # it is from now on, so that this is said once
            say(f"The run in '{out}' is of an earlier version: its records' {words} are not compared.")
        elif stored[stamp] != metadata[stamp]:
            raise ValueError(
                f"The {words} of the data set's records have changed since the run in '{out}' began. Put the "
                "files back, or continue with --changed-data."
            )


# The first step's gradients


# Parameters whose gradient is zero at the start by construction: a key bias shifts all scores of a query
# alike, which softmax ignores; LoRA's first matrix and a ladder have no gradient while what follows is 0.
ZERO_AT_START = re.compile(r"k_proj\.bias$|\.(q|k|v|out)\.down\.weight$|(^|\.)ladder\.")


class Diverged(ValueError):
    """A loss that is not finite."""


def check_gradients(model):
    """Check that each trained tensor has a finite gradient and no frozen one has any; returns a line on it.

    model: a `VLSM` after a backward pass. Raises ValueError if a gradient is missing, not finite, or on a
    frozen tensor.
    """
    tuned = model.tuned_parameters()
    published = model.info["reference"]  # published code trains some tensors that nothing reads
    broken = []
    zero = []
    expected = []
    for name, parameter in tuned.items():
        gradient = parameter.grad
        if gradient is None:
            (zero if published else broken).append(name)
        elif not gradient.isfinite().all():
            broken.append(name)
        elif not gradient.any():
            (expected if ZERO_AT_START.search(name) else zero).append(name)
    trained = {id(parameter) for parameter in tuned.values()}
    frozen = 0
    leaking = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            frozen += 1
            if parameter.grad is not None:
                leaking.append(name)
    if broken or leaking:
        raise ValueError(
            f"First step: {len(broken)} trained tensors without a finite gradient ({first_few(broken)}), "
            f"{len(leaking)} frozen ones with one ({first_few(leaking)}). Training would be wrong; "
            "please report this."
        )
    nonzero = len(tuned) - len(zero) - len(expected)
    counts = f"{nonzero} of {len(tuned)} trained tensors finite and non-zero"
    if expected:
        counts += f" ({len(expected)} cannot be at first)"
    line = f"Gradients of the first step: {counts}, 0 of {frozen} frozen ones."
    if zero:
        line += f"\n  ZERO, so not learning yet: {first_few(zero, 4)}"
    return line
