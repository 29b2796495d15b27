"""What a checkpoint predicts of a split, record by record, and its scores."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from vlsm.data.cache import chunks, prefetch
from vlsm.data.images import read_mask
from vlsm.results.intervals import group_names
from vlsm.results.predict import logits_at_size, mask_at_size, mask_target, save_png
from vlsm.results.scores import calibration_counts, score
from vlsm.system import parallel
from vlsm.system.console import progress


def predictions(predictor, data, prompts, batch_size):
    """Yield batches of (index, prompt, logits `[1, S, S]`, true mask bool `[H, W]`), on the device.

    prompts: a text for each record; records whose text is None are left out. Several processes share them.
    """
    wanted = [i for i in range(len(data)) if prompts[i] is not None]
    own = [batch for _, batch in parallel.own_batches(chunks(wanted, batch_size))]
    with ThreadPoolExecutor(4) as pool, progress(len(wanted), "evaluating") as bar:

        def read(batch):  # original masks, while the network works on the batch before
            return list(pool.map(lambda i: torch.from_numpy(read_mask(data.records[i].mask)), batch))

        for batch, masks in prefetch(read, own):
            images = data.batch(list(batch))[0]
            texts = [prompts[i] for i in batch]
            logits = predictor.logits(images, texts)
            yield list(zip(batch, texts, logits, (mask.to(predictor.device) for mask in masks)))
            bar.update(len(batch))


def gather(rows):
    """Return the (index, ...) rows of all processes in the records' order, without their indices."""
    return [row for _, *row in parallel.gather_sorted(rows)]


def measure_records(predictor, data, prompts, batch_size, measure):
    """Return measure(index, prompt, logits `[1, S, S]`, true mask) of each record, without those of None."""
    rows = []
    for batch in predictions(predictor, data, prompts, batch_size):
        rows += [(item[0], value) for item in batch if (value := measure(*item)) is not None]
    return [value for (value,) in gather(rows)]


def evaluate(predictor, data, prompts, options, group=None, keep=False, write=False):
    """Return the scores of a split's records (dictionaries) and, where `keep`, their packed masks.

    prompts: a text for each record. options: `EvaluateOptions`. group: a pattern, as in `group_names`. write:
    whether --save-masks and --save-probabilities apply.
    """
    records, rows = data.records, []
    groups = group_names(records, group)
    for batch in predictions(predictor, data, prompts, options.batch_size):
        indices, texts, logits, truths = zip(*batch)
        enlarged = [logits_at_size(z, t.shape) for z, t in zip(logits, truths)]
        if options.upsample == "logits":
            predicted = [z > 0 for z in enlarged]
        else:
            predicted = [mask_at_size(z, t.shape, options.upsample) for z, t in zip(logits, truths)]
        found = score(list(zip(predicted, truths)), options.nsd_tolerance)
        for i, text, z, truth, mask, row in zip(indices, texts, enlarged, truths, predicted, found):
            probability = z.sigmoid()
            about = dict(image=records[i].name, mask=records[i].mask_name, group=groups[i], prompt=text)
            row = {**about, **row, **calibration_counts(probability, truth)}
            rows.append((i, row, np.packbits(mask.cpu().numpy()) if keep else None))
            if write and options.save_masks:
                save_png(mask, mask_target(options.save_masks, records[i].mask_name))
            if write and options.save_probabilities:
                deep = (probability.double() * 65535).round().cpu().numpy().astype(np.uint16)
                save_png(Image.fromarray(deep), mask_target(options.save_probabilities, records[i].mask_name))
    found = gather(rows)
    return [row for row, _ in found], [mask for _, mask in found]
