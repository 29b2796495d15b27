"""Runs of earlier versions, in tests/golden/runs: they evaluate to the figures of their day, and go on.

A folder there is named after the version that trained it, by its command line ("options" in figures.json) on
the images of the `folder` fixture; "records" are the figures by which that version evaluated it, and
"third_epoch" is what that version's --resume logged.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN, ROOT, folder_of_golden, rows
from vlsm.checkpoint import load, read_metadata

RUNS = GOLDEN / "runs"
NAMES = sorted(path.name for path in RUNS.iterdir())
RESUMED = ("9bf5cfe-coop", "93ca10b-coop")  # the folders that hold a state
VOCABULARY = 995  # of the embedded tokenizer


def figures(name):
    return json.loads((RUNS / name / "figures.json").read_text())


def write_base(case, folder):
    """Write a golden network that takes the embedded tokenizer: its token embeddings are repeated."""
    if case == "clipseg-tiny":
        shutil.copytree(GOLDEN / case, folder)
    else:
        folder_of_golden(case, folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(ROOT / "vlsm" / "mini" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["vocab_size"] = VOCABULARY
    text["eos_token_id"] = VOCABULARY - 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("token_embedding.weight"):
            tensors[name] = tensor[torch.arange(VOCABULARY) % len(tensor)]
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """The folder that the runs were trained in: they name their data set and base relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide_base(path):
    """Write the base of a checkpoint, unless it is the embedded one."""
    weights = read_metadata(path)["weights"]
    if weights != "mini":
        write_base(weights, path.parent / weights)


def copy_run(name, place):
    """Copy a golden run, for the test to write into."""
    return shutil.copytree(RUNS / name, place / "run", ignore=shutil.ignore_patterns("figures.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_evaluates_to_the_figures_of_its_day(cli, place, name):
    checkpoint = shutil.copy(RUNS / name / "best.safetensors", place / "best.safetensors")
    provide_base(checkpoint)
    code, _, err = cli("evaluate", "--ckpt", checkpoint, "--cache-dir", "cache", "--out", "eval")
    assert code == 0, err
    expected = figures(name)["records"]
    measured = {row["image"]: row for row in rows(place / "eval" / "metrics.csv")}
    assert measured.keys() == expected.keys()
    for image, values in expected.items():
        for metric, value in values.items():
            assert float(measured[image][metric]) == pytest.approx(value, abs=1e-4), (image, metric)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_as_its_own_version_would(cli, place, name):
    run = copy_run(name, place)
    before = rows(run / "log.csv")
    code, out, err = cli("train", "--out", "run", "--resume", "--epochs", 3, "--cache-dir", "cache")
    assert code == 0 and "after epoch 2" in out, err
    log = rows(run / "log.csv")
    assert [row["val_loss"] for row in log[:2]] == [row["val_loss"] for row in before]
    for column, value in figures(name)["third_epoch"].items():
        # a pixel of one mask is 3e-4 of a mean DSC over six
        bar = 1e-5 if column.endswith("loss") else 1e-3
        assert float(log[2][column]) == pytest.approx(value, abs=bar), column
    assert load(run / "last.safetensors").metadata["epoch"] == 3
