"""Evaluate a run: `python evaluate.py --ckpt runs/NAME`. Score two folders of masks: `--pred DIR --target
DIR`. Predict without a ground truth: `--ckpt ... --images DIR --prompt "polyp" --save-masks DIR`.

DSC, IoU and HD95 are computed at each mask's original size; vlsm/metrics.py defines them.
"""

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

import datasets
from vlsm.checkpoint import load, read_metadata, save_merged
from vlsm.data.images import read_image
from vlsm.data.prompts import choose_prompt
from vlsm.results import audit, blocks, report, risk, transfer
from vlsm.results.evaluation import evaluate
from vlsm.results.figures import draw_cases
from vlsm.results.gallery import page_files, write_gallery
from vlsm.results.intervals import DRAWS, in_brackets
from vlsm.results.options import parse_options
from vlsm.results.predict import Ensemble, Predictor, mask_target, predict_folder
from vlsm.results.scores import METRICS, describe, difference, score_folders, summarise, write_results
from vlsm.system import parallel
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import check_targets, write_json, write_text

EXAMPLES = 24  # pictures of --serve


def prompt_seed(options, about):
    """Return the seed of random prompts: --seed, or that of the run with the metadata `about`."""
    return about["recipe"]["seed"] if options.seed is None else options.seed


def open_split(options, predictor, dataset, prompts, split=None):
    """Return a split's `CachedSplit` and a prompt for each record, as the run was trained unless options say
    otherwise.
    """
    about, split = predictor.about, split or options.split
    root = options.data_root or about["data_root"]
    data = datasets.open_dataset(
        dataset, [split], predictor.size, root, options.cache_dir, about["split_seed"], prompts,
    )[split]  # fmt: skip
    seed = prompt_seed(options, about)
    return data, [choose_prompt(record, prompts, seed, i) for i, record in enumerate(data.records)]


def group_pattern(options, dataset):
    """Return the pattern of what intervals draw as one, and that in words."""
    source = datasets.DATASETS.get(dataset)
    pattern = options.group or (source.group if source else None)
    return pattern, f"what '{pattern}' finds in an image's name" if pattern else "image"


def output_folder(checkpoint, options, about, dataset):
    """Return where an evaluation is written: --out, or eval-SPLIT in the run's folder, which says what is not
    plain: another data set, --mirror, --ensemble.
    """
    if options.out:
        return Path(options.out)
    run = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    elsewhere = [] if dataset == about["dataset"] else [Path(dataset).name]
    how = [name for name in ("mirror", "ensemble") if getattr(options, name)]
    return run / "-".join(["eval", options.split, *elsewhere, *how])


def evaluate_run(checkpoint, options, members=()):
    """Evaluate one run, or several `members` as one: write and print the results.

    Returns its summary, or with --all-prompts that of each key.
    """
    predictor = (Ensemble(members, options, options.weights) if members
                 else Predictor(checkpoint, options, options.weights))  # fmt: skip
    about = predictor.about
    dataset, prompts = options.dataset or about["dataset"], options.prompts or about["prompts"]
    out = output_folder(checkpoint, options, about, dataset)
    data, texts = open_split(options, predictor, dataset, prompts)
    check_outputs(options, data.records, out)
    trained, total = predictor.count_parameters()
    seed = prompt_seed(options, about)
    what = dict(
        ckpt=str(checkpoint), dataset=dataset, split=options.split, upsample=options.upsample, seed=seed,
        weights=about["weights"], method=about["method"], trained=trained, total=total, mirror=options.mirror,
        ensemble=[str(member) for member in members], nsd_tolerance=options.nsd_tolerance,
    )  # fmt: skip
    if options.all_prompts:
        return evaluate_all_prompts(predictor, data, seed, options, out, what)
    pattern, words = group_pattern(options, dataset)
    keep = bool(options.figure or options.gallery)
    scores, kept = evaluate(predictor, data, texts, options, pattern, keep, write=True)
    summary = dict(summarise(scores, words), nsd_tolerance=options.nsd_tolerance)
    if not parallel.rank():
        write_results(out, scores, summary, dict(prompts=prompts, **what))
        say(f"{dataset} {options.split}, {len(scores)} records, prompts: {prompts}\n{describe(summary)}")
        drawn = draw_cases(data.records, scores, [kept], options, out) if options.figure else []
        drawn += draw_gallery(data.records, {run_name(checkpoint): (scores, kept)}, options, out, dataset)
        say(f"Wrote {', '.join(map(str, [out / 'metrics.csv', 'metrics.json', *drawn]))}")
    if options.audit_prompts:
        found = audit.audit(predictor, data, texts, options, seed, pattern)
        if not parallel.rank():
            audit.write(found, out, options.figure_format)
    if options.audit_blocks:
        found = blocks.audit_blocks(predictor, data, texts, options, pattern)
        if not parallel.rank():
            write_json(out / "blocks.json", found)
            say(blocks.describe_blocks(found))
    if options.risk:
        held_back = open_split(options, predictor, dataset, prompts, "val")
        found = risk.control(predictor, held_back, (data, texts), options, options.risk[1], pattern)
        if not parallel.rank():
            write_json(out / "risk.json", found)
            say(risk.describe(found))
    return summary


def check_outputs(options, records, out):
    """Refuse to write over a user's files, before anything is computed. Raises as `check_targets`."""
    inputs = [file for r in records for file in (r.image, r.mask)]
    folders = [out]
    if options.all_prompts:
        folders = [out / key for key in dict.fromkeys(k for r in records for k in r.prompts)]
    names = ["metrics.csv", "metrics.json", f"figure.{options.figure_format}"]
    names += audit.files(options.figure_format) if options.audit_prompts else []
    names += ["risk.json"] if options.risk else []
    names += ["blocks.json"] if options.audit_blocks else []
    targets = [folder / name for folder in folders for name in names] if options.out else []
    for folder in filter(None, (options.save_masks, options.save_probabilities)):
        targets += [mask_target(folder, r.mask_name) for r in records]
    if options.gallery and options.out:
        targets += page_files(out / "gallery", len(records))
    check_targets(targets, inputs, options.overwrite)


def evaluate_all_prompts(predictor, data, seed, options, out, what):
    """Evaluate under each key of the prompts: a row of a table, and metrics in a folder of its own."""
    keys = list(dict.fromkeys(k for r in data.records for k in r.prompts))
    if not keys:
        raise ValueError(f"--all-prompts: the records of '{what['dataset']}' came without prompts.")
    summaries, (pattern, words) = {}, group_pattern(options, what["dataset"])
    for key in keys:
        texts = [choose_prompt(record, key, seed, i) for i, record in enumerate(data.records)]
        scores, _ = evaluate(predictor, data, texts, options, pattern)
        summaries[key] = summarise(scores, words)
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


def draw_gallery(records, runs, options, out, dataset):
    """Write the page of all records where --gallery asks for it; returns what to say of it, a list."""
    if not options.gallery:
        return []
    write_gallery(out / "gallery", records, runs, f"{' and '.join(runs)} on {dataset} {options.split}")
    return [out / "gallery" / "index.html"]


def compare(options):
    """Evaluate several checkpoints on the same records: intervals and Wilcoxon's test of each pair's DSC, and
    a sheet.

    Each has its own run's prompts unless --prompts says otherwise. The sheet shows the first one's best,
    median and worst cases.
    """
    if len(options.compare) < 2:
        raise ValueError("--compare wants two checkpoints or more.")
    out = Path(options.out or f"compare.{options.figure_format}")
    options = replace(options, figure=options.figure or 6)
    names = run_names(options.compare)
    dataset, found = options.dataset or read_metadata(options.compare[0])["dataset"], []
    check_targets([out], overwrite=options.overwrite)
    pattern, words = group_pattern(options, dataset)
    for name, path in zip(names, options.compare):
        predictor = Predictor(path, options, options.weights)
        prompts = options.prompts or predictor.about["prompts"]
        data, texts = open_split(options, predictor, dataset, prompts)
        found.append(evaluate(predictor, data, texts, options, pattern, keep=True))
        d = summarise(found[-1][0])["dsc"]
        mean = f"DSC {100 * d['mean']:.2f} {in_brackets(d['ci95'])} %"
        say(f"{name:30} {mean} over {d['n']} records, prompts: {prompts}")
    for i, j in combinations(range(len(found)), 2):
        say(f"{names[i]} - {names[j]}: {difference(found[i][0], found[j][0])}")
    say(f"[...]: 95 % bootstrap intervals, groups ({words}) drawn {DRAWS:,} times")
    if not parallel.rank():
        folder = out.with_suffix("")
        if options.gallery:
            check_targets(page_files(folder / "gallery", len(data), len(found)), overwrite=options.overwrite)
        draw_cases(data.records, found[0][0], [kept for _, kept in found], options, out.parent, out, names)
        page = draw_gallery(data.records, dict(zip(names, found)), options, folder, dataset)
        say(f"Wrote {', '.join(map(str, [out, *page]))}")


def run_name(path):
    """Return what a checkpoint is called."""
    return Path(path).name if Path(path).is_dir() else Path(path).stem


def run_names(paths):
    """Return what several checkpoints are called, told apart by their folders and numbers where need be."""
    names = [run_name(path) for path in paths]
    if len(set(names)) < len(names):  # runs of --seeds
        names = [f"{Path(path).absolute().parent.name}/{name}" for path, name in zip(paths, names)]
    seen = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if n == 1 else f"{name} ({n})" for name, n in zip(names, seen)]


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
    """Write the masks of images without a ground truth; checkpoint: one, or a list of an ensemble's."""
    if not options.prompt or not options.save_masks:
        raise ValueError('--images needs --prompt "what to segment" and --save-masks DIR.')
    kind = Ensemble if isinstance(checkpoint, list) else Predictor
    predictor = kind(checkpoint, options, options.weights)
    count, broken = predict_folder(predictor, options.images, options.prompt, options.save_masks, options)
    say(f"Wrote {count} masks to '{options.save_masks}'.")
    if broken:
        say(*broken, sep="\n", file=sys.stderr)
        parallel.shut_down()
        sys.exit(1)


def runs_below(folder):
    """Return the runs in a folder of runs (of --seeds), sorted; none of what is a run itself, or a file."""
    if (Path(folder) / "best.safetensors").is_file():
        return []
    return sorted(p.parent for p in Path(folder).glob("*/best.safetensors"))


def evaluate_ensemble(options):
    """Evaluate several checkpoints, or the runs of a folder, as one; or predict with them."""
    members = [run for path in options.ckpt for run in runs_below(path) or [path]]
    if len(members) < 2:
        raise ValueError("--ensemble wants several --ckpt, or a folder of runs (of --seeds).")
    if options.images:
        predict(members, options)
    else:
        place = options.ckpt[0] if len(options.ckpt) == 1 else Path(members[0]).absolute().parent
        evaluate_run(place, options, members)
    parallel.shut_down()


def serve_page(options):
    """Serve the page to try pictures and prompts on, with examples of the first run's split."""
    from vlsm.results.serve import Predictors, serve

    names = run_names(options.ckpt)
    predictors = Predictors(dict(zip(names, options.ckpt)), options)
    predictor = predictors.get(names[0])
    about = predictor.about
    try:
        data, texts = open_split(
            options, predictor, options.dataset or about["dataset"], options.prompts or about["prompts"]
        )
        shown = [(read_image(r.image), text) for r, text in zip(data.records[:EXAMPLES], texts)]
    except (OSError, ValueError):  # the data are not on this machine
        shown = []
    say(f"Serving on http://{options.share_host}:{options.port}; Ctrl-C ends it.")
    serve(predictors, shown)


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
    about, size = {name: model.metadata[name] for name in names}, model.metadata["image_size"]
    gap = to_onnx(model, options.prompt, size, options.export, dict(prompt=options.prompt, **about))
    difference = f"ONNX Runtime's logits differ from PyTorch's by at most {gap:.1g}"
    say(f"Wrote '{options.export}' for \"{options.prompt}\"; {difference}.")
    shapes = f"pixels float32 [batch, 3, {size}, {size}] (RGB, 0 to 255) -> logits [batch, 1, {size}, {size}]"
    say(f"{shapes}, foreground where above 0")


def write_report(options):
    """Write the table of all evaluated runs, on the screen and in a file, and two charts beside it."""
    runs = report.collect(options.report, options.split, options.transfer)
    out, kind = Path(options.out or options.report), options.figure_format
    if options.transfer:
        file, charts = out / f"transfer.{options.format}", [out / f"{transfer.CHART}.{kind}"]
        text = transfer.transfer_table(runs, options.format)
    else:
        file, charts = out / f"report.{options.format}", report.chart_files(out, kind)
        papers = report.published(options.published) if options.published else None
        text = report.table(runs, options.format, options.layout, papers)
    check_targets([file, *charts], overwrite=options.overwrite)
    write_text(file, text)
    drawn = transfer.draw_shares(runs, out, kind) if options.transfer else report.draw(runs, out, kind)
    say(f"{text}\n{len(runs)} evaluations. Wrote {', '.join(map(str, [file, *drawn]))}")


def score_masks(options):
    """Score two folders of masks."""
    if not (options.pred and options.target):
        raise ValueError(
            "--pred and --target go together: the folder of predicted masks and that of true ones."
        )
    if options.out:
        check_targets(
            [Path(options.out) / name for name in ("metrics.csv", "metrics.json")],
            overwrite=options.overwrite,
        )
    scores = score_folders(options.pred, options.target, options.nsd_tolerance, options.group)
    words = f"what '{options.group}' finds in a mask's name" if options.group else "mask"
    summary = dict(summarise(scores, words), nsd_tolerance=options.nsd_tolerance)
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
    if options.serve:
        return serve_page(options)
    if options.ensemble:
        return evaluate_ensemble(options)
    checkpoint = options.ckpt[0] if len(options.ckpt) == 1 else choose_checkpoint(options)
    for asked, action in ((options.merge, merge), (options.export, export), (options.images, predict)):
        if asked:
            action(checkpoint, options)
            return parallel.shut_down()
    runs = runs_below(checkpoint)
    if runs:
        evaluate_runs(runs, options)
    else:
        evaluate_run(checkpoint, options)
    return parallel.shut_down()


if __name__ == "__main__":
    with friendly_errors():
        main()
