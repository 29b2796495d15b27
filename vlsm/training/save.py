"""What a run writes: its description, checkpoints, log, curves, TensorBoard events."""

import platform

import torch

from vlsm.checkpoint import save_state, save_tuned
from vlsm.system import parallel, plots
from vlsm.system.console import say
from vlsm.system.files import atomic_write, write_csv
from vlsm.training.options import image_side
from vlsm.training.run_folder import make_folder

COLUMNS = (
    "epoch", "train_loss", "train_dsc", "val_loss", "val_dsc", "val_iou", "lr", "seconds",
    "images_per_second",
)  # fmt: skip


def describe_run(options, model):
    """Return what config.json and the checkpoint's metadata say about a run."""
    names = ("dataset", "data_root", "split_seed", "prompts")
    return dict(
        **{name: getattr(options, name) for name in names},
        image_size=image_side(model, options.image_size),
        mean=model.network.mean,
        std=model.network.std,
        recipe=options.recipe(),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
    )


def save_untrained(options, model, about):
    """Write the checkpoint of --peft none."""
    if not parallel.rank():
        out = make_folder(options, about)
        save_tuned(out / "best.safetensors", model, **about, best_val_dsc=None)
        checkpoint = out / "best.safetensors"
        say(f"Nothing to train. Wrote {checkpoint}; evaluate it with: python evaluate.py --ckpt {out}")


def save_epoch(job, about, better, writer=None):
    """Write every file of the run.

    state.pt comes last: until it is there, a resumed run repeats this epoch and writes the same.
    """
    if parallel.rank():
        return
    names = ["last", "best"] if better else ["last"]
    for name in names:
        path = job.out / f"{name}.safetensors"
        save_tuned(path, job.model, **about, best_val_dsc=job.best, epoch=len(job.history))
    rows = [COLUMNS, *([row[name] for name in COLUMNS] for row in job.history)]
    write_csv(job.out / "log.csv", rows, atomic_write)
    with atomic_write(job.out / "curves.png") as temporary:
        plots.curves(job.history, temporary)
    if writer:
        for name in COLUMNS[1:]:
            writer.add_scalar(name, job.history[-1][name], len(job.history))
    save_state(job.out / "state.pt", job.state())


def open_tensorboard(out, done):
    """Return a writer; what was logged after epoch `done`, by a run that then was killed, is left out."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=done + 1, flush_secs=20)
