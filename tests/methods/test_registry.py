"""LoRA, the learnable upsampler, combinations, wrong options; every method on the demo."""

import argparse
import json

import pytest
import torch
import torch.nn.functional as F

import datasets
import vlsm
from tests.conftest import ROOT, normalise
from tests.methods.test_adapters import REAL, batch, count
from tests.methods.test_prompt_learners import LEARNERS, SMALL, TINY, build, restated
from vlsm.methods.registry import (
    METHODS,
    OPTIONS,
    add_method_options,
    complete_options,
    default_options,
    make_tuner,
)
from vlsm.methods.upsampler import Upsampler
from vlsm.networks.hooks import Contexts
from vlsm.networks.weights import MINI
from vlsm.tools.merge import merged_state_dict
from vlsm.training.run import check_gradients


@pytest.mark.parametrize("h, w", [(4, 4), (3, 7), (1, 2)])
def test_upsampler_is_bilinear_then_convolution(h, w):
    up = Upsampler(build("none").network.config).double()
    z, logits = (
        torch.randn(3, 16, h, w, dtype=torch.double, requires_grad=True),
        torch.randn(3, 1, 16 * h, 16 * w, dtype=torch.double),
    )
    with torch.no_grad():
        up.ratio.fill_(0.3)
    risen = up.conv(F.interpolate(z, scale_factor=16, mode="bilinear", align_corners=False))
    want, got = (1 - up.ratio) * logits + up.ratio * risen, up(logits, z)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    weight, wrt = torch.randn_like(want), [z, *up.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), wrt), torch.autograd.grad((want * weight).sum(), wrt)
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_upsampler_trains_after_an_evaluation():
    """What is kept between calls must not be made in inference mode."""
    up = Upsampler(build("none").network.config)
    with torch.inference_mode():
        up.upsample(torch.randn(1, 16, 5, 6))
    up.upsample(torch.randn(1, 16, 5, 6)).sum().backward()
    assert up.conv.weight.grad.any()


@pytest.mark.parametrize(
    "method, reads",
    [("coop", "nothing"), ("cocoop", "nothing"), ("vpt", "sum"), ("maple", "mix"), ("dense", "mix")],
)
def test_upsampler_of_the_published_code(method, reads):
    """CoOp and CoCoOp build it and ignore it; VPT adds it without its ratio; the others, and all of ours, follow the paper."""
    ours, theirs = (build(method, upsampler=True, reference=r) for r in (False, True))
    theirs.load_tuned(ours.tuned_state_dict())
    pixels, ids = batch()
    pixels, ids = pixels[..., :48], ids
    bare = vlsm.build("clipseg", TINY, method, **{**SMALL.get(method, {}), "upsampler": False})
    bare.load_tuned({n: t for n, t in ours.tuned_state_dict().items() if not n.startswith("upsampler.")})
    frozen, z = [], []
    decoder = bare.network.decoder
    bare.network.decoder.forward = lambda *a: [frozen.append(out := type(decoder).forward(decoder, *a)), out][
        1
    ]
    bare(pixels, ids)
    logits, z = frozen[0]
    risen = ours.tuner.upsampler.upsample(z)
    mixed = 0.5 * logits + 0.5 * risen
    torch.testing.assert_close(ours(pixels, ids), mixed, atol=1e-5, rtol=0)
    wanted = {"nothing": logits, "sum": logits + risen, "mix": mixed}[reads]
    torch.testing.assert_close(theirs(pixels, ids), wanted, atol=1e-5, rtol=0)
    theirs(pixels, ids).square().mean().backward()
    grads = {
        n: p.grad is not None for n, p in theirs.tuned_parameters().items() if n.startswith("upsampler.")
    }
    assert grads == {
        "upsampler.ratio": reads == "mix",
        "upsampler.conv.weight": reads != "nothing",
        "upsampler.conv.bias": reads != "nothing",
    }
    assert "finite and non-zero, 0 of" in check_gradients(theirs)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("coop", dict(prompt_depth=0), "Give 1 to 11"),
        ("vpt", dict(prompt_depth=12), "Give 1 to 11"),
        ("coop", dict(context=19), "give 1 to 18: its window of 20 tokens"),
        ("vpt", dict(context=0), "give 1 or more"),
        ("maple", dict(lora_proj=True, intermediate_dim=[4, 5]), "takes one --intermediate-dim, not 2"),
        ("maple", dict(intermediate_dim=[4, 0]), "--intermediate-dim 4 0"),
        ("shared_attention", dict(heads=7), "give one of 1, 2, 4, 5, 8"),
        ("shared_attention", dict(dropout=1.0), "--dropout 1.0"),
        ("shared_separate", dict(shared_dim=0), "--shared-dim 0"),
        (
            "coop",
            dict(shared_dim=3),
            "takes the options prompt_depth, context, context_init; it has no shared_dim",
        ),
        ("coop+maple", {}, "both put context vectors into the text encoder"),
        ("dense+dense", {}, "dense is named twice"),
        ("none+vpt", {}, "none trains nothing"),
        ("full+decoder", {}, "full trains the decoder already"),
        ("dense+", {}, "Method '' is not known"),
        ("none", dict(upsampler=True), "--peft none trains nothing"),
        ("lora", dict(lora_targets=("q", "mlp")), "--lora-targets mlp: give one or more of q, k, v, out"),
        ("lora", dict(dim=0), "--dim 0"),
        ("lora", dict(branches="vc"), "--branches 'vc' is not known"),
    ],
)
def test_wrong_options_are_sentences(method, options, message):
    with pytest.raises(ValueError, match=message):
        vlsm.build("clipseg", TINY, method, **{**(SMALL.get(method, {})), **options})


@pytest.mark.parametrize(
    "text, message", [("", "holds nothing that the tokenizer knows"), ("red " * 76, "give 1 to 75")]
)
def test_context_texts_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        vlsm.build("clipseg", "mini", "coop", context_init=text)
    with pytest.raises(ValueError, match="equally many tokens are needed, and these have 1, 2"):
        vlsm.build("clipseg", "mini", "coop", context_init=["red", "red circle"])


@pytest.mark.parametrize("branches", ["v", "l", "vl"])
def test_lora_is_a_change_of_weights(branches):
    model = build("lora", branches=branches, dim=3, lora_alpha=6.0, lora_targets=("q", "k", "v", "out"))
    pixels, ids = batch()
    base = vlsm.build("clipseg", TINY)
    assert torch.equal(model(pixels, ids), base(pixels, ids)), "it starts as the base"
    with torch.no_grad():
        for p in model.tuned_parameters().values():
            p.add_(0.1 * torch.randn_like(p))
    assert (model(pixels, ids) - base(pixels, ids)).abs().max() > 0.01
    base.network.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(base(pixels, ids), model(pixels, ids), atol=1e-5, rtol=1e-5)
    sides = {"v": "vision", "l": "text"}
    assert {n.split(".")[0] for n in model.tuned_state_dict()} == {sides[b] for b in branches}
    up = model.tuner.lora_deltas(sides[branches[0]], 0)["out"]
    torch.testing.assert_close(up.weight(), 2.0 * up.up.weight @ up.down.weight)


def test_lora_count_at_real_size():
    with torch.device("meta"):
        lora = make_tuner("lora", REAL, False, complete_options("lora", {}, REAL))
        assert count(lora) == 2 * 16 * 2 * (10 * 768 + 12 * 512)


@pytest.mark.parametrize("method", ["dense", "coop", "lora+vpt"])
def test_what_is_no_change_of_weights_is_not_merged(method):
    with pytest.raises(ValueError, match="possible for lora, decoder and full, without --upsampler"):
        merged_state_dict(build(method))
    with pytest.raises(ValueError, match="without --upsampler"):
        merged_state_dict(build("lora", upsampler=True))


def test_features_of_a_combination_are_those_of_the_tower_as_it_runs():
    """coop + vpt is both; each part alone changes the logits of the pair."""
    model = build("coop+vpt", prompt_depth=3)
    contexts = model.tuner.contexts()
    assert isinstance(contexts, Contexts) and [len(c) for c in contexts] == [3, 3]
    pixels, ids = batch()
    want = restated(model.network, pixels, ids, [model.tuner.coop.context] * 2, [model.tuner.vpt.context] * 2)
    bare = build("coop+vpt", prompt_depth=3, upsampler=False)
    bare.load_tuned({n: t for n, t in model.tuned_state_dict().items() if "upsampler" not in n})
    torch.testing.assert_close(bare(pixels, ids), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [*LEARNERS, "lora", "dense+vpt"])
def test_half_precision_leaves_what_is_trained_in_float32(method):
    model = build(method, **dict(dropout=0.0) if method == "shared_attention" else {}).train()
    want = model(*batch())
    model.hold_frozen_weights_in(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*batch()).float()
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    got.square().mean().backward()
    assert "ZERO" not in check_gradients(model)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.tuned_parameters().values())


@pytest.fixture(scope="module")
def train_split(demo):
    return datasets.open_dataset(str(demo), ["train"], 96, "data", prompts="class")["train"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*LEARNERS, "lora", "dense+vpt"])
def test_two_pictures_of_the_demo_are_learnt_by_heart(train_split, method):
    data = train_split
    indices = [i for i in range(40) if data.records[i].class_word == "instrument"][:2]
    pixels, masks = data.batch(indices)
    torch.manual_seed(0)
    model = vlsm.build(
        "clipseg", MINI, method, **dict(dropout=0.0) if method == "shared_attention" else {}
    ).train()
    ids = model.tokenizer()([data.records[i].class_word for i in indices])
    rate = dict(cocoop=2e-2, lora=3e-3).get(method, 3e-3 if "dense" in method else 1e-2)
    optimizer, reached = torch.optim.AdamW(model.tuned_parameters().values(), lr=rate), 0
    for step in range(700):
        logits = model(normalise(pixels), *ids)
        reached = (
            vlsm.metrics.dsc(logits.detach()[:, 0] > 0, masks[:, 0] > 0).mean() if step % 10 == 9 else reached
        )
        if reached > 0.95:
            break
        optimizer.zero_grad()
        vlsm.dice_bce_loss(logits, masks, 1.0, 0.2).backward()
        optimizer.step()
    assert reached > 0.95


@pytest.mark.slow
def test_each_method_beats_its_zero_shot_on_the_demo(cli, demo, tmp_path):
    def dsc(method, *more):
        options = ["--dataset", demo, "--weights", "mini", "--image-size", 48, "--prompts", "class"]
        options += ["--negatives", 0]  # in so few epochs nothing is refused yet
        code, _, err = cli("train", "--peft", method, *options, "--out", tmp_path / method, *more)
        assert code == 0, err
        assert cli("evaluate", "--ckpt", tmp_path / method)[0] == 0
        return json.loads((tmp_path / method / "eval-test" / "metrics.json").read_text())["dsc"]["mean"]

    start = dsc("none")
    for method in (*LEARNERS, "lora", "dense+vpt"):
        assert dsc(method, "--epochs", 3, "--lr", 5e-3) > start + 0.1, method


def test_the_method_that_readme_adds(monkeypatch):
    """Its code as it stands there: built, counted, its frozen parts kept, combined with another."""
    from vlsm.methods import registry as methods

    text = (ROOT / "README.md").read_text().split("<!-- example -->")[1].split("```python")[1].split("```")[0]
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    exec(text, {})
    model = vlsm.build("clipseg", "mini", "scale", start=0.9)
    assert model.count_parameters()[0] == 3 * 128 and set(model.tuned_state_dict()) == {
        f"scale.{k}" for k in range(3)
    }
    model(torch.randn(2, 3, 48, 48), *model.tokenizer()(["a", "b"])).square().mean().backward()
    assert "3 of 3 trained tensors finite and non-zero" in check_gradients(model)
    assert vlsm.build("clipseg", "mini", "dense+scale").count_parameters()[0] == 174_144 + 3 * 128


def test_every_option_of_a_method_is_on_the_command_line():
    parser = argparse.ArgumentParser()
    add_method_options(parser)
    assert set(vars(parser.parse_args([]))) == set(OPTIONS)
    for method in METHODS:
        options = complete_options(method, {}, REAL)
        assert options == default_options(method)


def test_options_of_a_combination():
    settings = complete_options("dense+vpt", dict(dim=8, vpt=dict(context=3)), REAL)
    assert settings["upsampler"] and settings["dense"]["dim"] == 8 and settings["vpt"]["context"] == 3
    assert complete_options("dense+vpt", settings, REAL) == settings
    assert not complete_options("dense+vpt", dict(upsampler=False), REAL)["upsampler"]
    with pytest.raises(ValueError, match="has no heads"):
        complete_options("dense+vpt", dict(vpt=dict(heads=2)), REAL)
