"""A run in progress: model, optimizer, data and history; what resuming needs; the forward pass of a batch. The loop is in train.py."""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels import dice_bce

from . import runtime
from .cache import feed
from .frozen import Frozen
from .model import VLSM
from .prompts import prompt_of
from .text import Tokenizer


class Diverged(ValueError):
    """A loss that is not finite."""


@dataclass
class Job:
    """All that a step of training needs."""

    args: argparse.Namespace
    out: Path
    model: VLSM
    tokenizer: Tokenizer
    data: dict
    device: torch.device
    dtype: torch.dtype | None
    checked: bool = False  # whether the first step's gradients were looked at
    history: list = field(default_factory=list)  # a row of log.csv an epoch
    best: float = -1.0  # best validation DSC
    stalled: int = 0  # epochs since what is monitored last improved by 1e-4, and from where
    mark: float = -math.inf

    def __post_init__(self):
        args = self.args
        runtime.place(self.model, self.device, self.dtype, args.kernels, args.compile)
        self.frozen = Frozen(self.model, self.tokenizer, self.device, self.dtype, args.cache_gb, args.cache_dir)
        self.tuned = self.model.tuned_parameters()
        groups = {True: [], False: []}
        for name, tensor in self.tuned.items():
            groups[self.model.tuner.decays(name, tensor)].append(tensor)
        groups = [dict(params=tensors, weight_decay=args.weight_decay * decays) for decays, tensors in groups.items() if tensors]
        fused = self.device.type == "cuda"  # one kernel for all tensors
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, "min", args.lr_factor, args.lr_patience)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def state(self):
        """What resuming needs, besides config.json."""
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "scaler")}
        numbers = {name: getattr(self, name) for name in ("history", "best", "stalled", "mark")}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        base = self.model.info["fingerprint"]
        return dict(tuned=self.model.tuned_state_dict(), base=base, rng=torch.get_rng_state(), cuda_rng=cuda, **parts, **numbers)

    def resume(self, state):
        if state["base"] != self.model.info["fingerprint"]:
            raise ValueError(
                f"The run in '{self.out}' was started on another base than '{self.args.weights}'. Pass its own with --weights."
            )
        self.model.load_tuned(state["tuned"])
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("history", "best", "stalled", "mark"):
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def note(self, row):
        """Add an epoch to the history, lower the learning rate where validation stalls; True if it is the best so far."""
        self.history.append(row)
        self.scheduler.step(row["val_loss"])
        better, self.best = row["val_dsc"] > self.best, max(self.best, row["val_dsc"])
        level = row["val_dsc"] if self.args.monitor == "dsc" else -row["val_loss"]
        self.stalled, self.mark = (0, level) if level > self.mark + 1e-4 else (self.stalled + 1, self.mark)
        return better

    def saved(self):
        done = f"epoch {len(self.history)} is saved" if self.history else "no epoch was finished yet"
        return f"{done}. Go on with: python train.py --out {self.args.sweep_folder or self.out} --resume"

    def refuse_nonfinite(self, loss, what):
        """Raise Diverged where a loss is nan or infinite, before anything of that epoch is written."""
        if not math.isfinite(loss):
            done = len(self.history)
            kept = f"The last good state, after epoch {done}, is kept in '{self.out}'." if done else "No epoch was finished."
            lr = self.optimizer.param_groups[0]["lr"]
            raise Diverged(f"The {what}, at learning rate {lr:.3g}. {kept} Try a smaller --lr, or --amp off.")

    def prepare(self):
        """Before the first epoch: what frozen encoders make of the pictures, and the pictures to the GPU if there is room."""
        args = self.args
        if args.data_device == "cuda" and self.device.type != "cuda":
            raise ValueError(f"--data-device cuda needs --device cuda, and this run is on {self.device}.")
        for split in ("train", "val"):
            kept = self.frozen.fill(split, self.data[split], args.batch_size)
            if kept:
                print(kept)
        if self.device.type == "cuda" and args.data_device != "cpu":
            size = sum(d.nbytes for d in self.data.values())
            if args.data_device == "cuda" or size < torch.cuda.mem_get_info(self.device)[0] / 4:
                for data in self.data.values():
                    data.move(self.device)

    def batches(self, split, parts):
        """(indices, pixels or None, masks) of parts of a split's records, on the device."""
        data = self.data[split]
        with_pixels = (self.args.augment and split == "train") or self.frozen.needs_pixels(split, data)
        return feed(data, parts, self.device, with_pixels)

    def forward(self, split, indices, pixels, masks, *seed, changed=None):
        """(logits, loss) of some records; their prompts are drawn by `seed`; `changed`: which of the pictures augmentation altered."""
        args, data = self.args, self.data[split]
        prompts = [prompt_of(data.records[i], i, args.prompts, *seed) for i in indices]
        logits = self.frozen.logits(split, data, indices, prompts, pixels, changed)
        return logits, dice_bce(logits, masks, args.dice_weight, args.bce_weight, ce=args.ce)
