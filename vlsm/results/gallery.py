"""A page of every record of an evaluation: index.html and small pictures, for any browser, offline."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from vlsm.data.images import read_image, read_mask
from vlsm.results.figures import CYAN, GREEN
from vlsm.system.console import progress
from vlsm.system.files import owned_write, write_text

SIDE = 360  # of the small pictures, at most
TEMPLATE = Path(__file__).with_name("gallery.html")
DIFFERENCE = ((255, 140, 30), (240, 50, 70), GREEN)  # too much, missed, hit


def page_files(folder, count, runs=1):
    """Return the paths of all files of a gallery of `count` records under so many runs."""
    layers = ["truth", *(f"{kind}{k}" for k in range(runs) for kind in "pd")]
    endings = [".jpg", *(f"-{layer}.png" for layer in layers)]
    thumbs = Path(folder) / "thumbs"
    return [Path(folder) / "index.html", *(thumbs / f"{i:05}{end}" for i in range(count) for end in endings)]


def write_gallery(folder, records, runs, title):
    """Write the page of records under one run or several.

    runs: {name: (scores, packed masks)}, as `evaluate` returns them. Files that this program wrote there
    before are replaced.
    """
    rows, folder = [], Path(folder)
    for i, record in enumerate(progress(records, "drawing", "picture")):
        image, truth = read_image(record.image), read_mask(record.mask)
        masks = [np.unpackbits(kept[i], count=truth.size).reshape(truth.shape) for _, kept in runs.values()]
        thumb = folder / "thumbs" / f"{i:05}"
        size = _small(image.shape)
        _save(Image.fromarray(image).resize(size, Image.BILINEAR), thumb.with_suffix(".jpg"), "JPEG")
        layers = {"truth": (truth.astype(np.uint8), [GREEN])}
        for k, mask in enumerate(masks):
            layers[f"p{k}"] = mask, [CYAN]
            layers[f"d{k}"] = mask + 2 * truth.astype(np.uint8), DIFFERENCE
        for name, (codes, colours) in layers.items():
            _save(_layer(codes, colours, size), thumb.with_name(f"{thumb.name}-{name}.png"), "PNG")
        scores = [scores[i] for scores, _ in runs.values()]
        shown = dict(prompts=[s["prompt"] for s in scores], scores=[_shown(s) for s in scores])
        about = dict(id=f"{i:05}", image=record.name, width=size[0], height=size[1])
        rows.append(dict(**about, empty=scores[0]["target_empty"], **shown))
    write_text(folder / "index.html", _page(title, dict(records=rows, runs=list(runs))))


def _shown(score):
    """Return what the page says of one record under one run."""
    hd95 = None if math.isnan(score["hd95"]) else score["hd95"]
    empty, nothing = score["target_empty"], score["pred_empty"]
    return dict(dsc=score["dsc"], hd95=hd95, missed=nothing and not empty, alarm=empty and not nothing)


def _page(title, data):
    from jinja2 import Environment  # comes with torch

    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, data=data, runs=data["runs"])


def _small(shape):
    """Return (width, height) of a small picture."""
    shrink = min(1, SIDE / max(shape[:2]))
    return tuple(max(1, round(side * shrink)) for side in (shape[1], shape[0]))


def _layer(codes, colours, size):
    """Return codes 0 (transparent), 1, 2, ... `[H, W]` as a small palette image."""
    image = Image.fromarray(codes).resize(size, Image.NEAREST)
    image.putpalette([0, 0, 0, *(value for colour in colours for value in colour)])
    return image


def _save(image, path, kind):
    options = dict(quality=85) if kind == "JPEG" else dict(transparency=0, optimize=True)
    with owned_write(path) as temporary:
        image.save(temporary, format=kind, **options)
