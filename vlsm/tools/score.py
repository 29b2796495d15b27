"""Score a folder of predicted masks against a folder of true ones; files are paired by their stem."""

from pathlib import Path

import torch

from vlsm.data.images import image_files, read_mask, say_left_out
from vlsm.data.records import group_of
from vlsm.results.predict import overlay_target
from vlsm.results.scores import RESULT_FILES, describe, score, summarise, write_results
from vlsm.system.arguments import Parser, number, pattern
from vlsm.system.console import first_few, friendly_errors, progress, say
from vlsm.system.files import check_targets

EXAMPLES = r"""examples:
  python -m vlsm.tools.score predicted-masks my-folder/masks
  python -m vlsm.tools.score predicted-masks my-folder/masks --out scores --nsd-tolerance 3
  python -m vlsm.tools.score predicted-masks my-folder/masks --group "patient\d+"
"""


def masks_by_stem(folder):
    """Return {path below the folder without its suffix: file}.

    Raises FileNotFoundError if the folder is missing, ValueError for two files of one stem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    files = {}
    say_left_out(folder)
    for file in image_files(folder):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise ValueError(f"'{files[stem]}' and '{file}' have one stem, so their partner is unclear.")
        files[stem] = file
    return files


def score_folders(pred, target, tolerance=2.0, group=None):
    """Return the scores of two folders of masks, a dictionary for each pair.

    tolerance: of NSD, in pixels. group: pattern of the bootstrap's group in a mask's name. Raises as
    `masks_by_stem`, ValueError for masks without a partner or of another size.
    """
    predictions = masks_by_stem(pred)
    truths = masks_by_stem(target)
    if not predictions and not truths:
        raise ValueError(f"'{pred}' and '{target}' hold no masks.")
    overlays = set(map(overlay_target, predictions.values()))
    for stem in set(predictions) - set(truths):
        if predictions[stem] in overlays:
            del predictions[stem]
    unpaired = sorted(set(predictions) ^ set(truths))
    if unpaired:
        names = first_few(unpaired, 5)
        raise ValueError(f"Masks without a partner in the other folder ({len(unpaired)}): {names}.")
    scores = []
    for stem in progress(truths, "scoring", "mask"):
        prediction = read_mask(predictions[stem])
        truth = read_mask(truths[stem])
        if prediction.shape != truth.shape:
            raise ValueError(
                f"'{predictions[stem]}' and '{truths[stem]}' differ in size: {prediction.shape} and "
                f"{truth.shape} (height, width)."
            )
        row = score(torch.from_numpy(prediction), torch.from_numpy(truth), tolerance)
        scores.append(dict(row, mask=truths[stem].name, group=group_of(stem, group)))
    return scores


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.score")
    parser.add_argument("pred", metavar="PRED", help="folder of predicted masks")
    parser.add_argument("target", metavar="TARGET", help="folder of true masks")
    parser.add_argument(
        "--nsd-tolerance", type=number(float, 0), default=2.0, help="of NSD, in pixels (default 2)"
    )
    parser.add_argument(
        "--group",
        type=pattern,
        metavar="REGEX",
        help="the bootstrap draws whole groups: what this pattern finds in a mask's name (default: masks)",
    )
    parser.add_argument("--out", metavar="DIR", help="also write metrics.csv and metrics.json there")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that this program did not write"
    )
    args = parser.parse_args(argv)
    resampled = "mask"
    if args.group:
        resampled = f"what '{args.group}' finds in a mask's name"
    if args.out:
        check_targets([Path(args.out, name) for name in RESULT_FILES], overwrite=args.overwrite)

    scores = score_folders(args.pred, args.target, args.nsd_tolerance, args.group)
    summary = dict(summarise(scores, resampled), nsd_tolerance=args.nsd_tolerance)
    if args.out:
        write_results(Path(args.out), scores, summary, dict(pred=args.pred, target=args.target))
    say(describe(summary))
    say("+-: standard deviation over the masks")


if __name__ == "__main__":
    with friendly_errors():
        main()
