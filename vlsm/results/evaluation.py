"""Predict the masks of a split and score them, record by record; options and folder of an evaluation."""

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlsm.data.cache import chunks, default_cache, prefetch
from vlsm.data.images import read_mask
from vlsm.results.predict import logits_at_size, mask_at_size, mask_target, save_png
from vlsm.results.scores import calibration_counts, group_names, score
from vlsm.system import parallel
from vlsm.system.arguments import number
from vlsm.system.console import progress

READERS = 4  # threads that read masks


# The split


def add_split_arguments(parser):
    """Add the options of a program that evaluates a run on a split."""
    add = parser.add_argument_group("data").add_argument
    add("--split", default="test", choices=["train", "val", "test"], help="default: test")
    add("--dataset", help="another data set than the run's: a name or a folder")
    add("--data-root", help="folder that holds the data sets' folders (default: the run's)")
    add("--prompts", help='random, class, a key such as p6, or a text: "a polyp" (default: the run\'s)')
    add("--seed", type=number(int, 0), help="seed of random prompts (default: the run's)")
    add(
        "--group",
        type=pattern,
        metavar="REGEX",
        help="the bootstrap draws whole groups: what this pattern finds in an image's name (default: the "
        "patient of camus and chexlocalize, else the image)",
    )
    add(
        "--upsample",
        default="logits",
        choices=["logits", "mask"],
        help="logits: enlarge bilinearly, then threshold (default); mask: threshold, then enlarge, as the "
        "published code does",
    )
    add("--weights", help="folder or hub id of the base, if it has moved")
    add("--batch-size", type=number(int, 1), default=32, help="images at a time (default 32)")
    add("--cache-dir", default=default_cache(), help="folder of decoded images (default: %(default)s)")


def pattern(text):
    """Check a regular expression: a `type=` for argparse. Raises ArgumentTypeError if it is none."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression ({error})") from None
    return text


def results_folder(checkpoint, metadata, split, dataset=None, suffixes=()):
    """Return the folder of an evaluation's results: eval-SPLIT in the run's folder.

    The folder's name ends with the data set, if it is not the run's own, and with `suffixes` (mirror, ...).
    """
    run = Path(checkpoint)
    if not run.is_dir():
        run = run.parent
    parts = ["eval", split]
    if dataset and dataset != metadata["dataset"]:
        parts.append(Path(dataset).name)
    return run / "-".join([*parts, *suffixes])


# The predictions


def predictions(predictor, data, prompts, batch_size):
    """Yield batches of (index, prompt, logits `[1, S, S]`, true mask bool `[H, W]`), on the device.

    prompts: a text for each record; records whose text is None are left out. Several processes share them.
    """
    wanted = [i for i, prompt in enumerate(prompts) if prompt is not None]
    batches = [batch for _, batch in parallel.own_batches(chunks(wanted, batch_size))]
    with ThreadPoolExecutor(READERS) as pool, progress(len(wanted), "evaluating") as bar:

        def read_masks(batch):
            """Read masks at original size, in a thread, while the network works on the previous batch."""
            return list(pool.map(read_mask, [data.records[i].mask for i in batch]))

        for batch, masks in prefetch(read_masks, batches):
            images, _ = data.batch(batch)
            texts = [prompts[i] for i in batch]
            logits = predictor.logits(images, texts)
            truths = [torch.from_numpy(mask).to(predictor.device) for mask in masks]
            yield list(zip(batch, texts, logits, truths))
            bar.update(len(batch))


def measure_records(predictor, data, prompts, batch_size, measure):
    """Return measure(index, prompt, logits `[1, S, S]`, true mask `[H, W]`) of each record, in their order.

    Results that are None are left out. Several processes share the records; each gets all results.
    """
    results = []
    for batch in predictions(predictor, data, prompts, batch_size):
        for index, prompt, logits, truth in batch:
            result = measure(index, prompt, logits, truth)
            if result is not None:
                results.append((index, result))
    return [result for _, result in parallel.gather_sorted(results)]


def evaluate_split(
    predictor, data, prompts, tolerance=2.0, upsample="logits", batch_size=32, group=None, keep_masks=False,
    mask_folder=None, probability_folder=None,
):  # fmt: skip
    """Return the scores of a split's records, a dictionary for each.

    prompts: a text for each record. tolerance: of NSD, in pixels. group: a pattern, as in `group_names`.
    keep_masks: add the predicted mask as `packed_mask`. mask_folder, probability_folder: where to write the
    predicted masks as 0/255 PNGs, and the probabilities as 16-bit PNGs.
    """
    groups = group_names(data.records, group)

    def measure(i, prompt, logits, truth):
        """Return the scores of record i; write its mask and probabilities if folders are given."""
        record = data.records[i]
        probability = logits_at_size(logits, truth.shape).sigmoid()
        mask = mask_at_size(logits, truth.shape, upsample)
        if mask_folder:
            save_png(mask, mask_target(mask_folder, record.mask_name))
        if probability_folder:
            levels = (probability.double() * 65535).round().cpu().numpy()
            image = Image.fromarray(levels.astype(np.uint16))
            save_png(image, mask_target(probability_folder, record.mask_name))
        row = dict(image=record.name, mask=record.mask_name, group=groups[i], prompt=prompt)
        row.update(score(mask, truth, tolerance))
        row.update(calibration_counts(probability, truth))
        if keep_masks:
            row["packed_mask"] = np.packbits(mask.cpu().numpy())
        return row

    return measure_records(predictor, data, prompts, batch_size, measure)
