"""CRIS and SAN through train.py and evaluate.py: what is computed once, resuming, precision, compilation, merging; and that they learn."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
import vlsm
from tests.conftest import ROOT, normalise, rows, same_tensors, same_tensors_nearly
from tests.training.test_frozen_cache import cache_of, cached_logits, split
from vlsm.data.images import read_mask
from vlsm.networks.weights import image_side
from vlsm.results.predict import load_predictor
from vlsm.training.arguments import parse_arguments

TINY = {name: f"random:{ROOT / 'tests' / 'tiny' / name}.json" for name in ("cris", "san")}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "model, method, reference, images, prompts",
    [
        (
            "cris",
            "decoder",
            True,
            False,
            True,
        ),  # published: statistics drift in the frozen encoder, with every batch
        ("cris", "decoder", False, False, True),  # a random start learns its statistics in the neck
        ("cris", "coop", False, True, False),
        ("cris", "cocoop", False, True, False),
        ("cris", "full", False, False, False),
        ("san", "decoder", False, True, True),
        ("san", "full", False, False, True),
        ("san", "full", True, True, True),  # published: CLIP runs without gradients
    ],
)
def test_what_is_kept_is_what_would_be_computed(tmp_path, model, method, reference, images, prompts):
    torch.manual_seed(0)
    vlm = vlsm.build(model, TINY[model], method, reference)
    f, data = cache_of(vlm, tmp_path), split(7, 64)
    assert (f.images_frozen, f.prompts_frozen) == (images, prompts)
    said = f.add_split("train", data, 3)
    assert bool(said) == images and f.needs_pixels("train") == (not images or model == "san")
    indices, texts = [5, 7, 0, 3], ["red disk", "a polyp that is large and red", "red disk", ""]
    pixels = data.batch(indices)[0]
    inputs = normalise(pixels, vlm.network.mean, vlm.network.std), *f.tokenizer(texts)
    tuned = [p for name, p in vlm.tuned_parameters().items() if not name.endswith("k_proj.bias")]  # zero
    for given in (pixels, None)[: 1 + (images and model == "cris")]:
        want, got = vlm(*inputs), cached_logits(f, "train", indices, texts, given)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        gradients = [torch.autograd.grad(z.square().mean(), tuned, allow_unused=True) for z in (got, want)]
        for a, b in zip(*gradients):
            assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-9)


def test_decoder_of_a_settled_cris_keeps_its_maps(tmp_path):
    vlm = vlsm.build("cris", TINY["cris"], "decoder")
    for name, module in vlm.network.named_modules():
        if name in vlm.network.updated_norms:
            module.running_mean.fill_(0.1)
    vlm = type(vlm)(vlm.network, vlm.tuner, vlm.info)
    assert not vlm.updated_buffers and cache_of(vlm, tmp_path).images_frozen


@pytest.fixture
def arguments(folder, tmp_path):
    def make(model, *more, out="run"):
        size = ["--image-size", 64, "--lr", "1e-3", "--out", tmp_path / out]
        if "--batch-size" not in more:
            size += ["--batch-size", 8]
        return ["--model", model, "--weights", TINY[model], "--dataset", folder, *size, *more]

    return make


@pytest.mark.parametrize(
    "model, method", [("cris", "full"), ("cris", "coop"), ("san", "full"), ("san", "decoder")]
)
def test_train_resume_evaluate(cli, arguments, tmp_path, model, method):
    for out, epochs in (("straight", 3), ("parts", 1)):
        code, said, err = cli("train", *arguments(model, "--peft", method, "--epochs", epochs, out=out))
        assert code == 0, err
        assert "random weights, for tests and research" in err
        assert "finite and non-zero, 0 of" in said and "ZERO" not in said
    code, _, err = cli("train", "--out", tmp_path / "parts", "--resume", "--epochs", 3)
    assert code == 0, err
    assert same_tensors(tmp_path / "straight" / "last.safetensors", tmp_path / "parts" / "last.safetensors")
    code, _, err = cli("evaluate", "--ckpt", tmp_path / "parts")
    assert code == 0, err
    assert len(rows(tmp_path / "parts" / "eval-test" / "metrics.csv")) == 6
    about = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert about["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073]) and about["image_size"] == 64


@pytest.mark.parametrize("model", ["cris", "san"])
def test_evaluation_normalises_as_training_did(cli, arguments, tmp_path, model):
    assert cli("train", *arguments(model, "--epochs", 1))[0] == 0
    predictor = load_predictor(tmp_path / "run", device="cpu")
    vlm, pixels = vlsm.load(tmp_path / "run"), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        want = vlm(normalise(pixels, vlm.network.mean, vlm.network.std), *vlm.tokenizer()(["a disk", "x"]))
    torch.testing.assert_close(predictor.logits(pixels, ["a disk", "x"]), want)


@pytest.mark.parametrize("model", ["cris", "san"])
def test_defaults_are_the_papers(cli, tmp_path, model, monkeypatch):
    """Without --peft: the paper's row, its learning rate and its size of pictures."""
    monkeypatch.setattr(train, "describe_memory", lambda *_: "")  # test_memory.py's subject, and slow
    where = ["--weights", TINY[model], "--dataset", "demo", "--out", tmp_path / "run"]
    options = ["--model", model, *where, "--dry-run"]
    code, said, err = cli("train", *options)
    counts = dict(cris="2,170,777 of 2,170,778", san="169,682 of 609,107")[model]
    assert code == 0 and f"--peft full:\n  {counts}" in said, err
    args = parse_arguments([str(o) for o in options])
    assert args.lr == dict(cris=1e-4, san=3e-4)[model] and args.peft == "full"
    network = vlsm.build(model, TINY[model])
    assert image_side(network.network.config, network.info["folder"]) == 96
    assert parse_arguments(["--model", model]).out == f"runs/demo-{model}-full-seed42"


def test_reference_runs(cli, arguments, tmp_path):
    for model in ("cris", "san"):
        code, said, err = cli("train", *arguments(model, "--reference", "--epochs", 1, out=model))
        unread = dict(cris="backbone.logit_scale", san="side_adapter_network.")[model]
        assert code == 0 and f"ZERO, so not learning yet: {unread}" in said, err
        code, _, err = cli("evaluate", "--ckpt", tmp_path / model)
        assert code == 0, err
    code, _, err = cli(
        "train",
        *arguments("cris", "--reference", "--batch-size", 1, "--epochs", 1, "--negatives", 0, out="single"),
    )
    assert code == 2 and "this batch holds one image" in err


@pytest.mark.parametrize("model", ["cris", "san"])
def test_half_precision(cli, arguments, tmp_path, model):
    code, _, err = cli("train", *arguments(model, "--amp", "bf16", "--epochs", 2, "--device", "cpu"))
    assert code == 0, err
    assert all(
        t.dtype == torch.float32 and t.isfinite().all()
        for t in load_file(tmp_path / "run" / "last.safetensors").values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cris", "san"])
def test_compiled(cli, arguments, tmp_path, graphs, model):
    method = dict(cris="coop", san="full")[model]  # without dropout, whose draws differ
    for mode in ("off", "on"):
        code, _, err = cli(
            "train", *arguments(model, "--peft", method, "--epochs", 1, "--compile", mode, out=mode)
        )
        assert code == 0, err
    assert graphs["stats"]["unique_graphs"] and not graphs["graph_break"], graphs
    same_tensors_nearly(tmp_path / "off", tmp_path / "on", atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("model", ["cris", "san"])
def test_merged_weights_are_the_network(cli, arguments, tmp_path, model):
    assert cli("train", *arguments(model, "--epochs", 1))[0] == 0
    code, _, err = cli("vlsm.tools.merge", tmp_path / "run", tmp_path / "merged")
    assert code == 0, err
    tuned, plain = vlsm.load(tmp_path / "run"), vlsm.build(model, tmp_path / "merged")
    pixels, ids = torch.randn(2, 3, 64, 64), plain.tokenizer()(["a disk", "x"])
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels, *ids), tuned(pixels, *ids))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cris", "san"])
def test_a_tiny_one_learns_the_demo(cli, demo, tmp_path, model):
    """From random weights: better than calling everything foreground."""
    common = ["--model", model, "--weights", TINY[model], "--dataset", demo, "--lr", "1e-3"]
    code, _, err = cli("train", *common, "--image-size", 64, "--epochs", 10, "--out", tmp_path / "run")
    assert code == 0, err
    code, _, err = cli("evaluate", "--ckpt", tmp_path / "run")
    assert code == 0, err
    results = tmp_path / "run" / "eval-test"
    shares = [read_mask(demo / "masks" / row["mask"]).mean() for row in rows(results / "metrics.csv")]
    baseline = np.mean([2 * share / (1 + share) for share in shares])
    found = json.loads((results / "metrics.json").read_text())["dsc"]["mean"]
    assert found > baseline + 0.1, (found, baseline)
