"""Masks of a checkpoint: of pictures of the model's size, as evaluate.py wants them, and of a folder of pictures without a ground truth."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import parallel, pictures, runtime
from .cache import parts_of
from .checkpoint import load, replacing
from .console import progress
from .images import EXTENSIONS, normalise, picture_files, read_image, resize_image


class Predictor:
    """A checkpoint, ready to segment uint8 pictures of the model's size."""

    def __init__(self, args):
        self.device, self.dtype = runtime.choose(parallel.start(args.device), args.amp)
        with parallel.first_here():
            model = load(args.ckpt, args.weights)
        self.model = runtime.place(model, self.device, self.dtype, args.kernels, args.compile)
        self.about = self.model.about
        self.size = self.about["image_size"]
        self.tokenizer = self.model.tokenizer()

    @torch.inference_mode()
    def logits(self, pixels, prompts):
        """uint8 `[B, 3, S, S]` and B prompts -> float32 logits `[B, 1, S, S]`, on the device."""
        with runtime.autocast(self.device, self.dtype):
            pixels = normalise(pixels.to(self.device), mean=self.about["mean"], std=self.about["std"])
            return self.model(pixels, *self.tokenizer(prompts)).float()


def enlarge(logits, shape, how):
    """Logits `[1, S, S]` -> bool mask of the original `shape` (h, w)."""
    if how == "mask":
        return F.interpolate((logits[None] > 0).float(), shape, mode="nearest-exact")[0, 0] > 0
    return F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0, 0] > 0


def save_mask(mask, folder, name):
    """Write a bool mask as a 0/255 PNG under the name of the true mask (its ending becomes .png: JPEG would blur it)."""
    path = Path(folder) / PurePosixPath(name).with_suffix(".png")
    with replacing(path) as temporary:
        Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255).save(temporary, format="PNG")


def predict(args, predictor):
    """--images: masks for pictures without a ground truth; several processes share the pictures."""
    if not args.prompt or not args.save_masks:
        raise ValueError('--images needs --prompt "what to segment" and --save-masks DIR.')
    root = Path(args.images)
    if not root.exists():
        raise FileNotFoundError(f"There is no picture or folder '{root}'.")
    files = [root] if root.is_file() else picture_files(root)
    names = [p.name if root.is_file() else p.relative_to(root).as_posix() for p in files]
    targets = [str(PurePosixPath(n).with_suffix(".png")) for n in names]
    if not files:
        raise ValueError(f"'{root}' holds no pictures ({', '.join(EXTENSIONS)}).")
    if len(set(targets)) < len(targets):
        twice = next(t for t in targets if targets.count(t) > 1)
        raise ValueError(f"Several pictures would be written to '{twice}'; rename them so that their stems differ.")
    with ThreadPoolExecutor(4) as pool, progress(len(files), "segmenting") as bar:
        for _, part in parallel.own(parts_of(list(zip(files, targets)), args.batch_size)):
            images = list(pool.map(read_picture, [file for file, _ in part]))
            small = torch.stack([torch.from_numpy(resize_image(i, predictor.size).transpose(2, 0, 1)) for i in images])
            logits = predictor.logits(small, [args.prompt] * len(images))
            for image, (_, name), z in zip(images, part, logits):
                mask = enlarge(z, image.shape[:2], args.upsample)
                save_mask(mask, args.save_masks, name)
                if args.overlay:
                    path = Path(args.save_masks) / PurePosixPath(name).with_suffix(".overlay.png")
                    with replacing(path) as temporary:
                        Image.fromarray(pictures.overlay(image, mask.cpu().numpy(), pictures.CYAN)).save(temporary, format="PNG")
            bar.update(len(images))
    print(f"Wrote {len(files)} masks to '{args.save_masks}'.")


def read_picture(path):
    try:
        return read_image(path)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read as a picture ({error}).") from error
