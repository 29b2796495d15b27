"""The page to try prompts on: what it computes, and the page itself if gradio is installed."""

import importlib.util

import numpy as np
import pytest

from tests.conftest import without_dim
from vlsm.data.images import read_image
from vlsm.tools.serve import Runs, build_page, import_gradio, run_examples, segment


@pytest.fixture
def runs(trained):
    return Runs([str(trained)], device="cpu")


def test_what_it_shows(runs, trained, folder):
    run = str(trained)
    image = read_image(folder / "images" / "d30.png")
    tinted, grey, share, mask = segment(runs, run, image, "red disk", 0.5)
    assert tinted.size == grey.size == mask.size == (60, 44) and "% of the image" in share
    wide = segment(runs, run, image, "red disk", 0.01)[3]
    assert np.asarray(wide).sum() > np.asarray(mask).sum() > 0
    assert segment(runs, run, None, "red disk", 0.5)[2].startswith("Choose an image")
    assert segment(runs, run, image, "  ", 0.5)[0] is None
    with pytest.raises(KeyError):
        segment(runs, "/etc", image, "red disk", 0.5)


def test_examples_are_of_the_test_split(runs, trained, folder):
    predictor = runs.get(str(trained))
    examples = run_examples(predictor)
    assert len(examples) == 6 and examples[0][0].shape == (44, 60, 3) and "disk" in examples[0][1]
    folder.rename(folder.with_name("moved"))
    assert run_examples(predictor) == []


def test_runs_share_one_base(cli, quick, trained, tmp_path):
    assert cli("train", *without_dim(quick)[:-1], tmp_path / "lora", "--peft", "lora", "--epochs", 1)[0] == 0
    runs = Runs([str(trained), str(tmp_path / "lora")], device="cpu")
    first, second = (dict(runs.get(path).model.network.named_parameters()) for path in runs.predictors)
    assert all(first[name] is second[name] for name in first)


def test_without_gradio(cli, trained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, _, err = cli("vlsm.tools.serve", trained)
    assert code == 2 and "pip install gradio" in err


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
def test_the_page(runs):
    page = build_page(import_gradio(), runs, [(np.zeros((9, 9, 3), np.uint8), "disk")])
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"run", "prompt", "another prompt beside it", "image", "threshold of the probability"} <= labels
