"""Masks of a checkpoint: of images of the model's size, and of a folder of images without a ground truth."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from PIL import Image

from vlsm.checkpoint import load
from vlsm.data.cache import chunks
from vlsm.data.images import EXTENSIONS, ImageError, image_files, mask_image, read_image, resize_image
from vlsm.data.pixel_values import normalise
from vlsm.results.figures import CYAN, overlay
from vlsm.system import parallel
from vlsm.system.console import progress
from vlsm.system.device import autocast, choose_device
from vlsm.system.files import check_targets, owned_write

SIDES = re.compile(r"\b([Ll]eft|[Rr]ight)\b")


class Predictor:
    """A checkpoint, ready to segment uint8 images of the model's size.

    options: `EvaluateOptions` (the machine's, and mirror). weights: the base's folder or hub id, if it has
    moved.
    """

    def __init__(self, checkpoint, options, weights=None):
        self.device, self.dtype = choose_device(parallel.join_processes(options.device), options.amp)
        with parallel.local_first():
            model = load(checkpoint, weights)
        self.model = model.place_on(self.device, self.dtype, options.kernels, options.compile)
        self.mirror = options.mirror
        self.about = model.metadata
        self.size = self.about["image_size"]
        self.tokenizer = model.tokenizer()

    def count_parameters(self):
        """Return (trained, total) numbers of parameters."""
        return self.model.count_parameters()

    def logits(self, images, prompts):
        """Return float32 logits `[B, 1, S, S]` of uint8 images `[B, 3, S, S]` and B prompts.

        With --mirror those of the mean probability of each image and of its mirror image.
        """
        if not self.mirror:
            return self._logits(images, prompts)
        mirrored = self._logits(images.flip(-1), [mirrored_prompt(p) for p in prompts])
        return mean_logits([self._logits(images, prompts), mirrored.flip(-1)])

    @torch.inference_mode()
    def _logits(self, images, prompts):
        with autocast(self.device, self.dtype):
            pixel_values = normalise(images.to(self.device), self.about["mean"], self.about["std"])
            return self.model(pixel_values, *self.tokenizer(prompts)).float()


class Ensemble:
    """Several checkpoints as one `Predictor`: the mean of their probabilities.

    Raises ValueError where they segment images of different sizes.
    """

    def __init__(self, checkpoints, options, weights=None):
        self.members = [Predictor(path, options, weights) for path in checkpoints]
        first = self.members[0]
        self.about, self.size, self.device = first.about, first.size, first.device
        if any(member.size != self.size for member in self.members):
            sizes = ", ".join(str(member.size) for member in self.members)
            raise ValueError(f"--ensemble: the runs' images are of different sizes ({sizes} pixels).")

    def count_parameters(self):
        """Return (trained, total) numbers of parameters of all members together."""
        return tuple(map(sum, zip(*(member.count_parameters() for member in self.members))))

    def logits(self, images, prompts):
        """Return what `Predictor.logits` does."""
        return mean_logits([member.logits(images, prompts) for member in self.members])


def mean_logits(logits):
    """Return the logits of the mean of several logits' probabilities."""
    return torch.logit(torch.stack([z.double().sigmoid() for z in logits]).mean(0), eps=1e-12).float()


def mirrored_prompt(prompt):
    """Return a prompt as it holds for the mirrored image: left and right exchanged."""
    return SIDES.sub(lambda word: {"l": "right", "L": "Right", "r": "left", "R": "Left"}[word[0][0]], prompt)


def logits_at_size(logits, shape):
    """Return logits `[1, S, S]` enlarged bilinearly to the original `shape` (h, w), `[h, w]`."""
    return F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0, 0]


def mask_at_size(logits, shape, upsample):
    """Return the bool mask of the original `shape` (h, w) of logits `[1, S, S]`.

    upsample: "logits", enlarge bilinearly, then threshold; "mask", threshold, then enlarge.
    """
    if upsample == "mask":
        return F.interpolate((logits[None] > 0).float(), shape, mode="nearest-exact")[0, 0] > 0
    return logits_at_size(logits, shape) > 0


def mask_target(folder, name):
    """Return the path of a predicted mask: the true one's name or the image's, with .png (JPEG blurs)."""
    return Path(folder) / PurePosixPath(name).with_suffix(".png")


def save_png(image, path):
    """Write a Pillow image, or a bool mask as 0 and 255, as a PNG file of this program's."""
    with owned_write(path) as temporary:
        (mask_image(image.cpu()) if torch.is_tensor(image) else image).save(temporary, format="PNG")


def predict_folder(predictor, source, prompt, out, options):
    """Write the masks of an image, or of a folder of images, below the folder `out`.

    options: `EvaluateOptions`. Several processes share the images. Returns how many could be read, and a
    line on each of this process's that could not. Raises FileNotFoundError or ValueError where there are
    none, FileExistsError where a user's file would be written over.
    """
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(f"There is no picture or folder '{root}'.")
    files = [root] if root.is_file() else image_files(root)
    names = [p.name if root.is_file() else p.relative_to(root).as_posix() for p in files]
    masks = [mask_target(out, name) for name in names]
    overlays = [mask.with_suffix(".overlay.png") for mask in masks]
    if not files:
        raise ValueError(f"'{root}' holds no pictures ({', '.join(EXTENSIONS)}).")
    check_targets(masks + (overlays if options.overlay else []), files, options.overwrite)
    broken = []
    with ThreadPoolExecutor(4) as pool, progress(len(files), "segmenting") as bar:
        for _, batch in parallel.own_batches(chunks(list(zip(files, masks, overlays)), options.batch_size)):
            read = list(pool.map(read_picture, [file for file, *_ in batch]))
            broken += [image for image in read if isinstance(image, str)]
            batch = [(image, *row) for image, row in zip(read, batch) if not isinstance(image, str)]
            if batch:
                segment(predictor, prompt, batch, options)
            bar.update(len(read))
    return len(files) - len(broken), broken


def segment(predictor, prompt, batch, options):
    """Write the masks of a batch of (image, its file, the mask's, the overlay's)."""
    images = [image for image, *_ in batch]
    small = [torch.from_numpy(resize_image(i, predictor.size).transpose(2, 0, 1)) for i in images]
    logits = predictor.logits(torch.stack(small), [prompt] * len(images))
    for (image, _, target, drawn), z in zip(batch, logits):
        mask = mask_at_size(z, image.shape[:2], options.upsample)
        save_png(mask, target)
        if options.overlay:
            save_png(Image.fromarray(overlay(image, mask.cpu().numpy(), CYAN)), drawn)


def read_picture(path):
    """Read an image; returns a line that says why it cannot be read where that is so."""
    try:
        return read_image(path)
    except (ImageError, FileNotFoundError) as error:
        return str(error)
