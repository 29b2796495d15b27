"""Charts of plain numbers, drawn by matplotlib."""

from itertools import cycle

BLUE, ORANGE, PALE = "#1f5ab4", "#dc6e14", "#c8c8d0"
PANEL = (5.6, 3.8)  # inches; 100 dots each
COLOURS = (
    "#1f5ab4", "#dc6e14", "#3ca050", "#9650aa", "#c8323c", "#5a5a64", "#00a0b4", "#b49614",
)  # fmt: skip


def _panels(count, across=3):
    """Return (figure, axes) of `count` panels, `across` in a row; loads matplotlib, which takes a while."""
    from matplotlib.figure import Figure

    columns = min(across, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=100, layout="constrained")
    axes = [figure.add_subplot(rows, columns, k + 1) for k in range(count)]
    for axis in axes:
        axis.grid(True, color="#e6e6ea")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path, kind="png"):
    """Write a figure as png, pdf or svg, without its date, so that equal figures are equal files."""
    undated = {"png": dict(Software=None), "pdf": dict(CreationDate=None), "svg": dict(Date=None)}
    figure.savefig(path, format=kind, metadata=undated[kind])


def curves(history, path):
    """Plot loss and DSC against epochs; history: dictionaries with the columns of log.csv."""
    figure, axes = _panels(2)
    epochs = [row["epoch"] for row in history]
    panels = (
        ("loss", "train_loss", "val_loss", 1),
        ("DSC in %, at the model's size", "train_dsc", "val_dsc", 100),
    )
    for axis, (title, train, val, factor) in zip(axes, panels):
        for label, column, colour in (("training", train, BLUE), ("validation", val, ORANGE)):
            axis.plot(
                epochs, [factor * row[column] for row in history], color=colour, label=label, marker="."
            )
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    save_figure(figure, path)


def scatter(columns, values, best, faint, title, path, log=()):
    """Plot `values` against each of some columns, a panel each.

    columns: name -> numbers, or words, which stand side by side. best: index of the point in orange. faint:
    indices of pale points. log: names with a logarithmic axis.
    """
    figure, axes = _panels(len(columns))
    for axis, (name, xs) in zip(axes, columns.items()):
        if name in log:
            axis.set_xscale("log")
        elif not all(isinstance(x, float) for x in xs):
            words = sorted(set(xs), key=lambda x: (isinstance(x, str), x))
            axis.set_xticks(range(len(words)), list(map(str, words)))
            axis.set_xlim(-0.5, len(words) - 0.5)
            xs = [words.index(x) for x in xs]
        for i, (x, y) in enumerate(zip(xs, values)):
            colour = ORANGE if i == best else PALE if i in faint else BLUE
            axis.plot(x, y, "o", color=colour, zorder=3 if i == best else 2)
        axis.set(title=title, xlabel=name)
    save_figure(figure, path)


def bars(groups, title, path, kind="png"):
    """Plot bars with error bars; groups: name -> {label of a bar: something with mean and std, or None}.

    The error bar is the 95 % interval where that is known, else the deviation.
    """
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    figure, (axis,) = _panels(1)
    figure.set_figwidth(max(PANEL[0], 0.8 + len(groups) * (0.3 * len(labels) + 0.3)))
    width = 0.9 / max(len(labels), 1)
    for k, (label, colour) in enumerate(zip(labels, cycle(COLOURS))):
        cells = [(g, group[label]) for g, group in enumerate(groups.values()) if group.get(label)]
        places = [g + (k - (len(labels) - 1) / 2) * width for g, _ in cells]
        errors = [_error(cell) for _, cell in cells]
        axis.bar(
            places,
            [cell.mean for _, cell in cells],
            0.9 * width,
            yerr=list(zip(*errors)),
            color=colour,
            label=label,
        )
    crowded = sum(map(len, groups)) > 12 * figure.get_figwidth()
    turned = dict(rotation=30, ha="right") if crowded else {}
    axis.set_xticks(range(len(groups)), list(groups), **turned)
    axis.grid(False, axis="x")
    if len(labels) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axis.set_title(title)
    save_figure(figure, path, kind)


def _error(cell):
    """Return how far an error bar reaches below and above a mean."""
    if cell.ci95:
        return max(0, cell.mean - cell.ci95[0]), max(0, cell.ci95[1] - cell.mean)
    return cell.std or 0, cell.std or 0


def against_parameters(groups, path, kind="png"):
    """Plot DSC against trained parameters, a panel for each data set; groups: name -> [(trained, DSC,
    label)].

    Points without trained parameters stand at the left border, in orange.
    """
    figure, axes = _panels(len(groups))
    for axis, (name, points) in zip(axes, groups.items()):
        trained = [n for n, _, _ in points if n] or [10]
        left = min(trained) / 3
        axis.set_xscale("log")
        axis.set_xlim(left / 1.5, max(trained) * 10)
        for k, (n, value, label) in enumerate(sorted(points)):
            axis.plot(n or left, value, "o", color=BLUE if n else ORANGE)
            offset = (0, 8) if k % 2 else (0, -14)  # neighbours' labels keep clear of each other
            how = dict(xytext=offset, textcoords="offset points", ha="center", fontsize=8)
            axis.annotate(label, (n or left, value), **how)
        axis.margins(y=0.12)
        axis.set(title=f"{name}: DSC in %", xlabel="trained parameters")
    save_figure(figure, path, kind)


def lines(groups, title, xlabel, path, kind="png"):
    """Plot means against numbers, a panel for each group; bars reach from the least to the largest y.

    groups: name -> {label of a curve: [(x, [y, ...])]}.
    """
    figure, axes = _panels(len(groups))
    for axis, (name, curves) in zip(axes, groups.items()):
        for (label, points), colour in zip(curves.items(), cycle(COLOURS)):
            xs, means = zip(*((x, sum(ys) / len(ys)) for x, ys in points))
            reach = zip(*((mean - min(ys), max(ys) - mean) for mean, (_, ys) in zip(means, points)))
            axis.errorbar(xs, means, list(reach), color=colour, label=label, marker="o", capsize=3)
        axis.set(title=f"{name}: {title}", xlabel=xlabel)
        axis.legend(frameon=False)
    save_figure(figure, path, kind)
