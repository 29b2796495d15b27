"""Evaluate a run: DSC, IoU, NSD and HD95 of its masks at original resolution, on a split of a data set.

With --images: write masks, or label maps, of images without a ground truth. HD95 is in pixels, or in
millimetres if the spacing is known: the larger of both directions' 95th percentiles of boundary distances.
vlsm/metrics.py defines all metrics.
"""

import sys
from pathlib import Path

import numpy as np

from datasets import open_run_split
from vlsm.checkpoint import read_metadata, refuse_other_runs
from vlsm.data.images import LabelMask
from vlsm.data.negatives import ABSENT_SETS, absent_prompts, unused_words
from vlsm.data.records import choose_prompt, describe_groups
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
    in_brackets,
    mean_over_runs,
    metric_title,
    summarise,
    summarise_label_maps,
    summarise_values,
    write_results,
)
from vlsm.segment import prompt_notice
from vlsm.system import parallel
from vlsm.system.arguments import Parser, add_machine_arguments, number
from vlsm.system.console import friendly_errors, say, write_line
from vlsm.system.files import check_targets, write_json

EXAMPLES = """examples:
  python evaluate.py --ckpt runs/kvasir-dense-64-seed42 --figure 6 --gallery
  python evaluate.py --ckpt runs/kvasir-dense --ensemble --dataset etis --save-masks masks
  python evaluate.py --ckpt hub:owner/name --images photos --prompt "a polyp" --save-masks masks
  python evaluate.py --ckpt runs/ct --images x --prompt liver --prompt cyst --label-map --save-masks m
"""

# Options that have no effect beside others, as `Parser` refuses them.
RULES = (
    ("prompt label_map threshold overlay", "with", "images", ""),
    ("figure_format", "with", "figure", ""),
    ("gallery_full", "with", "gallery", ""),
    ("figure gallery save_masks save_probabilities", "without", "all_prompts", ", which writes scores alone"),
    (
        "figure gallery all_prompts out split dataset data_root prompts seed group nsd_tolerance spacing "
        "cache_dir",
        "without",
        "images",
        ", which come without masks",
    ),
)


def parse_arguments(argv=None):
    parser = Parser(__doc__, EXAMPLES, RULES)
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
    add(
        "--nsd-tolerance",
        type=number(float, 0),
        default=2.0,
        help="in pixels, or in millimetres if the spacing is known (default 2)",
    )
    add(
        "--spacing",
        type=number(float, above=0),
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="millimetres from row to row and from column to column of all images, at their original size, "
        "for HD95 and NSD (default: each image's in dataset.json, else pixels)",
    )
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
    add(
        "--gallery-full",
        action="store_true",
        help="also copy the images into the gallery at their original size, so that it can be moved",
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
    """Return the predictor of one run, or of several as an ensemble; print where it runs."""
    predictor = load_ensemble(
        checkpoints,
        weights=args.weights,
        device=args.device,
        amp=args.amp,
        kernels=args.kernels,
        compile=args.compile,
        mirror=args.mirror,
    )
    say(predictor.model.describe_place())
    return predictor


def runs_below(folder):
    """Return the runs in a folder of runs, sorted; none for a run itself, or a file."""
    if (Path(folder) / "best.safetensors").is_file():
        return []
    return sorted(path.parent for path in Path(folder).glob("*/best.safetensors"))


def refuse_other_records(runs, split, dataset):
    """Raise ValueError if runs of an ensemble were trained on a data set with different splits, as folds are.

    Some were then trained on records that others are tested on. dataset: None for the first run's.
    """
    described = [read_metadata(run) for run in runs]
    dataset = dataset or described[0]["dataset"]
    name = Path(dataset).name  # it may have moved
    records = [m.get("records", {}).get(split) for m in described if Path(m["dataset"]).name == name]
    if any(stamp != records[0] for stamp in records):
        raise ValueError(
            f"--ensemble: the runs have different {split} records of '{dataset}', as folds have, so some "
            "were trained on those of others. Evaluate the runs without --ensemble, or the ensemble with "
            "--images or another --dataset."
        )


# Scores of a split


def evaluate_run(args, checkpoints):
    """Evaluate one run, or several as an ensemble: write and print the results.

    Returns (folder of the results, {prompt key: summary} with --all-prompts, else {"": summary}).
    """
    if args.out and not args.all_prompts:  # before the weights are loaded; later with the names of the masks
        check_outputs(args, [], Path(args.out))
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
        spacing=args.spacing,
        keep_largest=args.keep_largest,
        min_area=args.min_area,
    )
    if args.all_prompts:
        return out, evaluate_all_prompts(args, predictor, data, out, settings)

    check_outputs(args, data.records, out)
    prompts = args.prompts or metadata["prompts"]
    prompt_sets = {"": texts}
    if metadata["recipe"].get("negatives"):
        words = unused_words(predictor.vocabulary(), data.records, texts, held_out=True)
        prompt_sets |= absent_prompts(data.records, texts, words, settings["seed"])
    scores, summary = score_prompts(args, predictor, data, prompt_sets)[""]
    summary |= score_label_maps(args, predictor, data, texts)
    if not parallel.rank():
        write_results(out, scores, summary, dict(prompts=prompts, **settings))
        say(f"{place}: {settings['dataset']} {args.split}, prompts: {prompts}")
        say(f"records: {len(scores)}; +-: standard deviation over these")
        say(describe(summary))
        files = [out / name for name in RESULT_FILES]
        files += draw(args, data.records, scores, out, prompts, settings)
        files += filter(None, [args.save_masks, args.save_probabilities])
        for file in files:
            say(f"Wrote {file}")
    return out, {"": summary}


def score_prompts(args, predictor, data, prompt_sets):
    """Return {name: (scores, summary)} of a split's records with each set of prompts."""
    scores_of = evaluate_prompts(
        predictor,
        data,
        prompt_sets,
        args.nsd_tolerance,
        args.upsample,
        args.batch_size,
        args.group,
        keep_masks=args.figure or args.gallery,
        mask_folder=args.save_masks,
        probability_folder=args.save_probabilities,
        keep_largest=args.keep_largest,
        min_area=args.min_area,
        alarm_sets=ABSENT_SETS,
        spacing=args.spacing,
    )
    alarms = {}
    for name in ABSENT_SETS:
        rows = scores_of.pop(name, None)
        if rows:
            values = {name: [row["alarm"] for row in rows]}
            alarms |= summarise_values(values, [row["group"] for row in rows])
    results = {}
    for name, scores in scores_of.items():
        summary = summarise(scores, describe_groups(data.records, args.group))
        summary["nsd_tolerance"] = args.nsd_tolerance
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
    targets = [out / name for name in RESULT_FILES]
    if args.figure:
        targets.append(out / f"figure.{args.figure_format}")
    if args.gallery:
        targets += page_files(out / "gallery")
    for folder in (args.save_masks, args.save_probabilities):
        if folder:
            targets += [mask_target(folder, record.mask_name) for record in records]
    check_targets(targets, inputs, args.overwrite)


def draw(args, records, scores, out, prompts, settings):
    """Write the sheet of --figure and the page of --gallery; returns their paths."""
    files = []
    if args.figure:
        figure = out / f"figure.{args.figure_format}"
        files.append(figure)
        draw_cases(figure, records, {"prediction": scores}, args.figure, args.figure_format)
    if args.gallery:
        name = Path(settings["ckpt"]).name.removesuffix(".safetensors")
        title = f"{name} on {settings['dataset']} {args.split}"
        tolerance = f"NSD within {args.nsd_tolerance:g} {scores[0]['unit']}"
        facts = [f"prompts: {prompts}", "foreground: probability above 0.5", tolerance]
        files.append(write_gallery(out / "gallery", records, {name: scores}, title, facts, args.gallery_full))
    return files


def evaluate_all_prompts(args, predictor, data, out, settings):
    """Evaluate with each prompt key: print a row of a table, write results into a folder for each key."""
    keys = {}
    for record in data.records:
        keys.update(record.prompts)
    if not keys:
        raise ValueError(f"--all-prompts: the records of '{settings['dataset']}' came without prompts.")
    targets = [out / key / name for key in keys for name in RESULT_FILES]
    check_targets([*targets, out / "prompts.json"], overwrite=args.overwrite)
    prompt_sets = {}
    seed = settings["seed"]
    for key in keys:
        prompt_sets[key] = [choose_prompt(record, key, seed, i) for i, record in enumerate(data.records)]
    results = score_prompts(args, predictor, data, prompt_sets)
    say(settings["ckpt"])
    say(f"{'prompt':8}{'DSC %':>8}{'IoU %':>8}{'HD95':>12}   an example")
    summaries = {}
    for key, (scores, summary) in results.items():
        summaries[key] = summary
        if not parallel.rank():
            write_results(out / key, scores, summary, dict(prompts=key, **settings))
        hd95 = summary["hd95"]["mean"]
        hd95 = "n/a" if hd95 is None else f"{hd95:.2f} {summary['unit']}"
        dsc = 100 * summary["dsc"]["mean"]
        iou = 100 * summary["iou"]["mean"]
        say(f"{key:8}{dsc:8.2f}{iou:8.2f}{hd95:>12}   {prompt_sets[key][0][:70]}")
    if not parallel.rank():
        write_json(out / "prompts.json", dict(prompts=summaries, **settings))
    return summaries


def print_means(evaluations, folder):
    """Print means over the records of several runs, as of folds, and write them to means.json.

    A record's value is its mean over the runs that have it. evaluations: for each run (folder of its
    results, {prompt key: summary}). folder: of the runs. Raises ValueError for distances of two units.
    """
    outs, summaries_of = zip(*evaluations)
    units = {summary["unit"] for summaries in summaries_of for summary in summaries.values()}
    unit = units.pop()
    if units:
        raise ValueError("Some runs' distances are in px, others' in mm; give --spacing for all of them.")
    say("All runs (+-: standard deviation of their means)")
    results = {}
    for key in summaries_of[0]:
        results[key] = {}
        folders = [out / key for out in outs]
        for metric, (_, factor, _) in METRICS.items():
            result = mean_over_runs(folders, metric)
            results[key][metric] = result
            if result["n"]:
                means = []
                for summaries in summaries_of:
                    mean = summaries[key][metric]["mean"]
                    if mean is not None:
                        means.append(factor * mean)
                spread = np.std(means, ddof=1) if len(means) > 1 else 0
                title = metric_title(metric, unit)
                line = (
                    f"{key} {title:8} {factor * result['mean']:7.2f} +- {spread:.2f} over {len(means)} runs, "
                    f"{in_brackets(result['ci95'], factor)} over {result['n']} records"
                )
                say(line.lstrip())
        for name in ABSENT_SETS:
            alarms = [summaries[key].get("alarms", {}).get(name) for summaries in summaries_of]
            rates = [100 * of_run["mean"] for of_run in alarms if of_run]
            if rates:
                say(f"False alarms {np.mean(rates):.1f} % over {len(rates)} runs: {name}")
    file = Path(folder, outs[0].name, "means.json")
    write_json(file, results)
    say(f"Wrote {file}")


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
    if notice:
        say(notice, sys.stderr)
    count, errors = predict_folder(predictor, args.images, writer, args.batch_size, args.overwrite)
    files = count * len(writer.mask_folders)
    say(f"Wrote {'label maps' if args.label_map else 'masks'} to '{args.save_masks}': {files}")
    return errors


def main(argv=None):
    """Evaluate runs, or segment a folder of images; exits with 1 if an image could not be read."""
    args = parse_arguments(argv)
    runs = []
    for path in args.ckpt:
        runs += runs_below(path) or [path]
    if len(args.ckpt) > 1 and not args.ensemble:
        raise ValueError("Several --ckpt are for --ensemble, which averages them; else name one.")
    if len(runs) == 1 and args.ensemble:
        raise ValueError("--ensemble needs several runs: more than one --ckpt, or a folder of runs.")
    groups = [runs] if args.ensemble else [[run] for run in runs]
    if len(groups) > 1:
        if args.out or args.save_masks or args.save_probabilities or args.images:
            raise ValueError(
                f"'{args.ckpt[0]}' holds {len(runs)} runs, whose output would mix in one folder; evaluate "
                "them one by one, or with --ensemble."
            )
        refuse_other_runs(runs)
    elif args.ensemble and not args.images:
        refuse_other_records(runs, args.split, args.dataset)
    errors = []
    if args.images:
        errors = predict(args, runs)
    else:
        evaluations = [evaluate_run(args, group) for group in groups]
        if len(groups) > 1 and not parallel.rank():
            print_means(evaluations, args.ckpt[0])
    parallel.shut_down()
    if errors:
        write_line("\n".join(errors), sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    with friendly_errors():
        main()
