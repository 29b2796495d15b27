"""Images for people: overlays of masks, and sheets of best, median and worst cases, drawn by matplotlib."""

import textwrap

import numpy as np

from vlsm.data.images import read_image, read_mask
from vlsm.system import plots
from vlsm.system.files import owned_write

INK, GREY = "#1e1e23", "#5a5a64"
# sizes of a sheet in inches: an image's width, space between images, height of the titles, of a line of text
CELL, GAP, HEAD, LINE = 2.2, 0.08, 0.28, 0.17
LETTERS = 15  # characters of a prompt in an inch, at 8.5 points
PROMPT_LINES = 3
DPI = 150


def rgb(colour):
    """Return a colour "#rrggbb" as its red, green and blue from 0 to 255."""
    return tuple(bytes.fromhex(colour[1:]))


TRUTH, PREDICTION = rgb(plots.GREEN), rgb(plots.SKY)


def overlay(image, mask, colour):
    """Tint the mask bool `[H, W]` on the image uint8 `[H, W, 3]` and draw its outline, on a copy."""
    from scipy.ndimage import binary_erosion

    out = image.astype(np.float32)
    out[mask] = 0.65 * out[mask] + 0.35 * np.array(colour)
    width = max(1, round(min(mask.shape) / 160))
    # erodes from the image's border, too, so that the outline closes
    inside = binary_erosion(mask, iterations=width)
    out[mask & ~inside] = colour
    return out.astype(np.uint8)


def unpack_mask(score, shape):
    """Return the predicted mask bool `[H, W]` of a score from `evaluate_split(keep_masks=True)`."""
    bits = np.unpackbits(score["packed_mask"], count=shape[0] * shape[1])
    return bits.reshape(shape).astype(bool)


def choose_cases(scores, count):
    """Return [(index, rank)] of `count` records by DSC: equally many "best", "median" and "worst"."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i]["dsc"])
    count = min(count, len(order))
    n_best = (count + 2) // 3
    n_worst = (count + 1) // 3
    n_median = count // 3
    middle = max(n_best, (len(order) - n_median) // 2)
    chosen = order[:n_best] + order[middle : middle + n_median] + order[len(order) - n_worst :]
    ranks = ["best"] * n_best + ["median"] * n_median + ["worst"] * n_worst
    return list(zip(chosen, ranks))


def draw_cases(path, records, runs, count, file_format="png"):
    """Write a sheet of the first run's best, median and worst cases, `count` rows.

    runs: {name: scores of all records with their masks, as `evaluate_split` returns them}.
    """
    first = next(iter(runs.values()))
    rows = []
    for i, rank in choose_cases(first, count):
        image = read_image(records[i].image)
        truth = read_mask(records[i].mask)
        masks = [unpack_mask(scores[i], truth.shape) for scores in runs.values()]
        caption = f"{rank}: DSC {100 * first[i]['dsc']:.1f}   {first[i]['image']}   {first[i]['class']}"
        rows.append((image, truth, masks, first[i]["prompt"], caption))
    with owned_write(path) as temporary:
        sheet(rows, temporary, list(runs), file_format)


def sheet(rows, path, names=("prediction",), file_format="png"):
    """Write a sheet of rows (image, truth, predictions, prompt, caption), as png, pdf or svg.

    A row shows the image, the truth in green, a prediction for each of `names` in blue, and the words below.
    image: uint8 `[H, W, 3]`; truth, predictions: bool `[H, W]`. Sizes may differ.
    """
    from matplotlib.figure import Figure

    titles = ["image", "ground truth", *names]
    width = GAP + len(titles) * (CELL + GAP)
    figure = Figure(dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))  # coordinates in inches, y downwards
    axes.set_axis_off()

    def write(x, y, text, size, weight="normal", colour=INK):
        axes.text(x, y, text, size=size, weight=weight, color=colour, va="top", parse_math=False)

    for k, title in enumerate(titles):
        write(GAP + k * (CELL + GAP), GAP, title, 10, "bold")
    y = HEAD
    for image, truth, predictions, prompt, caption in rows:
        panels = [image, overlay(image, truth, TRUTH)]
        panels += [overlay(image, mask, PREDICTION) for mask in predictions]
        bottom = y + CELL * image.shape[0] / image.shape[1]
        for k, panel in enumerate(panels):
            left = GAP + k * (CELL + GAP)
            axes.imshow(panel, extent=(left, left + CELL, bottom, y), aspect="auto")
        y = bottom + GAP / 2
        write(GAP, y, caption, 9, "bold")
        for line in wrap(prompt, width - 2 * GAP):
            y += LINE
            write(GAP, y, line, 8.5, colour=GREY)
        y += LINE + GAP
    axes.set(xlim=(0, width), ylim=(y, 0))
    figure.set_size_inches(width, y)
    plots.save_figure(figure, path, file_format)


def wrap(prompt, width):
    """Break a prompt, in quotation marks, into lines of `width` inches, at most `PROMPT_LINES`."""
    return textwrap.wrap(f'"{prompt}"', int(LETTERS * width), max_lines=PROMPT_LINES, placeholder=" ...")
