"""Intervals, NSD, calibration, a threshold with a guarantee, the audit of prompts, transfer, ensembles."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import GOLDEN, ROOT, rows
from vlsm import metrics
from vlsm.data.records import Record
from vlsm.results import audit, report, risk, transfer
from vlsm.results.intervals import bootstrap_intervals, group_names
from vlsm.results.predict import mirrored_prompt
from vlsm.results.scores import calibration_counts, summarise
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
        low, high = bootstrap_intervals({"x": rng.beta(5, 1, n)}, draws=600, seed=k)["x"]
        hits += low <= true <= high
    assert 0.93 <= hits / times <= 0.97


def test_groups_widen_intervals_and_undefined_values_are_left_out():
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(20), 10)
    values = rng.normal(0, 1, 20)[patient] + rng.normal(0, 0.1, 200)
    alone, together = (bootstrap_intervals({"x": values}, groups)["x"] for groups in (None, patient))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert bootstrap_intervals({"x": values}, patient) == bootstrap_intervals({"x": values}, patient)
    holed = np.where(np.arange(200) % 2, np.nan, 3.0)
    assert bootstrap_intervals({"x": holed, "y": np.full(200, np.nan)}) == {"x": [3.0, 3.0], "y": None}
    assert bootstrap_intervals({"x": [1.0]}) == {"x": None} and bootstrap_intervals({"x": []}) == {"x": None}


def test_groups_come_from_names():
    records = [Record(name, name, None, None) for name in ("patient1_a.png", "patient1_b.png", "x.png")]
    assert group_names(records, r"patient\d+") == ["patient1", "patient1", "x.png"]
    assert group_names(records) == [r.name for r in records]


# Calibration


def test_calibration_by_hand():
    p = torch.tensor([[0.1, 0.1], [0.9, 0.9]])
    truth = torch.tensor([[False, True], [True, True]])
    found = calibration_counts(p, truth)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    row = dict(dsc=1.0, iou=1.0, hd95=0.0, diagonal=1.0, target_empty=False, pred_empty=False, **found)
    assert summarise([row, row])["ece"] == pytest.approx((2 * abs(0.5 - 0.1) + 2 * abs(1 - 0.9)) / 4)


# A threshold with a guarantee


def test_the_risk_is_controlled():
    """Over many draws of records for fitting, the mean risk on new ones stays below the level."""
    rng = np.random.default_rng(0)

    def missed(n):  # a record's share of missed foreground grows with the threshold, more or less steeply
        steep = rng.uniform(0.2, 4, (n, 1))
        return risk.THRESHOLDS[None] ** steep

    new, level = missed(4000), 0.2
    risks = [
        new[:, np.searchsorted(risk.THRESHOLDS, risk.fit_threshold(missed(30), level))].mean()
        for _ in range(200)
    ]
    assert 0.1 < np.mean(risks) <= level
    with pytest.raises(ValueError, match="5 records with foreground allow no level below 0.1"):
        risk.fit_threshold(np.zeros((5, 999)), 0.1)
    with pytest.raises(ValueError, match="0 records with foreground"):
        risk.fit_threshold(np.zeros((0, 999)), 0.1)


# The audit of prompts


def test_prompts_of_the_audit():
    texts = ["", "polyp", "two small red round polyp, located in top left of the image"]
    records = [
        Record("a.png", "a.png", None, None, {f"p{k}": t for k, t in enumerate(texts)}, "polyp"),
        Record("b.png", "b.png", None, None, {"p0": "", "p1": "polyp", "p2": "large green polyp"}, "polyp"),
    ]
    found = audit.audit_prompts(records, [texts[2], "large green polyp"])
    assert list(found) == list(audit.KINDS)
    assert found["right"][0] == texts[2] and found["paraphrase"] == ["polyp", "polyp"]
    assert found["swapped"] == ["large green polyp", texts[2]]
    changed = found["contradictory"][0]
    assert changed.startswith("one large ") and "red" not in changed and "bottom right of" in changed
    assert found["contradictory"][1] == "small green polyp" and found["class word"] == ["polyp"] * 2
    assert found["absent object"] == ["a large green cross"] * 2
    assert audit.audit_prompts(records[:1], ["polyp"])["swapped"] == [None]
    assert audit.contradict("polyp") is None


def test_verdicts():
    def of(**values):
        return {kind.replace("_", " "): dict(mean=value) for kind, value in values.items()}

    deaf = audit.verdict(of(right=0.723, swapped=0.719, absent_object=0.7))
    assert deaf == "This run answers the picture, not the text: swapped 71.9, absent object 70.0, right 72.3."
    assert "but not its attributes" in audit.verdict(of(right=0.8, swapped=0.79, absent_object=0.1))
    assert "reads its prompt" in audit.verdict(of(right=0.8, swapped=0.3, absent_object=0.1))


def test_the_embedded_base_listens():
    """On drawn scenes: a phrase that tells an object from the others, and another scene's phrase."""
    from types import SimpleNamespace

    import vlsm
    from vlsm.data.cache import CachedSplit
    from vlsm.data.pixel_values import normalise
    from vlsm.mini import scenes

    pairs = [pair for i in range(60) if (pair := scenes.distinct_pair(99, i))]
    records = [
        Record(f"{i}.png", f"{i}.png", image, mask, {"p1": text})
        for i, (image, (text, mask), _) in enumerate(pairs)
    ]
    images = np.stack([r.image.transpose(2, 0, 1) for r in records])
    data = CachedSplit(
        records, images, np.stack([r.mask.astype(np.uint8) for r in records]), range(len(records))
    )
    model = vlsm.build("clipseg", "mini")
    tokenizer = model.tokenizer()

    @torch.inference_mode()
    def logits(images, prompts):
        return model(normalise(images, model.network.mean, model.network.std), *tokenizer(prompts))

    predictor = SimpleNamespace(device=torch.device("cpu"), logits=logits)
    options = SimpleNamespace(batch_size=32, upsample="logits")
    found = audit.audit(predictor, data, [r.prompts["p1"] for r in records], options)
    assert found["right"]["mean"] - found["swapped"]["mean"] > 0.55
    assert found["right"]["mean"] - found["contradictory"]["mean"] > 0.6
    assert audit.verdict(found).startswith("This run reads its prompt")


# Which blocks matter


def test_blocks_that_are_switched_off(cli, trained):
    code, said, err = cli("evaluate", "--ckpt", trained, "--audit-blocks")
    assert code == 0, err
    found = json.loads((trained / "eval-test" / "blocks.json").read_text())
    whole = json.loads((trained / "eval-test" / "metrics.json").read_text())["dsc"]["mean"]
    assert (
        list(found)[:2] == ["all", "vision 0"]
        and "text 2" in found
        and found["all"]["mean"] == (pytest.approx(whole))
    )
    assert all(s["mean"] + s["lost"] == pytest.approx(whole) for s in found.values())
    assert any(abs(s["lost"]) > 1e-4 for s in found.values()) and "95 % interval" in said


@pytest.mark.parametrize("method", ["dense", "lora", "telescopic"])
def test_an_adapter_of_zeros_changes_nothing(method):
    from vlsm.results.blocks import switched_off, tuned_blocks

    import vlsm

    torch.manual_seed(0)
    model, bare = vlsm.build("clipseg", "mini", method), vlsm.build("clipseg", "mini", "none")
    with torch.no_grad():
        for parameter in model.tuner.parameters():
            parameter.normal_(std=0.1)
    images, ids = torch.randn(2, 3, 96, 96), torch.tensor([[993, 5, 994], [993, 7, 994]])
    before, blocks = model(images, ids), tuned_blocks(model.tuner)
    kept = {name: p.clone() for name, p in model.tuner.named_parameters()}
    from contextlib import ExitStack

    with ExitStack() as stack, torch.no_grad():
        for at in blocks:
            stack.enter_context(switched_off(model.tuner, *at))
        if method == "telescopic":
            model.tuner.cond.scale.zero_()
        torch.testing.assert_close(model(images, ids), bare(images, ids))
    with torch.no_grad():
        if method == "telescopic":
            model.tuner.cond.scale.copy_(kept["cond.scale"])
    torch.testing.assert_close(model(images, ids), before)
    assert all(torch.equal(p, kept[name]) for name, p in model.tuner.named_parameters())


# Transfer


def run(own, dataset, dsc, seed=1, share=1.0, label="dense"):
    scores = dict(dsc=dsc, iou=dsc, hd95=1.0, nsd=None)
    return report.Run(None, dataset, label, json.dumps(dict(limit_train=share)), seed, 10, scores, own)


def test_transfer_table():
    runs = [run("kvasir", "kvasir", 0.8), run("kvasir", "kvasir", 0.9, 2), run("kvasir", "etis", 0.5)]
    runs += [run("kvasir", "cvc300", 0.7), run("busi", "busi", 0.6)]
    lines = transfer.transfer_table(runs).splitlines()
    assert lines[0] == "| trained on | method | in-domain | cvc300 | etis | out-of-domain | harmonic mean |"
    assert lines[3] == "| kvasir | dense | 85.00 | 70.00 | 50.00 | 60.00 | 70.34 |"
    assert lines[2] == "| busi | dense | 60.00 |  |  |  |  |"
    with pytest.raises(ValueError, match="No run here was evaluated on another data set"):
        transfer.transfer_table(runs[:2])


def test_curve_over_shares(tmp_path):
    runs = [run("k", "k", d, s, share) for share, d in ((0.1, 0.5), (0.5, 0.6), (1.0, 0.7)) for s in (1, 2)]
    runs.append(run("k", "k", 0.4, label="coop"))
    assert transfer.shares(runs)["k"] == {
        "dense": [(10.0, [50.0, 50.0]), (50.0, [60.0, 60.0]), (100.0, [70.0, 70.0])]
    }
    for kind in ("png", "pdf", "svg"):
        (file,) = transfer.draw_shares(runs, tmp_path, kind)
        assert file.stat().st_size > 3000
    assert transfer.draw_shares(runs[:2], tmp_path) == []


# The command line


def test_mirrored_prompts():
    assert mirrored_prompt("Left polyp at top right, leftover") == "Right polyp at top left, leftover"


def test_an_evaluation_says_how_sure_it_is(cli, trained, tmp_path):
    out, deep = tmp_path / "out", tmp_path / "deep"
    options = ["--figure", 3, "--figure-format", "svg", "--save-probabilities", deep, "--group", r"d3\d"]
    code, said, err = cli(
        "evaluate", "--ckpt", trained, "--out", out, *options, "--audit-prompts", "--risk", "fn", 0.6
    )
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
    audited = json.loads((out / "audit.json").read_text())
    assert list(audited["prompts"])[0] == "right" and audited["verdict"] in said
    assert audited["prompts"]["right"]["mean"] == pytest.approx(found["dsc"]["mean"])
    fitted = json.loads((out / "risk.json").read_text())
    assert fitted["fitted_on"] == 6 and 0 < fitted["threshold"] < 1 and "Threshold" in said
    assert fitted["test"]["dsc_at_half"]["mean"] == pytest.approx(found["dsc"]["mean"])


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
    code, said, err = cli("evaluate", "--report", runs, "--format", "csv", "--figure-format", "pdf")
    assert code == 0, err
    head = next(csv.reader([said.splitlines()[0]]))
    assert [label.split(" (")[1] for label in head[2:] if label.count("(") > 1] == ["mirrored)", "mean of 2)"]
    assert (runs / "dsc.pdf").read_bytes().startswith(b"%PDF")
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
    code, said, err = cli("evaluate", "--report", tmp_path, "--transfer")
    assert code == 0 and "| trained on | method | in-domain | elsewhere |" in said, err
    code, said, _ = cli("evaluate", "--report", tmp_path)
    assert code == 0 and "elsewhere" not in said and "1 evaluations" in said


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--risk", "fp", "0.1"], "--risk fp 0.1: give fn and a share between 0 and 1"),
        (["--risk", "fn", "x"], "--risk fn x: give fn"),
        (["--risk", "fn", "0.1", "--split", "val"], "cannot be judged there"),
        (["--group", "(", "--ckpt", "x"], "'(' is no regular expression"),
        (["--transfer"], "--transfer is a kind of --report"),
        (["--ensemble", "--ckpt", "x"], "--ensemble wants several"),
        (["--ensemble", "--ckpt", "x", "--all-prompts"], "goes with none of"),
        (["--nsd-tolerance", "-1"], "--nsd-tolerance -1.0: give 0 or more"),
        (["--pred", "a", "--target", "b", "--nsd-tolerance", "nan"], "--nsd-tolerance nan"),
    ],
)
def test_mistakes_are_sentences(argv, said, cli):
    code, _, err = cli("evaluate", *argv)
    assert code == 2 and said in err


def test_bars_show_intervals(tmp_path):
    cells = {"a": {"DSC": report.Cell(50.0, None, 1, (40.0, 55.0))}}
    for kind in ("png", "pdf", "svg"):
        plots.bars(cells, "DSC", tmp_path / f"x.{kind}", kind)
        assert (tmp_path / f"x.{kind}").stat().st_size > 3000
    assert ROOT.is_dir()
