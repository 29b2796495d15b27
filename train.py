"""Fine-tune a vision-language segmentation model: `python train.py --dataset kvasir --peft dense --dim 64`.

The loop is written out below, in `train_epoch` and `main`: data -> model -> loss -> step -> validate -> checkpoint.
"""

import argparse
import copy
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import datasets
from vlsm import build, methods, parallel, pictures, runtime, sweep
from vlsm.augment import augment
from vlsm.cache import parts_of
from vlsm.checkpoint import load_state, replacing, save_state, save_tuned, write_csv
from vlsm.console import Interrupt, progress, speaking
from vlsm.folder import adopt, check_folder, default_method, default_out, make_folder
from vlsm.job import Job
from vlsm.learners import Learner
from vlsm.methods import METHODS
from vlsm.metrics import dsc, iou
from vlsm.model import NETWORKS, network
from vlsm.weights import is_random, read_json

# The papers' recipes; of several methods (dense+vpt) the first one's holds. --dataset demo, which is small, ends after DEMO_EPOCHS.
DEFAULTS = dict(
    epochs=200, min_epochs=10, patience=20, monitor="dsc", prompts="random", augment=False, weight_decay=1e-3, lr_factor=0.3, clip=0.5,
    dice_weight=1.5, bce_weight=1.0,
)  # fmt: skip
LEARNER_DEFAULTS = dict(
    epochs=20, min_epochs=10, patience=12, monitor="loss", prompts="class", augment=True, weight_decay=0.0, lr_factor=0.2, clip=0.0,
    dice_weight=1.0, bce_weight=0.2,
)  # fmt: skip
LEARNING_RATES = {"dense": 1e-3, "shallow": 3e-4, "decoder": 1e-3, "full": 1e-4, "none": 0.0, "lora": 1e-3}
MODEL_RATES = {"cris": 1e-4, "san": 3e-4}  # of full and decoder
LEARNER_RATE, LEARNER_START = 2e-4, "a photo of a"
DEMO_EPOCHS = 40
RECIPE = (
    "epochs", "min_epochs", "patience", "monitor", "batch_size", "lr", "weight_decay", "lr_factor", "lr_patience", "clip",
    "dice_weight", "bce_weight", "ce", "augment", "amp", "seed",
)  # fmt: skip
COLUMNS = ("epoch", "train_loss", "train_dsc", "val_loss", "val_dsc", "val_iou", "lr", "seconds", "images_per_second")


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Fine-tune a vision-language segmentation model, by few parameters.", allow_abbrev=False)
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="demo", help="demo (default), " + ", ".join(datasets.DATASETS) + ", or a folder of your own")
    g.add_argument("--data-root", default="data", help="folder that holds the data sets' folders (default: data)")
    g.add_argument(
        "--prompts",
        help='random (default: a key from p1.. each time), class (default of prompt learners), a key such as p6, or a text: "a polyp"',
    )
    g.add_argument("--image-size", type=int, help="side in pixels (default: the base's own: 352 for CLIPSeg, 416 CRIS, 640 SAN)")
    augmentation = "scale, shift, rotate, brighten a little (default: with prompt learners only, as published)"
    g.add_argument("--augment", action=argparse.BooleanOptionalAction, help=augmentation)
    share = "train on this share of the training records, always the same ones (default 1)"
    g.add_argument("--limit-train", type=float, default=1.0, metavar="FRACTION", help=share)
    g.add_argument("--skip-bad", action="store_true", help="train without the records that cannot be used, instead of stopping")
    g.add_argument("--split-seed", type=int, default=0, help="of the 80/10/10 split of your own folder (default 0)")
    g.add_argument("--cache-dir", default=datasets.default_cache(), help="folder of the decoded pictures (default: %(default)s)")
    sharded = "of several processes (torchrun) each decodes and keeps a share of the pictures, and passes on what a batch needs"
    g.add_argument("--shard-cache", action="store_true", help=sharded)
    g = parser.add_argument_group("model and method")
    g.add_argument("--model", default="clipseg", choices=NETWORKS, help="clipseg (default), cris or san")
    default = f"mini for the demo, else {NETWORKS['clipseg'].default_weights}; san: {NETWORKS['san'].default_weights}"
    g.add_argument(
        "--weights",
        help=f"hub id, local folder, or mini, the embedded CLIPSeg (default: {default}); random:CONFIG.json: none, for tests and research",
    )
    others = ", ".join(m for m in METHODS if m != "dense")
    g.add_argument("--peft", help=f"dense (default on clipseg), {others}; or several: dense+vpt. cris, san: full (default), decoder, none")
    published = "do as the published code does, where it departs from its paper (but for prompt learners, implies --ce reference)"
    g.add_argument("--reference", action="store_true", help=published)
    methods.add_arguments(parser)
    g = parser.add_argument_group("recipe (defaults: the paper's; in brackets those of prompt learners, where they differ)")
    g.add_argument("--epochs", type=int, help=f"at most so many (default 200 [20]; demo {DEMO_EPOCHS})")
    g.add_argument("--min-epochs", type=int, help="at least so many (default 10)")
    g.add_argument("--patience", type=int, help="stop after so many epochs without 1e-4 of progress (default 20 [12])")
    g.add_argument("--monitor", choices=["dsc", "loss"], help="what of the validation split is to progress (default dsc [loss])")
    g.add_argument("--batch-size", type=int, default=32, help="images a step (default 32)")
    rates = ", ".join(f"{m} {r:g}" for m, r in LEARNING_RATES.items() if r)
    g.add_argument("--lr", type=float, help=f"learning rate of AdamW (default: {rates} [{LEARNER_RATE:g}])")
    g.add_argument("--weight-decay", type=float, help="of AdamW (default 1e-3 [0])")
    g.add_argument("--lr-factor", type=float, help="factor on the learning rate when validation loss stalls (default 0.3 [0.2])")
    g.add_argument("--lr-patience", type=int, default=5, help="epochs that it may stall (default 5)")
    g.add_argument("--clip", type=float, help="largest gradient norm; 0: any (default 0.5 [0])")
    g.add_argument("--dice-weight", type=float, help="of the Dice loss (default 1.5 [1.0])")
    g.add_argument("--bce-weight", type=float, help="of the cross entropy (default 1.0 [0.2])")
    g.add_argument(
        "--ce", choices=["logits", "reference"], help="cross entropy on logits (default), or on a second sigmoid as in the published code"
    )
    g.add_argument("--seed", type=int, default=42, help="of everything random (default 42)")
    g.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="a run for each of these seeds, in one folder")
    g = parser.add_argument_group("search")
    trials = "search hyper-parameters in so many runs (needs: pip install optuna); what is given as an option is not searched"
    g.add_argument("--sweep", type=int, metavar="TRIALS", help=trials)
    space = 'what to search: {"lr": {"low": 1e-5, "high": 5e-3, "log": true}, "prompt_depth": {"low": 1, "high": 9}, "dim": [16, 64]}'
    g.add_argument("--sweep-space", metavar="FILE.json", help=f"{space} (default: the paper's Table 2)")
    g = parser.add_argument_group("run")
    g.add_argument("--out", help="folder of the run (default: runs/<dataset>-<method>-...)")
    g.add_argument("--resume", action="store_true", help="go on where the run in that folder was stopped, with its options")
    g.add_argument("--overwrite", action="store_true", help="delete the run that is in that folder")
    g.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard (needs: pip install tensorboard)")
    g.add_argument("--dry-run", action="store_true", help="print the numbers of parameters and stop")
    runtime.add_arguments(g)
    g.add_argument(
        "--cache-gb",
        type=float,
        help="GB for what a frozen image encoder returns, computed once: GPU, then RAM, then disk (default: half of what is free there; "
        "0: computed at each step)",
    )
    g.add_argument(
        "--data-device", default="auto", choices=["auto", "cpu", "cuda"], help="where the pictures lie (auto: on the GPU if there is room)"
    )
    args = parser.parse_args(argv)
    args.sweep_folder = None  # of the sweep that a run belongs to
    args.given = {a.dest for a in parser._actions if any(s in _flags(argv) for s in a.option_strings)}
    return args


def _flags(argv):
    return {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}


def complete(args):
    """Fill in what depends on other options, or on the run that is resumed. Raises ValueError for what cannot be."""
    args.peft = args.peft or default_method(args)
    names = methods.parts_of(args.peft)
    for name in ("epochs", "batch_size", "image_size", "patience", "sweep"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more.")
    if not 0 < args.limit_train <= 1:
        raise ValueError(f"--limit-train {args.limit_train}: give more than 0 and at most 1.")
    if args.cache_gb is not None and not args.cache_gb >= 0:
        raise ValueError(f"--cache-gb {args.cache_gb}: give 0 (nothing is kept) or more.")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; give one of them.")
    args.out = args.out or default_out(args, f"seed{args.seed}")
    if args.resume:
        adopt(args)
    if args.shard_cache and args.data_device == "cuda":
        raise ValueError("--shard-cache passes pictures between processes, which --data-device cuda cannot hold; leave one of them out.")
    demo = args.dataset == "demo" and args.model == "clipseg"
    args.weights = args.weights or ("mini" if demo else network(args.model).default_weights)
    learner = issubclass(METHODS[names[0]], Learner)
    if args.context_init is None and args.context is None and {"coop", "cocoop"} & set(names):
        args.context_init = [LEARNER_START]
    rate = LEARNING_RATES.get(names[0], LEARNER_RATE)
    if args.model in MODEL_RATES and names[0] in ("decoder", "full"):
        rate = MODEL_RATES[args.model]
    for name, value in dict(LEARNER_DEFAULTS if learner else DEFAULTS, lr=rate).items():
        if getattr(args, name) is None:
            setattr(args, name, DEMO_EPOCHS if name == "epochs" and args.dataset == "demo" else value)
    args.ce = args.ce or ("reference" if args.reference and not learner else "logits")  # TuneVLSeg's own loss is right
    return args


def model_size(model, asked):
    """Side of the pictures: as asked for, else the network's own, else that of the weights' own processor, else the paper's 352."""
    config, file = model.base.config, model.info["folder"] / "preprocessor_config.json"
    asked = asked or getattr(config, "img_size", None)
    if asked is None:
        size = read_json(file).get("size", 352) if file.is_file() else 352
        asked = size if isinstance(size, int) else size.get("height", size.get("shortest_edge", 352))
    patch = config.stride
    if asked % patch:
        raise ValueError(
            f"--image-size {asked} is no multiple of the model's patch size {patch}; try {round(asked / patch) * patch or patch}."
        )
    return asked


def train_epoch(job, epoch, interrupt):
    """One pass over the training split; (loss, DSC), means over its records. Raises ValueError if the loss is not finite."""
    args, records, seed = job.args, len(job.data["train"]), job.args.seed * 1_000_003 + epoch
    job.model.train()
    order = torch.randperm(records, generator=torch.Generator().manual_seed(seed)).tolist()
    loss_sum, dsc_sum, seen, before = 0.0, 0.0, 0, None

    def settle(step, n, numbers):
        nonlocal loss_sum, dsc_sum, seen
        loss, dice = numbers.read()
        job.refuse_nonfinite(loss, f"loss became {loss} in epoch {epoch}, step {step}")
        loss_sum, dsc_sum, seen = loss_sum + loss * n, dsc_sum + dice, seen + n
        bar.set_postfix(loss=f"{loss_sum / max(seen, 1):.3f}", DSC=f"{100 * dsc_sum / max(seen, 1):.1f}", refresh=False)
        bar.update(len(parts[step - 1]))

    changed, parts = None, parts_of(order, args.batch_size)
    if parallel.world() > 1:  # dropout's draws: each process its own, whatever was drawn before
        torch.manual_seed(seed * 1_000_003 + parallel.rank())
    shares = [parallel.share(part) for part in parts]
    mine = [rows or part[:1] for (rows, _), part in zip(shares, parts)]  # one without rows takes part with weight 0
    with progress(records, f"epoch {epoch}/{args.epochs}") as bar:
        for step, (indices, pixels, masks) in enumerate(job.batches("train", mine), 1):
            (rows, weight), size = shares[step - 1], len(parts[step - 1])
            if args.augment:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + (step - 1) * args.batch_size)
                part = slice(parallel.rank(), None, parallel.world()) if rows else slice(0, 1)
                pixels, masks, changed = augment(pixels, masks, generator, size, part)
            logits, loss = job.forward("train", indices, pixels, masks, args.seed, epoch, changed=changed)
            job.optimizer.zero_grad(set_to_none=True)
            job.scaler.scale(loss if weight == 1 else loss * weight).backward()
            parallel.average(p.grad for p in job.tuned.values() if p.grad is not None)
            job.scaler.unscale_(job.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(job.tuned.values(), args.clip or math.inf)
            if not job.checked and loss.isfinite() and (job.dtype != torch.float16 or norm.isfinite()):  # fp16 seeks its scale first
                said = job.model.check_gradients()
                if not parallel.rank():
                    tqdm.write(said)
                job.checked = True
            job.scaler.step(job.optimizer)
            job.scaler.update()
            scores = dsc(logits.detach()[:, 0] > 0, masks[:, 0] > 0).sum() * bool(rows)
            numbers = runtime.Later(torch.stack([loss.detach().double(), scores]))
            if before:  # the step before: waiting for this one's numbers would leave a GPU without work
                settle(*before)
            before = step, len(rows), numbers
            interrupt.leave(f"Interrupted in epoch {epoch}; {job.saved()}")
        settle(*before)
    parallel.average(job.model.base.get_buffer(name) for name in job.model.moving)
    loss_sum, dsc_sum, seen = parallel.total([loss_sum, dsc_sum, seen], job.device)
    return loss_sum / seen, dsc_sum / seen


@torch.no_grad()
def validate(job):
    """(loss, DSC, IoU): means over the validation records, at the model's size. Each batch is one process's."""
    job.model.eval()
    found, count = [], len(job.data["val"])
    own = parallel.own(parts_of(list(range(count)), job.args.batch_size))
    # batches first: those of a sharded split go on, without records, while other processes want pictures
    for (indices, pixels, masks), (number, _) in zip(job.batches("val", [part for _, part in own]), own):
        logits, loss = job.forward("val", indices, pixels, masks, job.args.seed)
        predicted, truth = logits[:, 0] > 0, masks[:, 0] > 0
        scores = torch.stack([dsc(predicted, truth), iou(predicted, truth)], 1)
        found.append((number, loss.double() * len(indices), scores))
    if parallel.world() > 1:
        found = parallel.gather([(number, loss.cpu(), scores.cpu()) for number, loss, scores in found])
    loss_sum = sum(loss for _, loss, _ in found)
    return loss_sum.item() / count, *torch.cat([scores for _, _, scores in found]).mean(0).tolist()


def describe_run(args, size, model):
    """What config.json and the checkpoint's metadata say about a run."""
    recipe = {k: getattr(args, k) for k in RECIPE}
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    data = dict(dataset=args.dataset, data_root=args.data_root, split_seed=args.split_seed, prompts=args.prompts)
    return dict(**data, image_size=size, mean=model.base.mean, std=model.base.std, recipe=recipe, versions=versions)


def save_epoch(job, about, better):
    """Write every file of the run. state.pt comes last: until it is there, a resumed run repeats this epoch and writes the same."""
    if parallel.rank():
        return
    for name in ["last"] + ["best"] * better:
        save_tuned(job.out / f"{name}.safetensors", job.model, **about, best_val_dsc=job.best, epoch=len(job.history))
    write_csv(job.out / "log.csv", [COLUMNS, *([row[name] for name in COLUMNS] for row in job.history)])
    with replacing(job.out / "curves.png") as temporary:
        pictures.curves(job.history, temporary)
    save_state(job.out / "state.pt", job.state())


def open_tensorboard(out, done):
    """A writer beside the run's other files; what was logged after epoch `done`, by a run that then was killed, is left out."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard.") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=done + 1, flush_secs=20)


def train(args, after_epoch=None):
    """One run, from its options to its last epoch; the `Job`, or None where nothing was trained. `after_epoch` is called with the job."""
    device, dtype = runtime.choose(parallel.start(args.device), args.amp)
    if args.batch_size < parallel.world():
        raise ValueError(f"--batch-size {args.batch_size} is the whole batch, and there are {parallel.world()} processes to share it.")
    torch.manual_seed(args.seed)
    with parallel.first_here():
        model = build(args.model, args.weights, args.peft, args.reference, **methods.given(args))
    size = model_size(model, args.image_size)
    if is_random(args.weights):
        print(f"{args.weights}: random weights, for tests and research: nothing in them is pretrained.", file=sys.stderr)
    trained, total = model.count()
    share = f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"
    print(f"{args.model} ({args.weights}), --peft {args.peft}: {share}")
    if args.dry_run:
        return
    check_folder(args)
    parallel.barrier()
    about = describe_run(args, size, model)
    if args.peft == "none":
        if parallel.rank():
            return
        out = make_folder(args, about)
        save_tuned(out / "best.safetensors", model, **about, best_val_dsc=None)
        print(f"Nothing to train. Wrote {out / 'best.safetensors'}; evaluate it with: python evaluate.py --ckpt {out}")
        return

    tokenizer = model.tokenizer()
    splits = datasets.available_splits(args.dataset, args.data_root, args.split_seed) or ["train", "val"]
    where = args.data_root, args.cache_dir, args.split_seed
    data = datasets.open_dataset(args.dataset, splits, size, *where, args.prompts, args.skip_bad, args.limit_train, args.shard_cache)
    if not {"train", "val"} <= set(data):
        raise ValueError(
            f"'{args.dataset}' has records for {' and '.join(data)} only; training needs train and val. If it is a folder of a few "
            "files that are split by their names, another --split-seed or train/ and val/ folders help."
        )
    print(f"{args.dataset}: " + ", ".join(f"{len(d)} {s}" for s, d in data.items()) + f" records at {size} x {size}")
    about["class_words"] = sorted({r.class_word for d in data.values() for r in d.records if r.class_word})
    out = Path(args.out)
    job = Job(args, out, model, tokenizer, data, device, dtype)
    if args.resume and (out / "state.pt").is_file():
        job.resume(load_state(out / "state.pt"))
        print(f"Resuming '{out}' after epoch {len(job.history)} (best validation DSC {100 * job.best:.2f})")
    job.prepare()
    if not parallel.rank():
        make_folder(args, about)  # after the state was accepted: a wrong --weights must not enter config.json

    writer = open_tensorboard(out, len(job.history)) if args.tensorboard and not parallel.rank() else None
    with Interrupt() as interrupt:
        for epoch in range(len(job.history) + 1, args.epochs + 1):
            if epoch > args.min_epochs and job.stalled >= args.patience:
                print(f"Stopping early: {job.stalled} epochs without a better validation DSC.")
                break
            began, lr = time.perf_counter(), job.optimizer.param_groups[0]["lr"]
            loss, train_dsc = train_epoch(job, epoch, interrupt)
            seconds = time.perf_counter() - began
            speed = len(data["train"]) / seconds
            val_loss, val_dsc, val_iou = validate(job)
            job.refuse_nonfinite(val_loss, f"validation loss became {val_loss} after epoch {epoch}")
            row = (epoch, loss, train_dsc, val_loss, val_dsc, val_iou, lr, round(seconds, 2), round(speed, 1))
            better = job.note(dict(zip(COLUMNS, row)))
            for name, value in zip(COLUMNS[1:], row[1:]) if writer else ():
                writer.add_scalar(name, value, epoch)
            save_epoch(job, about, better)
            print(
                f"epoch {epoch:3d}/{args.epochs}  loss {loss:.4f}  DSC {100 * train_dsc:.2f}  val loss {val_loss:.4f}  "
                f"val DSC {100 * val_dsc:.2f}  IoU {100 * val_iou:.2f}  lr {lr:.1e}  {speed:.3g} img/s{'  *' if better else ''}",
                flush=True,
            )
            interrupt.leave(f"Interrupted after epoch {epoch}; {job.saved()}")
            if after_epoch:
                after_epoch(job)
    print(f"Best validation DSC {100 * job.best:.2f}. Evaluate it with: python evaluate.py --ckpt {out}")
    return job


def each_seed(args):
    """--seeds: the same run from several seeds, side by side in one folder. With --resume, those that are there go on."""
    if args.sweep or "seed" in args.given:
        raise ValueError(f"--seeds and {'--sweep' if args.sweep else '--seed'} exclude each other; leave one of them out.")
    group = Path(args.out or default_out(args, "seeds"))
    for seed in dict.fromkeys(args.seeds):
        one, out = copy.copy(args), group / f"seed{seed}"
        one.seed, one.out, one.given = seed, str(out), args.given | {"seed"}
        one.resume = args.resume and (out / "config.json").is_file()
        print(f"--seeds: {out}")
        train(complete(one))
    print(f"All seeds are done. Evaluate them with: python evaluate.py --ckpt {group}")


def main(argv=None):
    args = parse(argv)
    if args.seeds:
        return each_seed(args)
    args = complete(args)
    if args.sweep:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--sweep runs one trial after another in one process; start it without torchrun.")
        check_folder(args)
        sweep.run(args, train)
    else:
        train(args)


if __name__ == "__main__":
    with speaking():
        main()
