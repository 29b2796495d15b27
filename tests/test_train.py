"""train.py as a user runs it: whole small runs, recipes, options."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import vlsm
from tests.conftest import ROOT, rows, same_tensors, without_dim
from vlsm.methods.registry import METHODS
from vlsm.system import plots
from vlsm.training.run import Run, selection_score


def test_a_run_from_training_to_pictures(cli, quick, tmp_path, folder):
    run = tmp_path / "run"
    code, out, err = cli("train", *quick, "--epochs", 5, "--augment")
    assert code == 0, err
    assert "parameters are trained" in out and "48 of 48 trained tensors finite and non-zero, 0 of" in out
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 5 and all("  val DSC " in line and "  alarms " in line for line in epochs)
    assert (
        all(len(line) <= 80 and " left" in line for line in epochs)
        and "*: best epoch so far" in out
        and "CPU, " in out
    )
    for name in ("best.safetensors", "last.safetensors", "state.pt", "log.csv", "config.json", "curves.png"):
        assert (run / name).is_file(), name
    assert not list(run.glob(".*.tmp")), "no temporary file is left"
    log = rows(run / "log.csv")
    assert [r["epoch"] for r in log] == list("12345")
    assert float(log[4]["train_loss"]) < float(log[0]["train_loss"])
    width, height = Image.open(run / "curves.png").size
    assert (width, height) in ((2280, 1080), (2279, 1080)), (
        "five panels; older matplotlib rounds 11.4 inches down"
    )
    with safe_open(run / "best.safetensors", "pt") as file:
        about = {k: json.loads(v) for k, v in file.metadata().items()}
    assert (
        about["method"] == "dense"
        and about["options"] == dict(branches="vl", dim=8, dims=None, blocks=None, upsampler=False)
        and about["image_size"] == 48
    )
    assert about["weights"] == "mini" and len(about["fingerprint"]) == 16 and about["recipe"]["seed"] == 42
    best = max(log, key=lambda r: float(r["val_dsc"]) * (1 - float(r["val_alarms"]) / 2))
    assert f"Best epoch: {best['epoch']}, validation DSC" in out and epochs[0].endswith("  *")
    assert about["best_val_dsc"] == pytest.approx(float(best["val_dsc"])) and about["epoch"] == int(
        best["epoch"]
    )
    tuned = sum(p.numel() for p in vlsm.load(run).tuned_parameters().values())
    assert (run / "best.safetensors").stat().st_size < 4 * tuned + 12_000, (
        "the checkpoint holds the tuner alone"
    )

    masks = tmp_path / "masks"
    code, out, err = cli("evaluate", "--ckpt", run, "--save-masks", masks, "--figure", 4)
    assert code == 0, err
    assert (
        "DSC" in out
        and "HD95" in out
        and f"{run}: " in out
        and "+-: standard deviation" in out
        and f"Wrote {masks}" in out
    )
    result = json.loads((run / "eval-test" / "metrics.json").read_text())
    table = rows(run / "eval-test" / "metrics.csv")
    assert len(table) == 6 and list(table[0])[:3] == ["image", "mask", "prompt"]
    assert result["dsc"]["mean"] == pytest.approx(np.mean([float(r["dsc"]) for r in table]), abs=1e-5)
    assert set(result["hd95"]) >= {"mean", "std", "n"} and result["dsc"]["n"] == 6
    saved = np.asarray(Image.open(masks / table[0]["mask"]))
    assert saved.shape == (44, 60) and set(np.unique(saved)) <= {0, 255}
    assert Image.open(run / "eval-test" / "figure.png").size[0] > 600

    code, out, err = cli("vlsm.tools.score", masks, folder / "masks")
    assert code == 2 and "without a partner in the other folder (" in err
    for file in (folder / "masks").iterdir():
        if not (masks / file.name).exists():
            file.unlink()
    code, out, err = cli("vlsm.tools.score", masks, folder / "masks", "--out", tmp_path / "scores")
    again = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    for metric in ("dsc", "iou", "hd95"):
        assert again[metric].pop("ci95") == pytest.approx(result[metric].pop("ci95"))
        assert again[metric] == pytest.approx(result[metric], nan_ok=True), (
            "scoring the saved masks gives the same figures"
        )


def test_early_stop_and_plateau(cli, quick, tmp_path):
    code, out, _ = cli(
        "train", *quick, "--epochs", 30, "--min-epochs", 2, "--patience", 2, "--lr", 1e-9, "--lr-patience", 1
    )
    assert code == 0 and "Stopping early" in out and "--patience 2" in out
    log = rows(tmp_path / "run" / "log.csv")
    assert 3 <= len(log) < 10


def test_none_writes_a_checkpoint_at_once(cli, quick, tmp_path):
    options = without_dim(quick)
    code, out, err = cli("train", *options, "--peft", "none")
    assert code == 0 and "0 of 1," in out and "Nothing to train" in out, err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.safetensors", "config.json"]
    assert cli("evaluate", "--ckpt", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("none", "dense")] + ["dense+vpt"])
def test_other_methods_train_resume_and_evaluate(cli, quick, tmp_path, method):
    """Two epochs are one and one; the checkpoint gives the same logits in a new model."""
    options = quick if method in ("shallow", "dense+vpt", "lora") else without_dim(quick)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = cli("train", *options[:-1], whole, "--peft", method, "--epochs", 2)
    assert code == 0 and "ZERO" not in out, err
    assert cli("train", *options[:-1], parts, "--peft", method, "--epochs", 1)[0] == 0
    code, out, err = cli("train", "--out", parts, "--resume", "--epochs", 2)
    assert code == 0 and "after epoch 1" in out, err
    assert same_tensors(whole / "last.safetensors", parts / "last.safetensors")
    assert cli("evaluate", "--ckpt", whole)[0] == 0
    names = set(load_file(whole / "best.safetensors"))
    if method == "decoder":
        assert all(n.startswith("decoder.") for n in names)
    if method == "full":
        assert (
            "clip.vision_model.encoder.layers.0.mlp.fc1.weight" in names and "clip.logit_scale" not in names
        )
    one, two = vlsm.load(whole / "last.safetensors"), vlsm.load(parts / "last.safetensors")
    pixels, ids = torch.randn(2, 3, 48, 48), one.tokenizer()(["red disk"] * 2)[0]
    assert torch.equal(one(pixels, ids), two(pixels, ids))


def test_each_paper_has_its_recipe(cli, quick, folder, tmp_path):
    def recipe(method, *more):
        options = [*without_dim(quick)[:-1], tmp_path / f"{method}{len(more)}"]
        code, _, err = cli("train", *options, "--peft", method, "--epochs", 1, *more)
        assert code == 0, err
        config = json.loads((tmp_path / f"{method}{len(more)}" / "config.json").read_text())
        return {
            **config["options"],
            "upsampler": vlsm.load(tmp_path / f"{method}{len(more)}").info["options"]["upsampler"],
        }

    names = (
        "lr",
        "weight_decay",
        "dice_weight",
        "bce_weight",
        "prompts",
        "augment",
        "patience",
        "monitor",
        "lr_factor",
        "clip",
        "upsampler",
    )
    adapters = (1e-3, 1e-3, 1.5, 1.0, "random", False, 20, "dsc", 0.3, 0.5, False)
    learners = (2e-4, 0.0, 1.0, 0.2, "class", True, 12, "loss", 0.2, 0.0, True)
    assert (
        tuple(map(recipe("dense").get, names)) == adapters
        and tuple(map(recipe("vpt").get, names)) == learners
    )
    given = recipe(
        "coop",
        "--lr",
        0.1,
        "--no-augment",
        "--prompts",
        "p2",
        "--clip",
        2,
        "--no-upsampler",
        "--monitor",
        "dsc",
        "--context",
        2,
    )
    assert (
        tuple(map(given.get, names)) == (0.1, 0.0, 1.0, 0.2, "p2", False, 12, "dsc", 0.2, 2.0, False)
        and given["context_init"] is None
    )
    assert recipe("coop")["context_init"] == ["a photo of a"]
    assert (
        recipe("coop", "--reference")["ce"] == "logits"
        and recipe("dense", "--reference")["ce"] == "reference"
    )
    both = recipe("dense+vpt")
    assert both["lr"] == 1e-3 and both["upsampler"], "the first method's recipe"
    code, _, err = cli(
        "train",
        *without_dim(quick),
        "--peft",
        "full",
        "--epochs",
        30,
        "--lr",
        0,
        "--min-epochs",
        1,
        "--patience",
        2,
    )
    assert code == 0 and len(rows(tmp_path / "run" / "log.csv")) == 3, "without progress it stops"


@pytest.mark.parametrize("monitor, stalled, best", [("dsc", 0, True), ("loss", 2, True)])
def test_what_is_monitored_is_what_must_progress(monitor, stalled, best):
    plateau = SimpleNamespace(step=lambda loss: None)
    run = Run("nowhere", vlsm.build("clipseg", "mini"), None, plateau, None, {}, monitor)
    rest = dict(train_loss=1, train_dsc=0, val_iou=0, lr=1, images_per_second=1)
    for dsc, loss in ((0.5, 1.0), (0.6, 0.99995), (0.7, 1.2)):
        run.end_epoch(epoch=run.next_epoch, val_dsc=dsc, val_loss=loss, val_alarms=None, **rest)
        assert run.improved == best
    assert run.stalled == stalled and run.best == 0.7
    run.end_epoch(epoch=4, val_dsc=0.9, val_loss=1.3, val_alarms=0.6, **rest)
    assert not run.improved and run.best == 0.7, "a model that answers any word is not better"
    run.end_epoch(epoch=5, val_dsc=0.71, val_loss=1.4, val_alarms=0, **rest)
    assert run.improved and run.best == 0.71 and run.describe_best() == "Best epoch: 5, validation DSC 71.00."
    run.times = [0, 1800, 3600]
    line = run.describe_epoch(200)
    assert line == "epoch   5/200  loss 1.000  val DSC 71.0  alarms   0 %  1:00:00, 97:30:00 left  *"
    assert len(line) == 80
    nothing = selection_score(dict(val_dsc=0, val_alarms=0))
    assert selection_score(dict(val_dsc=0.1, val_alarms=1)) > nothing, "an empty mask for all is worse yet"


def test_dry_run_prints_the_counts_and_writes_nothing(cli, quick, tmp_path):
    code, out, _ = cli("train", *quick, "--dry-run", "--branches", "vlc")
    assert code == 0 and "parameters are trained (" in out and not (tmp_path / "run").exists()


def test_bf16_on_the_cpu(cli, quick, tmp_path):
    assert cli("train", *quick, "--epochs", 1, "--amp", "bf16")[0] == 0
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "run" / "last.safetensors").values())
    assert cli("evaluate", "--ckpt", tmp_path / "run", "--amp", "bf16")[0] == 0


def test_reference_switch_reaches_loss_and_model(cli, quick, tmp_path):
    assert cli("train", *quick, "--epochs", 1)[0] == 0
    assert cli("train", *quick[:-1], tmp_path / "ref", "--epochs", 1, "--reference")[0] == 0
    config = json.loads((tmp_path / "ref" / "config.json").read_text())
    assert config["recipe"]["ce"] == "reference" and vlsm.load(tmp_path / "ref").info["reference"]
    ours, theirs = (float(rows(tmp_path / d / "log.csv")[0]["val_loss"]) for d in ("run", "ref"))
    assert abs(ours - theirs) > 0.05


def test_recipe_options_have_effects(cli, quick, tmp_path):
    changes = [
        ["--lr", 3e-3],
        ["--weight-decay", 0.5],
        ["--clip", 1e-3],
        ["--dice-weight", 0.1],
        ["--bce-weight", 9],
    ]
    changes += [["--prompts", "p1"], ["--augment"], ["--batch-size", 5]]
    at = quick.index("--batch-size")
    without = quick[:at] + quick[at + 2 : -1]
    for n, option in enumerate(changes):
        if "--batch-size" not in option:
            option = [*option, "--batch-size", 8]
        assert cli("train", *without, tmp_path / str(n), "--epochs", 1, *option)[0] == 0
    assert cli("train", *quick, "--epochs", 1)[0] == 0
    for n in range(len(changes)):
        assert not same_tensors(
            tmp_path / "run" / "last.safetensors", tmp_path / str(n) / "last.safetensors"
        ), n


def test_data_options_have_effects(cli, quick, folder, tmp_path):
    assert cli("train", *quick, "--epochs", 1, "--cache-dir", tmp_path / "kept")[0] == 0
    assert len(list((tmp_path / "kept").iterdir())) == 3
    (folder / "images" / "d3.png").write_bytes(b"broken")
    code, _, err = cli("train", *quick[:-1], tmp_path / "b", "--epochs", 1)
    assert (
        code == 2
        and "1 of 24 records cannot be used" in err
        and "d3.png" in err
        and not (tmp_path / "b").exists()
    )
    code, out, err = cli("train", *quick[:-1], tmp_path / "b", "--epochs", 1, "--skip-bad")
    assert code == 0 and "dropped 1 of 24 records" in out and "23 train" in out, err
    shutil.rmtree(folder / "anns")
    (folder / "images" / "d3.png").unlink()
    (folder / "masks" / "d3.png").unlink()
    sides = set()
    for seed in (0, 1):
        code, out, err = cli(
            "train",
            *quick[:-1],
            tmp_path / f"s{seed}",
            "--epochs",
            1,
            "--prompts",
            "disk",
            "--split-seed",
            seed,
        )
        assert code == 0, err
        code, _, err = cli("evaluate", "--ckpt", tmp_path / f"s{seed}")
        assert code == 0, err
        sides.add(tuple(r["image"] for r in rows(tmp_path / f"s{seed}" / "eval-test" / "metrics.csv")))
    assert len(sides) == 2, "evaluation uses the split of the training run"


def test_plateau_lowers_the_learning_rate(cli, quick, tmp_path):
    assert cli("train", *quick, "--epochs", 4, "--lr", 4e-8, "--lr-patience", 0, "--lr-factor", 0.5)[0] == 0
    rates = [float(r["lr"]) for r in rows(tmp_path / "run" / "log.csv")]
    assert (
        rates[0] == 4e-8
        and min(rates) < 4e-8
        and all(a == b or b == pytest.approx(a / 2) for a, b in zip(rates, rates[1:]))
    )


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [0.3, 0.3, 0.3], [1e-7, 247.0], [5.0, -2.0]])
def test_curves_of_any_values_are_drawn(tmp_path, values):
    keys = ("train_loss", "val_loss", "train_dsc", "val_dsc")
    log = [dict(epoch=e, val_alarms=None, lr=1e-3, **dict.fromkeys(keys, v)) for e, v in enumerate(values, 1)]
    plots.curves(log, len(values), "a_$name$_" * 20, tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert pixels.shape == (1080, 1520, 3), "loss, DSC and learning rate: what the log lacks has no panel"
    is_orange = (np.abs(pixels.astype(int) - (0xE6, 0x9F, 0x00)) < 3).all(2)
    assert is_orange[:500, :760].any() and is_orange[:500, 760:].any()
    plots.curves(log, 1, "a_$name$_" * 20, tmp_path / "d.png")
    panels = np.asarray(Image.open(tmp_path / "d.png").convert("RGB"))[:900]
    assert np.array_equal(panels, pixels[:900]) == (len(values) == 1), "the best epoch is marked"


@pytest.mark.parametrize("shadow", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_package_named_datasets_does_no_harm(tmp_path, shadow):
    """train.py's own datasets.py is meant, with and without the PyPI package of that name on the path."""
    if shadow:
        (tmp_path / "datasets").mkdir()
        (tmp_path / "datasets" / "__init__.py").write_text("raise RuntimeError('the wrong datasets')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "train.py", "--dry-run", "--peft", "none"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "parameters are trained" in done.stdout, done.stderr


def test_help_fits_its_purpose(cli):
    for program in ("train", "evaluate", "datasets"):
        code, said, _ = cli(program, "--help")
        assert code == 0 and "default" in said
