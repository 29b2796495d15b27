"""Segment an image of any size by prompts: what `VLSM.predict` does."""

import math
import re
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from vlsm.data.images import grey_to_rgb, read_image, rgb_pixels, to_eight_bits
from vlsm.data.normalise import normalise
from vlsm.data.resize import resize_image
from vlsm.networks.weights import image_side
from vlsm.system.console import first_few, say_once
from vlsm.system.parallel import autocast

MOST_CLASSES = 255  # a label map is uint8, and 0 is its background
_tokenizers = WeakKeyDictionary()  # model -> its tokenizer, which takes long to read


def segment_image(model, image, prompts, threshold=0.5, probability=False):
    """Do as `VLSM.predict` says."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not 1 <= len(texts) <= MOST_CLASSES:
        raise ValueError(f"predict takes 1 to {MOST_CLASSES} prompts, and {len(texts)} were given.")
    bound = logit_of(threshold)
    metadata = model.metadata or {}
    notice = prompt_notice(metadata, texts)
    if notice:
        say_once(notice, notice)
    side = image_side(model.network.config, Path(model.info["folder"]), metadata.get("image_size"))
    pixels = read_pixels(image)
    training = model.training
    model.eval()
    logits = image_logits(model, to_batch([pixels], side), texts)  # [P, 1, S, S]
    model.train(training)
    logits = enlarge(logits[:, 0], pixels.shape[:2])  # [P, H, W]
    result = logits.sigmoid() if probability else logits > bound
    if isinstance(prompts, str):
        result = result[0]
    elif not probability:
        number = logits.argmax(0) + 1
        result = (number * result.any(0)).to(torch.uint8)
    return result.cpu().numpy()


@torch.inference_mode()
def image_logits(model, images, prompts):
    """Return float32 logits `[B * P, 1, S, S]` of uint8 images `[B, 3, S, S]` and B * P prompts."""
    if model not in _tokenizers:
        _tokenizers[model] = model.tokenizer()
    network = model.network
    metadata = model.metadata or {}
    mean = metadata.get("mean", network.mean)
    std = metadata.get("std", network.std)
    device = next(model.parameters()).device
    with autocast(device, model.compute_dtype):
        pixel_values = normalise(images.to(device), mean, std)
        return model(pixel_values, *_tokenizers[model](prompts)).float()


def read_pixels(image):
    """Return uint8 `[H, W, 3]` of a path, a Pillow image, or an array `[H, W, 3]` or `[H, W]`.

    Raises ValueError for other arrays, and as `read_image`.
    """
    if isinstance(image, Image.Image):
        return rgb_pixels(ImageOps.exif_transpose(image), "the image")
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = grey_to_rgb(to_eight_bits(image, "the image"))
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"An image is an array uint8 [H, W, 3] or [H, W], and this one is {image.dtype} "
                f"{list(image.shape)}."
            )
    return read_image(image)


def to_batch(images, side):
    """Resize images uint8 `[H, W, 3]` of any sizes to one batch uint8 `[B, 3, side, side]`."""
    pixels = [torch.from_numpy(resize_image(image, side)) for image in images]
    return torch.stack(pixels).permute(0, 3, 1, 2)


def enlarge(logits, shape):
    """Enlarge logits `[P, S, S]` bilinearly to an image's `shape` (h, w): `[P, h, w]`."""
    return F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0]


def logit_of(threshold):
    """Return the logit of a threshold of the probability. Raises ValueError unless it is within 0 and 1."""
    if not 0 < threshold < 1:
        raise ValueError(f"A threshold of the probability is more than 0 and less than 1, not {threshold}.")
    return math.log(threshold / (1 - threshold))


def prompt_notice(metadata, prompts):
    """Return a line on prompts that name none of the class words a run was trained on; empty if all do."""
    words = metadata.get("class_words") or []
    names = "|".join(map(re.escape, words))
    named = re.compile(rf"\b({names})", re.I)  # open at its end: a plural names the class, too
    strange = [f"'{prompt}'" for prompt in prompts if not named.search(prompt)]
    if not words or not strange:
        return ""
    return f"Note: this run was trained on '{first_few(words)}'; {first_few(strange)} names none of that."
