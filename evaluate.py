"""Evaluate a run: `python evaluate.py --ckpt runs/NAME`. Score two folders of masks: `--pred DIR --target
DIR`. Predict without a ground truth: `--ckpt ... --images DIR --prompt "polyp" --save-masks DIR`.

DSC, IoU and HD95 are computed at each mask's original size; vlsm/metrics.py defines them.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import datasets
from vlsm.checkpoint import load, read_metadata, save_merged
from vlsm.data.cache import chunks, prefetch
from vlsm.data.images import read_image, read_mask
from vlsm.data.prompts import choose_prompt
from vlsm.results import figures, report
from vlsm.results.options import parse_options
from vlsm.results.predict import Predictor, mask_at_size, mask_target, predict_folder, save_png
from vlsm.results.scores import METRICS, describe, score, score_folders, signed_rank, summarise, write_results
from vlsm.system import parallel
from vlsm.system.console import friendly_errors, progress, say
from vlsm.system.files import check_targets, owned_write, write_json, write_text

RESULT_FILES = ("metrics.csv", "metrics.json", "figure.png")


def evaluate(predictor, data, prompts, seed, options, masks_dir=None):
    """Return the scores of a split's records (dictionaries, with the prompt), and the packed masks for
    --figure.

    masks_dir: folder to write the predicted masks to. Several processes share the records and return all.
    """
    scores, kept, records = [], [], data.records
    own = [batch for _, batch in parallel.own_batches(chunks(range(len(data)), options.batch_size))]
    with ThreadPoolExecutor(4) as pool, progress(len(data), "evaluating") as bar:

        def read(batch):  # original masks, while the network works on the batch before
            return list(pool.map(lambda i: torch.from_numpy(read_mask(records[i].mask)), batch))

        for batch, masks in prefetch(read, data.equalise_batches(own)):
            images = data.batch(list(batch))[0]
            if not batch:  # of a sharded split: other processes want images
                continue
            texts = [choose_prompt(records[i], prompts, seed, i) for i in batch]
            logits = predictor.logits(images, texts)
            truths = [mask.to(predictor.device) for mask in masks]
            predicted = [mask_at_size(z, t.shape, options.upsample) for z, t in zip(logits, truths)]
            for i, text, row, mask in zip(batch, texts, score(list(zip(predicted, truths))), predicted):
                scores.append(dict(image=records[i].name, mask=records[i].mask_name, prompt=text, **row))
                kept.append(np.packbits(mask.cpu().numpy()) if options.figure else None)
                if masks_dir:
                    save_png(mask, mask_target(masks_dir, records[i].mask_name))
            bar.update(len(batch))
    if parallel.world_size() > 1:
        found = parallel.gather_sorted(list(zip([i for batch in own for i in batch], scores, kept)))
        scores, kept = [row for _, row, _ in found], [mask for *_, mask in found]
    return scores, kept


def open_split(options, predictor, dataset, prompts):
    """Return the split that is evaluated, as the run was trained on it unless options say otherwise."""
    about, split = predictor.about, options.split
    root = options.data_root or about["data_root"]
    data = datasets.open_dataset(
        dataset, [split], predictor.size, root, options.cache_dir, about["split_seed"], prompts,
        shard=options.shard_cache,
    )  # fmt: skip
    return data[split]


def evaluate_run(checkpoint, options):
    """Evaluate one run: write and print the results; its summary, or with --all-prompts that of each key."""
    predictor = Predictor(checkpoint, options, options.weights)
    about = predictor.about
    dataset, prompts = options.dataset or about["dataset"], options.prompts or about["prompts"]
    seed = about["recipe"]["seed"] if options.seed is None else options.seed
    run = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    out = Path(options.out) if options.out else run / f"eval-{options.split}"
    data = open_split(options, predictor, dataset, prompts)
    check_outputs(options, data.records, out)
    trained, total = predictor.model.count_parameters()
    what = dict(
        ckpt=str(checkpoint), dataset=dataset, split=options.split, upsample=options.upsample, seed=seed,
        weights=about["weights"], method=about["method"], trained=trained, total=total,
    )  # fmt: skip
    if options.all_prompts:
        return evaluate_all_prompts(predictor, data, seed, options, out, what)
    scores, kept = evaluate(predictor, data, prompts, seed, options, options.save_masks)
    summary = summarise(scores)
    if parallel.rank():
        return summary
    write_results(out, scores, summary, dict(prompts=prompts, **what))
    if options.figure:
        draw_cases(data.records, scores, [kept], options.figure, out / "figure.png")
    say(f"{dataset} {options.split}, {len(scores)} records, prompts: {prompts}\n{describe(summary)}")
    say(f"Wrote {out / 'metrics.csv'} and metrics.json" + (", figure.png" if options.figure else ""))
    return summary


def check_outputs(options, records, out):
    """Refuse to write over a user's files, before anything is computed. Raises as `check_targets`."""
    inputs = [file for r in records for file in (r.image, r.mask)]
    folders = [out]
    if options.all_prompts:
        folders = [out / key for key in dict.fromkeys(k for r in records for k in r.prompts)]
    targets = [folder / name for folder in folders for name in RESULT_FILES] if options.out else []
    if options.save_masks:
        targets += [mask_target(options.save_masks, r.mask_name) for r in records]
    check_targets(targets, inputs, options.overwrite)


def evaluate_all_prompts(predictor, data, seed, options, out, what):
    """Evaluate under each key of the prompts: a row of a table, and metrics in a folder of its own."""
    keys = list(dict.fromkeys(k for r in data.records for k in r.prompts))
    if not keys:
        raise ValueError(f"--all-prompts: the records of '{what['dataset']}' came without prompts.")
    summaries = {}
    for key in keys:
        scores, _ = evaluate(predictor, data, key, seed, options)
        summaries[key] = summarise(scores)
        if not parallel.rank():
            write_results(out / key, scores, summaries[key], dict(prompts=key, **what))
    say(f"{'prompt':8}{'DSC %':>8}{'IoU %':>8}{'HD95 px':>9}   an example")
    for key, s in summaries.items():
        hd95 = "n/a" if s["hd95"]["mean"] is None else f"{s['hd95']['mean']:.2f}"
        example = choose_prompt(data.records[0], key, seed, 0)[:70]
        say(f"{key:8}{100 * s['dsc']['mean']:8.2f}{100 * s['iou']['mean']:8.2f}{hd95:>9}   {example}")
    if not parallel.rank():
        write_json(out / "prompts.json", dict(prompts=summaries, **what))
    return summaries


def evaluate_runs(runs, options):
    """Evaluate the runs of a folder one after another, and print the means over them."""
    if options.out or options.save_masks:
        raise ValueError(
            f"'{options.ckpt[0]}' holds {len(runs)} runs, which --out and --save-masks would mix; evaluate "
            "them one by one."
        )
    found = [evaluate_run(run, options) for run in runs]
    groups = {"": found}
    if options.all_prompts:
        groups = {f"{key} ": [summaries[key] for summaries in found] for key in found[0]}
    for key, summaries in groups.items():
        for name, (title, factor, _) in METRICS.items():
            means = [factor * s[name]["mean"] for s in summaries if s[name]["mean"] is not None]
            if means:
                spread = np.std(means, ddof=1) if len(means) > 1 else 0
                say(f"{key}{title:8} {np.mean(means):7.2f} +- {spread:.2f} over {len(means)} runs")


def draw_cases(records, scores, masks, rows, path, names=("prediction",)):
    """Write a sheet of the best, median and worst cases by DSC, in equal parts.

    masks: for each of `names` the packed masks of all records.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i]["dsc"])
    rows = min(rows, len(order))
    best, worst, median = (rows // 3 + (k < rows % 3) for k in range(3))
    middle = max(best, (len(order) - median) // 2)
    chosen = [(i, "best") for i in order[:best]] + [(i, "median") for i in order[middle : middle + median]]
    chosen += [(i, "worst") for i in order[len(order) - worst :]]
    page = []
    for i, kind in chosen:
        image, truth = read_image(records[i].image), read_mask(records[i].mask)
        predicted = [np.unpackbits(m[i], count=truth.size).reshape(truth.shape).astype(bool) for m in masks]
        caption = f"{kind}: DSC {100 * scores[i]['dsc']:.1f}   {scores[i]['image']}"
        page.append((image, truth, predicted, scores[i]["prompt"], caption))
    with owned_write(path) as temporary:
        figures.sheet(page, temporary, names)


def compare(options):
    """Evaluate several checkpoints on the same records: Wilcoxon's test of each pair's DSC, and a sheet.

    Each has its own run's prompts unless --prompts says otherwise. The sheet shows the first one's best,
    median and worst cases.
    """
    if len(options.compare) < 2:
        raise ValueError("--compare wants two checkpoints or more.")
    out = Path(options.out or "compare.png")
    check_targets([out], overwrite=options.overwrite)
    options = replace(options, figure=options.figure or 6)
    names = [run_name(path) for path in options.compare]
    if len(set(names)) < len(names):  # runs of --seeds
        names = [f"{Path(path).absolute().parent.name}/{n}" for path, n in zip(options.compare, names)]
    first = read_metadata(options.compare[0])
    dataset = options.dataset or first["dataset"]
    seed = first["recipe"]["seed"] if options.seed is None else options.seed
    found = []
    for name, path in zip(names, options.compare):
        predictor = Predictor(path, options, options.weights)
        prompts = options.prompts or predictor.about["prompts"]
        data = open_split(options, predictor, dataset, prompts)
        found.append(evaluate(predictor, data, prompts, seed, options))
        d = np.array([s["dsc"] for s in found[-1][0]])
        mean = f"DSC {100 * d.mean():.2f} +- {100 * d.std(ddof=1):.2f} %"
        say(f"{name:30} {mean} over {len(d)} records, prompts: {prompts}")
    for i, j in combinations(range(len(found)), 2):
        a, b = ([s["dsc"] for s in found[k][0]] for k in (i, j))
        p, n = signed_rank(a, b)
        difference = f"{100 * (np.mean(a) - np.mean(b)):+.2f} points"
        say(f"{names[i]} - {names[j]}: {difference}, p = {p:.2g} (signed ranks of {n} pairs that differ)")
    if not parallel.rank():
        draw_cases(data.records, found[0][0], [kept for _, kept in found], options.figure, out, names)
        say(f"Wrote {out}")


def run_name(path):
    """Return what a checkpoint is called."""
    return Path(path).name if Path(path).is_dir() else Path(path).stem


def choose_checkpoint(options):
    """Return the one of several checkpoints that --route names, or whose class word the prompt holds.

    Raises ValueError unless it is one.
    """
    if not options.images:
        raise ValueError(
            "Several checkpoints are for --images, where one of them is chosen; evaluate them one by one."
        )
    words, prompt = {}, (options.prompt or "").casefold()
    for path in options.ckpt:
        about = read_metadata(path)
        source = datasets.DATASETS.get(about["dataset"])
        words[path] = about.get("class_words") or ([source.word] if source and source.word else [])
    names = {path: run_name(path) for path in options.ckpt}
    if options.route:
        fitting = [path for path in options.ckpt if names[path] == options.route]
        problem = f"There is no checkpoint '{options.route}' in --ckpt"
    else:
        fitting = [path for path in options.ckpt if any(word.casefold() in prompt for word in words[path])]
        which = "of several" if fitting else "of no"
        problem = f"The prompt '{options.prompt}' holds the class word {which} checkpoint"
    if len(fitting) != 1:
        known = ", ".join(
            f"{names[path]} ({', '.join(words[path]) or 'no class word'})" for path in options.ckpt
        )
        raise ValueError(f"{problem}. Known are {known}; choose one with --route NAME.")
    say(f"Using '{fitting[0]}'.")
    return fitting[0]


def predict(checkpoint, options):
    """Write the masks of images without a ground truth."""
    if not options.prompt or not options.save_masks:
        raise ValueError('--images needs --prompt "what to segment" and --save-masks DIR.')
    predictor = Predictor(checkpoint, options, options.weights)
    count, broken = predict_folder(predictor, options.images, options.prompt, options.save_masks, options)
    say(f"Wrote {count} masks to '{options.save_masks}'.")
    if broken:
        say(*broken, sep="\n", file=sys.stderr)
        parallel.shut_down()
        sys.exit(1)


def merge(checkpoint, options):
    """Write a plain folder of weights with what was learnt merged in."""
    model = load(checkpoint, options.weights)
    save_merged(options.merge, model)
    also = "transformers loads it, and so does" if model.info["model"] == "clipseg" else "load it with"
    say(f"Wrote '{options.merge}'; {also} --weights {options.merge}.")


def export(checkpoint, options):
    """Write one prompt's network as a file for other programs, compared with PyTorch before it is kept."""
    from vlsm.extras.onnx import to_onnx

    check_targets([options.export], overwrite=options.overwrite)
    if not options.prompt:
        raise ValueError('--export builds one prompt into the file; name it: --prompt "polyp".')
    model = load(checkpoint, options.weights)
    names = ("model", "weights", "method", "dataset", "image_size")
    about, size = {name: model.about[name] for name in names}, model.about["image_size"]
    gap = to_onnx(model, options.prompt, size, options.export, dict(prompt=options.prompt, **about))
    difference = f"ONNX Runtime's logits differ from PyTorch's by at most {gap:.1g}"
    say(f"Wrote '{options.export}' for \"{options.prompt}\"; {difference}.")
    shapes = f"pixels float32 [batch, 3, {size}, {size}] (RGB, 0 to 255) -> logits [batch, 1, {size}, {size}]"
    say(f"{shapes}, foreground where above 0")


def write_report(options):
    """Write the table of all evaluated runs, on the screen and in a file, and two charts beside it."""
    runs, out = report.collect(options.report, options.split), Path(options.out or options.report)
    file = out / f"report.{options.format}"
    check_targets([file, *(out / name for name in report.CHARTS)], overwrite=options.overwrite)
    papers = report.published(options.published) if options.published else None
    text = report.table(runs, options.format, options.layout, papers)
    write_text(file, text)
    files = ", ".join(map(str, [file, *report.draw(runs, out)]))
    say(f"{text}\n{len(runs)} evaluations. Wrote {files}")


def score_masks(options):
    """Score two folders of masks."""
    if not (options.pred and options.target):
        raise ValueError(
            "--pred and --target go together: the folder of predicted masks and that of true ones."
        )
    if options.out:
        check_targets([Path(options.out) / name for name in RESULT_FILES], overwrite=options.overwrite)
    scores = score_folders(options.pred, options.target)
    summary = summarise(scores)
    if options.out:
        write_results(Path(options.out), scores, summary, dict(pred=options.pred, target=options.target))
    say(describe(summary))


def main(argv=None):
    options = parse_options(argv)
    if options.pred or options.target:
        return score_masks(options)
    if options.report:
        return write_report(options)
    if options.compare:
        compare(options)
        return parallel.shut_down()
    if not options.ckpt:
        raise ValueError(
            "Name what to evaluate: --ckpt RUN_DIR_OR_FILE, or two folders of masks with --pred and --target."
        )
    checkpoint = options.ckpt[0] if len(options.ckpt) == 1 else choose_checkpoint(options)
    for asked, action in ((options.merge, merge), (options.export, export), (options.images, predict)):
        if asked:
            action(checkpoint, options)
            return parallel.shut_down()
    runs = sorted(p.parent for p in Path(checkpoint).glob("*/best.safetensors"))
    if runs and not (Path(checkpoint) / "best.safetensors").is_file():
        evaluate_runs(runs, options)
    else:
        evaluate_run(checkpoint, options)
    return parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
