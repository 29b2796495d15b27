"""Fine-tune a vision-language segmentation model with few trained parameters.

`python train.py --dataset kvasir --peft dense --dim 64`; the run is written out from top to bottom below.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import datasets
import kernels
from vlsm.checkpoint import start_from
from vlsm.data.augment import augment
from vlsm.data.cache import chunks, device_batches
from vlsm.data.folders import split_rules
from vlsm.data.negatives import Negatives, add_empty_masks, unused_words
from vlsm.data.records import is_text
from vlsm.metrics import counted_pixels, dsc, iou, is_alarm
from vlsm.model import build
from vlsm.networks.weights import image_side, is_random
from vlsm.system import parallel
from vlsm.system.console import Interrupt, friendly_errors, progress, say
from vlsm.system.parallel import autocast, choose_device
from vlsm.training.arguments import RECIPE_FIELDS, method_options, parse_arguments, stored_settings
from vlsm.training.dry_run import describe_memory, rehearse
from vlsm.training.frozen_cache import FrozenCache
from vlsm.training.run import Run, check_folder, check_gradients, describe_run, held_folder

SEED_STEP = 1_000_003  # between the seeds of two epochs, and of two batches
NOTHING_FOUND = 0.005  # last validation DSC below which a run's last line says what to look at
# What an epoch's line shows, in words
LINES = """An epoch's line: loss, validation DSC in %, time so far, time left at most;
alarms: share of absent things for which the model marks something;
*: best epoch so far, by the DSC, of which alarms cost up to half (all in log.csv)."""
LOOK_EVERY = 20  # steps between two readings of the sums on the device: each waits until it is idle


def main(argv=None, after_epoch=None):
    """Train one run; after each epoch, call `after_epoch(run)`. Returns the `Run`, or None for --dry-run."""
    args = parse_arguments(argv)  # on --resume the stored values went through the same parser
    if args.negatives is None:
        args.negatives = 0 if args.dataset in datasets.DATASETS else 1  # the papers' recipes have none
    device, dtype = choose_device(parallel.join_processes(args.device), args.amp)
    if args.batch_size < parallel.world_size():
        raise ValueError(f"--batch-size {args.batch_size}: {parallel.world_size()} processes share a batch.")
    # looked at before the weights are loaded, to fail early: the run's folder and the data set
    if not args.dry_run:
        check_folder(Path(args.out), args.resume, args.overwrite)
    splits = datasets.read_splits(args.dataset, args.data_root, split_rules(vars(args)))
    torch.manual_seed(args.seed)
    with parallel.local_first():  # one process of a machine downloads the weights
        model = build(args.model, args.weights, args.peft, args.reference, **method_options(vars(args)))
    begun = args.resume and Path(args.out, "state.pt").is_file()
    if args.init and not begun:
        start_from(model, args.init)
    side = image_side(model.network.config, model.info["folder"], args.image_size)
    model.place_on(device, dtype, args.kernels, args.compile)
    model.recompute_activations(args.checkpoint_activations)
    describe_model(model)
    if args.peft == "none":
        return save_untrained(args, model, side)
    criterion = partial(
        kernels.dice_bce_loss, dice_weight=args.dice_weight, bce_weight=args.bce_weight, ce=args.ce
    )
    groups = model.parameter_groups(args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")
    scheduler = ReduceLROnPlateau(optimizer, "min", args.lr_factor, args.lr_patience)
    cache = FrozenCache(model, device, dtype, args.cache_gb, args.cache_dir)
    if args.dry_run:
        say(describe_memory(model, cache, optimizer, criterion, side, args.negatives))
        return None
    with held_folder(args.out, args.resume, args.overwrite):
        parallel.barrier()  # every rank checks the folder before rank 0 writes
        data = open_data(args, splits, side)
        settings = stored_settings(vars(args))
        metadata = describe_run(model, data, side, settings, RECIPE_FIELDS)
        run = Run(args.out, model, optimizer, scheduler, dtype, metadata, args.monitor)
        run.start(settings, args.resume, args.overwrite, args.changed_data, args.tensorboard)
        share = math.ceil(args.batch_size / (args.accumulate * parallel.world_size()))
        rehearse(model, cache, criterion, side, args.negatives, share)
        for split in ("train", "val"):
            description = cache.add_split(split, data[split], args.batch_size)
            if description:
                say(description)
            data[split].move_to(device)
        negatives = choose_negatives(args.negatives, args.prompts, data, cache.tokenizer)
        with Interrupt() as interrupt:
            train_epochs(args, run, data, cache, negatives, criterion, interrupt, after_epoch)
        run.check_results()
    say(f"{run.describe_best()} Evaluate it with:\n  python evaluate.py --ckpt {run.out}")
    if run.history[-1]["val_dsc"] < NOTHING_FOUND:
        say(
            f"At the end almost nothing is found. Try a smaller --lr than {args.lr:g}. Look at the masks:\n"
            f"  python datasets.py --check {args.dataset}\n"
            "and above at the gradients of the first step: none should be zero."
        )
    return run


def train_epochs(args, run, data, cache, negatives, criterion, interrupt, after_epoch=None):
    """Train to the last epoch, or until validation stalls; save the run after each epoch."""
    say(LINES)
    run.times.append(time.perf_counter())
    for epoch in range(run.next_epoch, args.epochs + 1):
        if epoch > args.min_epochs and run.stalled >= args.patience:
            say(f"Stopping early, as the validation {args.monitor} stalls (--patience {args.patience}).")
            break
        began = time.perf_counter()
        lr = run.optimizer.param_groups[0]["lr"]
        loss, train_dsc = train_epoch(
            run, data["train"], cache, negatives["train"], criterion, epoch, args.epochs, args.seed,
            args.batch_size, args.accumulate, args.augment, args.clip, interrupt,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        val_loss, val_dsc, val_iou, val_alarms = validate(
            run.model, data["val"], cache, negatives["val"], criterion, args.seed, args.batch_size
        )  # fmt: skip
        run.refuse_nonfinite(val_loss, f"validation loss after epoch {epoch}")
        speed = len(data["train"]) / seconds
        run.end_epoch(
            epoch=epoch, train_loss=loss, train_dsc=train_dsc, val_loss=val_loss, val_dsc=val_dsc,
            val_iou=val_iou, val_alarms=val_alarms, lr=lr, seconds=round(seconds, 2),
            images_per_second=round(speed, 3),
        )  # fmt: skip
        run.save()
        run.times.append(time.perf_counter())
        say(run.describe_epoch(args.epochs))
        interrupt.leave(f"Interrupted after epoch {epoch}; {run.describe_saved()}")
        if after_epoch:
            after_epoch(run)


def train_epoch(
    run, data, cache, negatives, criterion, epoch, epochs, seed, batch_size, accumulate, augmented, clip,
    interrupt,
):  # fmt: skip
    """Train on every record of `data` once; returns (loss, DSC), means over the records.

    Raises Diverged for a loss of nan or infinity.
    """
    model = run.model.train()
    device = cache.device
    epoch_seed = seed * SEED_STEP + epoch
    generator = torch.Generator().manual_seed(epoch_seed)
    order = torch.randperm(len(data), generator=generator).tolist()
    steps = [parallel.share_batch(batch, accumulate) for batch in chunks(order, batch_size)]
    if parallel.world_size() > 1:  # each rank draws its own dropout, whatever was drawn before
        torch.manual_seed(epoch_seed * SEED_STEP + parallel.rank())
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of loss and DSC, over this rank's records
    seen = 0
    parts = []
    for step in steps:
        for share in step:
            parts.append(share.indices)
    texts = cache.encode_ahead(negatives.prompts(parts, seed, epoch), negatives.right)
    batches = device_batches(data, parts, device, augmented or cache.needs_pixels("train"))
    with progress(len(data), f"epoch {epoch}/{epochs}") as bar:
        for k, step in enumerate(steps):  # step: this rank's shares of a batch, one for each accumulation
            run.optimizer.zero_grad(set_to_none=True)
            for share, prompts, (indices, images, masks) in zip(step, texts, batches):
                # prompts: P an image, the first right; images: uint8 [B, 3, S, S], None if cached features
                # replace them; masks: uint8 [B, 1, S, S]
                changed = None
                if augmented:
                    # seeded by the batch: every rank draws for the whole batch and takes its share
                    generator = torch.Generator().manual_seed(epoch_seed * SEED_STEP + k * batch_size)
                    images, masks, changed = augment(images, masks, generator, share.batch_size, share.part)
                masks = add_empty_masks(masks, negatives.count)  # [B * P, 1, S, S]
                inputs = cache.model_inputs("train", indices, images, prompts, changed)
                with autocast(device, cache.dtype):
                    logits = model(*inputs)  # [B * P, 1, S, S]
                loss = criterion(logits, masks)
                run.scaler.scale(loss * share.weight).backward()
                # a rank without records of this batch has computed one, with weight and count 0
                predicted, truth = counted_pixels(logits.detach()[:, 0] > 0, masks[:, 0])
                scores = dsc(predicted[negatives.right], truth[negatives.right])[: share.count]
                share_loss = loss.detach().double() * share.count
                sums += torch.stack([share_loss, scores.sum()])
                seen += share.count
            optimizer_step(run, loss, clip)
            bar.update(step[0].batch_size)
            steps_done = k + 1
            if steps_done % LOOK_EVERY == 0 or steps_done == len(steps):
                loss_sum, dsc_sum = sums.tolist()
                run.refuse_nonfinite(loss_sum, f"loss in epoch {epoch}")
                bar.set_postfix(loss=loss_sum / seen, DSC=100 * dsc_sum / seen)
            interrupt.leave(f"Interrupted in epoch {epoch}; {run.describe_saved()}")
    buffers = [model.network.get_buffer(name) for name in model.updated_buffers]
    parallel.all_reduce_mean(buffers)
    loss_sum, dsc_sum, count = parallel.all_reduce_sum([*sums.tolist(), seen], device)
    return loss_sum / count, dsc_sum / count


def optimizer_step(run, loss, clip):
    """Average the gradients over all ranks, clip them, and update the trained parameters."""
    parameters = run.model.tuned_parameters().values()
    gradients = [p.grad for p in parameters if p.grad is not None]
    parallel.all_reduce_mean(gradients)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    # checked once, as it waits for the GPU; in fp16 at the first step that does not overflow
    if not run.gradients_checked and loss.isfinite() and (norm.isfinite() or not run.scaler.is_enabled()):
        say(check_gradients(run.model))
        run.gradients_checked = True
    run.scaler.step(run.optimizer)
    run.scaler.update()


@torch.no_grad()
def validate(model, data, cache, negatives, criterion, seed, batch_size):
    """Return (loss, DSC, IoU, share of false alarms), means over the validation records at the model's size.

    The loss is of right prompts and negatives alike, as in training. Without negatives the share is None.
    """
    model.eval()
    shares = parallel.own_batches(chunks(list(range(len(data))), batch_size))
    parts = [indices for _, indices in shares]
    texts = cache.encode_ahead(negatives.prompts(parts, seed), negatives.right)
    batches = device_batches(data, parts, cache.device, cache.needs_pixels("val"))
    rows = []  # for each batch: its number, its records' summed loss, their DSC, IoU and alarms `[B, 3]`
    for (number, _), prompts, (indices, images, masks) in zip(shares, texts, batches):
        masks = add_empty_masks(masks, negatives.count)
        inputs = cache.model_inputs("val", indices, images, prompts)
        with autocast(cache.device, cache.dtype):
            logits = model(*inputs)  # [B * P, 1, S, S]
        loss_sum = criterion(logits, masks).double() * len(indices)
        predicted, truth = counted_pixels(logits[:, 0] > 0, masks[:, 0])
        alarms = is_alarm(predicted).view(len(indices), -1)[:, 1:].sum(1, dtype=torch.float64)  # [B]
        predicted, truth = predicted[negatives.right], truth[negatives.right]
        scores = torch.stack([dsc(predicted, truth), iou(predicted, truth), alarms], 1)
        rows.append((number, loss_sum, scores))
    # read from the device only now: every reading waits for it
    rows = [(number, loss_sum.cpu(), scores.cpu()) for number, loss_sum, scores in rows]
    _, loss_sums, scores = zip(*parallel.gather_sorted(rows))
    loss = sum(loss_sums) / len(data)
    dsc_mean, iou_mean, alarms = torch.cat(scores).mean(0).tolist()
    alarms = alarms / negatives.count if negatives.count else None
    return loss.item(), dsc_mean, iou_mean, alarms


def describe_model(model):
    """Print where the model runs and how many parameters are trained, and warn of random weights."""
    weights = model.info["weights"]
    if is_random(weights):
        say(f"{weights}: random weights, for tests and research; nothing is pretrained.", file=sys.stderr)
    trained, total = model.count_parameters()
    percent = 100 * trained / total
    say(model.describe_place())
    say(
        f"{model.info['model']} ({weights}), --peft {model.info['method']}:\n"
        f"  {trained:,} of {total:,} parameters are trained ({percent:.2f} %)"
    )


def open_data(args, splits, side):
    """Open the `splits` that the data set has, with images of `side` pixels; returns {split: `CachedSplit`}.

    Raises ValueError without a training or validation split.
    """
    wanted = list(splits) or ["train", "val"]  # of a data set without records the message names these
    data = datasets.open_dataset(
        args.dataset, wanted, side, args.data_root, args.cache_dir, split_rules(vars(args)), args.prompts,
        args.skip_bad, args.limit_train, splits=splits,
    )  # fmt: skip
    if not {"train", "val"} <= set(data):
        raise ValueError(
            f"'{args.dataset}' has records for {' and '.join(data)} only; training needs train and val: "
            "three images or groups at least, or train/ and val/ folders."
        )
    counts = ", ".join(f"{len(split)} {name}" for name, split in data.items())
    say(f"{args.dataset}: {counts} records at {side} x {side}")
    words = {record.class_word for record in data["train"].records}
    if len(words) > 1 and is_text(args.prompts):
        say(
            f"--prompts '{args.prompts}' is one text for {len(words)} classes,\n"
            "  which it cannot tell apart; leave it out.",
            file=sys.stderr,
        )
    return data


def choose_negatives(count, prompt_mode, data, tokenizer):
    """Return the `Negatives` of each split, {split: Negatives}, and print what they are."""
    words = []
    if count:
        records = [record for split in data.values() for record in split.records]
        words = unused_words(tokenizer.words(), records, [prompt_mode])
        if not words:
            raise ValueError("The prompts use every word of the tokenizer's vocabulary; use --negatives 0.")
        say(
            f"--negatives {count}: with each right prompt, {count} of what is not in the image:\n"
            f"  absent classes, if any, and {len(words):,} words that no prompt uses"
        )
    return {name: Negatives(split.records, prompt_mode, words, count) for name, split in data.items()}


def save_untrained(args, model, side):
    """Write the checkpoint of --peft none; returns its `Run`, or None for --dry-run."""
    if args.dry_run:
        return None
    settings = stored_settings(vars(args))
    metadata = describe_run(model, {}, side, settings, RECIPE_FIELDS)
    run = Run(args.out, model, None, None, None, metadata)
    with held_folder(args.out, args.resume, args.overwrite):
        parallel.barrier()
        run.start(settings, args.resume, args.overwrite)
        run.save_checkpoint("best")
    say(f"Nothing to train. Wrote a checkpoint; evaluate it with:\n  python evaluate.py --ckpt {args.out}")
    return run


if __name__ == "__main__":
    with friendly_errors():
        main()
        parallel.shut_down()
