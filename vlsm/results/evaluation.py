"""Predict the masks of a split and score them, record by record; options and folder of an evaluation."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vlsm.data.cache import chunks, default_cache, prefetch
from vlsm.data.images import READERS, mask_image, read_labels, read_target
from vlsm.data.records import group_names, index_images
from vlsm.metrics import counted_pixels, is_alarm
from vlsm.results.predict import BATCH_SIZE, mask_target, masks_at_size, save_png, save_probability
from vlsm.results.scores import calibration_counts, score
from vlsm.segment import enlarge
from vlsm.system import parallel
from vlsm.system.arguments import number, pattern
from vlsm.system.console import progress, say_once

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
        help="the bootstrap draws whole groups: what this pattern finds in an image's name (default: as the "
        "run was split; the patient of camus and chexlocalize; else the image)",
    )
    add(
        "--upsample",
        default="logits",
        choices=["logits", "mask"],
        help="logits: enlarge bilinearly, then threshold (default); mask: threshold, then enlarge, as the "
        "published code does",
    )
    add("--weights", help="folder or hub id of the base, if it has moved")
    add(
        "--batch-size", type=number(int, 1), default=BATCH_SIZE, help="images at a time (default %(default)s)"
    )
    add("--cache-dir", default=default_cache(), help="folder of decoded images (default: %(default)s)")


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


def pixel_spacings(records, spacing=None):
    """Return the spacing (row, column) of each record's pixels in millimetres: `spacing`, else its own.

    None for all, unless all have one: their distances would be of two units.
    """
    spacings = [spacing or record.spacing for record in records]
    unknown = spacings.count(None)
    if 0 < unknown < len(records):
        say_once(
            "spacing",
            f"{unknown} of {len(records)} records have no spacing in dataset.json: all distances are in "
            "pixels. (--spacing ROW COLUMN, in millimetres, is for all.)",
        )
    return [None] * len(records) if unknown else spacings


# The predictions


def predictions(predictor, data, prompt_sets, batch_size, read=read_target):
    """Yield (index, {set's name: (prompt, logits `[1, S, S]`)}, truth `[H, W]`), on the device.

    read: reads the truth of a record's mask (default: uint8, 0, 1, and 255 where pixels are ignored).
    prompt_sets: {name: a text for each record, or None to leave the record out}. An image is encoded once for
    the prompts of all sets. Several processes share the records.
    """
    texts_of = list(zip(*prompt_sets.values()))  # record -> its text in each set
    wanted = [i for i, texts in enumerate(texts_of) if any(text is not None for text in texts)]
    images_at_a_time = max(1, batch_size // len(prompt_sets))
    batches = [batch for _, batch in parallel.own_batches(chunks(wanted, images_at_a_time))]
    with ThreadPoolExecutor(READERS) as pool, progress(len(wanted), "evaluating") as bar:

        def read_masks(batch):
            """Read masks at original size, in a thread, while the network works on the previous batch."""
            return list(pool.map(read, [data.records[i].mask for i in batch]))

        for batch, masks in prefetch(read_masks, batches):
            images, _ = data.batch(batch)
            texts = []
            for i in batch:  # images have equally many prompts: "" takes the place of None
                texts += [text or "" for text in texts_of[i]]
            logits = predictor.logits(images, texts).unflatten(0, (len(batch), -1))  # [B, P, 1, S, S]
            for i, mask, of_image in zip(batch, masks, logits):
                outputs = {}
                for name, text, of_text in zip(prompt_sets, texts_of[i], of_image):
                    if text is not None:
                        outputs[name] = text, of_text
                yield i, outputs, torch.from_numpy(mask).to(predictor.device)
            bar.update(len(batch))


def measure_prompts(predictor, data, prompt_sets, batch_size, measure):
    """Return {name: what `measure` returns of each record, in their order} of some sets of prompts.

    It is called as measure(name, index, prompt, logits `[1, S, S]`, truth uint8 `[H, W]`); truth: 255 where
    pixels are ignored. prompt_sets: {name: a text for each record, or None}. Results that are None are left
    out. Several processes share the records; each gets all results.
    """
    results = []
    for index, outputs, truth in predictions(predictor, data, prompt_sets, batch_size):
        for name, (prompt, logits) in outputs.items():
            result = measure(name, index, prompt, logits, truth)
            if result is not None:
                results.append((index, name, result))
    by_name = {name: [] for name in prompt_sets}
    for _, name, result in parallel.gather_sorted(results):
        by_name[name].append(result)
    return by_name


def evaluate_prompts(
    predictor, data, prompt_sets, tolerance=2.0, upsample="logits", batch_size=BATCH_SIZE, group=None,
    keep_masks=False, mask_folder=None, probability_folder=None, keep_largest=False, min_area=0,
    alarm_sets=(), spacing=None,
):  # fmt: skip
    """Return {name: the scores of a split's records, a dictionary for each} of some sets of prompts.

    prompt_sets: {name: a text for each record}. tolerance: of NSD. group: a pattern, as in `group_names`.
    keep_masks: add the predicted mask as `packed_mask`. mask_folder, probability_folder: where
    to write the predicted masks as 0/255 PNGs, and the probabilities as 16-bit PNGs. keep_largest, min_area:
    clean the masks, as `clean_mask` says. alarm_sets: names of sets that ask for what is not in the images,
    whose scores are `alarm` and `group` alone. spacing: as in `pixel_spacings`, for distances in millimetres.
    """
    groups = group_names(data.records, group)
    spacings = pixel_spacings(data.records, spacing)

    def measure(name, i, prompt, logits, truth):
        """Return the scores of record i; write its mask and probabilities if folders are given."""
        record = data.records[i]
        enlarged = enlarge(logits, truth.shape)  # [1, H, W]
        mask = masks_at_size(logits, enlarged, upsample, keep_largest=keep_largest, min_area=min_area)[0]
        if name in alarm_sets:
            counted, _ = counted_pixels(mask, truth)
            return dict(group=groups[i], alarm=is_alarm(counted[None]).item())
        if mask_folder:
            save_png(mask_image(mask.cpu()), mask_target(mask_folder, record.mask_name))
        if probability_folder:
            save_probability(enlarged[0], mask_target(probability_folder, record.mask_name))
        row = dict(
            image=record.name,
            mask=record.mask_name,
            group=groups[i],
            prompt=prompt,
            **score(mask, truth, tolerance, spacings[i]),
            **calibration_counts(enlarged[0].sigmoid(), truth),
        )
        row["class"] = record.class_word or ""
        if keep_masks:
            row["packed_mask"] = np.packbits(mask.cpu().numpy())
        return row

    return measure_prompts(predictor, data, prompt_sets, batch_size, measure)


def evaluate_split(predictor, data, prompts, **settings):
    """Return the scores of a split's records; prompts: a text for each. settings: of `evaluate_prompts`."""
    return evaluate_prompts(predictor, data, {"": prompts}, **settings)[""]


# Label maps


def class_prompts(records, prompts):
    """Return {class number: a text for the first record of each image, None for others}.

    An image that holds the class has its right prompt; one without it gets another image's prompt for it.
    """
    first, image_of = index_images(records)
    texts_of = defaultdict(dict)  # class number -> {image: text}
    for record, image, prompt in zip(records, image_of, prompts):
        texts_of[record.mask.value][image] = prompt
    prompt_sets = {}
    for value in sorted(texts_of):
        texts = texts_of[value]
        others = list(texts.values())
        prompt_sets[value] = [None] * len(records)
        for image, i in enumerate(first):
            prompt_sets[value][i] = texts.get(image, others[i % len(others)])
    return prompt_sets


def confusion_matrix(predictor, data, prompts, batch_size=BATCH_SIZE, **settings):
    """Return how many pixels of each true class are of each predicted one, int64 `[C + 1, C + 1]`.

    data: a split of label maps. Rows: the background, then the split's classes by their numbers; columns: the
    same, predicted. Each image is asked for all C classes; a pixel is of the most probable one, if that
    exceeds 0.5. Ignored pixels do not count. prompts: the records' right ones. settings: of `masks_at_size`.
    """

    def read_map(mask):
        return read_labels(mask.file)

    records = data.records
    prompt_sets = class_prompts(records, prompts)
    index_of = np.zeros(1 << 16, np.int64)  # class number -> row
    index_of[list(prompt_sets)] = range(1, 1 + len(prompt_sets))
    side = 1 + len(prompt_sets)
    counts = np.zeros(side**2, np.int64)
    for i, outputs, truth in predictions(predictor, data, prompt_sets, batch_size, read_map):
        numbers = truth.cpu().numpy()
        logits = torch.cat([of_class for _, of_class in outputs.values()])  # [C, S, S]
        masks = masks_at_size(logits, enlarge(logits, numbers.shape), exclusive=True, **settings)
        predicted = (masks.int().argmax(0) + 1) * masks.any(0)
        codes = side * index_of[numbers] + predicted.cpu().numpy()
        counts += np.bincount(codes[numbers != records[i].mask.ignore], minlength=side**2)
    counts = parallel.all_reduce_sum(counts.tolist(), predictor.device)
    return np.array(counts, np.int64).reshape(side, side)
