"""The page to try prompts on: what it computes, and the page itself where gradio is installed."""

import importlib.util

import numpy as np
import pytest
from vlsm.results.options import parse_options

from vlsm.data.images import read_image
from vlsm.results.serve import Predictors, build_page, segment


@pytest.fixture
def predictors(trained):
    options = parse_options(["--ckpt", str(trained), "--device", "cpu"])
    return Predictors({"run": str(trained)}, options)


def test_what_it_shows(predictors, folder):
    image = read_image(folder / "images" / "d30.png")
    drawn, grey, said, mask = segment(predictors, "run", image, "red disk", 0.5)
    assert drawn.size == grey.size == mask.size == (60, 44) and "% of the picture" in said
    wide = segment(predictors, "run", image, "red disk", 0.01)[3]
    assert np.asarray(wide).sum() > np.asarray(mask).sum() > 0
    assert segment(predictors, "run", None, "red disk", 0.5)[2].startswith("Choose a picture")
    assert segment(predictors, "run", image, "  ", 0.5)[0] is None


def test_without_gradio(predictors, cli, trained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, _, err = cli("evaluate", "--serve", "--ckpt", trained)
    assert code == 2 and "pip install gradio" in err


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
def test_the_page(predictors):
    page = build_page(predictors, [(np.zeros((9, 9, 3), np.uint8), "disk")])
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"run", "prompt", "another prompt beside it", "picture", "threshold of the probability"} <= labels
