"""Intervals, NSD, calibration, ensembles, sheets."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import GOLDEN, rows, without_dim
from vlsm import metrics
from vlsm.data.records import Record, group_names
from vlsm.results import figures
from vlsm.results.predict import Ensemble, load_ensemble, load_predictor, mirrored_prompt
from vlsm.results.scores import bootstrap_intervals, calibration_counts, score, summarise
from vlsm.system import plots

# NSD


def test_nsd_is_deepminds():
    """Values of surface-distance-based-measures 0.1 at tolerances of 0, 1, 1.5, 2 and 5 pixels."""
    golden = np.load(GOLDEN / "nsd.npz")
    for k in range(24):
        a, b = (torch.from_numpy(golden[f"{side}{k}"]) for side in "ab")
        for tolerance, value in zip((0, 1, 1.5, 2, 5), golden[f"v{k}"]):
            assert metrics.nsd([a], [b], tolerance).item() == pytest.approx(value, abs=1e-9)


def restated_nsd(a, b, tolerance):
    """From the definition, a corner at a time."""

    def corners(mask):
        padded, found = np.pad(mask, 1), {}
        for y in range(mask.shape[0] + 1):
            for x in range(mask.shape[1] + 1):
                window = padded[y : y + 2, x : x + 2]
                if 0 < window.sum() < 4:
                    straight = window.sum() == 2 and window[0, 0] != window[1, 1]
                    crossed = window.sum() == 2 and not straight
                    found[y, x] = 1 if straight else math.sqrt(2) if crossed else math.sqrt(2) / 2
        return found

    def near(ours, theirs):
        return sum(v for at, v in ours.items() if min(math.dist(at, o) for o in theirs) <= tolerance)

    a, b = corners(a), corners(b)
    return (near(a, b) + near(b, a)) / (sum(a.values()) + sum(b.values()))


def test_nsd_by_its_definition():
    rng = np.random.default_rng(3)
    for _ in range(6):
        a, b = rng.random((2, *rng.integers(2, 12, 2))) < 0.4
        a[0, 0] = b[-1, -1] = True
        for tolerance in (0, 1, 2.5):
            want = restated_nsd(a, b, tolerance)
            assert metrics.nsd(*(torch.from_numpy(m)[None] for m in (a, b)), tolerance).item() == (
                pytest.approx(want, abs=1e-9)
            )


def test_nsd_of_empty_and_full_masks():
    full, empty = torch.ones(2, 5, 7, dtype=torch.bool).unbind()[0], torch.zeros(5, 7, dtype=torch.bool)
    pred, target = torch.stack([full, empty, full, empty]), torch.stack([full, empty, empty, full])
    assert metrics.nsd(pred, target).tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="tolerance"):
        metrics.nsd(pred, target, -1.0)


# Intervals


@pytest.mark.parametrize("n", [50, 200])
def test_intervals_cover_what_they_say(n):
    """Of a mean of skewed scores in 0..1, such as DSC."""
    rng, true, hits, times = np.random.default_rng(0), 5 / 6, 0, 1500
    for k in range(times):
        low, high = bootstrap_intervals({"x": rng.beta(5, 1, n)}, range(n), draws=600, seed=k)["x"]
        hits += low <= true <= high
    assert 0.93 <= hits / times <= 0.97


def test_groups_widen_intervals_and_undefined_values_are_left_out():
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(20), 10)
    values = rng.normal(0, 1, 20)[patient] + rng.normal(0, 0.1, 200)
    alone, together = (bootstrap_intervals({"x": values}, groups)["x"] for groups in (range(200), patient))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert bootstrap_intervals({"x": values}, patient) == bootstrap_intervals({"x": values}, patient)
    holed = np.where(np.arange(200) % 2, np.nan, 3.0)
    values = {"x": holed, "y": np.full(200, np.nan)}
    assert bootstrap_intervals(values, range(200)) == {"x": [3.0, 3.0], "y": None}
    assert bootstrap_intervals({"x": [1.0]}, ["a"]) == {"x": None} == bootstrap_intervals({"x": []}, [])


def test_groups_come_from_names():
    records = [Record(name, name, None, None) for name in ("patient1_a.png", "patient1_b.png", "x.png")]
    assert group_names(records, r"patient\d+") == ["patient1", "patient1", "x.png"]
    assert group_names(records) == [r.name for r in records]


# Means


def test_means_where_masks_are_empty():
    empty = torch.zeros(4, 5, dtype=torch.bool)
    some = empty.clone()
    some[1, 2] = True
    scores = [score(*pair) for pair in ((empty, empty), (empty, some), (some, empty), (some, some))]
    assert [s["dsc"] for s in scores] == [1, 0, 0, 1] and [s["hd95"] for s in scores][::3] == [0, 0]
    means = summarise(scores)
    hd95 = means["hd95"]
    assert (hd95["mean"], hd95["std"], hd95["n"], hd95["n_undefined"]) == (0, 0, 2, 2)
    assert hd95["mean_with_diagonal"] == pytest.approx(math.hypot(4, 5) / 2)
    assert means["dsc"]["mean"] == means["dsc"]["std"] == means["dsc_nonempty"]["mean"] == 0.5
    assert (means["empty_correct"]["mean"], means["empty_correct"]["n"]) == (0.5, 2)
    assert means["intervals"]["groups"] == 4
    nothing = summarise(scores[1:2])
    assert nothing["hd95"]["mean"] is None and nothing["hd95"]["ci95"] is None and nothing["hd95"]["n"] == 0


# Calibration


def test_calibration_by_hand():
    p = torch.tensor([[0.1, 0.1], [0.9, 0.9]])
    truth = torch.tensor([[False, True], [True, True]])
    found = calibration_counts(p, truth)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    row = dict(
        dsc=1.0, iou=1.0, hd95=0.0, diagonal=1.0, unit="px", target_empty=False, pred_empty=False, **found
    )
    assert summarise([row, row])["ece"] == pytest.approx((2 * abs(0.5 - 0.1) + 2 * abs(1 - 0.9)) / 4)


# The command line


def test_mirrored_prompts():
    assert mirrored_prompt("Left polyp at top right, leftover") == "Right polyp at top left, leftover"


def test_an_evaluation_says_how_sure_it_is(cli, trained, tmp_path):
    out, deep = tmp_path / "out", tmp_path / "deep"
    options = ["--figure", 3, "--figure-format", "svg", "--save-probabilities", deep, "--group", r"d3\d"]
    code, said, err = cli("evaluate", "--ckpt", trained, "--out", out, *options)
    assert code == 0, err
    found = json.loads((out / "metrics.json").read_text())
    for name in ("dsc", "iou", "hd95", "nsd", "brier", "dsc_nonempty"):
        low, high = found[name]["ci95"]
        assert low <= found[name]["mean"] <= high
    assert 0 <= found["ece"] <= 1 and found["intervals"]["groups"] == 6 and found["nsd_tolerance"] == 2
    table = rows(out / "metrics.csv")
    assert [r["group"] for r in table] == [f"d3{k}" for k in range(6)] and float(table[0]["nsd"]) <= 1
    assert "NSD" in said and "Brier" in said and "drawn 10,000 times" in said
    pixels = np.asarray(Image.open(deep / "d30.png"))
    assert (deep / "d30.png").read_bytes()[24] == 16, "bits a sample, in a PNG's header"
    assert pixels.shape == (44, 60) and 1000 < pixels.max() <= 65535 and pixels.min() >= 0
    assert (out / "figure.svg").read_text().startswith("<?xml")


def test_mirror_and_ensemble_are_rows_of_their_own(cli, trained, tmp_path):
    import shutil

    runs = tmp_path / "runs"
    for seed in (1, 2):
        shutil.copytree(trained, runs / f"seed{seed}")
    plain = [cli("evaluate", "--ckpt", runs / f"seed{s}") for s in (1, 2)]
    assert all(code == 0 for code, *_ in plain), plain
    code, said, err = cli("evaluate", "--ckpt", runs / "seed1", "--mirror")
    assert code == 0 and "eval-test-mirror" in said, err
    code, said, err = cli("evaluate", "--ckpt", runs, "--ensemble")
    assert code == 0 and (runs / "eval-test-ensemble" / "metrics.json").is_file(), err
    one, both = (
        json.loads((file / "metrics.json").read_text())
        for file in (runs / "seed1" / "eval-test", runs / "eval-test-ensemble")
    )
    assert both["dsc"]["mean"] == pytest.approx(one["dsc"]["mean"], abs=1e-6) and len(both["ensemble"]) == 2
    assert both["trained"] == 2 * one["trained"]
    masks = tmp_path / "masks"
    code, _, err = cli(
        "evaluate", "--ckpt", runs, "--ensemble", "--mirror", "--images", tmp_path / "disks" / "images" / "d0.png",
        "--prompt", "disk", "--save-masks", masks,
    )  # fmt: skip
    assert code == 0 and (masks / "d0.png").is_file(), err


def test_another_data_set_is_another_folder(cli, trained, folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "elsewhere")
    for dataset in (folder, tmp_path / "elsewhere"):
        code, _, err = cli("evaluate", "--ckpt", trained, "--dataset", dataset)
        assert code == 0, err
    assert (trained / "eval-test-elsewhere" / "metrics.json").is_file()


def test_members_of_an_ensemble_share_one_base(cli, quick, trained, tmp_path):
    code, _, err = cli("train", *without_dim(quick)[:-1], tmp_path / "coop", "--peft", "coop", "--epochs", 1)
    assert code == 0, err
    ensemble = load_ensemble([trained, trained, tmp_path / "coop"], device="cpu")
    bases = []
    for member in ensemble.predictors:
        bases.append({id(parameter) for parameter in member.model.network.parameters()})
    assert bases[0] == bases[1] == bases[2] and len(bases[0]) > 50
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    alone = load_predictor(tmp_path / "coop", device="cpu").logits(images, ["disk", "red disk"])
    assert torch.equal(ensemble.predictors[2].logits(images, ["disk", "red disk"]), alone)
    same = Ensemble(ensemble.predictors[:2]).logits(images, ["disk"] * 2)
    torch.testing.assert_close(same, ensemble.predictors[0].logits(images, ["disk"] * 2))
    ensemble.predictors[1].size = 96
    with pytest.raises(ValueError, match="image size"):
        Ensemble(ensemble.predictors)


def test_all_prompts_of_an_ensemble(cli, trained, tmp_path):
    out = tmp_path / "out"
    code, said, err = cli("evaluate", "--ckpt", trained, trained, "--ensemble", "--all-prompts", "--out", out)
    first_words = [line.split()[0] for line in said.splitlines()]
    table = first_words[first_words.index("prompt") :][:5]
    assert code == 0 and table == ["prompt", "p0", "p1", "p2", "p3"], err
    assert len(json.loads((out / "p3" / "metrics.json").read_text())["ensemble"]) == 2


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--group", "(", "--ckpt", "x"], ("--group", "regular expression")),
        (["--ensemble", "--ckpt", "x"], ("--ensemble", "several")),
        (["--ckpt", "x", "y"], ("--ckpt", "--ensemble")),
        (["--ckpt", "x", "--all-prompts", "--gallery"], ("--all-prompts", "gallery")),
        (["--ckpt", "x", "--nsd-tolerance", "-1"], ("--nsd-tolerance", "-1")),
        (["--ckpt", "x", "--nsd-tolerance", "nan"], ("--nsd-tolerance", "nan")),
        (["--ckpt", "x", "--figure", "0"], ("--figure", "0")),
        (["--ckpt", "x", "--fig", "3"], ("--fig",)),
        ([], ("--ckpt",)),
    ],
)
def test_mistakes_are_sentences(argv, named, cli):
    code, _, err = cli("evaluate", *argv)
    assert code == 2 and all(word in err for word in named), err


def test_a_sheet_in_every_format(tmp_path):
    """Sizes differ, prompts are long or hold what matplotlib would take for a formula."""
    rng = np.random.default_rng(0)
    page = []
    for shape in ((40, 60), (90, 30)):
        mask = np.zeros(shape, bool)
        mask[10:30, 10:25] = True
        image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        panels = [
            (image, None, ""),
            (image, mask, ""),
            (image, mask, "DSC 90.0 %"),
            (image, ~mask, "DSC 0.0 %"),
        ]
        page.append((panels, "best: a_$1$.png", "a $polyp_1$ that is large " * 12))
    titles = [("image", "white"), ("truth", plots.GREEN), ("one", plots.SKY), ("two", plots.SKY)]
    for file_format in ("png", "pdf", "svg"):
        files = [tmp_path / f"{k}.{file_format}" for k in range(2)]
        for file in files:
            figures.sheet(page, titles, file, file_format)
        written = files[0].read_bytes()
        assert written == files[1].read_bytes() and len(written) > 10_000 and b"/Type3" not in written
    pixels = np.asarray(Image.open(tmp_path / "0.png").convert("RGB"))
    for colour in (figures.TRUTH, figures.PREDICTION):
        assert (pixels == colour).all(-1).sum() > 500
        assert (pixels[:60] == colour).all(-1).sum() > 500, "the legend: titles on the colours of the masks"
    text = (tmp_path / "0.svg").read_text()
    assert ">DSC 90.0 %<" in text and ">best: a_$1$.png<" in text and ">two<" in text
    figures.sheet([([(image, None, "")], "train: a.png", "")], titles[:1], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").width < pixels.shape[1]


@pytest.mark.parametrize("shape", [(10, 20_000), (20_000, 10)])
def test_a_strip_is_a_thumbnail(shape, tmp_path):
    image = np.full((*shape, 3), 90, np.uint8)
    mask = np.ones(shape, bool)
    figures.sheet([([(image, mask, "")], "a.png", "")], [("mask", plots.GREEN)], tmp_path / "a.png")
    page = Image.open(tmp_path / "a.png")
    assert page.height < 1000 and page.width < 1000
    drawn = (np.abs(np.asarray(page.convert("RGB"))[60:].astype(int) - figures.TRUTH) < 80).all(-1)
    assert drawn.sum() > 20 * 300 and drawn.any(0).sum() > 20 and drawn.any(1).sum() > 20


def test_long_texts_are_wrapped_at_words():
    words = [f"word{k}" for k in range(500)]
    lines = figures.wrap(" ".join(words), 4)
    assert len(lines) == figures.MOST_LINES and lines[-1].endswith(" ...")
    shown = " ".join(lines).split()
    assert shown[:-1] == words[: len(shown) - 1], "no word is cut"
    from matplotlib.textpath import TextPath

    for line in figures.wrap("IMG_" * 60, 4.5):
        extent = TextPath((0, 0), line, size=8.5, prop=dict(weight="bold")).get_extents()
        assert extent.width < 4.5 * 72


def test_cases_of_a_sheet():
    def score(dsc, target_empty=False):
        return dict(dsc=dsc, target_empty=target_empty, pred_empty=target_empty and dsc == 1)

    scores = [score(dsc) for dsc in (0.5, 0.9, 0.1, 0.7, 0.3)]
    assert figures.choose_cases(scores, 3) == [(1, "best"), (0, "median"), (2, "worst")]
    assert [i for i, _ in figures.choose_cases(scores, 99)] == [1, 3, 0, 4, 2]
    scores = [score(1, True), score(0, True), *scores, score(1, True)]
    chosen = [(3, "best"), (5, "best"), (2, "median"), (4, "worst"), (1, "false alarm")]
    assert figures.choose_cases(scores, 5) == chosen, "empty masks rightly predicted are no best cases"
