"""Charts of plain numbers, drawn by matplotlib."""

# Okabe and Ito's colours, which the colour-blind tell apart
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
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


# The report's charts. groups: {data set: {method: its DSC in %, as mean, low and high}};
# trained: {method: number of trained parameters}.


def bars(groups, trained, path, file_format="png"):
    """Plot DSC as bars, with lines from low to high."""
    methods = set()
    for cells in groups.values():
        methods.update(cells)
    width = 0.9 / len(methods)
    figure, (axis,) = _panels(1)
    figure.set_figwidth(max(PANEL[0], 0.8 + len(groups) * (0.3 * len(methods) + 0.3)))
    for k, method in enumerate(sorted(methods, key=lambda method: (trained[method], method))):
        heights = {}
        for place, cells in enumerate(groups.values()):
            if method in cells:
                x = place + (k - (len(methods) - 1) / 2) * width
                heights[x] = cells[method].mean
                axis.vlines(x, cells[method].low, cells[method].high, color="black", zorder=3)
        colour = COLOURS[k % len(COLOURS)]
        axis.bar(list(heights), list(heights.values()), 0.9 * width, color=colour, label=method)
    crowded = sum(map(len, groups)) > 12 * figure.get_figwidth()  # letters of the names below the axis
    axis.set_xticks(range(len(groups)), list(groups), rotation=15 if crowded else 0)
    axis.grid(False, axis="x")
    axis.set_title("DSC in %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path, file_format)


def against_parameters(groups, trained, path, file_format="png"):
    """Plot DSC against trained parameters, a panel for each data set."""
    figure, axes = _panels(len(groups))
    for axis, (dataset, cells) in zip(axes, groups.items()):
        for k, method in enumerate(sorted(cells, key=trained.get)):
            point = (trained[method], cells[method].mean)
            axis.plot(*point, "o", color=BLUE)
            offset = (0, 8) if k % 2 else (0, -14)  # neighbours' labels keep clear of each other
            axis.annotate(method, point, offset, textcoords="offset points", ha="center", fontsize=8)
        axis.set_xscale("symlog", linthresh=1000)  # a method may train no parameters
        axis.margins(0.2, 0.12)
        axis.set_title(f"{dataset}: DSC in %")
        axis.set_xlabel("trained parameters")
    save_figure(figure, path, file_format)
