"""Predict masks with a run's checkpoint: of images of the model's size, and of a folder of images."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from vlsm.checkpoint import load
from vlsm.data.cache import chunks
from vlsm.data.images import (
    EXTENSIONS,
    READERS,
    ImageError,
    image_files,
    left_out,
    mask_image,
    read_image,
    say_left_out,
)
from vlsm.results.figures import PREDICTION, overlay, rgb
from vlsm.segment import enlarge, image_logits, logit_of, to_batch
from vlsm.system import parallel
from vlsm.system.console import progress
from vlsm.system.files import check_targets, owned_write, write_json
from vlsm.system.parallel import choose_device
from vlsm.system.plots import COLOURS

BATCH_SIZE = 16  # images at a time: on a CPU larger tensors are slow to allocate
SIDES = re.compile(r"\b(left|right|Left|Right)\b")
OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def load_predictor(
    checkpoint,
    weights=None,
    device="auto",
    amp="auto",
    kernels="auto",
    compile="auto",
    mirror=False,
    base=None,
):
    """Return the `Predictor` of a run's checkpoint, on its device; joins the processes that torchrun started.

    weights: folder or hub id of the base, if it has moved. device, amp, kernels, compile: the options of
    every program; "auto" does not compile: that takes longer than some hundred images. mirror: as in
    `Predictor`. base: a VLSM in memory that shares its frozen weights. Raises as `vlsm.load`.
    """
    device, dtype = choose_device(parallel.join_processes(device), amp)
    with parallel.local_first():
        model = load(checkpoint, weights, base)
    model.place_on(device, dtype, kernels, "off" if compile == "auto" else compile)
    return Predictor(model, mirror)


class Predictor:
    """A model on its device, ready to segment uint8 images of its size.

    model: a VLSM that `vlsm.load` returned, on its device. mirror: average the probabilities of each image
    and of its mirror image. Attributes: `size`, the side of its images in pixels; `trained`, `total`, numbers
    of parameters.
    """

    def __init__(self, model, mirror=False):
        self.model = model
        self.device = next(model.parameters()).device
        self.mirror = mirror
        self.metadata = model.metadata
        self.size = model.metadata["image_size"]
        self.trained, self.total = model.count_parameters()

    def vocabulary(self):
        """Return the whole words of the tokenizer's vocabulary."""
        return self.model.tokenizer().words()

    def logits(self, images, prompts):
        """Return float32 logits `[B * P, 1, S, S]` of uint8 images `[B, 3, S, S]` and B * P prompts.

        The first P prompts are of the first image, and so on; each image is encoded once.
        """
        logits = image_logits(self.model, images, prompts)
        if not self.mirror:
            return logits
        swapped = [mirrored_prompt(prompt) for prompt in prompts]
        mirrored = image_logits(self.model, images.flip(-1), swapped)
        return mean_logits([logits, mirrored.flip(-1)])


class Ensemble(Predictor):
    """Several `Predictor`s as one: the mean of their probabilities.

    Raises ValueError if they segment images of different sizes.
    """

    def __init__(self, predictors):
        super().__init__(predictors[0].model)
        self.predictors = predictors
        sizes = {predictor.size for predictor in predictors}
        if len(sizes) > 1:
            raise ValueError(f"--ensemble needs runs of one image size; these have {sorted(sizes)} pixels.")
        self.trained = sum(predictor.trained for predictor in predictors)
        self.total = sum(predictor.total for predictor in predictors)

    def logits(self, images, prompts):
        """Return float32 logits `[B * P, 1, S, S]`, as `Predictor.logits`."""
        return mean_logits([predictor.logits(images, prompts) for predictor in self.predictors])


def load_predictors(checkpoints, **settings):
    """Return the `Predictor`s of checkpoints, which share one base in memory.

    settings: of `load_predictor`.
    """
    predictors = []
    base = None
    for path in checkpoints:
        predictor = load_predictor(path, base=base, **settings)
        base = base or predictor.model
        predictors.append(predictor)
    return predictors


def load_ensemble(checkpoints, **settings):
    """Return the `Predictor` of one checkpoint, or the `Ensemble` of several.

    settings: of `load_predictor`.
    """
    predictors = load_predictors(checkpoints, **settings)
    return Ensemble(predictors) if len(predictors) > 1 else predictors[0]


def mean_logits(logits):
    """Average the probabilities of several logits; returns float32 logits of their shape."""
    probabilities = torch.stack([z.double().sigmoid() for z in logits])
    return torch.logit(probabilities.mean(0), eps=1e-12).float()


def mirrored_prompt(prompt):
    """Return a prompt for the mirrored image: left and right exchanged."""
    return SIDES.sub(lambda word: OTHER_SIDE[word[0]], prompt)


# At the original size


def logits_at_size(logits, shape):
    """Enlarge logits `[1, S, S]` bilinearly to the original `shape` (h, w), `[h, w]`."""
    return enlarge(logits, shape)[0]


def masks_at_size(
    logits, enlarged, upsample="logits", bound=0.0, exclusive=False, keep_largest=False, min_area=0
):
    """Return bool masks `[P, h, w]` at the original size, of logits `[P, S, S]` and the same `enlarged`.

    bound: masks are where the logits exceed it. upsample: "logits": threshold the enlarged logits; "mask":
    threshold, then enlarge. exclusive: a pixel is of the largest logit alone. keep_largest, min_area: clean
    the masks, as `clean_mask` says.
    """
    if upsample == "logits":
        logits = enlarged
    masks = logits > bound
    if exclusive:
        masks &= F.one_hot(logits.argmax(0), len(logits)).movedim(-1, 0).bool()
    if upsample == "mask":
        masks = F.interpolate(masks[None].float(), enlarged.shape[1:], mode="nearest-exact")[0] > 0
    if keep_largest or min_area:
        cleaned = [clean_mask(mask, keep_largest, min_area) for mask in masks.cpu().numpy()]
        masks = torch.from_numpy(np.stack(cleaned)).to(masks.device)
    return masks


def clean_mask(mask, keep_largest=False, min_area=0):
    """Remove pieces of a mask bool `[H, W]`: those of fewer than `min_area` pixels, or all but the largest.

    Pixels that touch at a side or a corner are of one piece.
    """
    pieces, _ = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(pieces.ravel())
    areas[0] = 0  # background
    kept = areas >= max(min_area, 1)
    if keep_largest:
        kept &= np.arange(len(areas)) == areas.argmax()
    return kept[pieces]


def mask_target(folder, name):
    """Return the path of a predicted mask: an image's or mask's name with .png (JPEG blurs)."""
    return Path(folder) / PurePosixPath(name).with_suffix(".png")


def save_probability(logits, path):
    """Write the probabilities of logits `[h, w]` as a 16-bit PNG: 65535 is 1."""
    levels = (logits.sigmoid().double() * 65535).round().cpu().numpy()
    save_png(Image.fromarray(levels.astype(np.uint16)), path)


def save_png(image, path):
    """Write a Pillow image as a PNG file that this program may replace."""
    with owned_write(path) as temporary:
        image.save(temporary, format="PNG")


# Images without a ground truth


class MaskWriter:
    """Writes what is asked for of images, one after another, below the folder `out`.

    One prompt: NAME.png, a mask of 0 and 255; several: the same in a folder for each. label_map: instead
    NAME.png with class numbers, and dataset.json, which names them. probability_folder: also write the
    probabilities, as 16-bit PNGs. overlays: also write NAME.overlay.png. threshold: of the probability.
    keep_largest, min_area: as in `clean_mask`. Raises ValueError for prompts that cannot be told apart.
    """

    def __init__(
        self, prompts, out, upsample="logits", threshold=0.5, label_map=False, overlays=False,
        probability_folder=None, keep_largest=False, min_area=0,
    ):  # fmt: skip
        self.prompts = prompts
        self.label_file = Path(out) / "dataset.json" if label_map else None
        self.overlays = overlays
        self.mask_settings = dict(
            upsample=upsample,
            bound=logit_of(threshold),
            exclusive=label_map,
            keep_largest=keep_largest,
            min_area=min_area,
        )
        self.mask_folders = [Path(out)] if label_map else prompt_folders(out, prompts)
        self.probability_folders = []
        if probability_folder:
            self.probability_folders = prompt_folders(probability_folder, prompts)
        if label_map and ("background" in prompts or len(set(prompts)) < len(prompts)):
            raise ValueError("--label-map needs prompts that differ, other than 'background'.")

    def targets(self, name):
        """Return the paths of all files that `write` makes of an image."""
        masks = [mask_target(folder, name) for folder in self.mask_folders]
        probabilities = [mask_target(folder, name) for folder in self.probability_folders]
        overlays = [overlay_target(mask) for mask in masks] if self.overlays else []
        return masks + probabilities + overlays

    def write(self, name, image, logits):
        """Write the files of an image uint8 `[H, W, 3]` from its logits `[P, S, S]`."""
        enlarged = enlarge(logits, image.shape[:2])
        for folder, of_prompt in zip(self.probability_folders, enlarged):
            save_probability(of_prompt, mask_target(folder, name))
        masks = masks_at_size(logits, enlarged, **self.mask_settings).cpu().numpy()
        if self.label_file:
            colours = class_colours(len(masks))
            numbers = (masks.argmax(0) + 1) * masks.any(0)
            labels = Image.fromarray(numbers.astype(np.uint8))
            labels.putpalette(bytes(3) + colours.tobytes())  # black is background
            self.save(mask_target(self.mask_folders[0], name), labels, image, masks, colours)
        else:
            for folder, mask in zip(self.mask_folders, masks):
                self.save(mask_target(folder, name), mask_image(mask), image, [mask], [PREDICTION])

    def save(self, target, picture, image, masks, colours):
        """Write a mask or a label map and, if asked for, its overlay."""
        save_png(picture, target)
        if self.overlays:
            for mask, colour in zip(masks, colours):
                image = overlay(image, mask, colour)
            save_png(Image.fromarray(image), overlay_target(target))

    def write_label_names(self):
        """Write dataset.json in nnU-Net's form, if label maps are written: {"labels": {name: number}}."""
        if self.label_file:
            names = ["background", *self.prompts]
            write_json(self.label_file, dict(labels={name: number for number, name in enumerate(names)}))


def prompt_folders(folder, prompts):
    """Return a folder for each prompt below `folder`, named by its letters and digits; itself for one prompt.

    Raises ValueError for two prompts of one name.
    """
    if len(prompts) == 1:
        return [Path(folder)]
    folders = {}
    for prompt in prompts:
        name = part_of_name(prompt) or "prompt"
        if name in folders:
            raise ValueError(f"--prompt '{prompt}' and '{folders[name]}' would share the folder '{name}'.")
        folders[name] = prompt
    return [Path(folder) / name for name in folders]


def part_of_name(text):
    """Return a text's letters and digits, at most 60, for the name of a file or folder."""
    return re.sub(r"[^\w-]+", "-", text).strip("-")[:60]


def class_colours(count):
    """Return the colours of `count` classes, uint8 `[count, 3]`; from the eighth on they are darker."""
    palette = np.array([rgb(colour) for colour in COLOURS])
    rounds, places = np.divmod(np.arange(count), len(palette))
    return (palette[places] * 0.6 ** rounds[:, None]).astype(np.uint8)


def predict_folder(predictor, source, writer, batch_size=BATCH_SIZE, overwrite=False):
    """Write the masks of an image, or of a folder of images, by a `MaskWriter`; processes share them.

    Returns (number of images that could be read, this process's messages on those that could not). Raises
    FileNotFoundError or ValueError if there are no images, FileExistsError rather than overwriting a user's
    file.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"There is no image or folder '{source}'.")
    files = [source]
    folder = source.parent
    if source.is_dir():
        files = image_files(source)
        folder = source
        if not files:
            others = left_out(source) or "nothing"
            raise ValueError(f"'{source}' holds no images ({', '.join(EXTENSIONS)}); it holds {others}.")
        say_left_out(source)
    targets = [writer.label_file] if writer.label_file else []
    for file in files:
        targets += writer.targets(file.relative_to(folder).as_posix())
    check_targets(targets, files, overwrite)
    if not parallel.rank():
        writer.write_label_names()
    errors = []
    # a batch has `batch_size` masks, not images: each prompt takes a pass of the decoder
    batches = chunks(files, max(1, batch_size // len(writer.prompts)))
    with ThreadPoolExecutor(READERS) as pool, progress(len(files), "segmenting") as bar:
        for _, batch in parallel.own_batches(batches):
            names = []
            images = []
            for file, image in zip(batch, pool.map(_read_or_message, batch)):
                if isinstance(image, str):
                    errors.append(image)
                else:
                    names.append(file.relative_to(folder).as_posix())
                    images.append(image)
            if images:
                pixels = to_batch(images, predictor.size)
                logits = predictor.logits(pixels, writer.prompts * len(images))
                logits = logits.view(len(images), -1, *logits.shape[2:])  # [B, P, S, S]
                for name, image, of_image in zip(names, images, logits):
                    writer.write(name, image, of_image)
            bar.update(len(batch))
    return len(files) - len(errors), errors


def overlay_target(mask):
    """Return the path of the overlay beside a mask."""
    return mask.with_suffix(".overlay.png")


def _read_or_message(path):
    """Read an image; if it cannot be read, return the reason as text."""
    try:
        return read_image(path)
    except (ImageError, FileNotFoundError) as error:
        return str(error)
