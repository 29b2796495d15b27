"""Evaluate a run: DSC, IoU, NSD and HD95 of its masks at original resolution, on a split of a data set.

With --images: write masks, or label maps, of images without a ground truth. HD95 is in pixels: the larger of
both directions' 95th percentiles of boundary distances. vlsm/metrics.py defines all metrics.
"""

import sys
from pathlib import Path

import numpy as np

from datasets import group_pattern, open_run_split
from vlsm.data.images import LabelMask
from vlsm.data.negatives import ABSENT_SETS, absent_prompts, unused_words
from vlsm.data.records import choose_prompt
from vlsm.results.evaluation import (
    add_split_arguments,
    confusion_matrix,
    evaluate_prompts,
    results_folder,
)
from vlsm.results.figures import draw_cases
from vlsm.results.gallery import page_files, write_gallery
from vlsm.results.predict import MaskWriter, load_ensemble, mask_target, predict_folder
from vlsm.results.scores import (
    METRICS,
    RESULT_FILES,
    describe,
    summarise,
    summarise_label_maps,
    summarise_values,
    write_results,
)
from vlsm.segment import prompt_notice
from vlsm.system import parallel
from vlsm.system.arguments import Parser, add_machine_arguments, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import check_targets, write_json

EXAMPLES = """examples:
  python evaluate.py --ckpt runs/kvasir-dense-64-seed42 --figure 6 --gallery
  python evaluate.py --ckpt runs/kvasir-dense --ensemble --dataset etis --save-masks masks
  python evaluate.py --ckpt hub:owner/name --images photos --prompt "a polyp" --save-masks masks --overlay
  python evaluate.py --ckpt runs/ct --images new --prompt liver --prompt tumour --label-map --save-masks maps
"""


def parse_arguments(argv=None):
    parser = Parser(__doc__, EXAMPLES)
    add = parser.add_argument_group("runs").add_argument
    add(
        "--ckpt",
        nargs="+",
        required=True,
        help="a run's folder (its best.safetensors), a folder of runs, a checkpoint file, or hub:OWNER/NAME; "
        "several only with --ensemble",
    )
    add("--ensemble", action="store_true", help="average the probabilities of several runs")
    add(
        "--mirror",
        action="store_true",
        help="average the probabilities of each image and its mirror image, with left and right exchanged in "
        "the prompt",
    )
    add_split_arguments(parser)
    add = parser.add_argument_group("scores").add_argument
    add("--all-prompts", action="store_true", help="evaluate every prompt key p0, p1, ... and print a table")
    add("--nsd-tolerance", type=number(float, 0), default=2.0, help="in pixels (default 2)")
    add_output_arguments(parser)
    add_image_arguments(parser)
    add_machine_arguments(parser)
    return parser.parse_args(argv)


def add_output_arguments(parser):
    """Add the options of what an evaluation writes, and of how masks are cleaned."""
    add = parser.add_argument_group("output").add_argument
    add("--out", help="folder of metrics.csv and metrics.json (default: eval-SPLIT in the run's folder)")
    add(
        "--overwrite",
        action="store_true",
        help="replace files that this program did not write; inputs are never replaced",
    )
    add("--save-masks", metavar="DIR", help="write predicted masks as 0/255 PNGs of original size")
    add(
        "--save-probabilities",
        metavar="DIR",
        help="write the foreground's probabilities as 16-bit PNGs of original size (65535 is 1)",
    )
    add(
        "--keep-largest",
        action="store_true",
        help="keep the largest piece of each predicted mask alone; metrics are of the cleaned masks",
    )
    add(
        "--min-area",
        type=number(int, 1),
        default=0,
        metavar="N",
        help="remove pieces of fewer than N pixels from predicted masks; metrics are of the cleaned masks",
    )
    add(
        "--figure",
        type=number(int, 1),
        metavar="N",
        help="write figure.png: N rows, the best, median and worst cases",
    )
    add("--figure-format", default="png", choices=["png", "pdf", "svg"], help="default: png")
    add(
        "--gallery",
        action="store_true",
        help="write gallery/index.html: every record, worst first, for a browser",
    )


def add_image_arguments(parser):
    """Add the options of --images."""
    add = parser.add_argument_group("images without a ground truth").add_argument
    add("--images", help="image or folder of images to segment, with --prompt and --save-masks")
    add(
        "--prompt",
        action="append",
        help='what to segment in --images: "a polyp"; of several, each gets a folder below those of '
        "--save-masks and --save-probabilities",
    )
    add(
        "--label-map",
        action="store_true",
        help="write one map an image, of class numbers: 1 for the first prompt, ..., 0 for background; "
        "dataset.json beside them has the names",
    )
    add(
        "--threshold",
        type=number(float, 0.001, 0.999),
        help="probability above which a pixel is foreground in --images (default 0.5)",
    )
    add("--overlay", action="store_true", help="also write NAME.overlay.png")


def load_runs(args, checkpoints):
    """Return the predictor of one run, or of several as an ensemble."""
    return load_ensemble(
        checkpoints,
        weights=args.weights,
        device=args.device,
        amp=args.amp,
        kernels=args.kernels,
        compile=args.compile,
        mirror=args.mirror,
    )


def runs_below(folder):
    """Return the runs in a folder of runs, sorted; none for a run itself, or a file."""
    if (Path(folder) / "best.safetensors").is_file():
        return []
    return sorted(path.parent for path in Path(folder).glob("*/best.safetensors"))


# Scores of a split


def evaluate_run(args, checkpoints):
    """Evaluate one run, or several as an ensemble: write and print the results.

    Returns {prompt key: summary} with --all-prompts, else {"": summary}.
    """
    predictor = load_runs(args, checkpoints)
    metadata = predictor.metadata
    data, texts = open_run_split(
        metadata, args.split, args.dataset, args.data_root, args.prompts, args.seed, args.cache_dir
    )
    place = checkpoints[0]
    members = []
    suffixes = ["mirror"] if args.mirror else []
    if args.ensemble:
        place = args.ckpt[0] if len(args.ckpt) == 1 else Path(place).absolute().parent
        members = list(map(str, checkpoints))
        suffixes.append("ensemble")
    out = Path(args.out or results_folder(place, metadata, args.split, args.dataset, suffixes))
    settings = dict(
        ckpt=str(place),
        dataset=args.dataset or metadata["dataset"],
        split=args.split,
        upsample=args.upsample,
        seed=metadata["recipe"]["seed"] if args.seed is None else args.seed,
        weights=metadata["weights"],
        method=metadata["method"],
        trained=predictor.trained,
        total=predictor.total,
        mirror=args.mirror,
        ensemble=members,
        nsd_tolerance=args.nsd_tolerance,
        keep_largest=args.keep_largest,
        min_area=args.min_area,
    )
    if args.all_prompts:
        return evaluate_all_prompts(args, predictor, data, out, settings)

    check_outputs(args, data.records, out)
    prompts = args.prompts or metadata["prompts"]
    prompt_sets = {"": texts}
    if metadata["recipe"].get("negatives"):
        words = unused_words(predictor.vocabulary(), data.records, texts, held_out=True)
        prompt_sets |= absent_prompts(data.records, texts, words, settings["seed"])
    scores, summary = score_prompts(args, predictor, data, prompt_sets, settings["dataset"])[""]
    summary |= score_label_maps(args, predictor, data, texts)
    if not parallel.rank():
        write_results(out, scores, summary, dict(prompts=prompts, **settings))
        say(f"{settings['dataset']} {args.split}, {len(scores)} records, prompts: {prompts}")
        say(describe(summary))
        files = [out / "metrics.csv", "metrics.json", *draw(args, data.records, scores, out, settings)]
        say(f"Wrote {', '.join(map(str, files))}")
    return {"": summary}


def score_prompts(args, predictor, data, prompt_sets, dataset):
    """Return {name: (scores, summary)} of a split's records with each set of prompts."""
    pattern, group_in_words = group_pattern(dataset, args.group)
    scores_of = evaluate_prompts(
        predictor,
        data,
        prompt_sets,
        args.nsd_tolerance,
        args.upsample,
        args.batch_size,
        pattern,
        keep_masks=args.figure or args.gallery,
        mask_folder=args.save_masks,
        probability_folder=args.save_probabilities,
        keep_largest=args.keep_largest,
        min_area=args.min_area,
        alarm_sets=ABSENT_SETS,
    )
    alarms = {}
    for name in ABSENT_SETS:
        rows = scores_of.pop(name, None)
        if rows:
            alarms[name] = summarise_values([row["alarm"] for row in rows], [row["group"] for row in rows])
    results = {}
    for name, scores in scores_of.items():
        summary = dict(summarise(scores, group_in_words), nsd_tolerance=args.nsd_tolerance)
        if alarms:
            summary["alarms"] = alarms
        results[name] = scores, summary
    return results


def score_label_maps(args, predictor, data, texts):
    """Return {"label_maps": summary} of a split of label maps, else {}; texts: the records' prompts.

    Without a prompt of its own a class cannot be told from another: then {}, too.
    """
    words = {}
    for record in data.records:
        if not isinstance(record.mask, LabelMask):
            return {}
        words[record.mask.value] = record.class_word
    if len(set(texts)) < len(words):
        return {}
    counts = confusion_matrix(
        predictor,
        data,
        texts,
        args.batch_size,
        upsample=args.upsample,
        keep_largest=args.keep_largest,
        min_area=args.min_area,
    )
    return dict(label_maps=summarise_label_maps(counts, [words[number] for number in sorted(words)]))


def check_outputs(args, records, out):
    """Refuse to write over a user's files, before anything is computed. Raises as `check_targets`."""
    inputs = []
    for record in records:
        inputs += record.files
    targets = []
    if args.out:
        targets += [out / name for name in RESULT_FILES]
    if args.out and args.figure:
        targets.append(out / f"figure.{args.figure_format}")
    if args.out and args.gallery:
        targets += page_files(out / "gallery")
    for folder in (args.save_masks, args.save_probabilities):
        if folder:
            targets += [mask_target(folder, record.mask_name) for record in records]
    check_targets(targets, inputs, args.overwrite)


def draw(args, records, scores, out, settings):
    """Write the sheet of --figure and the page of --gallery; returns their paths."""
    files = []
    if args.figure:
        figure = out / f"figure.{args.figure_format}"
        files.append(figure)
        draw_cases(figure, records, {"prediction": scores}, args.figure, args.figure_format)
    if args.gallery:
        name = Path(settings["ckpt"]).name.removesuffix(".safetensors")
        title = f"{name} on {settings['dataset']} {args.split}"
        files.append(write_gallery(out / "gallery", records, {name: scores}, title))
    return files


def evaluate_all_prompts(args, predictor, data, out, settings):
    """Evaluate with each prompt key: print a row of a table, write results into a folder for each key."""
    keys = {}
    for record in data.records:
        keys.update(record.prompts)
    if not keys:
        raise ValueError(f"--all-prompts: the records of '{settings['dataset']}' came without prompts.")
    if args.out:
        targets = [out / key / name for key in keys for name in RESULT_FILES]
        check_targets([*targets, out / "prompts.json"], overwrite=args.overwrite)
    prompt_sets = {}
    for key in keys:
        seed = settings["seed"]
        prompt_sets[key] = [choose_prompt(record, key, seed, i) for i, record in enumerate(data.records)]
    results = score_prompts(args, predictor, data, prompt_sets, settings["dataset"])
    say(f"{'prompt':8}{'DSC %':>8}{'IoU %':>8}{'HD95 px':>9}   an example")
    summaries = {}
    for key, (scores, summary) in results.items():
        summaries[key] = summary
        if not parallel.rank():
            write_results(out / key, scores, summary, dict(prompts=key, **settings))
        hd95 = summary["hd95"]["mean"]
        hd95 = "n/a" if hd95 is None else f"{hd95:.2f}"
        dsc = 100 * summary["dsc"]["mean"]
        iou = 100 * summary["iou"]["mean"]
        say(f"{key:8}{dsc:8.2f}{iou:8.2f}{hd95:>9}   {prompt_sets[key][0][:70]}")
    if not parallel.rank():
        write_json(out / "prompts.json", dict(prompts=summaries, **settings))
    return summaries


def print_means(evaluations):
    """Print means and deviations over runs; evaluations: of each run {prompt key: summary}."""
    for key in evaluations[0]:
        for metric, (title, factor, _) in METRICS.items():
            means = []
            for summaries in evaluations:
                mean = summaries[key][metric]["mean"]
                if mean is not None:
                    means.append(factor * mean)
            if means:
                spread = np.std(means, ddof=1) if len(means) > 1 else 0
                label = f"{key} {title:8}".lstrip()
                say(f"{label} {np.mean(means):7.2f} +- {spread:.2f} over {len(means)} runs")


# Masks of images without a ground truth


def predict(args, checkpoints):
    """Write the masks of --images; returns the messages on images that this process could not read."""
    if not args.prompt or not all(args.prompt) or not args.save_masks:
        raise ValueError('--images needs --prompt "a polyp" and --save-masks DIR.')
    writer = MaskWriter(
        args.prompt,
        args.save_masks,
        args.upsample,
        args.threshold or 0.5,
        args.label_map,
        args.overlay,
        args.save_probabilities,
        args.keep_largest,
        args.min_area,
    )
    predictor = load_runs(args, checkpoints)
    notice = prompt_notice(predictor.metadata, args.prompt)
    if notice and not parallel.rank():
        print(notice, file=sys.stderr)
    count, errors = predict_folder(predictor, args.images, writer, args.batch_size, args.overwrite)
    files = count * len(writer.mask_folders)
    say(f"Wrote {files} {'label maps' if args.label_map else 'masks'} to '{args.save_masks}'.")
    return errors


def main(argv=None):
    """Evaluate runs, or segment a folder of images; exits with 1 if an image could not be read."""
    args = parse_arguments(argv)
    if args.images and (args.figure or args.gallery or args.all_prompts or args.out):
        raise ValueError("--figure, --gallery, --all-prompts and --out need masks; --images comes without.")
    if not args.images and (args.prompt or args.label_map or args.threshold or args.overlay):
        raise ValueError("--prompt, --label-map, --threshold and --overlay are for --images.")
    runs = []
    for path in args.ckpt:
        runs += runs_below(path) or [path]
    if len(args.ckpt) > 1 and not args.ensemble:
        raise ValueError("Several --ckpt are for --ensemble, which averages them; else name one.")
    if len(runs) == 1 and args.ensemble:
        raise ValueError("--ensemble needs several runs: more than one --ckpt, or a folder of runs.")
    if args.all_prompts and (args.save_masks or args.save_probabilities or args.figure or args.gallery):
        raise ValueError("--all-prompts writes scores alone: no masks, probabilities, figure or gallery.")
    groups = [runs] if args.ensemble else [[run] for run in runs]
    one_place = args.out or args.save_masks or args.save_probabilities or args.images
    if len(groups) > 1 and one_place:
        raise ValueError(
            f"'{args.ckpt[0]}' holds {len(runs)} runs, whose output would mix in one folder; evaluate them "
            "one by one, or with --ensemble."
        )
    errors = []
    if args.images:
        errors = predict(args, runs)
    else:
        evaluations = [evaluate_run(args, group) for group in groups]
        if len(groups) > 1:
            print_means(evaluations)
    parallel.shut_down()
    if errors:
        print(*errors, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    with friendly_errors():
        main()
