"""Pictures drawn with Pillow: training curves, scatter plots, overlays, and sheets of best, median and worst cases."""

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


def sheet(rows, path, names=("prediction",), cell=220):
    """Write a picture of rows (image, truth, predictions, prompt, caption): image, truth (green), a prediction for each of `names` (blue),
    words under them. image: uint8 `[H, W, 3]`; truth, predictions: bool `[H, W]`. Sizes may differ.
    """
    face, bold, gap, across = font(13), font(15), 8, 2 + len(names)
    tall = [round(cell * r[0].shape[0] / r[0].shape[1]) for r in rows]
    words = [wrap(f'"{r[3]}"', across * (cell + gap) - gap, face)[:2] for r in rows]
    heights = [h + 24 + 17 * len(w) + gap for h, w in zip(tall, words)]
    page = Image.new("RGB", (across * (cell + gap) + gap, sum(heights) + 30), "white")
    draw, y = ImageDraw.Draw(page), 26
    for k, title in enumerate(("image", "ground truth", *names)):
        draw.text((gap + k * (cell + gap), 6), title, INK, bold)
    for (image, truth, predictions, _, caption), h, lines, height in zip(rows, tall, words, heights):
        for k, picture in enumerate((image, overlay(image, truth, GREEN), *(overlay(image, p, CYAN) for p in predictions))):
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


class Panel:
    """A plot's frame on a page: title, grid, marks on both axes; `spot` places a point. `xs`, `ys`: pairs of (value, its label)."""

    W, H = 560, 380

    def __init__(self, draw, column, row, title, below, xs, ys):
        self.left, self.top = column * self.W + 60, row * self.H + 44
        self.right, self.bottom = (column + 1) * self.W - 20, (row + 1) * self.H - 46
        (self.x0, _), (self.x1, _), (self.y0, _), (self.y1, _) = xs[0], xs[-1], ys[0], ys[-1]
        draw.text((self.left, self.top - 30), title, INK, font(17))
        for y, label in ys:
            draw.line([self.spot(self.x0, y), self.spot(self.x1, y)], PALE)
            draw.text((self.left - 8, self.spot(self.x0, y)[1]), label, INK, font(13), anchor="rm")
        for x, label in xs:
            if label:
                draw.text((self.spot(x, self.y0)[0], self.bottom + 6), label, INK, font(13), anchor="mt")
        draw.text(((self.left + self.right) / 2, self.bottom + 26), below, INK, font(13), anchor="mm")

    def spot(self, x, y):
        across, up = (x - self.x0) / (self.x1 - self.x0), (y - self.y0) / (self.y1 - self.y0)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def labelled(values):
    return [(v, f"{v:g}" if abs(v) >= 1e-9 else "0") for v in values]


def curves(history, path):
    """Write loss and DSC against epochs, training and validation; `history`: dictionaries with the columns of log.csv."""
    page = Image.new("RGB", (2 * Panel.W, Panel.H), "white")
    draw = ImageDraw.Draw(page)
    epochs = [row["epoch"] for row in history]
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)
    marks = {round(t) for t in ticks(first, last)}
    xs = [(t, str(t) if t in marks else "") for t in sorted({t for t in marks if first <= t <= last} | {first, last})]
    panels = (("loss", "train_loss", "val_loss", 1), ("DSC in %, at the model's size", "train_dsc", "val_dsc", 100))
    for k, (title, train, val, factor) in enumerate(panels):
        series = {
            "training": ([row[train] * factor for row in history], BLUE),
            "validation": ([row[val] * factor for row in history], ORANGE),
        }
        values = [v for line, _ in series.values() for v in line]
        panel = Panel(draw, k, 0, title, "epoch", xs, labelled(ticks(min(values), max(values))))
        for n, (name, (line, colour)) in enumerate(series.items()):
            points = [panel.spot(e, v) for e, v in zip(epochs, line)]
            draw.line(points, colour, 2)
            x, y = points[-1]
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            draw.line([(panel.right - 190 + 100 * n, 24), (panel.right - 172 + 100 * n, 24)], colour, 3)
            draw.text((panel.right - 166 + 100 * n, 24), name, INK, font(13), anchor="lm")
    page.save(path, format="PNG")


def scatter(columns, heights, marked, faint, title, path, log=()):
    """Write a panel for each of `columns` (name -> values): `heights` against its values; all but float values side by side.

    marked: the index of the point in orange; faint: those of pale points; log: names with a logarithmic axis.
    """
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    page = Image.new("RGB", (across * Panel.W, down * Panel.H), "white")
    draw = ImageDraw.Draw(page)
    ys = labelled(ticks(min(heights), max(heights)))
    for k, (name, values) in enumerate(columns.items()):
        if name in log:
            places = [float(np.log10(v)) for v in values]
            exponents = range(int(np.floor(min(places))), int(np.ceil(max(places) + 1e-9)) + 1)
            xs = [(e, f"1e{e}") for e in ([*exponents, exponents[-1] + 1] if len(exponents) < 2 else exponents)]
        elif all(isinstance(v, float) for v in values):
            places, xs = values, labelled(ticks(min(values), max(values)))
        else:
            words = sorted(set(values), key=lambda v: (isinstance(v, str), v))
            places = [words.index(v) for v in values]
            xs = [(-0.5, ""), *enumerate(map(str, words)), (len(words) - 0.5, "")]
        panel = Panel(draw, k % across, k // across, title, name, xs, ys)
        for i in sorted(range(len(values)), key=lambda i: i == marked):  # the marked one on top
            x, y = panel.spot(places[i], heights[i])
            colour = ORANGE if i == marked else PALE if i in faint else BLUE
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour, BLUE if i in faint else "white")
    page.save(path, format="PNG")


COLOURS = ((31, 90, 180), (220, 110, 20), (60, 160, 80), (150, 80, 170), (200, 50, 60), (90, 90, 100), (0, 160, 180), (180, 150, 20))


def bars(groups, title, path):
    """Write bars with error bars; groups: title of a group -> {label of a bar: something with mean and std, or None}."""
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    face, wide, gap = font(13), 26, 30
    width = max(560, 80 + len(groups) * (len(labels) * wide + gap))
    legend = wrapped_legend(labels, width - 80, face)
    page = Image.new("RGB", (width, 340 + 20 * len(legend)), "white")
    draw, bottom, top = ImageDraw.Draw(page), 290, 40
    found = [c for group in groups.values() for c in group.values() if c]
    marks = ticks(0, max([c.mean + (c.std or 0) for c in found], default=1))
    spot = lambda v: bottom - (bottom - top) * v / marks[-1]  # noqa: E731
    draw.text((60, 10), title, INK, font(17))
    for mark in marks:
        draw.line((60, spot(mark), width - 20, spot(mark)), PALE)
        draw.text((52, spot(mark)), f"{mark:g}", INK, face, anchor="rm")
    for g, (name, group) in enumerate(groups.items()):
        left = 70 + g * (len(labels) * wide + gap)
        draw.text((left + len(labels) * wide / 2, bottom + 8), name, INK, face, anchor="mt")
        for k, label in enumerate(labels):
            cell = group.get(label)
            if cell is None:
                continue
            x = left + k * wide
            draw.rectangle((x, spot(cell.mean), x + wide - 4, bottom), COLOURS[k % len(COLOURS)])
            if cell.std:
                middle = x + (wide - 4) / 2
                draw.line((middle, spot(cell.mean - cell.std), middle, spot(cell.mean + cell.std)), INK, 2)
    for row, entries in enumerate(legend):
        for x, k, label in entries:
            y = bottom + 40 + 20 * row
            draw.rectangle((60 + x, y - 5, 70 + x, y + 5), COLOURS[k % len(COLOURS)])
            draw.text((75 + x, y), label, INK, face, anchor="lm")
    page.save(path, format="PNG")


def wrapped_legend(labels, width, face):
    """Rows of (x, index, label) that fit a width."""
    rows, x = [[]], 0
    for k, label in enumerate(labels):
        needed = face.getlength(label) + 40
        if rows[-1] and x + needed > width:
            rows.append([])
            x = 0
        rows[-1].append((x, k, label))
        x += needed
    return rows


def against_parameters(groups, path):
    """Write a panel for each data set: DSC against trained parameters, on a logarithmic axis; groups: name -> [(trained, DSC, label)].

    Points without trained parameters stand at the left border.
    """
    across = min(3, len(groups))
    page = Image.new("RGB", (across * Panel.W, -(-len(groups) // across) * Panel.H), "white")
    draw = ImageDraw.Draw(page)
    for k, (name, points) in enumerate(groups.items()):
        powers = [np.log10(n) for n, _, _ in points if n] or [0.0]
        first, last = int(np.floor(min(powers))), max(int(np.ceil(max(powers))), int(np.floor(min(powers))) + 1)
        heights = [v for _, v, _ in points]
        xs = [(e, f"1e{e}") for e in range(first, last + 1)]
        panel = Panel(
            draw, k % across, k // across, f"{name}: DSC in %", "trained parameters", xs, labelled(ticks(min(heights), max(heights)))
        )
        spots = [panel.spot(np.log10(n) if n else first, value) for n, value, _ in points]
        taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
        for box, (n, _, _) in zip(taken, points):
            draw.ellipse(box, ORANGE if not n else BLUE, "white")
        for (x, y), (_, _, label) in zip(spots, points):
            places = ((x + 9, y), "lm"), ((x - 9, y), "rm"), ((x, y - 8), "mb"), ((x, y + 8), "mt")
            boxes = [draw.textbbox(at, label, font(12), anchor=anchor) for at, anchor in places]
            inside = [k for k, box in enumerate(boxes) if box[0] > panel.left and box[2] < panel.right] or [0]
            k = next((k for k in inside if not any(_overlap(boxes[k], other) for other in taken)), inside[0])
            draw.text(places[k][0], label, INK, font(12), anchor=places[k][1])
            taken.append(boxes[k])
    page.save(path, format="PNG")


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
