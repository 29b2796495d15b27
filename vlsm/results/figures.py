"""Images for people, drawn with Pillow: overlays, and sheets of best, median and worst cases."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlsm.data.images import read_image, read_mask
from vlsm.system.files import owned_write
from vlsm.system.plots import save_figure

INK, GREY, GREEN, CYAN = (30, 30, 35), (90, 90, 100), (40, 200, 90), (0, 200, 255)


def overlay(image, mask, colour):
    """Tint the mask bool `[H, W]` on the image uint8 `[H, W, 3]` and draw its outline, on a copy."""
    out = image.astype(np.float32)
    out[mask] = 0.65 * out[mask] + 0.35 * np.array(colour)
    width = max(1, round(min(mask.shape) / 160))
    edge = np.zeros_like(mask)
    padded = np.pad(mask, width)  # beyond the image is background, so that the outline closes
    H, W = mask.shape
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y, x = width + dy * width, width + dx * width
        edge |= mask & ~padded[y : y + H, x : x + W]
    out[edge] = colour
    return out.astype(np.uint8)


def wrap(text, width, font):
    """Break a text into lines that fit `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def draw_cases(records, scores, masks, options, folder, path=None, names=("prediction",)):
    """Write a sheet of the best, median and worst cases by DSC, in equal parts; returns its path, in a list.

    masks: for each of `names` the packed masks of all records. options: `EvaluateOptions` (figure, the number
    of rows, and figure_format). path: default figure.png in the folder.
    """
    path = path or folder / f"figure.{options.figure_format}"
    order = sorted(range(len(scores)), key=lambda i: -scores[i]["dsc"])
    rows = min(options.figure, len(order))
    best, worst, median = (rows // 3 + (k < rows % 3) for k in range(3))
    middle = max(best, (len(order) - median) // 2)
    chosen = [(i, "best") for i in order[:best]] + [(i, "median") for i in order[middle : middle + median]]
    chosen += [(i, "worst") for i in order[len(order) - worst :]]
    page = []
    for i, kind in chosen:
        image, truth = read_image(records[i].image), read_mask(records[i].mask)
        predicted = [np.unpackbits(m[i], count=truth.size).reshape(truth.shape).astype(bool) for m in masks]
        caption = f"{kind}: DSC {100 * scores[i]['dsc']:.1f}   {scores[i]['image']}"
        page.append((image, truth, predicted, scores[i]["prompt"], caption))
    with owned_write(path) as temporary:
        if options.figure_format == "png":
            sheet(page, temporary, names)
        else:
            vector_sheet(page, temporary, names, options.figure_format)
    return [path]


def vector_sheet(rows, path, names, kind):
    """Write the rows of `sheet` as pdf or svg: pictures of full size, words as text."""
    from matplotlib.figure import Figure

    across, height = 2 + len(names), 2.2  # inches a picture
    figure = Figure(figsize=(height * across, (height + 0.3) * len(rows)), layout="constrained")
    for n, (image, truth, predictions, prompt, caption) in enumerate(rows):
        shown = [image, overlay(image, truth, GREEN), *(overlay(image, p, CYAN) for p in predictions)]
        for k, (pixels, title) in enumerate(zip(shown, ("image", "ground truth", *names))):
            axis = figure.add_subplot(len(rows), across, n * across + k + 1)
            axis.imshow(pixels)
            axis.set_axis_off()
            axis.set_title(title if not n and k else "", fontsize=8)
        figure.axes[n * across].set_title(f"{caption}\n“{prompt[:60]}”", fontsize=7, loc="left")
    save_figure(figure, path, kind)


def sheet(rows, path, names=("prediction",), cell=220):
    """Write a sheet of rows (image, truth, predictions, prompt, caption).

    A row shows the image, the truth in green, a prediction for each of `names` in blue, and the words below.
    image: uint8 `[H, W, 3]`; truth, predictions: bool `[H, W]`. Sizes may differ.
    """
    small, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    gap, across = 8, 2 + len(names)
    step = cell + gap
    tall = [round(cell * row[0].shape[0] / row[0].shape[1]) for row in rows]
    words = [wrap(f'"{row[3]}"', across * step - gap, small)[:2] for row in rows]
    heights = [h + 24 + 17 * len(w) + gap for h, w in zip(tall, words)]
    page = Image.new("RGB", (across * step + gap, sum(heights) + 30), "white")
    draw, y = ImageDraw.Draw(page), 26
    for k, title in enumerate(("image", "ground truth", *names)):
        draw.text((gap + k * step, 6), title, INK, bold)
    for (image, truth, predictions, _, caption), h, lines, height in zip(rows, tall, words, heights):
        overlays = [overlay(image, truth, GREEN), *(overlay(image, p, CYAN) for p in predictions)]
        for k, shown in enumerate([image, *overlays]):
            page.paste(Image.fromarray(shown).resize((cell, h), Image.LANCZOS), (gap + k * step, y))
        draw.text((gap, y + h + 3), caption, INK, bold)
        for n, line in enumerate(lines):
            draw.text((gap, y + h + 22 + 17 * n), line, GREY, small)
        y += height
    page.save(path, format="PNG")
