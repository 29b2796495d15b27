"""The table of all evaluated runs below a folder, in three formats, and its charts."""

import csv
import io
import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, without_dim
from tests.test_mistakes import rewrite
from vlsm.results.tables import BOLD, PLAIN, format_rows
from vlsm.system import plots
from vlsm.system.files import read_csv, write_csv
from vlsm.tools import report
from vlsm.tools.report import Cell, Run, add_published, group_seeds, table_rows, tabulate


def summary(mean):
    return dict(mean=mean, ci95=None)


def run(dataset, label, seed, dsc, trained=1000, iou=0.5, hd95=10.0, ci95=None, **recipe):
    metrics = dict(trained=trained, dsc=dict(mean=dsc, ci95=ci95), iou=summary(iou))
    metrics |= dict(hd95=summary(hd95), nsd=summary(None))
    return Run(dataset, label, dict(recipe, seed=seed), Path("metrics.json"), metrics)


RUNS = [
    run("kvasir", "dense vl 64", 41, 0.80, 2_974_464, hd95=9.0),
    run("kvasir", "dense vl 64", 42, 0.82, 2_974_464, hd95=11.0),
    run("kvasir", "coop J9", 42, 0.75, 20_034, hd95=None, ci95=[0.7, 0.781]),
    run("isic_x", "coop J9", 42, 0.9, 20_034, iou=0.81, hd95=30.0),
]


def table(runs, text_format="md", paper=None):
    groups, trained = group_seeds(runs)
    cells = tabulate(groups)
    if paper:
        add_published(cells, trained, str(paper))
    return format_rows(table_rows(cells, trained), text_format)


def test_means_and_spreads():
    groups, trained = group_seeds(RUNS)
    assert trained == {"dense vl 64": 2_974_464, "coop J9": 20_034}
    cells = tabulate(groups)
    std = np.std([80, 82], ddof=1)
    cell = cells["kvasir", "dsc"]["dense vl 64"]
    assert cell[:3] == pytest.approx((81, 81 - std, 81 + std)) and cell.spread == " ± 1.41"
    cell = cells["kvasir", "dsc"]["coop J9"]
    assert cell[:3] == pytest.approx((75, 70, 78.1)) and cell.spread == " [70.00, 78.10]"
    assert cells["kvasir", "iou"]["coop J9"].spread == ""
    assert "coop J9" not in cells["kvasir", "hd95"], "undefined for all records"


def test_markdown():
    lines = table(RUNS).splitlines()
    assert lines[0] == "| data set | metric | coop J9 (20 k) | dense vl 64 (2.97 M) |"  # by parameters
    assert lines[2] == "| kvasir | DSC % | 75.00 [70.00, 78.10] | **81.00** ± 1.41 |"
    assert lines[3] == "| kvasir | IoU % | **50.00** | **50.00** ± 0.00 |"
    assert lines[4] == "| kvasir | HD95 px |  | **10.00** ± 1.41 |"
    assert lines[5] == r"| isic\_x | DSC % | **90.00** |  |"
    assert len(lines) == 8, "no row for NSD, which is undefined"


def test_the_smaller_distance_is_the_better():
    lines = table([run("a", "x", 1, 0.5, hd95=3.0), run("a", "y", 1, 0.5, hd95=2.0)]).splitlines()
    assert lines[4] == "| a | HD95 px | 3.00 | **2.00** |"


def test_csv_and_latex():
    rows = list(csv.reader(io.StringIO(table(RUNS, "csv"))))
    assert rows[1] == ["kvasir", "DSC %", "75.00 [70.00, 78.10]", "81.00 +- 1.41"] and len(rows) == 7
    tex = table(RUNS, "tex")
    assert (
        r"kvasir & DSC \% & 75.00 [70.00, 78.10] & \textbf{81.00} $\pm$ 1.41 \\" in tex and r"isic\_x" in tex
    )
    assert tex.startswith("\\begin{tabular}{llrr}\n\\toprule\n") and tex.endswith("\\end{tabular}\n")
    assert tex.splitlines()[3] == r"\midrule"


def test_a_papers_figures_are_marked_and_never_in_bold(tmp_path):
    file = tmp_path / "paper.json"
    row = dict(dataset="kvasir", method="dense vl 64", trained=3_000_000, dsc=89.1, hd95=5)
    file.write_text(json.dumps(dict(source="A paper, Table 1", rows=[row])))
    lines = table(RUNS, paper=file).splitlines()
    assert lines[0].endswith("| dense vl 64 (2.97 M) | dense vl 64 † (3 M) |")
    assert lines[2].endswith("| **81.00** ± 1.41 | 89.10 |")
    assert lines[3].endswith("**50.00** ± 0.00 |  |") and lines[4].endswith("| **10.00** ± 1.41 | 5.00 |")
    assert r"dense vl 64 $^\dagger$ (3 M)" in table(RUNS, "tex", file)
    row |= dict(dsc=81.0)
    del row["trained"]
    file.write_text(json.dumps(dict(source="A paper, Table 1", rows=[row])))
    lines = table(RUNS, paper=file).splitlines()
    assert lines[0].endswith("| dense vl 64 † |") and lines[2].endswith("| **81.00** ± 1.41 | 81.00 |")
    assert add_published({}, {}, str(file)) == "† A paper, Table 1"


BAD_FIGURES = {
    "[]": "a JSON object",
    "{}": "rows",
    '{"source": 1, "rows": []}': "source",
    '{"source": "x", "rows": [{"dataset": "a"}]}': "row 0': 'method' should be a text",
    '{"source": "x", "rows": [{"dataset": "a", "method": "b", "dsc": "9"}]}': "'dsc' should be a number",
    '{"source": "x", "rows": [{"dataset": "a", "method": "b", "dsc": NaN}]}': "'dsc' should be a number",
    '{"source": "x", "rows": [{"dataset": "a", "method": "b", "trained": []}]}': "'trained' should be",
}


@pytest.mark.parametrize("text", BAD_FIGURES)
def test_figures_that_are_none_are_named(text, tmp_path):
    (tmp_path / "paper.json").write_text(text)
    with pytest.raises(ValueError, match="paper.json") as error:
        add_published({("a", "dsc"): {}}, {}, str(tmp_path / "paper.json"))
    assert BAD_FIGURES[text] in str(error.value)


def test_the_papers_figures_are_at_hand(cli, tmp_path):
    rows = json.loads((ROOT / "vlsm" / "tools" / "published" / "vlsm-adapter.json").read_text())["rows"]
    cells, trained = {(row["dataset"], metric): {} for row in rows for metric in ("dsc", "iou", "hd95")}, {}
    assert "Table 1" in add_published(cells, trained, "vlsm-adapter")
    assert cells["kvasir", "dsc"]["dense vl 64 †"].mean == 89.1 and trained["dense vl 64 †"] == 3_000_000
    assert sum(map(len, cells.values())) == 120
    for file in (ROOT / "vlsm" / "tools" / "published").glob("*.json"):
        add_published({}, trained, file.stem)
    assert trained["coop †"] is None
    with pytest.raises(FileNotFoundError, match="vlsm-adaptor"):
        add_published({}, {}, "vlsm-adaptor")


def test_runs_of_other_recipes_are_told_apart():
    runs = [run("k", "dense", 1, dsc, lr=lr, clip=0.5) for dsc, lr in ((0.5, 1e-3), (0.6, 1e-4), (0.7, 1e-4))]
    groups, _ = group_seeds(runs)
    means = {
        label: [r.metrics["dsc"]["mean"] for r in seeds.values()] for (_, label), seeds in groups.items()
    }
    assert means == {"dense (lr 0.001)": [0.5], "dense (lr 0.0001)": [0.6]}, "of equal seeds the first counts"
    groups, _ = group_seeds([runs[0], run("other", "dense", 1, 0.6, lr=1e-4)])
    assert {label for _, label in groups} == {"dense"}


def test_runs_that_differ_in_more_than_seed_or_fold_are_told_apart():
    runs = [run("k", "dense", 1, 0.5, fold="1/2"), run("k", "dense", 1, 0.7, fold="2/2")]
    groups, _ = group_seeds([*runs, run("k", "dense", 2, 0.9, prompts="p6", init="runs/a")])
    assert [(label, list(seeds)) for (_, label), seeds in groups.items()] == [
        ("dense (prompts None) (init None)", [(1, "1/2"), (1, "2/2")]),
        ("dense (prompts p6) (init runs/a)", [(2, None)]),
    ]


def test_labels():
    metadata = dict(model="cris", method="coop", options=dict(prompt_depth=9), reference=True)
    assert report.method_label(metadata, {}) == "CRIS coop J9 (published code)"
    metadata = dict(model="clipseg", method="dense", options=dict(dim=64, branches="vl"), reference=False)
    assert report.method_label(metadata, dict(mirror=True)) == "dense vl 64 (mirrored)"
    assert report.method_label(metadata, dict(ensemble=["a", "b"])) == "dense vl 64 (mean of 2)"


def test_false_alarms_are_rows():
    rates = [0.1, 0.2, 0.4]
    runs = [run("k", "dense", seed, 0.5) for seed in range(3)] + [run("k", "coop", 0, 0.5, trained=10)]
    for one, rate in zip(runs, rates):
        one.metrics["absent word"] = dict(mean=rate, ci95=[rate, rate])
    lines = table(runs).splitlines()
    std = np.std([10, 20, 40], ddof=1)
    assert lines[-1] == f"| k | false alarms %: absent word |  | **23.33** ± {std:.2f} |"


def test_pixels_of_a_paper_stay_in_sight_beside_millimetres(tmp_path):
    file = tmp_path / "paper.json"
    row = dict(dataset="kvasir", method="dense", trained=1000, dsc=89.1, hd95=5)
    file.write_text(json.dumps(dict(source="A paper", rows=[row])))
    lines = table([run("kvasir (mm)", "dense", 1, 0.8)], paper=file).splitlines()
    assert "| kvasir (mm) | DSC % | **80.00** | 89.10 |" in lines
    assert "| kvasir (mm) | HD95 mm | **10.00** |  |" in lines
    assert lines[-1] == "| kvasir | HD95 px |  | 5.00 |"


def test_names_cannot_break_a_table():
    rows = [
        ["data set", "metric", "m"],
        ["=a|b\\c*d_e<f[g](h)&~\nend", "DSC %", BOLD + "8.10" + PLAIN + " ± 0.10"],
    ]
    assert (
        r"| =a\|b\\c\*d\_e\<f[g]\(h)\&\~ end | DSC % | **8.10** ± 0.10 |"
        in format_rows(rows, "md").splitlines()
    )
    cells = list(csv.reader(io.StringIO(format_rows(rows, "csv"))))[1]
    assert cells == ["'=a|b\\c*d_e<f[g](h)&~\nend", "DSC %", "8.10 +- 0.10"]
    rows[1][0] = r"[\{}$&#^_~%]†"
    tex = (
        r"{[}\textbackslash{}\{\}\$\&\#\textasciicircum{}\_\textasciitilde{}\%]$^\dagger$ & DSC \% & "
        r"\textbf{8.10} $\pm$ 0.10 \\"
    )
    lines = format_rows(rows, "tex", ["a\nnote"]).splitlines()
    assert tex in lines and lines[-1] == "% a note"


def test_formulas_are_escaped_once_and_read_back(tmp_path):
    cells = [
        "=1+1",
        "-x",
        "+x",
        "@x",
        "\tx",
        "\rx",
        "'=x",
        "''-x",
        "'x",
        "-0.5",
        "+1e-3",
        "-1+1",
        "",
        "a=b",
        "-.5",
    ]
    write_csv(tmp_path / "a.csv", [["name"], *([cell] for cell in cells)])
    with open(tmp_path / "a.csv", newline="") as file:
        written = [row[0] for row in csv.reader(file) if row][1:]
    assert written[:8] == ["'" + cell for cell in cells[:8]] and "'-1+1" in written
    assert [cell for cell in cells[8:] if cell in written] == ["'x", "-0.5", "+1e-3", "", "a=b", "-.5"]
    assert [row[0] for row in read_csv(tmp_path / "a.csv")][1:] == cells


def chart_groups():
    """Eight data sets of 13 methods and a paper's, with long names, close values and unknown numbers."""
    methods = [f"a method_{k} of a $long$ name{' and options' * (k % 2)}" for k in range(13)]
    trained = {method: 10**k if k < 9 else 0 for k, method in enumerate(methods)}
    trained["paper †"] = trained["other †"] = None
    groups = {}
    for d in range(8):
        cells = {method: Cell(80 + k / 50, 79.0, 82.0, " [79.00, 82.00]") for k, method in enumerate(methods)}
        groups[f"set_{d}"] = {"other †": Cell(70.0, 70.0, 70.0, "")} | cells
        groups[f"set_{d}"]["paper †"] = Cell(99.0, 99.0, 99.0, "")
    return groups, trained


def svg_texts(file):
    """Return [(text, x, y)] of an SVG, whose text is text."""
    elements = ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")
    places = []
    for element in elements:
        x, y = element.get("x"), element.get("y")
        if x is None:  # a line of several
            x, y = re.findall(r"[\d.]+", element.get("transform"))[:2]
        places.append((element.text, float(x), float(y)))
    return places


def test_names_stand_at_their_bars_and_do_not_overlap(tmp_path):
    groups, trained = chart_groups()
    plots.bars(groups, tmp_path / "a.svg", "svg")
    texts = svg_texts(tmp_path / "a.svg")
    heights = {text: y for text, _, y in texts}
    values = [(y, text) for text, _, y in texts if text.endswith("[79.00, 82.00]")]
    assert len(values) == 8 * 13
    assert abs(heights["paper †"] - heights["99.00"]) < 3 and heights["99.00"] < heights["70.00"]
    first = [y for text, x, y in texts if text in ("99.00", "70.00") or "[" in text][:15]
    assert all(abs(b - a) > 10 for a, b in pairwise(sorted(first)))
    plots.against_parameters(trained, groups, tmp_path / "b.svg", "svg")
    names = [(x, y) for text, x, y in svg_texts(tmp_path / "b.svg") if text.startswith("a method")]
    column = sorted(y for x, y in names if x == names[0][0])
    assert len(names) == 8 * 13 and all(b - a > 8 for a, b in pairwise(column) if b != a)
    assert "paper" not in (tmp_path / "b.svg").read_text(), "whose parameters are unknown"


def test_a_single_method_is_no_giant_bar(tmp_path):
    plots.bars({"k": {"dense": Cell(80, 79, 81, "")}}, tmp_path / "a.png")
    width, height = Image.open(tmp_path / "a.png").size
    assert height < width / 4
    blue = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")) == (0x00, 0x72, 0xB2)
    assert 20 < blue.all(-1).any(1).sum() < 80, "rows of pixels"


@pytest.mark.parametrize("file_format", ["png", "pdf", "svg"])
def test_charts(tmp_path, file_format):
    groups, trained = group_seeds([*RUNS, run("kvasir", "none", 1, 0.4, trained=0)])
    dsc = {dataset: cells for (dataset, metric), cells in tabulate(groups).items() if metric == "dsc"}
    for draw in (plots.bars, partial(plots.against_parameters, trained)):
        draw(dsc, tmp_path / "a", file_format)
        draw(dsc, tmp_path / "b", file_format)
        written = (tmp_path / "a").read_bytes()
        assert written == (tmp_path / "b").read_bytes() and len(written) > 3000
        assert b"/Type3" not in written, "a font that journals refuse"
        if file_format == "png":
            assert Image.open(tmp_path / "a").info["dpi"][0] == pytest.approx(200, abs=0.1)


@pytest.fixture
def group(cli, quick, tmp_path):
    """Two seeds of dense adapters and one run of decoder, evaluated."""
    runs = tmp_path / "runs"
    code, _, err = cli(
        "vlsm.tools.repeat", "--seeds", 1, 2, "--out", runs / "dense", "--", *quick[:-2], "--epochs", 1
    )
    assert code == 0, err
    options = without_dim(quick)[:-1]
    assert cli("train", *options, runs / "decoder", "--peft", "decoder", "--epochs", 1)[0] == 0
    code, said, err = cli("evaluate", "--ckpt", runs / "dense")
    assert code == 0 and said.count("records: 6;") == 2, err
    assert cli("evaluate", "--ckpt", runs / "decoder")[0] == 0
    return runs


def mean_dsc(folder):
    return json.loads((folder / "metrics.json").read_text())["dsc"]["mean"]


def test_each_prompt_over_the_seeds(cli, group):
    code, said, err = cli("evaluate", "--ckpt", group / "dense", "--all-prompts")
    assert code == 0, err
    scores = [mean_dsc(group / "dense" / f"seed{seed}" / "eval-test" / "p1") for seed in (1, 2)]
    spread = f"{100 * np.mean(scores):.2f} +- {100 * np.std(scores, ddof=1):.2f} over 2 runs"
    assert f"p1 DSC % {spread}" in " ".join(said.split())


def test_other_runs_have_no_mean(cli, group):
    (group / "decoder").rename(group / "dense" / "decoder")
    code, said, err = cli("evaluate", "--ckpt", group / "dense")
    assert code == 2 and "differ in 'method' (decoder, dense)" in err and not said
    (group / "dense" / "decoder").rename(group / "decoder")
    rewrite(group / "dense" / "seed2" / "best.safetensors", prompts="p1")
    code, _, err = cli("evaluate", "--ckpt", group / "dense")
    assert code == 2 and "differ in 'prompts' (random, p1)" in err and "vlsm.tools.report" in err


def test_a_report_of_runs(cli, group, folder, tmp_path):
    for text_format in ("md", "csv", "tex"):
        code, said, err = cli("vlsm.tools.report", group, "--format", text_format)
        assert code == 0, err
        text = (group / f"report.{text_format}").read_text()
        assert text in said and "3 evaluations" in said
        assert ("95 % bootstrap interval" in text) == (text_format != "csv")
        assert "false alarms" in text and "dense vl 8 (22.9 k)" in text and "decoder (142 k)" in text
    scores = [mean_dsc(group / "dense" / f"seed{seed}" / "eval-test") for seed in (1, 2)]
    spread = f"{100 * np.mean(scores):.2f} +- {100 * np.std(scores, ddof=1):.2f}"
    assert spread in (group / "report.csv").read_text()
    for name in ("dsc.png", "parameters.png"):
        assert len(set(Image.open(group / name).convert("L").tobytes())) > 10
    code, said, err = cli(
        "vlsm.tools.report", group, "--published", "vlsm-adapter", "--out", tmp_path / "out"
    )
    assert code == 0 and "dense vl 64 † (3 M)" in said and "† VLSM-Adapter" in said, err
    other = folder.rename(folder.with_name("other"))
    assert cli("evaluate", "--ckpt", group / "decoder", "--dataset", other)[0] == 0
    code, said, _ = cli("vlsm.tools.report", group)
    assert code == 0 and "3 evaluations" in said and "other" not in said, "the runs' own data set alone"


def test_what_a_report_cannot_be_made_of(cli, group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs")
    code, _, err = cli("vlsm.tools.report")
    assert code == 2 and "Below 'runs' there is no run" in err
    code, _, err = cli("vlsm.tools.report", ROOT / "vlsm")
    assert code == 2 and "Evaluate the runs first" in err
    (tmp_path / "report.md").write_text("mine")
    code, _, err = cli("vlsm.tools.report", group, "--out", tmp_path)
    assert code == 2 and "report.md" in err and (tmp_path / "report.md").read_text() == "mine"
    assert not (tmp_path / "dsc.png").exists()
    file = group / "decoder" / "eval-test" / "metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["trained"]
    file.write_text(json.dumps(metrics))
    code, _, err = cli("vlsm.tools.report", group)
    assert code == 2 and str(file) in err and "'trained'" in err
