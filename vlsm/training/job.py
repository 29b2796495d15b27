"""A run in progress: model, optimizer, data and history, and what resuming needs. The loop is in train.py."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from vlsm.data.cache import device_batches
from vlsm.data.pixel_values import normalise
from vlsm.model import VLSM
from vlsm.networks.tokenizer import Tokenizer
from vlsm.system import parallel
from vlsm.system.console import process_rank, say
from vlsm.system.device import AsyncScalars
from vlsm.training.frozen_cache import FrozenCache
from vlsm.training.options import TrainOptions

PROGRESS = 1e-4  # by which the monitored value must improve


class Diverged(ValueError):
    """A loss that is not finite."""


@dataclass
class Job:
    """All that a step of training needs. data: split -> `CachedSplit`."""

    options: TrainOptions
    out: Path
    model: VLSM
    tokenizer: Tokenizer
    data: dict
    device: torch.device
    dtype: torch.dtype | None  # of autocast
    gradients_checked: bool = False
    history: list = field(default_factory=list)  # a row of log.csv an epoch
    best: float = -1.0  # best validation DSC
    stalled: int = 0  # epochs since the monitored value last improved by PROGRESS
    mark: float = -math.inf  # that value

    def __post_init__(self):
        options, model = self.options, self.model
        model.place_on(self.device, self.dtype, options.kernels, options.compile)
        model.recompute_activations(options.checkpoint_activations)
        mean, std = model.base.mean, model.base.std
        self.normalise = lambda images: None if images is None else normalise(images, mean, std)
        self.frozen = FrozenCache(
            model, self.tokenizer, self.normalise, self.device, self.dtype, options.cache_gb,
            options.cache_dir,
        )  # fmt: skip
        self.tuned = model.tuned_parameters()
        decayed, others = [], []
        for name, tensor in self.tuned.items():
            (decayed if model.tuner.uses_weight_decay(name, tensor) else others).append(tensor)
        groups = ((decayed, options.weight_decay), (others, 0.0))
        groups = [dict(params=tensors, weight_decay=decay) for tensors, decay in groups if tensors]
        fused = self.device.type == "cuda"  # one kernel for all tensors
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "min", options.lr_factor, options.lr_patience
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    # Data

    def add_data(self):
        """Compute what frozen encoders make of the images; move the images to the GPU if there is room."""
        asked = self.options.data_device
        if asked == "cuda" and self.device.type != "cuda":
            raise ValueError(f"--data-device cuda needs --device cuda, and this run is on {self.device}.")
        for split in ("train", "val"):
            kept = self.frozen.add_split(split, self.data[split], self.options.batch_size)
            if kept:
                say(kept)
        if self.device.type == "cuda" and asked != "cpu":
            size = sum(d.nbytes for d in self.data.values())
            if asked == "cuda" or size < torch.cuda.mem_get_info(self.device)[0] / 4:
                for data in self.data.values():
                    data.move_to(self.device)

    def batches(self, split, batches):
        """Yield (indices, images uint8 or None, masks) of batches of a split's records, on the device."""
        augmented = self.options.augment and split == "train"
        with_images = augmented or self.frozen.needs_pixels(split)
        return device_batches(self.data[split], batches, self.device, with_images)

    def step(self, loss):
        """Change what is trained by the gradients that are there; loss: the last one, a scalar tensor."""
        parallel.all_reduce_mean(p.grad for p in self.tuned.values() if p.grad is not None)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.tuned.values(), self.options.clip or math.inf)
        self.check_gradients(loss, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    # Progress

    def check_gradients(self, loss, norm):
        """Look at the first step's gradients and say what was found.

        Raises ValueError where they are wrong.
        """
        seeks_scale = self.dtype == torch.float16 and not norm.isfinite()  # fp16's first steps may overflow
        if self.gradients_checked or not loss.isfinite() or seeks_scale:
            return
        line = self.model.check_gradients()
        if not process_rank():
            tqdm.write(line)
        self.gradients_checked = True

    def refuse_nonfinite(self, loss, what):
        """Raise Diverged where a loss is nan or infinite, before anything of that epoch is written."""
        if not math.isfinite(loss):
            done = len(self.history)
            kept = f"The last good state, after epoch {done}, is kept in '{self.out}'."
            kept = kept if done else "No epoch was finished."
            lr = self.optimizer.param_groups[0]["lr"]
            raise Diverged(f"The {what}, at learning rate {lr:.3g}. {kept} Try a smaller --lr, or --amp off.")

    def end_epoch(self, row):
        """Add a row to the history and lower the learning rate where validation stalls; True if it is the
        best.
        """
        self.history.append(row)
        self.scheduler.step(row["val_loss"])
        better, self.best = row["val_dsc"] > self.best, max(self.best, row["val_dsc"])
        value = row["val_dsc"] if self.options.monitor == "dsc" else -row["val_loss"]
        if value > self.mark + PROGRESS:
            self.stalled, self.mark = 0, value
        else:
            self.stalled += 1
        return better

    def describe_saved(self):
        """Return in words what is saved, and how to go on."""
        done = f"epoch {len(self.history)} is saved" if self.history else "no epoch was finished yet"
        return f"{done}. Go on with: python train.py --out {self.options.sweep_folder or self.out} --resume"

    # Resuming

    def state(self):
        """Return what resuming needs, besides config.json."""
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "scaler")}
        numbers = {name: getattr(self, name) for name in ("history", "best", "stalled", "mark")}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        base, tuned = self.model.info["fingerprint"], self.model.tuned_state_dict()
        return dict(tuned=tuned, base=base, rng=torch.get_rng_state(), cuda_rng=cuda, **parts, **numbers)

    def resume(self, state):
        """Take up a `state`. Raises ValueError where it belongs to another base."""
        if state["base"] != self.model.info["fingerprint"]:
            weights = self.options.weights
            raise ValueError(
                f"The run in '{self.out}' was started on another base than '{weights}'. Pass its own with "
                "--weights."
            )
        self.model.load_tuned(state["tuned"])
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("history", "best", "stalled", "mark"):
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


class EpochMeter:
    """Sums of loss and DSC over the records of an epoch, shown on a progress bar.

    A step's numbers are read when the next step has been issued: waiting for them would leave a GPU without
    work.
    """

    def __init__(self, job, epoch, bar):
        self.job, self.epoch, self.bar, self.pending, self.step = job, epoch, bar, None, 0
        self.loss, self.dsc, self.records = 0.0, 0.0, 0

    def add(self, loss, dsc_sum, records):
        """Note a part of a step. Raises Diverged where the loss of the one before is not finite.

        loss: the mean over this process's `records`, a scalar tensor; dsc_sum: their DSC, summed.
        """
        scalars = AsyncScalars(torch.stack([loss.detach().double(), dsc_sum]))
        self.flush()
        self.step += 1
        self.pending = self.step, scalars, records

    def flush(self):
        """Read the numbers of the last step that was noted. Raises Diverged where its loss is not finite."""
        if not self.pending:
            return
        (step, scalars, records), self.pending = self.pending, None
        loss, dsc_sum = scalars.tolist()
        self.job.refuse_nonfinite(loss, f"loss became {loss} in epoch {self.epoch}, step {step}")
        self.loss += loss * records
        self.dsc += dsc_sum
        self.records += records
        seen = max(self.records, 1)
        means = dict(loss=f"{self.loss / seen:.3f}", DSC=f"{100 * self.dsc / seen:.1f}")
        self.bar.set_postfix(means, refresh=False)
