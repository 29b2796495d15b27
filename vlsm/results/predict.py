"""Predict masks with a run's checkpoint: of images of the model's size, and of a folder of images."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from PIL import Image

from vlsm.checkpoint import load
from vlsm.data.cache import chunks, normalise
from vlsm.data.images import EXTENSIONS, ImageError, image_files, mask_image, read_image, resize_image
from vlsm.results.figures import CYAN, overlay
from vlsm.system import parallel
from vlsm.system.console import progress
from vlsm.system.files import check_targets, owned_write
from vlsm.system.parallel import autocast, choose_device

SIDES = re.compile(r"\b(left|right|Left|Right)\b")
OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
READERS = 4  # threads that read images


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
    every program. mirror: as in `Predictor`. base: a VLSM in memory that shares its frozen weights. Raises as
    `vlsm.load`.
    """
    device, dtype = choose_device(parallel.join_processes(device), amp)
    with parallel.local_first():
        model = load(checkpoint, weights, base)
    model.place_on(device, dtype, kernels, compile)
    return Predictor(model, device, dtype, mirror)


class Predictor:
    """A model on its device, ready to segment uint8 images of its size.

    model: a VLSM that `vlsm.load` returned. dtype: autocast's, or None. mirror: average the probabilities of
    each image and of its mirror image. Attributes: `size`, the side of its images in pixels; `trained`,
    `total`, numbers of parameters.
    """

    def __init__(self, model, device, dtype, mirror=False):
        self.model = model
        self.device = device
        self.dtype = dtype
        self.mirror = mirror
        self.metadata = model.metadata
        self.size = model.metadata["image_size"]
        self.tokenizer = model.tokenizer()
        self.trained, self.total = model.count_parameters()

    def logits(self, images, prompts):
        """Return float32 logits `[B, 1, S, S]` of uint8 images `[B, 3, S, S]` and B prompts."""
        logits = self._logits(images, prompts)
        if not self.mirror:
            return logits
        swapped = [mirrored_prompt(prompt) for prompt in prompts]
        mirrored = self._logits(images.flip(-1), swapped)
        return mean_logits([logits, mirrored.flip(-1)])

    @torch.inference_mode()
    def _logits(self, images, prompts):
        with autocast(self.device, self.dtype):
            images = images.to(self.device)
            pixel_values = normalise(images, self.metadata["mean"], self.metadata["std"])
            return self.model(pixel_values, *self.tokenizer(prompts)).float()


class Ensemble:
    """Several `Predictor`s as one: the mean of their probabilities.

    Raises ValueError if they segment images of different sizes.
    """

    def __init__(self, predictors):
        first = predictors[0]
        self.predictors = predictors
        self.metadata = first.metadata
        self.size = first.size
        self.device = first.device
        sizes = {predictor.size for predictor in predictors}
        if len(sizes) > 1:
            raise ValueError(f"--ensemble needs runs of one image size; these have {sorted(sizes)} pixels.")
        self.trained = sum(predictor.trained for predictor in predictors)
        self.total = sum(predictor.total for predictor in predictors)

    def logits(self, images, prompts):
        """Return float32 logits `[B, 1, S, S]`, as `Predictor.logits`."""
        return mean_logits([predictor.logits(images, prompts) for predictor in self.predictors])


def load_ensemble(checkpoints, **settings):
    """Return the `Predictor` of one checkpoint, or the `Ensemble` of several, which share one base in memory.

    settings: of `load_predictor`.
    """
    first = load_predictor(checkpoints[0], **settings)
    if len(checkpoints) == 1:
        return first
    predictors = [first]
    for path in checkpoints[1:]:
        predictors.append(load_predictor(path, base=first.model, **settings))
    return Ensemble(predictors)


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
    return F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0, 0]


def mask_at_size(logits, shape, upsample="logits"):
    """Return the bool mask `[h, w]` of logits `[1, S, S]` at the original `shape`.

    upsample: "logits": enlarge bilinearly, then threshold; "mask": threshold, then enlarge.
    """
    if upsample == "logits":
        return logits_at_size(logits, shape) > 0
    mask = (logits[None] > 0).float()
    return F.interpolate(mask, shape, mode="nearest-exact")[0, 0] > 0


def mask_target(folder, name):
    """Return the path of a predicted mask: an image's or mask's name with .png (JPEG blurs)."""
    return Path(folder) / PurePosixPath(name).with_suffix(".png")


def save_png(image, path):
    """Write a Pillow image, or a bool mask as 0 and 255, as a PNG file that this program may replace."""
    if torch.is_tensor(image):
        image = mask_image(image.cpu())
    with owned_write(path) as temporary:
        image.save(temporary, format="PNG")


# Images without a ground truth


def predict_folder(
    predictor, source, prompt, out, batch_size=32, upsample="logits", overlays=False, overwrite=False
):
    """Write the masks of an image, or of a folder of images, below the folder `out`; processes share them.

    overlays: also write NAME.overlay.png. Returns (number of images that could be read, this process's
    messages on those that could not). Raises FileNotFoundError or ValueError if there are no images,
    FileExistsError rather than overwriting a user's file.
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
        raise ValueError(f"'{source}' holds no images ({', '.join(EXTENSIONS)}).")
    targets = [mask_target(out, file.relative_to(folder).as_posix()) for file in files]
    written = list(targets)
    if overlays:
        written += [overlay_target(target) for target in targets]
    check_targets(written, files, overwrite)
    errors = []
    batches = chunks(list(zip(files, targets)), batch_size)
    with ThreadPoolExecutor(READERS) as pool, progress(len(files), "segmenting") as bar:
        for _, batch in parallel.own_batches(batches):
            images = list(pool.map(_read_or_message, [file for file, _ in batch]))
            jobs = []
            for image, (_, target) in zip(images, batch):
                if isinstance(image, str):
                    errors.append(image)
                else:
                    jobs.append((image, target))
            if jobs:
                _segment(predictor, prompt, jobs, upsample, overlays)
            bar.update(len(batch))
    return len(files) - len(errors), errors


def overlay_target(mask):
    """Return the path of the overlay beside a mask."""
    return mask.with_suffix(".overlay.png")


def _segment(predictor, prompt, jobs, upsample, overlays):
    """Write the masks of a batch of (image uint8 `[H, W, 3]`, path of its mask)."""
    pixels = []
    for image, _ in jobs:
        small = resize_image(image, predictor.size)
        pixels.append(torch.from_numpy(small.transpose(2, 0, 1)))
    logits = predictor.logits(torch.stack(pixels), [prompt] * len(jobs))
    for (image, target), z in zip(jobs, logits):
        mask = mask_at_size(z, image.shape[:2], upsample)
        save_png(mask, target)
        if overlays:
            tinted = overlay(image, mask.cpu().numpy(), CYAN)
            save_png(Image.fromarray(tinted), overlay_target(target))


def _read_or_message(path):
    """Read an image; if it cannot be read, return the reason as text."""
    try:
        return read_image(path)
    except (ImageError, FileNotFoundError) as error:
        return str(error)
