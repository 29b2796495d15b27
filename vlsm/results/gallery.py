"""Write a page of every record of an evaluation: index.html and small images, for any browser, offline."""

import datetime
import math
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from vlsm.data.images import read_image, read_mask
from vlsm.results.figures import PREDICTION, TRUTH, outline, rgb, unpack_mask
from vlsm.results.scores import summarise
from vlsm.system.console import progress
from vlsm.system.files import owned_write, write_text

SIDE = 360  # of the small images, at most
FILL = 128  # alpha of an area in a layer; the page replaces it by the opacity that its reader chooses
# Red and green look alike to many people; a test measures that these do not.
HIT, TOO_MUCH, MISSED = rgb("#2060ff"), rgb("#ffe600"), rgb("#8b0000")
SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")  # a GIF might move
COLUMNS = "image mask class group prompt dsc iou nsd hd95 unit target_empty pred_empty".split()


def page_files(folder):
    """Return the paths in a page's folder that may be overwritten: index.html and all files in thumbs."""
    return [folder / "index.html", *folder.glob("thumbs/[!.]*")]


def write_gallery(folder, records, runs, title, facts=(), full=False):
    """Write the page of records under one run or several; returns the path of index.html.

    folder: a Path. runs: {name: scores with their masks, as `evaluate_split` returns them}. facts: phrases
    on the evaluation, for the page's head. full: also write the images at their original size; without it
    the page reads those that a browser can show from where they are.
    """
    rows = []
    for i, record in enumerate(progress(records, "drawing")):
        scores = [run[i] for run in runs.values()]
        row = _write_images(folder, f"{i:05}", record, scores, full)
        row["scores"] = list(map(_page_score, scores))
        rows.append(row)
    summaries = list(map(summarise, runs.values()))
    page = folder / "index.html"
    facts = [*facts, f"evaluated on {datetime.date.today()}"]
    write_text(
        page, _render(title, facts, dict(records=rows, runs=list(runs), summaries=summaries, side=SIDE))
    )
    return page


def _page_score(score):
    """Return the page's data on one record under one run; JSON knows no NaN."""
    data = {name: score[name] for name in COLUMNS}
    if math.isnan(data["hd95"]):
        data["hd95"] = None
    return data


def _render(title, facts, data):
    """Return the page as text, with its style and its program in it."""
    from jinja2 import Environment  # comes with torch

    def read_file(ending):
        return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")

    template = Environment(autoescape=True).from_string(read_file(".html"))
    return template.render(
        title=title,
        facts=facts,
        data=data,
        runs=data["runs"],
        colours=dict(truth=TRUTH, prediction=PREDICTION, hit=HIT, over=TOO_MUCH, missed=MISSED),
        style=read_file(".css"),
        program=read_file(".js"),
    )


# Images


def _write_images(folder, name, record, scores, full):
    """Write a record's images below `folder`/thumbs; returns the page's data on them.

    NAME.jpg is the small image. The truth, prediction k (pk) and difference k (dk) are transparent layers,
    NAME-LAYER.png, that the page puts on it. Those of the original size end with -full.
    """
    image = Image.fromarray(read_image(record.image))
    truth = read_mask(record.mask)
    original = _relative_url(record.image, folder)
    thumbs = folder / "thumbs"
    if full:
        original = f"thumbs/{name}-full.png"
        with owned_write(folder / original) as temporary:
            image.save(temporary, format="PNG")
    image.thumbnail((SIDE, SIDE), Image.BILINEAR)
    with owned_write(thumbs / f"{name}.jpg") as temporary:
        image.save(temporary, format="JPEG", quality=85)

    for layer, (codes, colours) in _layers(truth, scores).items():
        codes = Image.fromarray(codes)
        if original:
            _save_layer(thumbs / f"{name}-{layer}-full.png", codes, colours)
        codes.thumbnail((SIDE, SIDE), Image.NEAREST)
        _save_layer(thumbs / f"{name}-{layer}.png", codes, colours)
    height, width = truth.shape
    return dict(id=name, width=width, height=height, size=truth.mean(), original=original)


def _relative_url(source, folder):
    """Return the URL of an image's file relative to a page's folder; None if a browser cannot show it."""
    if not isinstance(source, (str, Path)) or Path(source).suffix.lower() not in SHOWN_BY_BROWSERS:
        return None
    with Image.open(source) as image:
        if image.mode not in (
            "L",
            "RGB",
            "CMYK",
        ):  # a browser shows deep or transparent pixels in its own way
            return None
    return quote(os.fsencode(os.path.relpath(source, folder)))


def _layers(truth, scores):
    """Return {name: (codes uint8 `[H, W]`, the colours of code 1, 2, ...)} of a record's layers."""
    truth = truth.astype(np.uint8)
    layers = {"truth": (truth, [TRUTH])}
    for k, score in enumerate(scores):
        mask = unpack_mask(score, truth.shape).astype(np.uint8)
        layers[f"p{k}"] = mask, [PREDICTION]
        layers[f"d{k}"] = mask + 2 * truth, [TOO_MUCH, MISSED, HIT]
    return layers


def _save_layer(path, codes, colours):
    """Write an image of codes as a PNG: 0 is transparent, an area half transparent, its contour opaque."""
    drawn = np.array(codes)
    n_colours = len(colours)
    for code in range(1, 1 + n_colours):
        drawn[outline(drawn == code)] += n_colours
    layer = Image.fromarray(drawn)
    layer.putpalette(sum(2 * colours, (0, 0, 0)))
    alphas = bytes([0] + n_colours * [FILL] + n_colours * [255])
    with owned_write(path) as temporary:
        layer.save(temporary, format="PNG", transparency=alphas, optimize=True)
