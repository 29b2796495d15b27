"""Results of several runs: seeds, tables in three formats, pictures, comparisons of two methods on the same records."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, rows, without_dim
from vlsm.results import report
from vlsm.results.report import Run, table, tabulate
from vlsm.results.scores import signed_rank


def run(dataset, label, seed, dsc, trained=1000, iou=0.5, hd95=10.0, recipe="{}"):
    return Run(None, dataset, label, recipe, seed, trained, dict(dsc=dsc, iou=iou, hd95=hd95))


RUNS = [
    run("kvasir", "dense vl 64", 41, 0.80, 2_974_464, hd95=9.0),
    run("kvasir", "dense vl 64", 42, 0.82, 2_974_464, hd95=11.0),
    run("kvasir", "coop J9", 42, 0.75, 20_034, hd95=None),
    run("isic_x", "coop J9", 42, 0.9, 20_034, iou=0.81, hd95=30.0),
]


def test_means_and_deviations():
    names, labels, cells, trained = tabulate(RUNS)
    assert names == ["kvasir", "isic_x"] and labels == ["coop J9", "dense vl 64"]  # by trained parameters
    cell = cells["kvasir", "dense vl 64", "dsc"]
    assert (cell.mean, cell.std, cell.seeds) == (
        pytest.approx(81),
        pytest.approx(np.std([80, 82], ddof=1)),
        2,
    )
    assert cells["kvasir", "coop J9", "dsc"].std is None
    assert ("kvasir", "coop J9", "hd95") not in cells, "what is undefined for all records has no mean"


def test_markdown():
    lines = table(RUNS).splitlines()
    assert lines[0] == "| data set | metric | coop J9 (20 k) | dense vl 64 (2.97 M) |"
    assert lines[2] == "| kvasir | DSC % | 75.00 | **81.00** ± 1.41 |"
    assert lines[3] == "| kvasir | IoU % | **50.00** | **50.00** ± 0.00 |"
    assert lines[4] == "| kvasir | HD95 px |  | **10.00** ± 1.41 |"
    assert lines[5] == "| isic_x | DSC % | **90.00** |  |"


def test_the_smaller_distance_is_the_better():
    lines = table([run("a", "x", 1, 0.5, hd95=3.0), run("a", "y", 1, 0.5, hd95=2.0)]).splitlines()
    assert lines[4] == "| a | HD95 px | 3.00 | **2.00** |"


def test_csv_and_latex():
    found = list(csv.reader(io.StringIO(table(RUNS, "csv"))))
    assert found[1] == ["kvasir", "DSC %", "75.00", "81.00 +- 1.41"] and len(found) == 7
    tex = table(RUNS, "tex")
    assert r"kvasir & DSC \% & 75.00 & \textbf{81.00} $\pm$ 1.41 \\" in tex and r"isic\_x" in tex
    assert tex.startswith(r"\begin{tabular}{llrr}") and tex.endswith("\\end{tabular}\n")


def test_a_row_for_each_method():
    lines = table(RUNS, layout="methods").splitlines()
    assert lines[0] == "| method | trained | kvasir DSC % | kvasir IoU % | isic_x DSC % | isic_x IoU % |"
    assert lines[2] == "| coop J9 | 20 k | 75.00 | **50.00** | **90.00** | **81.00** |"
    assert lines[3] == "| dense vl 64 | 2.97 M | **81.00** ± 1.41 | **50.00** ± 0.00 |  |  |"


def test_a_papers_figures_are_marked_and_never_in_bold(tmp_path):
    file = tmp_path / "paper.json"
    row = dict(dataset="kvasir", method="dense vl 64", trained=3_000_000, dsc=89.1, dsc_std=0.2, hd95=5)
    file.write_text(json.dumps(dict(source="A paper, Table 1", rows=[row])))
    lines = table(RUNS, papers=report.published(file)).splitlines()
    assert (
        lines[0].endswith("| dense vl 64 (2.97 M) | dense vl 64 † (3 M) |")
        and lines[-1] == "† A paper, Table 1"
    )
    assert lines[2] == "| kvasir | DSC % | 75.00 | **81.00** ± 1.41 | 89.10 ± 0.20 |"
    assert lines[3].endswith("**50.00** ± 0.00 |  |") and lines[4].endswith("| **10.00** ± 1.41 | 5.00 |")
    assert r"dense vl 64$^\dagger$ & 3 M & 89.10" in table(RUNS, "tex", "methods", report.published(file))
    del row["trained"]
    file.write_text(json.dumps(dict(source="A paper, Table 1", rows=[row])))
    assert table(RUNS, papers=report.published(file)).splitlines()[0].endswith("| dense vl 64 † |")
    assert "| dense vl 64 † |  | 89.10" in table(RUNS, "md", "methods", report.published(file))


BAD_FIGURES = {
    "[]": "a JSON object",
    "{}": "a source",
    '{"source": "x", "rows": [{"dataset": "a"}]}': "row 0': 'method' should be a text, and is None",
    '{"source": "x", "rows": [{"dataset": "a", "method": "b", "dsc": "9"}]}': "'dsc' should be a number",
    '{"source": "x", "rows": [{"dataset": "a", "method": "b", "dsc": NaN}]}': "'dsc' should be a number",
    '{"source": "x", "rows": [{"dataset": "a", "method": "b", "trained": []}]}': "'trained' should be",
}


@pytest.mark.parametrize("text", BAD_FIGURES)
def test_figures_that_are_none_are_named(text, tmp_path):
    (tmp_path / "paper.json").write_text(text)
    with pytest.raises(ValueError, match="paper.json") as error:
        report.published(tmp_path / "paper.json")
    assert BAD_FIGURES[text] in str(error.value)


def test_the_papers_figures_are_at_hand():
    cells, trained, source = report.published("vlsm-adapter")
    assert cells["kvasir", "dense vl 64 †", "dsc"].mean == 89.1 and "Table 1" in source
    assert trained["dense vl 64 †"] == 3_000_000 and len(cells) == 120
    assert report.published("tunevlseg")[1]["coop †"] is None
    with pytest.raises(FileNotFoundError, match="'vlsm-adaptor'.*tunevlseg, .*vlsm-adapter"):
        report.published("vlsm-adaptor")


def test_runs_of_other_recipes_are_told_apart():
    a, b = json.dumps(dict(lr=1e-3, clip=0.5)), json.dumps(dict(lr=1e-4, clip=0.5))
    given = [run("k", "dense", 1, dsc, recipe=recipe) for dsc, recipe in ((0.5, a), (0.6, b), (0.7, b))]
    runs = report._tell_apart(given)
    assert {r.label for r in report._tell_apart([given[0], run("other", "dense", 1, 0.6, recipe=b)])} == {
        "dense"
    }
    assert [(r.label, r.scores["dsc"]) for r in runs] == [
        ("dense (lr 0.001)", 0.5),
        ("dense (lr 0.0001)", 0.6),
    ]


def test_signed_ranks_are_scipys():
    """p of scipy.stats.wilcoxon(a, b, zero_method="wilcox", correction=False, method="asymptotic"), SciPy 1.17."""
    rng = np.random.default_rng(0)
    for n, p, differing in (
        (12, 0.9645238640375574, 11),
        (60, 0.06885550116225884, 59),
        (300, 0.0003563879774951835, 289),
    ):
        a = rng.uniform(size=n).round(2)
        b = (a + rng.normal(0.02, 0.1, size=n)).round(2)
        assert signed_rank(a, b) == (pytest.approx(p, rel=1e-9), differing)


def test_signed_ranks_by_hand():
    assert signed_rank([1, 2, 3], [1, 2, 3]) == (1.0, 0)
    p, n = signed_rank(np.arange(20) + 1.0, np.zeros(20))  # all on one side
    assert n == 20 and p == pytest.approx(8.857e-5, rel=1e-3)
    assert signed_rank([2, 4, 1, 3], [4, 2, 3, 1])[0] == 1.0


@pytest.fixture
def group(cli, quick, tmp_path):
    """Two seeds of dense adapters and one run of decoder, evaluated."""
    options = without_dim(quick)[:-1]
    code, said, err = cli("train", *quick[:-1], tmp_path / "runs" / "dense", "--epochs", 1, "--seeds", 1, 2)
    assert code == 0, err
    assert "All seeds are done" in said
    assert cli("train", *options, tmp_path / "runs" / "decoder", "--peft", "decoder", "--epochs", 1)[0] == 0
    code, said, err = cli("evaluate", "--ckpt", tmp_path / "runs" / "dense")
    assert code == 0, err
    assert "over 2 runs" in said and said.count("6 records") == 2
    assert cli("evaluate", "--ckpt", tmp_path / "runs" / "decoder")[0] == 0
    return tmp_path / "runs"


def test_each_prompt_over_the_seeds(cli, group):
    code, said, err = cli("evaluate", "--ckpt", group / "dense", "--all-prompts")
    assert code == 0, err
    scores = [
        json.loads((group / "dense" / f"seed{s}" / "eval-test" / "p1" / "metrics.json").read_text())["dsc"][
            "mean"
        ]
        for s in (1, 2)
    ]
    assert (
        f"p1 DSC %    {100 * np.mean(scores):7.2f} +- {100 * np.std(scores, ddof=1):.2f} over 2 runs" in said
    )


def test_a_report_of_runs(cli, group):
    for kind in ("md", "csv", "tex"):
        code, said, err = cli("evaluate", "--report", group, "--format", kind)
        assert code == 0, err
        text = (group / f"report.{kind}").read_text()
        assert (
            text in said
            and "3 evaluations" in said
            and "dense vl 8 (22.9 k)" in text
            and "decoder (142 k)" in text
        )
    scores = [
        json.loads((group / "dense" / f"seed{s}" / "eval-test" / "metrics.json").read_text())["dsc"]["mean"]
        for s in (1, 2)
    ]
    assert (
        f"{100 * np.mean(scores):.2f} +- {100 * np.std(scores, ddof=1):.2f}"
        in (group / "report.csv").read_text()
    )
    for name in ("dsc.png", "parameters.png"):
        assert len(set(Image.open(group / name).convert("L").tobytes())) > 10


def test_seeds_go_on_after_an_interruption(cli, quick, group, tmp_path):
    """One of two runs is there and has an epoch to go, the other one is not there at all."""
    import shutil

    shutil.rmtree(group / "dense" / "seed2")
    code, _, err = cli("train", *quick[:-1], group / "dense", "--epochs", 2, "--seeds", 1, 2, "--resume")
    assert code == 0, err
    assert [len(rows(group / "dense" / f"seed{s}" / "log.csv")) for s in (1, 2)] == [2, 2]
    for more, sentence in (
        (["--seed", 3], "--seeds and --seed exclude"),
        (["--sweep", 2], "--seeds and --sweep exclude"),
    ):
        code, _, err = cli("train", *quick, "--seeds", 1, *more)
        assert code == 2 and sentence in err


def test_comparison_on_the_same_records(cli, quick, group, tmp_path):
    out = tmp_path / "compare.png"
    assert (
        cli("train", *without_dim(quick)[:-1], group / "word", "--peft", "none", "--prompts", "class")[0] == 0
    )
    assert cli("evaluate", "--ckpt", group / "word")[0] == 0
    code, said, err = cli(
        "evaluate", "--compare", group / "dense" / "seed1", group / "decoder", "--figure", 3, "--out", out
    )
    assert code == 0, err
    assert "seed1 - decoder: " in said and " points, p = " in said and "over 6 records" in said
    assert Image.open(out).width == 4 * 228 + 8
    code, said, err = cli("evaluate", "--compare", *[group / "dense" / "seed1"] * 2, "--out", out)
    assert code == 0 and "dense/seed1 - dense/seed1 (2): +0.00 [+0.00, +0.00] points, p = 1 " in said, err
    code, said, err = cli("evaluate", "--compare", group / "decoder", group / "word", "--out", out)
    own = json.loads((group / "word" / "eval-test" / "metrics.json").read_text())["dsc"]["mean"]
    assert (
        "prompts: random" in said
        and f"{100 * own:.2f} [" in said.split("word ")[1]
        and "prompts: class" in said
    ), err
    code, _, err = cli("evaluate", "--compare", group / "decoder")
    assert code == 2 and "two checkpoints or more" in err


def test_what_a_report_cannot_be_made_of(cli, quick, trained, tmp_path, group):
    code, _, err = cli("evaluate", "--report", tmp_path / "none")
    assert code == 2 and "There is no folder" in err
    code, _, err = cli("evaluate", "--report", ROOT / "vlsm")
    assert code == 2 and "Evaluate the runs first" in err
    file = group / "decoder" / "eval-test" / "metrics.json"
    old = json.loads(file.read_text())
    del old["trained"]
    file.write_text(json.dumps(old))
    code, said, err = cli("evaluate", "--report", group)
    assert (
        code == 0
        and "1 evaluations were written by an older version" in said
        and "decoder" not in (group / "report.md").read_text()
    )
    code, _, err = cli("evaluate", "--ckpt", group / "dense", "--out", tmp_path / "x")
    assert code == 2 and "evaluate them one by one" in err
