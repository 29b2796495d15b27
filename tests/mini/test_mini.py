"""The embedded base: small, readable by transformers, and listening to its prompt; the demo on top of it."""

import json
import shutil

import pytest
import torch

import vlsm
from tests.conftest import ROOT
from vlsm.mini import pretrain, scenes
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


def test_words_of_scenes_are_single_tokens():
    tokenizer = Tokenizer(MINI)
    assert len(tokenizer.encode("the large red striped circle, located in top left of the image")) == 2 + 13


def test_it_listens_to_the_prompt():
    """Scenes of a seed that it was not trained on: the right phrase finds its object, another object's phrase does not."""
    right, wrong = pretrain.listening(vlsm.build("clipseg", "mini").base, Tokenizer(MINI), seed=1, count=300)
    assert right >= 0.80 and wrong <= 0.15


def test_scenes_are_reproducible_and_phrases_true():
    a, b = scenes.sample(3, 7), scenes.sample(3, 7)
    assert (a[0] == b[0]).all() and a[1] == b[1] and (a[2] == b[2]).all()
    assert not (scenes.sample(4, 7)[0] == a[0]).all()
    empty = sum(not mask.any() for i in range(100) for mask in scenes.sample(0, i)[2])
    assert 30 < empty < 80
    for i in range(50):
        _, objects = scenes.draw(0, i)
        for thing in objects:
            wanted = {k: thing[k] for k in ("colour", "location")}
            found = scenes.matching(objects, wanted)
            assert (
                any(thing is o for o in found)
                and (scenes.union(found) & thing["mask"]).sum() == thing["mask"].sum()
            )


def test_pretraining_resumes_bit_for_bit(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def run(out, stop):
        def listening(*args):
            if stop:
                raise Stopped  # as if killed after the first save
            return 0.0, 0.0

        monkeypatch.setattr(pretrain, "listening", listening)
        monkeypatch.setattr(
            "sys.argv", ["pretrain", "--out", str(tmp_path / out), "--steps", "4", "--batch-size", "2"]
        )
        pretrain.main()
        return (tmp_path / out / "model.safetensors").read_bytes()

    def copied_tokenizer(folder):  # making one reads thousands of scenes
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(MINI / name, folder / name)

    monkeypatch.setattr(pretrain, "make_tokenizer", copied_tokenizer)
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    whole = run("a", False)
    with pytest.raises(Stopped):
        run("b", True)
    assert run("b", False) == whole


@pytest.mark.slow
def test_demo_reaches_what_readme_says(tmp_path, demo, cli):
    """Dense adapters on the demo: test DSC of 80 and more, at least 20 points above the base as it is."""
    scores = {}
    for method in ("none", "dense"):
        code, _, err = cli(
            "train",
            "--dataset",
            demo,
            "--weights",
            "mini",
            "--epochs",
            40,
            "--peft",
            method,
            "--out",
            tmp_path / method,
        )
        assert code == 0, err
        code, _, err = cli("evaluate", "--ckpt", tmp_path / method)
        assert code == 0, err
        scores[method] = json.loads((tmp_path / method / "eval-test" / "metrics.json").read_text())["dsc"][
            "mean"
        ]
    assert scores["dense"] >= 0.80 and scores["dense"] - scores["none"] >= 0.20, scores


def test_readme_names_the_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert "<!-- tests -->" in text and "python train.py --dataset demo --peft dense --dim 64" in text
