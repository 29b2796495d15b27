"""Charts of plain numbers, drawn by matplotlib."""

BLUE = "#1f5ab4"
ORANGE = "#dc6e14"
COLOURS = (BLUE, ORANGE, "#3ca050", "#9650aa", "#c8323c", "#5a5a64", "#00a0b4", "#b49614")
PANEL = (5.6, 3.8)  # inches; 100 dots each


def _panels(count, across=3):
    """Return (figure, axes) of `count` panels, `across` in a row."""
    from matplotlib.figure import Figure  # takes a while to load

    columns = min(across, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=100, layout="constrained")
    axes = []
    for k in range(count):
        axis = figure.add_subplot(rows, columns, k + 1)
        axis.grid(True, color="#e6e6ea")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axes.append(axis)
    return figure, axes


def save_figure(figure, path, file_format="png"):
    """Write a figure as png, pdf or svg, without its date, so that equal figures are equal files."""
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    figure.savefig(path, format=file_format, metadata=undated[file_format])


def curves(history, path):
    """Plot loss and DSC against epochs; history: dictionaries with the columns of log.csv."""
    figure, (loss_axis, dsc_axis) = _panels(2)
    epochs = [row["epoch"] for row in history]
    for split, label, colour in (("train", "training", BLUE), ("val", "validation", ORANGE)):
        loss = [row[f"{split}_loss"] for row in history]
        dsc = [100 * row[f"{split}_dsc"] for row in history]
        loss_axis.plot(epochs, loss, color=colour, label=label, marker=".")
        dsc_axis.plot(epochs, dsc, color=colour, label=label, marker=".")
    loss_axis.set_title("loss")
    dsc_axis.set_title("DSC in %, at the model's size")
    for axis in (loss_axis, dsc_axis):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    save_figure(figure, path)


# The report's charts. groups: {data set: {method: its DSC in % with mean, std and ci95, or None}};
# trained: {method: number of trained parameters}.


def bars(groups, trained, path, file_format="png"):
    """Plot DSC as bars with error bars: the 95 % interval if it is known, else the deviation."""
    methods = _methods(groups, trained)
    figure, (axis,) = _panels(1)
    figure.set_figwidth(max(PANEL[0], 0.8 + len(groups) * (0.3 * len(methods) + 0.3)))
    width = 0.9 / len(methods)
    for k, method in enumerate(methods):
        middle = (k - (len(methods) - 1) / 2) * width
        places = []
        means = []
        errors = []
        for place, cells in enumerate(groups.values()):
            cell = cells.get(method)
            if cell:
                places.append(place + middle)
                means.append(cell.mean)
                errors.append(_error(cell))
        below, above = zip(*errors)
        colour = COLOURS[k % len(COLOURS)]
        axis.bar(places, means, 0.9 * width, yerr=(below, above), color=colour, label=method)
    crowded = sum(map(len, groups)) > 12 * figure.get_figwidth()  # letters of the names below the axis
    turned = {"rotation": 30, "ha": "right"} if crowded else {}
    axis.set_xticks(range(len(groups)), list(groups), **turned)
    axis.grid(False, axis="x")
    if len(methods) > 1:
        letters = 6 + max(map(len, methods))  # of a column, with its colour
        ncols = min(3, max(1, int(12 * figure.get_figwidth() / letters)))
        figure.legend(loc="outside lower center", ncols=ncols, frameon=False)
    axis.set_title("DSC in %")
    save_figure(figure, path, file_format)


def _methods(groups, trained):
    """Return the methods with figures, by their trained parameters."""
    methods = set()
    for cells in groups.values():
        methods.update(method for method, cell in cells.items() if cell)
    return sorted(methods, key=lambda method: (trained[method], method))


def _error(cell):
    """Return how far an error bar reaches below and above a mean."""
    if cell.ci95:
        low, high = cell.ci95
        return max(0, cell.mean - low), max(0, high - cell.mean)
    deviation = cell.std or 0
    return deviation, deviation


def against_parameters(groups, trained, path, file_format="png"):
    """Plot DSC against trained parameters, a panel for each data set.

    Points without trained parameters are at the left border, in orange.
    """
    figure, axes = _panels(len(groups))
    for axis, (dataset, cells) in zip(axes, groups.items()):
        methods = _methods({dataset: cells}, trained)
        counts = [trained[method] for method in methods if trained[method]] or [10]
        left = min(counts) / 3
        axis.set_xscale("log")
        axis.set_xlim(left / 1.5, max(counts) * 10)
        for k, method in enumerate(methods):
            point = (trained[method] or left, cells[method].mean)
            colour = BLUE if trained[method] else ORANGE
            axis.plot(*point, "o", color=colour)
            offset = (0, 8) if k % 2 else (0, -14)  # neighbours' labels keep clear of each other
            axis.annotate(method, point, offset, textcoords="offset points", ha="center", fontsize=8)
        axis.margins(y=0.12)
        axis.set_title(f"{dataset}: DSC in %")
        axis.set_xlabel("trained parameters")
    save_figure(figure, path, file_format)
