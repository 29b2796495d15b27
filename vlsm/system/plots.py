"""Charts of plain numbers, drawn by matplotlib."""

import math
import textwrap
from contextlib import contextmanager

# Okabe and Ito's colours, which the colour-blind tell apart
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
GREY = "#5a5a64"
PANEL = (3.8, 2.7)  # inches
WIDE, LINE = 6.0, 0.14  # inches: width of a panel with names of methods, height of a line of text
NAME = 34  # characters of a name in a line
DAGGER = " †"  # after the name of a method whose figures are a paper's
STYLE = {
    "font.size": 8.5,
    "figure.labelsize": 8.5,
    "pdf.fonttype": 42,  # journals refuse the default, type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vlsm",  # ids are the same each time
    "text.parse_math": False,  # a file name with two $ is no formula
    "figure.dpi": 200,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e6ea",
}


@contextmanager
def styled():
    """Draw in the project's style, used as `@styled()`; matplotlib's settings stay as they were."""
    import matplotlib  # takes a while to load

    with matplotlib.rc_context(STYLE):
        yield


def _panels(count, across, size):
    """Return (figure, axes) of `count` panels of a size in inches, `across` in a row."""
    from matplotlib.figure import Figure

    columns = min(across, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, k + 1) for k in range(count)]
    return figure, axes


def save_figure(figure, path, file_format="png"):
    """Write a figure as png, pdf or svg, without date or version, so that equal figures are equal files."""
    entry = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}[file_format]
    figure.savefig(path, format=file_format, metadata={entry: None})


# title -> columns of log.csv
CURVES = {
    "loss": ("train_loss", "val_loss"),
    "DSC in %, at the model's size": ("train_dsc", "val_dsc"),
    "false alarms in %": ("val_alarms",),
    "learning rate": ("lr",),
    "seconds an epoch": ("seconds",),
}
SERIES = {"train": ("training", BLUE), "val": ("validation", ORANGE)}  # beginning of a column -> name, colour


@styled()
def curves(history, best, name, path):
    """Plot a run's log against epochs, with a line at the epoch `best`, under the run's name.

    history: dictionaries with the columns of log.csv; there is no panel for what they lack.
    """
    epochs = [row["epoch"] for row in history]
    charts = [title for title, columns in CURVES.items() if history[-1].get(columns[0]) is not None]
    figure, axes = _panels(len(charts), 3 if len(charts) > 4 else 2, PANEL)
    for axis, title in zip(axes, charts):
        factor = 100 if "%" in title else 1
        for column in CURVES[title]:
            label, colour = SERIES.get(column.partition("_")[0], ("", GREY))
            values = [factor * row.get(column, math.nan) for row in history]
            axis.plot(epochs, values, color=colour, label=label, marker=".")
        axis.axvline(best, color=GREY, linestyle="--", linewidth=1, label=f"best epoch: {best}")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if title == "learning rate":
            rates = sorted(set(values))
            axis.set_yscale("log" if rates[0] > 0 else "linear")
            axis.set_yticks(rates, [f"{rate:.1e}" for rate in rates])
            axis.minorticks_off()
    figure.suptitle(textwrap.fill(name, 2 * NAME))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


# The report's charts. groups: {data set: {method: its DSC in %, as mean, low, high, and spread in words}};
# trained: {method: number of trained parameters, or None}. Figures of a paper are hollow.


def _method_panels(groups):
    """Return (figure, axes): a panel for each data set, with room for a line of text for each method."""
    most = max(map(len, groups.values()))
    lines = 1 + max(len(method) for cells in groups.values() for method in cells) // NAME
    figure, axes = _panels(len(groups), 2, (WIDE, 1 + most * LINE * (lines + 0.5)))
    for axis, dataset in zip(axes, groups):
        axis.set_title(textwrap.fill(dataset, NAME), loc="left", weight="bold")
    return figure, axes


def _fill(method):
    return "white" if method.endswith(DAGGER) else BLUE


@styled()
def bars(groups, path, file_format="png"):
    """Plot DSC as horizontal bars, the best first, with lines from low to high."""
    figure, axes = _method_panels(groups)
    most = max(map(len, groups.values()))
    for axis, cells in zip(axes, groups.values()):
        methods = sorted(cells, key=lambda method: -cells[method].mean)
        for place, method in enumerate(methods):
            mean, low, high, spread = cells[method]
            axis.barh(place, mean, 0.7, color=_fill(method), edgecolor=BLUE)
            axis.hlines(place, low, high, color="black", zorder=3)
            axis.text(102, place, f"{mean:.2f}{spread}", va="center")
        axis.set_yticks(range(len(methods)), [textwrap.fill(method, NAME) for method in methods])
        axis.set(xlim=(0, 100), ylim=(most - 0.4, -0.6))  # bars are equally thick in all panels
        axis.grid(False, axis="y")
    figure.supxlabel("DSC in %. Lines: ± of seeds or folds, else the 95 % interval. Hollow: published (†).")
    save_figure(figure, path, file_format)


@styled()
def against_parameters(trained, groups, path, file_format="png"):
    """Plot DSC against trained parameters, where these are known.

    The names stand in a column beside the panel, and lines lead to them.
    """
    figure, axes = _method_panels(groups)
    line = dict(arrowstyle="-", color="#b4b4bc", relpos=(0, 0.5))
    for axis, cells in zip(axes, groups.values()):
        methods = [method for method in cells if trained[method] is not None]
        methods.sort(key=lambda method: cells[method].mean)
        for k, method in enumerate(methods):
            point = trained[method], cells[method].mean
            axis.plot(*point, "o", color=BLUE, markerfacecolor=_fill(method))
            name = textwrap.fill(method, NAME)
            end = 1.05, (k + 0.5) / len(methods)
            axis.annotate(name, point, end, textcoords="axes fraction", va="center", arrowprops=line)
        axis.set_xscale("symlog", linthresh=1000)  # a method may train no parameters
        axis.set_xticks([0, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8], "0,1 k,10 k,100 k,1 M,10 M,100 M".split(","))
        axis.set_xlim(-200, 1e9)
        axis.margins(y=0.05)
    figure.supxlabel("DSC in % against trained parameters, where these are known. Hollow: published (†).")
    save_figure(figure, path, file_format)
