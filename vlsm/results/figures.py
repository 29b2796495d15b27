"""Images for people: overlays of masks, and sheets of best, median and worst cases, drawn by matplotlib."""

import math
import textwrap

import numpy as np
from scipy.ndimage import binary_erosion

from vlsm.data.images import read_image, read_mask
from vlsm.system import plots
from vlsm.system.files import owned_write

# sizes of a sheet in inches: an image's width and height at most, and its least side, space between images, a
# line of text
CELL, TALL, THIN, GAP, LINE = 2.2, 3.3, 0.15, 0.08, 0.17
LETTERS = 12  # characters in an inch, of a name in capitals
MOST_LINES = 4  # of a text


def rgb(colour):
    """Return a colour "#rrggbb" as its red, green and blue from 0 to 255."""
    return tuple(bytes.fromhex(colour[1:]))


TRUTH, PREDICTION = rgb(plots.GREEN), rgb(plots.SKY)


def outline(mask):
    """Return the outline of a mask bool `[H, W]`, as a mask; it is thicker in a larger image."""
    width = max(1, round(min(mask.shape) / 160))
    # erodes from the image's border, too, so that the outline closes
    return mask & ~binary_erosion(mask, iterations=width)


def overlay(image, mask, colour):
    """Tint the mask bool `[H, W]` on the image uint8 `[H, W, 3]` and draw its outline, on a copy."""
    out = image.astype(np.float32)
    out[mask] = 0.65 * out[mask] + 0.35 * np.array(colour)
    out[outline(mask)] = colour
    return out.astype(np.uint8)


def unpack_mask(score, shape):
    """Return the predicted mask bool `[H, W]` of a score from `evaluate_split(keep_masks=True)`."""
    bits = np.unpackbits(score["packed_mask"], count=math.prod(shape))
    return bits.reshape(shape).astype(bool)


def choose_cases(scores, count):
    """Return [(index, rank)] of `count` records by DSC: equally many "best", "median" and "worst".

    Empty masks that were predicted empty are left out: there is nothing to see. A mask in place of an empty
    one is a "false alarm", wherever it ranks.
    """
    order = [i for i, score in enumerate(scores) if not (score["target_empty"] and score["pred_empty"])]
    order.sort(key=lambda i: -scores[i]["dsc"])
    count = min(count, len(order))
    n_best = (count + 2) // 3
    n_worst = (count + 1) // 3
    n_median = count // 3
    middle = max(n_best, (len(order) - n_median) // 2)
    chosen = order[:n_best] + order[middle : middle + n_median] + order[len(order) - n_worst :]
    ranks = ["best"] * n_best + ["median"] * n_median + ["worst"] * n_worst
    return [(i, "false alarm" if scores[i]["target_empty"] else rank) for i, rank in zip(chosen, ranks)]


def draw_cases(path, records, runs, count, file_format="png"):
    """Write a sheet of the first run's best, median and worst cases, at most `count` rows.

    runs: {name: scores of all records with their masks, as `evaluate_split` returns them}.
    """
    first = next(iter(runs.values()))
    rows = []
    for i, rank in choose_cases(first, count):
        image = read_image(records[i].image)
        truth = read_mask(records[i].mask)
        panels = [(image, None, ""), (image, truth, "")]
        for scores in runs.values():
            score = scores[i]
            hd95 = "undefined" if np.isnan(score["hd95"]) else f"{score['hd95']:.1f} {score['unit']}"
            note = f"DSC {100 * score['dsc']:.1f} %, HD95 {hd95}"
            panels.append((image, unpack_mask(score, truth.shape), note))
        prompts = dict.fromkeys(f'"{scores[i]["prompt"]}"' for scores in runs.values())
        caption = f"{rank}: {first[i]['image']}   {first[i]['class']}"
        rows.append((panels, caption, "  |  ".join(prompts)))
    titles = [("image", "white"), ("ground truth", plots.GREEN), *((name, plots.SKY) for name in runs)]
    with owned_write(path) as temporary:
        sheet(rows, titles, temporary, file_format)


@plots.styled()
def sheet(rows, titles, path, file_format="png"):
    """Write a sheet of rows (panels, caption, text), as png, pdf or svg.

    titles: of the columns, (text, colour of the text's ground and of the masks). panels: for each column
    (image uint8 `[H, W, 3]`, mask bool `[H, W]` to draw on it or None, note); sizes may differ.
    """
    from matplotlib.figure import Figure

    width = GAP + len(titles) * (CELL + GAP)
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))  # coordinates in inches, y downwards
    axes.set_axis_off()

    def write(x, y, text, across, **style):
        """Write text, in lines of `across` inches; return where the next line begins."""
        lines = wrap(text, across)
        axes.text(x, y, "\n".join(lines), va="top", linespacing=1.4, **style)
        return y + LINE * len(lines)

    bottom = 0
    for k, (title, colour) in enumerate(titles):
        left = 2 * GAP + k * (CELL + GAP)
        end = write(left, 1.5 * GAP, title, CELL - 2 * GAP, weight="bold", backgroundcolor=colour)
        bottom = max(bottom, end + GAP)
    for panels, caption, text in rows:
        top = bottom
        for k, (image, mask, note) in enumerate(panels):
            left = GAP + k * (CELL + GAP)
            across, high = fit(*image.shape[:2])
            if mask is not None:
                image = overlay(image, mask, rgb(titles[k][1]))
            axes.imshow(image, extent=(left, left + across, top + high, top), aspect="auto")
            bottom = max(bottom, write(left, top + high + GAP / 2, note, CELL))
        bottom = write(GAP, bottom, caption, width - 2 * GAP, weight="bold")
        bottom = write(GAP, bottom, text, width - 2 * GAP, color=plots.GREY) + GAP
    axes.set(xlim=(0, width), ylim=(bottom, 0))
    figure.set_size_inches(width, bottom)
    plots.save_figure(figure, path, file_format)


def fit(height, width):
    """Return an image's width and height on a sheet, in inches; that of a strip is not to scale."""
    scale = min(CELL / width, TALL / height)
    return max(scale * width, THIN), max(scale * height, THIN)


def wrap(text, width):
    """Break a text at spaces into lines of `width` inches; "..." stands for lines above `MOST_LINES`."""
    return textwrap.wrap(text, int(LETTERS * width), max_lines=MOST_LINES, placeholder=" ...")
