"""The embedded base: small, readable by transformers, and listening to its prompt; the demo on top of it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import datasets
import vlsm
from tests.conftest import ROOT, normalise
from vlsm.data.images import read_mask
from vlsm.data.negatives import ABSENT_SETS
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI


def test_it_is_small_and_transformers_reads_it():
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation

    assert sum(f.stat().st_size for f in MINI.iterdir()) < 8 * 2**20
    theirs, ours = CLIPSegForImageSegmentation.from_pretrained(MINI).eval(), vlsm.build("clipseg", "mini")
    texts = ["large red circle", "the blue square on the left"]
    tokens = AutoTokenizer.from_pretrained(MINI)(texts, padding=True, return_tensors="pt")
    ids, mask = Tokenizer(MINI)(texts)
    assert tokens["input_ids"].tolist() == ids.tolist()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        want = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(pixels, ids, mask)[:, 0], want, atol=1e-4, rtol=0)


def test_it_is_the_base_that_checkpoints_name():
    """A checkpoint of the embedded base is refused by weights with another fingerprint."""
    assert vlsm.build("clipseg", "mini").info["fingerprint"] == "2efc317894476e35"


def test_words_of_prompts_are_single_tokens():
    tokenizer = Tokenizer(MINI)
    assert len(tokenizer.encode("the large red striped circle, located in top left of the image")) == 2 + 13
    assert len(tokenizer.encode("one small pink round polyp, located in center of the image")) == 2 + 12


@pytest.mark.parametrize("background", [60, 200])
def test_it_listens_to_the_prompt(background):
    """The prompt chooses the object; a prompt of an absent one gives an empty mask."""
    y, x = np.mgrid[:96, :96]
    circle = np.hypot(y - 30, x - 26) < 16
    square = (abs(y - 62) < 14) & (abs(x - 66) < 14)
    image = np.full((96, 96, 3), background, np.uint8)
    image[circle] = (200, 40, 40)
    image[square] = (40, 60, 200)
    pixels = normalise(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))
    model = vlsm.build("clipseg", "mini")
    for prompt, truth in (
        ("the red circle", circle),
        ("the blue square", square),
        ("the object on the left, red", circle),
        ("green circle", np.zeros_like(circle)),
    ):
        with torch.no_grad():
            mask = model(pixels, *Tokenizer(MINI)([prompt]))[0, 0] > 0
        assert vlsm.metrics.dsc([mask], [torch.from_numpy(truth)]).item() > 0.95, prompt


def test_the_demo_is_imported_without_torch():
    code = "import sys, vlsm.mini.demo; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.slow
def test_demo_reaches_what_readme_says(tmp_path, cli):
    """Dense adapters on the demo: each class is found under its own prompt, and not under another's."""
    summaries = {}
    for method in ("none", "dense"):
        run = tmp_path / method
        for command in (
            ("train", "--dataset", "demo", "--peft", method, "--out", run),
            ("evaluate", "--ckpt", run),
        ):
            code, _, err = cli(*command)
            assert code == 0, err
        summaries[method] = json.loads((run / "eval-test" / "metrics.json").read_text())
    summary = summaries["dense"]
    assert summary["dsc"]["mean"] - summaries["none"]["dsc"]["mean"] >= 0.20
    scores = {word: of_class["dsc"]["mean"] for word, of_class in summary["classes"]["each"].items()}
    assert set(scores) == {"polyp", "instrument"} and min(scores.values()) >= 0.80, scores
    alarms = {name: of_name["mean"] for name, of_name in summary["alarms"].items()}
    assert set(alarms) == set(ABSENT_SETS) and max(alarms.values()) < 0.15, alarms

    model = vlsm.load(run)
    other = {"polyp": "instrument", "instrument": "polyp"}
    records = datasets.records("demo", "test")
    pairs = []
    for record in records:
        mask = model.predict(record.image, other[record.class_word])
        pairs.append((torch.from_numpy(mask), torch.from_numpy(read_mask(record.mask))))
    assert vlsm.metrics.dsc(*zip(*pairs)).mean() < 0.10


def test_readme_names_the_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert "<!-- tests -->" in text and "python train.py --dataset demo --peft dense --dim 64" in text


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat  # comes with nbclient

    notebook = nbformat.read(MINI / "demo.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": MINI}}).execute()
    printed = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed += output.get("text", "")
    before, *epochs = re.findall(r"validation DSC ([\d.]+)", printed)
    assert len(epochs) == 3
    assert float(before) < 50 < 65 < float(epochs[-1])
