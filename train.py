"""Fine-tune a vision-language segmentation model: `python train.py --dataset kvasir --peft dense --dim 64`.

The loop is written out below: `train_epochs` goes through the epochs, `train_epoch` through the batches of
one.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import datasets
import kernels
from vlsm.checkpoint import load_state
from vlsm.data.augment import augment
from vlsm.data.cache import chunks
from vlsm.data.prompts import choose_prompt
from vlsm.metrics import dsc, iou
from vlsm.model import build
from vlsm.networks.weights import is_random
from vlsm.system import parallel
from vlsm.system.console import Interrupt, friendly_errors, progress, say
from vlsm.system.device import autocast, choose_device, multiplies_bf16
from vlsm.training import memory, sweep
from vlsm.training.job import EpochMeter, Job
from vlsm.training.options import complete, default_folder, parse_options
from vlsm.training.run_folder import check_records, fingerprint_records, held_folder, make_folder
from vlsm.training.save import describe_run, open_tensorboard, save_epoch, save_untrained

LARGE = 20_000_000  # parameters, from which products are most of a step
STRIDE = 1_000_003  # between the seeds of two epochs


def train_epoch(job, epoch, interrupt):
    """Train on every record once; returns (loss, DSC), means over the records.

    Raises Diverged for a loss of nan.
    """
    options, model, records = job.options, job.model.train(), job.data["train"].records
    mode, seed = options.prompts, options.seed * STRIDE + epoch
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = [parallel.share_batch(batch, options.accumulate) for batch in chunks(order, options.batch_size)]
    if parallel.world_size() > 1:  # dropout's draws: each process its own, whatever was drawn before
        torch.manual_seed(seed * STRIDE + parallel.rank())
    with progress(len(records), f"epoch {epoch}/{options.epochs}") as bar:
        meter = EpochMeter(job, epoch, bar)
        batches = job.batches("train", [share.indices for shares in steps for share in shares])
        for k, shares in enumerate(steps):
            job.optimizer.zero_grad(set_to_none=True)
            for share, (indices, images, masks) in zip(shares, batches):
                # images: uint8 [B, 3, S, S], or None where what is kept will do; masks: uint8 [B, 1, S, S]
                changed = None
                if options.augment:
                    generator = torch.Generator().manual_seed(seed * STRIDE + k * options.batch_size)
                    size, part = share.batch_size, share.part
                    images, masks, changed = augment(images, masks, generator, size, part)
                prompts = [choose_prompt(records[i], mode, options.seed, epoch, i) for i in indices]
                pixel_values = job.normalise(images)  # [B, 3, S, S]
                kept = job.frozen.lookup("train", indices, prompts, pixel_values, changed)
                with autocast(job.device, job.dtype):
                    logits = model(pixel_values, *job.tokenizer(prompts), **kept)  # [B, 1, S, S]
                loss = kernels.dice_bce_loss(logits, masks, **options.loss())
                job.scaler.scale(loss * share.weight).backward()
                scores = dsc(logits.detach()[:, 0] > 0, masks[:, 0] > 0)
                meter.add(loss, scores[: share.count].sum(), share.count)
            job.step(loss)
            bar.update(share.batch_size)
            interrupt.leave(f"Interrupted in epoch {epoch}; {job.describe_saved()}")
        meter.flush()
    parallel.all_reduce_mean(model.base.get_buffer(name) for name in model.updated_buffers)
    loss_sum, dsc_sum, count = parallel.all_reduce_sum([meter.loss, meter.dsc, meter.records], job.device)
    return loss_sum / count, dsc_sum / count


@torch.no_grad()
def validate(job):
    """Return (loss, DSC, IoU), means over the validation records at the model's size."""
    options, model, records = job.options, job.model.eval(), job.data["val"].records
    own = parallel.own_batches(chunks(list(range(len(records))), options.batch_size))
    found = []
    for (indices, images, masks), (number, _) in zip(job.batches("val", [batch for _, batch in own]), own):
        prompts = [choose_prompt(records[i], options.prompts, options.seed, i) for i in indices]
        pixel_values = job.normalise(images)
        kept = job.frozen.lookup("val", indices, prompts, pixel_values)
        with autocast(job.device, job.dtype):
            logits = model(pixel_values, *job.tokenizer(prompts), **kept)  # [B, 1, S, S]
        loss = kernels.dice_bce_loss(logits, masks, **options.loss())
        predicted, truth = logits[:, 0] > 0, masks[:, 0] > 0
        scores = torch.stack([dsc(predicted, truth), iou(predicted, truth)], 1)
        found.append((number, loss.double() * len(indices), scores))
    if parallel.world_size() > 1:
        found = parallel.gather_sorted([(number, loss.cpu(), scores.cpu()) for number, loss, scores in found])
    loss_sum = sum(loss for _, loss, _ in found)
    return loss_sum.item() / len(records), *torch.cat([scores for _, _, scores in found]).mean(0).tolist()


def train_epochs(job, about, after_epoch=None):
    """Train to the last epoch, or until validation stalls; after each, save the run and call
    `after_epoch(job)`.
    """
    options, records = job.options, len(job.data["train"])
    writer = (
        open_tensorboard(job.out, len(job.history)) if options.tensorboard and not parallel.rank() else None
    )
    with Interrupt() as interrupt:
        for epoch in range(len(job.history) + 1, options.epochs + 1):
            if epoch > options.min_epochs and job.stalled >= options.patience:
                say(f"Stopping early: {job.stalled} epochs without a better validation DSC.")
                break
            began, lr = time.perf_counter(), job.optimizer.param_groups[0]["lr"]
            loss, train_dsc = train_epoch(job, epoch, interrupt)
            seconds = time.perf_counter() - began
            speed = records / seconds
            val_loss, val_dsc, val_iou = validate(job)
            job.refuse_nonfinite(val_loss, f"validation loss became {val_loss} after epoch {epoch}")
            row = dict(
                epoch=epoch, train_loss=loss, train_dsc=train_dsc, val_loss=val_loss, val_dsc=val_dsc,
                val_iou=val_iou, lr=lr, seconds=round(seconds, 2), images_per_second=round(speed, 1),
            )  # fmt: skip
            better = job.end_epoch(row)
            save_epoch(job, about, better, writer)
            say(
                f"epoch {epoch:3d}/{options.epochs}  loss {loss:.4f}  DSC {100 * train_dsc:.2f}  val loss "
                f"{val_loss:.4f}  val DSC {100 * val_dsc:.2f}  IoU {100 * val_iou:.2f}  lr {lr:.1e}  "
                f"{speed:.3g} img/s{'  *' if better else ''}"
            )
            interrupt.leave(f"Interrupted after epoch {epoch}; {job.describe_saved()}")
            if after_epoch:
                after_epoch(job)


def train(options, after_epoch=None):
    """Train one run, from its options to its last epoch; returns the `Job`, or None where nothing was
    trained.
    """
    device, dtype = choose_device(parallel.join_processes(options.device), options.amp)
    if options.batch_size < parallel.world_size():
        raise ValueError(
            f"--batch-size {options.batch_size} is the whole batch, and there are {parallel.world_size()} "
            "processes to share it."
        )
    datasets.available_splits(options.dataset, options.data_root, options.split_seed)  # is it there?
    torch.manual_seed(options.seed)
    model = build_model(options)
    about = describe_run(options, model)
    large = model.count_parameters()[1] > LARGE
    if device.type == "cpu" and dtype is None and large and multiplies_bf16():
        say("This CPU multiplies in bfloat16: --amp bf16 makes a step about 1.8 to 3 times as fast.")
    if options.dry_run:
        if options.peft != "none":
            say_memory(options, model, about, device, dtype)
        return None
    with held_folder(options):
        parallel.barrier()  # all have looked at the folder before the first one writes there
        if options.peft == "none":
            return save_untrained(options, model, about)
        job = start_job(options, model, about, device, dtype)
        train_epochs(job, about, after_epoch)
    say(f"Best validation DSC {100 * job.best:.2f}. Evaluate it with: python evaluate.py --ckpt {job.out}")
    return job


def say_memory(options, model, about, device, dtype):
    """Print what a run needs of memory, and the largest batches for some cards."""
    root, seed = options.data_root, options.split_seed
    images = sum(len(datasets.records(options.dataset, split, root, seed)) for split in ("train", "val"))
    job = Job(options, Path(options.out), model, model.tokenizer(), {}, device, dtype)
    say(memory.describe(memory.estimate(job, about["image_size"]), options, images))


def start_job(options, model, about, device, dtype):
    """Return the `Job` of a new run, or of the one that goes on, with its data and its folder."""
    tokenizer = model.tokenizer()
    data = open_data(options, about["image_size"])
    about["class_words"] = sorted({r.class_word for d in data.values() for r in d.records if r.class_word})
    about["records"] = fingerprint_records(data)
    job = Job(options, Path(options.out), model, tokenizer, data, device, dtype)
    if options.resume and (job.out / "state.pt").is_file():
        check_records(options, about["records"])
        job.resume(load_state(job.out / "state.pt"))
        best = f"best validation DSC {100 * job.best:.2f}"
        say(f"Resuming '{job.out}' after epoch {len(job.history)} ({best})")
    job.add_data()
    if not parallel.rank():  # after the state was accepted: a wrong --weights must not enter config.json
        make_folder(options, about)
    return job


def build_model(options):
    """Return the model, and say how many of its parameters are trained."""
    with parallel.local_first():
        model = build(
            options.model, options.weights, options.peft, options.reference, **options.method_options
        )
    if is_random(options.weights):
        note = "random weights, for tests and research: nothing in them is pretrained."
        say(f"{options.weights}: {note}", file=sys.stderr)
    trained, total = model.count_parameters()
    share = f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"
    say(f"{options.model} ({options.weights}), --peft {options.peft}: {share}")
    return model


def open_data(options, side):
    """Return {split: `CachedSplit`} of the run.

    Raises ValueError where there is no training or validation split.
    """
    name, root, seed = options.dataset, options.data_root, options.split_seed
    splits = datasets.available_splits(name, root, seed) or ["train", "val"]
    data = datasets.open_dataset(
        name, splits, side, root, options.cache_dir, seed, options.prompts, skip_bad=options.skip_bad,
        limit_train=options.limit_train,
    )  # fmt: skip
    if not {"train", "val"} <= set(data):
        raise ValueError(
            f"'{name}' has records for {' and '.join(data)} only; training needs train and val. If it is a "
            "folder of a few files that are split by their names, another --split-seed or train/ and val/ "
            "folders help."
        )
    say(f"{name}: " + ", ".join(f"{len(d)} {s}" for s, d in data.items()) + f" records at {side} x {side}")
    return data


def train_each_seed(options):
    """Train a run for each of --seeds, side by side in one folder.

    With --resume, those that are there go on.
    """
    if options.sweep or "seed" in options.given:
        other = "--sweep" if options.sweep else "--seed"
        raise ValueError(f"--seeds and {other} exclude each other; leave one of them out.")
    group = Path(options.out or default_folder(options, "seeds"))
    for seed in dict.fromkeys(options.seeds):
        out = group / f"seed{seed}"
        resume = options.resume and (out / "config.json").is_file()
        say(f"--seeds: {out}")
        given = options.given | {"seed"}
        train(complete(replace(options, seed=seed, out=str(out), resume=resume, given=given)))
    say(f"All seeds are done. Evaluate them with: python evaluate.py --ckpt {group}")


def main(argv=None):
    options = parse_options(argv)
    if options.seeds:
        train_each_seed(options)
        return parallel.shut_down()
    options = complete(options)
    if options.sweep:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "--sweep runs one trial after another in one process; start it without torchrun."
            )
        with held_folder(options):
            sweep.run_sweep(options, train)
    else:
        train(options)
    return parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
