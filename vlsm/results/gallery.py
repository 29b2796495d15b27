"""Write a page of every record of an evaluation: index.html and small images, for any browser, offline."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from vlsm.data.images import read_image, read_mask
from vlsm.results.figures import PREDICTION, TRUTH, rgb, unpack_mask
from vlsm.system import plots
from vlsm.system.console import progress
from vlsm.system.files import owned_write, write_text

SIDE = 360  # of the small images, at most
TEMPLATE = Path(__file__).with_name("gallery.html")
DIFFERENCE = (rgb(plots.ORANGE), rgb(plots.BLUE), TRUTH)  # false positive, false negative, true positive


def page_files(folder):
    """Return the paths in a page's folder that may be overwritten: index.html and all files in thumbs."""
    return [folder / "index.html", *folder.glob("thumbs/[!.]*")]


def write_gallery(folder, records, runs, title):
    """Write the page of records under one run or several; returns the path of index.html.

    folder: a Path. runs: {name: scores with their masks, as `evaluate_split` returns them}.
    """
    rows = []
    for i, record in enumerate(progress(records, "drawing")):
        scores = [run[i] for run in runs.values()]
        width, height = _write_images(folder / "thumbs" / f"{i:05}", record, scores)
        rows.append(
            dict(
                id=f"{i:05}",
                image=record.name,
                class_word=record.class_word or "",
                width=width,
                height=height,
                empty=scores[0]["target_empty"],
                prompts=[score["prompt"] for score in scores],
                scores=list(map(_page_score, scores)),
            )
        )
    page = folder / "index.html"
    write_text(page, _render(title, dict(records=rows, runs=list(runs))))
    return page


def _write_images(stem, record, scores):
    """Write the small images of a record as `stem`.jpg and .png; returns their (width, height).

    Truth, prediction k (-pk) and difference k (-dk) are transparent layers that the page puts on the image.
    """
    image = read_image(record.image)
    truth = read_mask(record.mask)
    shrink = min(1, SIDE / max(truth.shape))
    height, width = (max(1, round(shrink * side)) for side in truth.shape)
    small = Image.fromarray(image).resize((width, height), Image.BILINEAR)
    with owned_write(stem.with_suffix(".jpg")) as temporary:
        small.save(temporary, format="JPEG", quality=85)

    layers = {"truth": (truth, [TRUTH])}
    for k, score in enumerate(scores):
        mask = unpack_mask(score, truth.shape)
        layers[f"p{k}"] = mask, [PREDICTION]
        layers[f"d{k}"] = mask + 2 * truth.astype(np.uint8), DIFFERENCE
    for name, (codes, colours) in layers.items():
        layer = Image.fromarray(codes.astype(np.uint8)).resize((width, height), Image.NEAREST)
        layer.putpalette([0, 0, 0, *np.ravel(colours).tolist()])
        with owned_write(stem.with_name(f"{stem.name}-{name}.png")) as temporary:
            layer.save(temporary, format="PNG", transparency=0, optimize=True)
    return width, height


def _page_score(score):
    """Return the page's data on one record under one run."""
    missed = score["pred_empty"] and not score["target_empty"]
    false_alarm = score["target_empty"] and not score["pred_empty"]
    hd95 = None if math.isnan(score["hd95"]) else score["hd95"]
    return dict(dsc=score["dsc"], hd95=hd95, missed=missed, alarm=false_alarm)


def _render(title, data):
    """Return the page as text."""
    from jinja2 import Environment  # comes with torch

    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, data=data, runs=data["runs"])
