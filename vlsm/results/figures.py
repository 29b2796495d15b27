"""Images for people, drawn with Pillow: overlays, and sheets of best, median and worst cases."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
