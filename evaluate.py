"""Evaluate a run: `python evaluate.py --ckpt runs/NAME`. Score two folders of masks: `--pred DIR --target DIR`. Predict without a
ground truth: `--ckpt ... --images DIR --prompt "polyp" --save-masks DIR`.

DSC, IoU and HD95 are computed at each mask's original size; vlsm/metrics.py defines them.
"""

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import datasets
from vlsm import load, metrics, parallel, pictures, runtime
from vlsm.cache import ahead, parts_of
from vlsm.checkpoint import read_metadata, replacing, save_merged, write_csv, write_text
from vlsm.console import progress, speaking
from vlsm.export import NEEDS, to_onnx
from vlsm.images import picture_files, read_image, read_mask
from vlsm.paired import signed_rank
from vlsm.predict import Predictor, enlarge, predict, save_mask
from vlsm.prompts import prompt_of
from vlsm.report import METRICS, collect, draw, in_words, published, table

COLUMNS = ("image", "mask", "prompt", "dsc", "iou", "hd95")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="DSC, IoU and HD95 of a run at the original resolution; masks and pictures. HD95 is in pixels: the larger of both "
        "directions' 95th percentiles of boundary distances.",
        allow_abbrev=False,
    )
    g = parser.add_argument_group("what to evaluate")
    where = "a run's folder (its best.safetensors), a folder of runs (of --seeds), or a checkpoint file; several: for --images"
    g.add_argument("--ckpt", nargs="+", help=where)
    g.add_argument("--compare", nargs="+", metavar="CKPT", help="several runs on the same records: a sheet of pictures and a paired test")
    g.add_argument("--report", metavar="DIR", help="the table of all evaluated runs below DIR, means over seeds, and two pictures")
    g.add_argument("--split", default="test", choices=datasets.SPLITS, help="default: test")
    g.add_argument("--dataset", help="another data set than the run's own: a name or a folder")
    g.add_argument("--data-root", help="folder that holds the data sets' folders (default: the run's)")
    g.add_argument("--prompts", help='another way than the run\'s: random, class, a key such as p6, or a text: "a polyp"')
    g.add_argument("--all-prompts", action="store_true", help="evaluate every key p0, p1, ... and print a table")
    upsample = "logits: enlarge bilinearly, then threshold (default); mask: threshold, then enlarge, as the published code does"
    g.add_argument("--upsample", default="logits", choices=["logits", "mask"], help=upsample)
    g.add_argument("--seed", type=int, help="of random prompts (default: the run's)")
    g.add_argument("--weights", help="the base's folder or hub id, if it has moved")
    g = parser.add_argument_group("what to write")
    g.add_argument("--out", help="folder of metrics.csv and metrics.json (default: eval-SPLIT in the run's folder)")
    g.add_argument("--format", default="md", choices=["md", "csv", "tex"], help="of --report (default: md)")
    layout = "of --report: a row for each data set and metric (default, as VLSM-Adapter prints them), or for each method (as TuneVLSeg)"
    g.add_argument("--layout", default="datasets", choices=["datasets", "methods"], help=layout)
    g.add_argument("--published", metavar="FILE.json", help="a paper's figures beside ours; see vlsm/report.py")
    g.add_argument("--save-masks", metavar="DIR", help="write predicted masks as 0/255 PNGs of original size, under the masks' own names")
    g.add_argument("--figure", type=int, metavar="N", help="write figure.png: N rows, the best, median and worst cases")
    merge = "instead of evaluating, write a plain folder of weights (Hugging Face's for CLIPSeg) with what lora, decoder or full has learnt"
    g.add_argument("--merge", metavar="DIR", help=merge)
    onnx = f"instead of evaluating, write the network with --prompt built in, for other programs (needs: pip install {NEEDS})"
    g.add_argument("--export", metavar="FILE.onnx", help=onnx)
    g = parser.add_argument_group("other inputs")
    g.add_argument("--pred", help="folder of predicted masks, scored without a network against --target")
    g.add_argument("--target", help="folder of true masks for --pred; files are paired by stem")
    g.add_argument("--images", help="picture or folder of pictures to segment, with --prompt and --save-masks")
    g.add_argument("--prompt", help='what to segment in --images: "polyp"')
    g.add_argument(
        "--route", metavar="NAME", help="which of several --ckpt: a run's name (default: the one whose class word --prompt holds)"
    )
    g.add_argument("--overlay", action="store_true", help="with --images: also write NAME.overlay.png")
    g = parser.add_argument_group("machine")
    g.add_argument("--batch-size", type=int, default=32, help="images at a time (default 32)")
    g.add_argument("--cache-dir", default=datasets.default_cache(), help="folder of the decoded pictures (default: %(default)s)")
    g.add_argument("--shard-cache", action="store_true", help="of several processes (torchrun) each keeps a share of the pictures")
    runtime.add_arguments(g)
    return parser.parse_args(argv)


def score(pairs):
    """Per-record scores of (prediction, truth) pairs of bool masks, as dictionaries."""
    predicted, truth = zip(*pairs)
    columns = [m(predicted, truth).tolist() for m in (metrics.dsc, metrics.iou, metrics.hd95)]
    return [
        dict(dsc=d, iou=i, hd95=h, diagonal=math.hypot(*t.shape), target_empty=not t.any().item(), pred_empty=not p.any().item())
        for d, i, h, p, t in zip(*columns, predicted, truth)
    ]


def summarise(scores):
    keys = ("dsc", "iou", "hd95", "diagonal", "target_empty", "pred_empty")
    return metrics.summarise(*([s[k] for s in scores] for k in keys))


def evaluate(predictor, data, prompts, seed, args, masks_dir=None):
    """Scores of all records of a split (dictionaries, with the prompt), and the predicted masks if `masks_dir` or a figure wants them."""
    scores, kept, count = [], [], len(data)
    with ThreadPoolExecutor(4) as pool, progress(count, "evaluating") as bar:

        def read(part):  # original masks, while the network works on the part before
            return list(pool.map(lambda i: torch.from_numpy(read_mask(data.records[i].mask)), part))

        own = [part for _, part in parallel.own(parts_of(range(count), args.batch_size))]
        for part, present in ahead(read, data.rounds(own)):
            pixels = data.batch(list(part))[0]
            if not part:
                continue
            texts = [prompt_of(data.records[i], i, prompts, seed) for i in part]
            logits = predictor.logits(pixels, texts)
            truth = [t.to(predictor.device) for t in present]
            predicted = [enlarge(z, t.shape, args.upsample) for z, t in zip(logits, truth)]
            for i, text, row, mask in zip(part, texts, score(list(zip(predicted, truth))), predicted):
                scores.append(dict(image=data.records[i].name, mask=data.records[i].mask_name, prompt=text, **row))
                if masks_dir:
                    save_mask(mask, masks_dir, data.records[i].mask_name)
                if args.figure:
                    kept.append(np.packbits(mask.cpu().numpy()))
            bar.update(len(part))
    if parallel.world() > 1:
        places = [i for part in own for i in part]
        together = parallel.gather(list(zip(places, scores, kept or [None] * len(scores))))
        scores, kept = [row for _, row, _ in together], [mask for *_, mask in together]
    return scores, kept


def write_results(out, scores, summary, about):
    """metrics.csv, a row a record, and metrics.json."""
    rows = ([s["image"], s["mask"], s["prompt"], f"{s['dsc']:.6f}", f"{s['iou']:.6f}", f"{s['hd95']:.4f}"] for s in scores)
    write_csv(out / "metrics.csv", [COLUMNS, *rows])
    write_text(out / "metrics.json", json.dumps(dict(**summary, **about), indent=1))


def figure(data, scores, kept, rows, path, names=("prediction",)):
    """The best, median and worst cases by DSC, in equal parts. kept: packed masks of each record; of several `names`, a list of these."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i]["dsc"])
    rows = min(rows, len(order))
    third = [rows // 3 + (k < rows % 3) for k in (0, 2, 1)]  # best, median, worst
    middle = max(third[0], (len(order) - third[1]) // 2)
    chosen = [(i, "best") for i in order[: third[0]]] + [(i, "median") for i in order[middle : middle + third[1]]]
    chosen += [(i, "worst") for i in order[len(order) - third[2] :]]
    page = []
    for i, kind in chosen:
        image, truth = read_image(data.records[i].image), read_mask(data.records[i].mask)
        masks = [np.unpackbits(k[i], count=truth.size).reshape(truth.shape).astype(bool) for k in (kept if len(names) > 1 else [kept])]
        page.append((image, truth, masks, scores[i]["prompt"], f"{kind}: DSC {100 * scores[i]['dsc']:.1f}   {scores[i]['image']}"))
    with replacing(path) as temporary:
        pictures.sheet(page, temporary, names)


def write_report(args):
    """--report: the table on the screen and in a file, and two pictures beside it."""
    runs, out = collect(args.report, args.split), Path(args.out or args.report)
    text = table(runs, args.format, args.layout, published(args.published) if args.published else None)
    write_text(out / f"report.{args.format}", text)
    drawn = draw(runs, out)
    print(f"{text}\n{len(runs)} evaluations. Wrote {', '.join(map(str, [out / f'report.{args.format}', *drawn]))}")


def score_folders(args):
    """--pred and --target: two folders of masks, paired by stem."""

    def files(folder):
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder '{root}'.")
        found = {}
        for path in picture_files(root):
            stem = path.relative_to(root).with_suffix("").as_posix()
            if stem in found:
                raise ValueError(f"'{found[stem]}' and '{path}' share a stem, so they cannot be told apart.")
            found[stem] = path
        return found

    pred, target = files(args.pred), files(args.target)
    lone = sorted(set(pred) ^ set(target))
    if lone or not pred:
        raise ValueError(
            f"{len(lone)} masks have no partner in the other folder: {', '.join(lone[:5])}."
            if pred or target
            else "Both folders hold no masks."
        )
    scores = []
    for stem in progress(target, "scoring", "mask"):
        masks = [torch.from_numpy(read_mask(files_[stem])) for files_ in (pred, target)]
        if masks[0].shape != masks[1].shape:
            raise ValueError(
                f"'{pred[stem]}' and '{target[stem]}' differ in size: {tuple(masks[0].shape)} and {tuple(masks[1].shape)} (height, width)."
            )
        scores.append(dict(image="", mask=target[stem].name, prompt="", **score([tuple(masks)])[0]))
    summary = summarise(scores)
    if args.out:
        write_results(Path(args.out), scores, summary, dict(pred=args.pred, target=args.target))
    print(in_words(summary))


def route(args):
    """The one of several checkpoints that --route names, or whose class word the prompt holds. Raises ValueError unless it is one."""
    if not args.images:
        raise ValueError("Several checkpoints are for --images, where one of them is chosen; evaluate them one by one.")
    words, prompt = {}, (args.prompt or "").casefold()
    for path in args.ckpt:
        about = read_metadata(path)
        source = datasets.DATASETS.get(about["dataset"])
        words[path] = about.get("class_words") or ([source.word] if source and source.word else [])
    names = {path: run_name(path) for path in args.ckpt}
    if args.route:
        fitting, why = [path for path in args.ckpt if names[path] == args.route], f"There is no checkpoint '{args.route}' in --ckpt"
    else:
        fitting = [path for path in args.ckpt if any(word.casefold() in prompt for word in words[path])]
        why = f"The prompt '{args.prompt}' holds the class word {'of several' if fitting else 'of no'} checkpoint"
    if len(fitting) != 1:
        known = ", ".join(f"{names[path]} ({', '.join(words[path]) or 'no class word'})" for path in args.ckpt)
        raise ValueError(f"{why}. Known are {known}; choose one with --route NAME.")
    print(f"Using '{fitting[0]}'.")
    return fitting[0]


def main(argv=None):
    args = parse(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: give 1 or more.")
    if args.pred or args.target:
        if not (args.pred and args.target):
            raise ValueError("--pred and --target go together: the folder of predicted masks and that of true ones.")
        return score_folders(args)
    if args.report:
        return write_report(args)
    if args.compare:
        return compare(args)
    if not args.ckpt:
        raise ValueError("Name what to evaluate: --ckpt RUN_DIR_OR_FILE, or two folders of masks with --pred and --target.")
    args.ckpt = args.ckpt[0] if len(args.ckpt) == 1 else route(args)
    if args.merge:
        model = load(args.ckpt, args.weights)
        save_merged(args.merge, model)
        also = "transformers loads it, and so does" if model.info["model"] == "clipseg" else "load it with"
        print(f"Wrote '{args.merge}'; {also} --weights {args.merge}.")
        return
    if args.export:
        return export(args)
    if args.images:
        return predict(args, Predictor(args))
    runs = [] if (Path(args.ckpt) / "best.safetensors").is_file() else sorted(p.parent for p in Path(args.ckpt).glob("*/best.safetensors"))
    if not runs:
        return evaluate_run(args)
    if args.out or args.save_masks:
        raise ValueError(f"'{args.ckpt}' holds {len(runs)} runs, which --out and --save-masks would mix; evaluate them one by one.")
    found = []
    for run in runs:
        args.ckpt = run
        found.append(evaluate_run(args))
    groups = {f"{key} ": [table[key] for table in found] for key in found[0]} if args.all_prompts else {"": found}
    for key, summaries in groups.items():
        for name, (title, factor, _) in METRICS.items():
            means = [factor * s[name]["mean"] for s in summaries if s[name]["mean"] is not None]
            if means:
                spread = np.std(means, ddof=1) if len(means) > 1 else 0
                print(f"{key}{title:8} {np.mean(means):7.2f} +- {spread:.2f} over {len(means)} runs")


def export(args):
    """--export: one prompt's network as a file for other programs, compared with PyTorch before it is kept."""
    if not args.prompt:
        raise ValueError('--export builds one prompt into the file; name it: --prompt "polyp".')
    model = load(args.ckpt, args.weights)
    size, about = model.about["image_size"], {name: model.about[name] for name in ("model", "weights", "method", "dataset", "image_size")}
    gap = to_onnx(model, args.prompt, size, args.export, dict(prompt=args.prompt, **about))
    print(f"Wrote '{args.export}' for \"{args.prompt}\"; ONNX Runtime's logits differ from PyTorch's by at most {gap:.1g}.")
    print(f"pixels float32 [batch, 3, {size}, {size}] (RGB, 0 to 255) -> logits [batch, 1, {size}, {size}], foreground where above 0")


def evaluate_run(args):
    """One run on a split of a data set: results written and printed; its summary, or with --all-prompts that of each key."""
    predictor = Predictor(args)
    about = predictor.about
    dataset, prompts = args.dataset or about["dataset"], args.prompts or about["prompts"]
    seed = about["recipe"]["seed"] if args.seed is None else args.seed
    run = Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent
    out = Path(args.out) if args.out else run / f"eval-{args.split}"
    data = open_split(args, predictor, dataset, prompts)
    trained, total = predictor.model.count()
    what = dict(
        ckpt=str(args.ckpt), dataset=dataset, split=args.split, upsample=args.upsample, seed=seed, weights=about["weights"],
        method=about["method"], trained=trained, total=total,
    )  # fmt: skip
    if args.all_prompts:
        return all_prompts(predictor, data, seed, args, out, what)
    scores, kept = evaluate(predictor, data, prompts, seed, args, args.save_masks)
    summary = summarise(scores)
    if parallel.rank():
        return summary
    write_results(out, scores, summary, dict(prompts=prompts, **what))
    if args.figure:
        figure(data, scores, kept, args.figure, out / "figure.png")
    print(f"{dataset} {args.split}, {len(scores)} records, prompts: {prompts}\n{in_words(summary)}")
    print(f"Wrote {out / 'metrics.csv'} and metrics.json" + (", figure.png" if args.figure else ""))
    return summary


def open_split(args, predictor, dataset, prompts):
    about = predictor.about
    where = args.data_root or about["data_root"], args.cache_dir, about["split_seed"]
    return datasets.open_dataset(dataset, [args.split], predictor.size, *where, prompts, shard=args.shard_cache)[args.split]


def compare(args):
    """--compare: the same records under several checkpoints, each with its own run's prompts unless --prompts says otherwise; Wilcoxon's
    test of each pair's DSC, and a sheet of the first one's best, median and worst cases.
    """
    if len(args.compare) < 2:
        raise ValueError("--compare wants two checkpoints or more.")
    args.figure, found, opened = args.figure or 6, [], None
    names = [run_name(path) for path in args.compare]
    if len(set(names)) < len(names):  # runs of --seeds
        names = [f"{Path(path).absolute().parent.name}/{name}" for path, name in zip(args.compare, names)]
    first = read_metadata(args.compare[0])
    dataset, seed = args.dataset or first["dataset"], first["recipe"]["seed"] if args.seed is None else args.seed
    for path in args.compare:
        args.ckpt = path
        predictor = Predictor(args)
        prompts = args.prompts or predictor.about["prompts"]
        opened = open_split(args, predictor, dataset, prompts)
        found.append(evaluate(predictor, opened, prompts, seed, args))
        d = np.array([s["dsc"] for s in found[-1][0]])
        score = f"DSC {100 * d.mean():.2f} +- {100 * d.std(ddof=1):.2f} %"
        print(f"{names[len(found) - 1]:30} {score} over {len(d)} records, prompts: {prompts}")
    for i, j in combinations(range(len(found)), 2):
        a, b = ([s["dsc"] for s in found[k][0]] for k in (i, j))
        p, n = signed_rank(a, b)
        print(
            f"{names[i]} - {names[j]}: {100 * (np.mean(a) - np.mean(b)):+.2f} points, p = {p:.2g} (signed ranks of {n} pairs that differ)"
        )
    if parallel.rank():
        return
    out = Path(args.out or "compare.png")
    figure(opened, found[0][0], [kept for _, kept in found], args.figure, out, names)
    print(f"Wrote {out}")


def run_name(path):
    return Path(path).name if Path(path).is_dir() else Path(path).stem


def all_prompts(predictor, data, seed, args, out, what):
    """--all-prompts: a row of the table, and metrics in a folder of its own, for each key."""
    keys = list(dict.fromkeys(k for r in data.records for k in r.prompts))
    if not keys:
        raise ValueError(f"--all-prompts: the records of '{what['dataset']}' came without prompts.")
    table = {}
    for key in keys:
        scores, _ = evaluate(predictor, data, key, seed, args)
        table[key] = summarise(scores)
        if not parallel.rank():
            write_results(out / key, scores, table[key], dict(prompts=key, **what))
    if parallel.rank():
        return table
    print(f"{'prompt':8}{'DSC %':>8}{'IoU %':>8}{'HD95 px':>9}   an example")
    for key, s in table.items():
        hd = "n/a" if s["hd95"]["mean"] is None else f"{s['hd95']['mean']:.2f}"
        example = prompt_of(data.records[0], 0, key, seed)
        print(f"{key:8}{100 * s['dsc']['mean']:8.2f}{100 * s['iou']['mean']:8.2f}{hd:>9}   {example[:70]}")
    write_text(out / "prompts.json", json.dumps(dict(prompts=table, **what), indent=1))
    return table


if __name__ == "__main__":
    with speaking():
        main()
