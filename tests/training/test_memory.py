"""Less memory for the same step: parts of a batch, recomputed activations; and what a run is said to need."""

import copy
import json

import numpy as np
import pytest
import torch

import vlsm
from tests.conftest import ROOT, rows, same_tensors, same_tensors_nearly, tiny_batch, without_dim
from vlsm.system import parallel

CPU = torch.device("cpu")


def gradients(model, images, ids, target, parts=1):
    """Of a batch's mean loss, computed in parts."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(7)
    for share in parallel.share_batch(list(range(len(images))), parts):
        logits = model(images[share.indices], ids[share.indices])
        loss = vlsm.dice_bce_loss(logits, target[share.indices])
        (loss * share.weight).backward()
    return {name: p.grad.clone() for name, p in model.tuned_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("method", ["dense", "lora", "vpt", "full", "telescopic", "shared_attention"])
def test_recomputed_activations_give_the_same_bits(method):
    torch.manual_seed(0)
    model = vlsm.build("clipseg", "mini", method)
    images, ids = torch.randn(3, 3, 96, 96), torch.tensor([[993, 5, 994], [993, 7, 994], [993, 7, 994]])
    target = torch.rand(3, 1, 96, 96) < 0.3
    kept = gradients(model, images, ids, target)
    model.recompute_activations()
    again = gradients(model, images, ids, target)
    assert kept.keys() == again.keys() and all(torch.equal(g, again[name]) for name, g in kept.items())


@pytest.mark.parametrize("name, network", [("cris", "full"), ("san", "full")])
def test_other_networks_recompute_too(name, network):
    torch.manual_seed(0)
    model = vlsm.build(name, f"random:{ROOT}/tests/tiny/{name}.json", network)
    images, ids = tiny_batch(2, 72 if name == "san" else 64)
    target = torch.rand(2, 1, *images.shape[2:]) < 0.3
    other = copy.deepcopy(model)
    other.recompute_activations()
    kept, again = (gradients(m, images, ids, target) for m in (model, other))
    assert all(torch.equal(g, again[name]) for name, g in kept.items())


@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_parts_of_a_batch_give_the_whole_ones_gradients(parts):
    torch.manual_seed(0)
    model = vlsm.build("clipseg", "mini", "dense").double()
    images = torch.randn(5, 3, 96, 96, dtype=torch.float64)
    ids = torch.tensor([[993, 5, 994]] * 5)
    target = torch.rand(5, 1, 96, 96) < torch.tensor([0, 0.1, 0.3, 0.6, 1]).view(5, 1, 1, 1)
    whole, summed = (gradients(model, images, ids, target, n) for n in (1, parts))
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, atol=1e-12, rtol=1e-9)


def test_a_run_in_parts_is_the_run(cli, quick, tmp_path):
    for name, more in (("whole", []), ("parts", ["--accumulate", 3, "--checkpoint-activations"])):
        code, _, err = cli("train", *quick[:-1], tmp_path / name, "--epochs", 2, "--augment", *more)
        assert code == 0, err
    same_tensors_nearly(tmp_path / "whole", tmp_path / "parts", atol=2e-4, rtol=0)
    logs = [rows(tmp_path / name / "log.csv") for name in ("whole", "parts")]
    for a, b in zip(*logs):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), abs=1e-3)


def test_resume_is_exact_with_blocks_and_recomputing(cli, quick, tmp_path):
    more = ["--blocks", "2-3", "--checkpoint-activations", "--accumulate", 2]
    for name, epochs in (("once", 3), ("twice", 1)):
        code, _, err = cli("train", *quick[:-1], tmp_path / name, "--epochs", epochs, *more)
        assert code == 0, err
    code, said, err = cli("train", "--out", tmp_path / "twice", "--resume", "--epochs", 3)
    assert code == 0 and "output of 2 image blocks is kept" in said, err
    assert same_tensors(*(tmp_path / name / "last.safetensors" for name in ("once", "twice")))
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["options"]["blocks"] == "2-3"


def test_needs_in_words(cli, quick, tmp_path):
    code, said, err = cli("train", *quick, "--dry-run")
    assert code == 0 and "GB for each image of a step" in said and "Largest --batch-size" in said, err
    assert " in 80 GB" in said and not (tmp_path / "run").exists()
    for method in ("shallow", "full"):
        code, said, err = cli("train", *without_dim(quick), "--peft", method, "--dry-run")
        assert code == 0 and " in 80 GB" in said, err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--blocks", "x"], "--blocks 'x': give a range such as 5-8"),
        (["--blocks", "3-9"], "blocks 0 to 3 reach the logits"),
        (["--blocks", "3-1"], "blocks 0 to 3 reach the logits"),
        (["--blocks", "v:1,v:2"], "give a range such as 5-8"),
        (["--dims", 8, 8], "--dims gives 2 widths"),
        (["--dims", 8, 8, 0], "--dim 0 leaves an adapter"),
        (["--peft", "dense+telescopic"], "both act before the residual additions"),
        (["--accumulate", 0], "--accumulate"),
    ],
)
def test_what_cannot_be(options, said, cli, quick):
    base = without_dim(quick) if "--dims" in options else quick
    code, _, err = cli("train", *base, *options)
    assert code == 2 and said in err


def test_widths_a_block():
    model = vlsm.build("clipseg", "mini", "dense", dims=[4, 8, 16])
    assert [model.tuner.vision[str(i)]["attn"].down.out_features for i in range(3)] == [4, 8, 16]
    assert np.allclose(model.tuner.text["2"]["mlp"].up.weight.shape, (96, 16))
    telescopic = vlsm.build("clipseg", "mini", "telescopic").tuner
    assert sorted(telescopic.text) == ["1", "2", "3"] and sorted(telescopic.vision) == ["0", "1", "2"]
    assert [telescopic.vision[str(i)]["mlp"].down.out_features for i in range(3)] == [8, 17, 32]
    assert telescopic.cond.scale.item() == pytest.approx(0.1)
