"""Masks of a checkpoint: of images of the model's size, and of a folder of images without a ground truth."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from PIL import Image

from vlsm.checkpoint import load
from vlsm.data.cache import chunks
from vlsm.data.images import EXTENSIONS, image_files, mask_image, read_image, resize_image
from vlsm.data.pixel_values import normalise
from vlsm.results.figures import CYAN, overlay
from vlsm.system import parallel
from vlsm.system.console import progress
from vlsm.system.device import autocast, choose_device
from vlsm.system.files import atomic_write


class Predictor:
    """A checkpoint, ready to segment uint8 images of the model's size.

    machine: `MachineOptions`. weights: the base's folder or hub id, if it has moved.
    """

    def __init__(self, checkpoint, machine, weights=None):
        self.device, self.dtype = choose_device(parallel.join_processes(machine.device), machine.amp)
        with parallel.local_first():
            model = load(checkpoint, weights)
        self.model = model.place_on(self.device, self.dtype, machine.kernels, machine.compile)
        self.about = model.about
        self.size = self.about["image_size"]
        self.tokenizer = model.tokenizer()

    @torch.inference_mode()
    def logits(self, images, prompts):
        """Return float32 logits `[B, 1, S, S]` of uint8 images `[B, 3, S, S]` and B prompts."""
        with autocast(self.device, self.dtype):
            pixel_values = normalise(images.to(self.device), self.about["mean"], self.about["std"])
            return self.model(pixel_values, *self.tokenizer(prompts)).float()


def mask_at_size(logits, shape, upsample):
    """Return the bool mask of the original `shape` (h, w) of logits `[1, S, S]`.

    upsample: "logits", enlarge bilinearly, then threshold; "mask", threshold, then enlarge.
    """
    if upsample == "mask":
        return F.interpolate((logits[None] > 0).float(), shape, mode="nearest-exact")[0, 0] > 0
    return F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0, 0] > 0


def save_mask(mask, folder, name):
    """Write a bool mask as a 0/255 PNG under the name of the true mask (with .png: JPEG blurs)."""
    _save_png(mask_image(mask.cpu()), Path(folder) / PurePosixPath(name).with_suffix(".png"))


def _save_png(image, path):
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def predict_folder(predictor, source, prompt, out, upsample="logits", batch_size=32, with_overlay=False):
    """Write the masks of an image, or of a folder of images, below the folder `out`; returns how many.

    Several processes share the images. with_overlay: write NAME.overlay.png too. Raises FileNotFoundError or
    ValueError where there are no images, or two would be written to one file.
    """
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(f"There is no picture or folder '{root}'.")
    files = [root] if root.is_file() else image_files(root)
    names = [p.name if root.is_file() else p.relative_to(root).as_posix() for p in files]
    targets = [str(PurePosixPath(n).with_suffix(".png")) for n in names]
    if not files:
        raise ValueError(f"'{root}' holds no pictures ({', '.join(EXTENSIONS)}).")
    if len(set(targets)) < len(targets):
        twice = next(t for t in targets if targets.count(t) > 1)
        raise ValueError(
            f"Several pictures would be written to '{twice}'; rename them so that their stems differ."
        )
    with ThreadPoolExecutor(4) as pool, progress(len(files), "segmenting") as bar:
        for _, batch in parallel.own_batches(chunks(list(zip(files, targets)), batch_size)):
            images = list(pool.map(read_picture, [file for file, _ in batch]))
            small = [torch.from_numpy(resize_image(i, predictor.size).transpose(2, 0, 1)) for i in images]
            logits = predictor.logits(torch.stack(small), [prompt] * len(images))
            for image, (_, name), z in zip(images, batch, logits):
                mask = mask_at_size(z, image.shape[:2], upsample)
                save_mask(mask, out, name)
                if with_overlay:
                    drawn = Image.fromarray(overlay(image, mask.cpu().numpy(), CYAN))
                    _save_png(drawn, Path(out) / PurePosixPath(name).with_suffix(".overlay.png"))
            bar.update(len(images))
    return len(files)


def read_picture(path):
    """Read an image. Raises ValueError where it cannot be read."""
    try:
        return read_image(path)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read as a picture ({error}).") from error
