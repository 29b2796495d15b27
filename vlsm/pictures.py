"""Pictures drawn with Pillow: training curves, overlays, and sheets of best, median and worst cases."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PALE = (30, 30, 35), (225, 225, 230)
BLUE, ORANGE, GREEN, CYAN = (31, 90, 180), (220, 110, 20), (40, 200, 90), (0, 200, 255)


def font(size):
    return ImageFont.load_default(size)


def overlay(image, mask, colour):
    """The picture uint8 `[H, W, 3]` with the mask bool `[H, W]` tinted and its outline drawn."""
    out = image.astype(np.float32)
    out[mask] = 0.65 * out[mask] + 0.35 * np.array(colour)
    width = max(1, round(min(mask.shape) / 160))
    edge = np.zeros_like(mask)
    padded = np.pad(mask, width)  # beyond the picture is background, so that the outline closes
    H, W = mask.shape
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        edge |= mask & ~padded[width + dy * width : width + dy * width + H, width + dx * width : width + dx * width + W]
    out[edge] = colour
    return out.astype(np.uint8)


def wrap(text, width, face):
    """Lines of `text` that fit `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and face.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def sheet(rows, path, cell=220):
    """Write a picture of rows (image, truth, prediction, prompt, caption): image, truth (green), prediction (blue), words under them.

    image: uint8 `[H, W, 3]`; truth, prediction: bool `[H, W]`. Sizes may differ.
    """
    face, bold, gap = font(13), font(15), 8
    tall = [round(cell * r[0].shape[0] / r[0].shape[1]) for r in rows]
    words = [wrap(f'"{r[3]}"', 3 * cell + 2 * gap, face)[:2] for r in rows]
    heights = [h + 24 + 17 * len(w) + gap for h, w in zip(tall, words)]
    page = Image.new("RGB", (3 * cell + 4 * gap, sum(heights) + 30), "white")
    draw, y = ImageDraw.Draw(page), 26
    for k, title in enumerate(("image", "ground truth", "prediction")):
        draw.text((gap + k * (cell + gap), 6), title, INK, bold)
    for (image, truth, prediction, _, caption), h, lines, height in zip(rows, tall, words, heights):
        for k, picture in enumerate((image, overlay(image, truth, GREEN), overlay(image, prediction, CYAN))):
            page.paste(Image.fromarray(picture).resize((cell, h), Image.LANCZOS), (gap + k * (cell + gap), y))
        draw.text((gap, y + h + 3), caption, INK, bold)
        for n, line in enumerate(lines):
            draw.text((gap, y + h + 22 + 17 * n), line, (90, 90, 100), face)
        y += height
    page.save(path, format="PNG")


def ticks(low, high, count=5):
    """Round numbers that cover low..high, which may be one and the same."""
    span = max(high - low, 1e-3 * max(abs(low), abs(high), 1))
    high = low + span
    step = 10 ** np.floor(np.log10(span / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs(span / (step * m) - count))
    return [float(v) for v in np.arange(np.floor(low / step) * step, high + step, step)]


def curves(history, path):
    """Write loss and DSC against epochs, training and validation; `history`: dictionaries with the columns of log.csv."""
    W, H = 560, 380
    page = Image.new("RGB", (2 * W, H), "white")
    draw = ImageDraw.Draw(page)
    epochs = [row["epoch"] for row in history]
    panels = (("loss", "train_loss", "val_loss", 1), ("DSC in %, at the model's size", "train_dsc", "val_dsc", 100))
    for k, (title, train, val, factor) in enumerate(panels):
        left, top, right, bottom = k * W + 60, 44, (k + 1) * W - 20, H - 46
        series = {
            "training": ([row[train] * factor for row in history], BLUE),
            "validation": ([row[val] * factor for row in history], ORANGE),
        }
        values = [v for line, _ in series.values() for v in line]
        marks = ticks(min(values), max(values))
        low, high = marks[0], marks[-1]
        first, last = epochs[0], max(epochs[-1], epochs[0] + 1)

        def spot(epoch, value, box=(left, top, right, bottom), scale=(first, last, low, high)):
            (x0, y0, x1, y1), (e0, e1, v0, v1) = box, scale
            return x0 + (epoch - e0) / (e1 - e0) * (x1 - x0), y1 - (value - v0) / (v1 - v0) * (y1 - y0)

        draw.text((left, 14), title, INK, font(17))
        for mark in marks:
            draw.line([spot(first, mark), spot(last, mark)], PALE)
            draw.text((left - 8, spot(first, mark)[1]), f"{mark:g}" if abs(mark) >= 1e-9 else "0", INK, font(13), anchor="rm")
        for epoch in sorted({round(t) for t in ticks(first, last) if first <= t <= last}):
            draw.text((spot(epoch, low)[0], bottom + 6), str(epoch), INK, font(13), anchor="mt")
        draw.text(((left + right) / 2, H - 20), "epoch", INK, font(13), anchor="mm")
        for n, (name, (line, colour)) in enumerate(series.items()):
            points = [spot(e, v) for e, v in zip(epochs, line)]
            draw.line(points, colour, 2)
            x, y = points[-1]
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            draw.line([(right - 190 + 100 * n, 24), (right - 172 + 100 * n, 24)], colour, 3)
            draw.text((right - 166 + 100 * n, 24), name, INK, font(13), anchor="lm")
    page.save(path, format="PNG")
