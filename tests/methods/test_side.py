"""The ladder of --peft side: its formula and gradients, its start, what is cached, other networks."""

import pytest
import torch

import vlsm
from tests.conftest import ROOT
from tests.methods.test_adapters import REAL, count
from tests.tools import test_export
from tests.training.test_frozen_cache import cache_of, cached_logits, split, wrap
from vlsm.methods.registry import METHODS

SAM3 = f"random:{ROOT}/tests/tiny/sam3.json"


def learnt(weights="mini", method="side", model="clipseg", **options):
    """A model whose ladder has left its start, at which nothing but the projections has a gradient."""
    torch.manual_seed(0)
    model = vlsm.build(model, weights, method, **options)
    with torch.no_grad():
        for tensor in model.tuner.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def inputs_of(model, side=48):
    torch.manual_seed(1)
    return torch.randn(3, 3, side, side), *model.tokenizer()(["red disk", "a polyp", "bone"])


def ladder_in_words(tensors, outputs, layers):
    """{layer: its adapted activation} of all blocks' outputs, by the formula alone."""
    s = 0
    adapted = {}
    for k, a in enumerate(outputs):
        t = {n.removeprefix(f"ladder.{k}."): v for n, v in tensors.items() if n.startswith(f"ladder.{k}.")}
        deviation = (a.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        normed = (a - a.mean(-1, keepdim=True)) / deviation * t["norm.weight"] + t["norm.bias"]
        hidden = normed @ t["down.weight"].T + t["down.bias"]
        if k:
            hidden = hidden + s @ t["recur.weight"].T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        s = s + hidden @ t["up.weight"].T + t["up.bias"]
        if k in layers:
            j = layers.index(k)
            adapted[k] = a + s @ tensors[f"project.{j}.weight"].T + tensors[f"project.{j}.bias"]
    return adapted


def test_parameters_at_real_size():
    with torch.device("meta"):
        tuner = METHODS["side"](REAL)
    rung = 2 * 768 + (768 * 64 + 64) + 64 * 64 + (64 * 64 + 64)
    assert count(tuner) == 10 * rung - 64 * 64 + 3 * (64 * 768 + 768) == 735_744


def test_formula_and_gradients():
    """In float64 those of the formula, in float32 the same but for rounding."""
    model = learnt(dim=8)
    pixels, ids, mask = inputs_of(model)
    layers = list(model.network.config.extract_layers)
    x = model.network.embed(pixels)
    outputs = []
    for depth in range(1, 5):
        x = model.network.run_vision(x, depth, vlsm.build("clipseg", "mini").tuner)
        outputs.append(x.tokens)
    found = {}
    for dtype in (torch.float64, torch.float32):
        tuner = model.tuner.to(dtype)
        own = tuner.adapt_blocks({i: a.to(dtype) for i, a in enumerate(outputs)})
        assert torch.equal(own[0], outputs[0].to(dtype))  # no extract layer
        total = sum((own[i] * own[i].detach().cos()).sum() for i in layers)
        found[dtype] = torch.autograd.grad(total, tuner.parameters())
    tensors = {n: p.detach().double().requires_grad_() for n, p in model.tuner.named_parameters()}
    adapted = ladder_in_words(tensors, [a.double() for a in outputs], layers)
    total = sum((adapted[i] * adapted[i].detach().cos()).sum() for i in layers)
    wanted = torch.autograd.grad(total, tensors.values())
    for name, want, double, single in zip(tensors, wanted, *found.values()):
        assert want.any(), name
        torch.testing.assert_close(double, want, atol=1e-10, rtol=1e-6, msg=name)
        assert (single - want).norm() <= 1e-4 * want.norm(), name
    # the decoder reads the adapted activations
    by_words = ladder_in_words(dict(model.tuner.named_parameters()), outputs, layers)
    reduced = [r(by_words[i]) for r, i in zip(model.network.decoder.reduces, reversed(layers))]
    text = model.network.encode_prompts(ids, mask, model.tuner)
    logits, _ = model.network.decoder(reduced, text[0], (6, 6))
    torch.testing.assert_close(model(pixels, ids, mask), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model, weights, side", [("clipseg", "mini", 48), ("sam3", SAM3, 56)])
def test_at_the_start_it_is_the_frozen_model(model, weights, side):
    """Bit for bit; then every trained tensor learns, and the encoder receives no gradient."""
    plain = vlsm.build(model, weights)
    tuned = vlsm.build(model, weights, "side")
    inputs = inputs_of(plain, side)
    assert torch.equal(tuned(*inputs), plain(*inputs))
    tuned(*inputs).square().mean().backward()
    with_gradient = {name for name, p in tuned.tuned_parameters().items() if p.grad.any()}
    assert with_gradient == {name for name in tuned.tuned_state_dict() if name.startswith("project.")}
    tuned = learnt(weights, model=model)
    assert not torch.equal(tuned(*inputs), plain(*inputs))
    tuned(*inputs).square().mean().backward()
    assert all(p.grad.any() for p in tuned.tuned_parameters().values())
    assert all(p.grad is None for p in tuned.network.parameters())
    features = tuned.network.encode_image(inputs[0], tuned.tuner)
    assert len(features.activations) == len(tuned.tuner.ladder) == dict(clipseg=4, sam3=2)[model]
    assert not any(a.requires_grad for a in features.activations)


@pytest.mark.parametrize(
    "method, prompts", [("side", True), ("side+decoder", True), ("coop+side", False), ("side+cocoop", False)]
)
def test_cached_features_give_the_same_bits(tmp_path, method, prompts):
    f, data = cache_of(learnt(method=method), tmp_path), split()
    assert (f.images_frozen, f.prompts_frozen) == (True, prompts)
    f.add_split("noise", data, 4)
    assert not f.needs_pixels("noise")
    activations = 4 + ("cocoop" in method)
    assert len(f.stores["noise"].tensors) == activations
    indices, texts = [0, 1, 2, 3], ["red disk"] * 4
    images = data.batch(indices)[0]
    found = []
    for cached in (False, True):
        f.model.zero_grad()
        if cached:
            logits = cached_logits(f, "noise", indices, texts, None)
        else:
            text_features = f.text_features(texts, texts[:1]) if prompts else None
            logits = f.model(f.normalise(images), *f.tokenizer(texts), None, text_features)
        logits.square().mean().backward()
        found.append([logits, *[p.grad for p in f.model.tuned_parameters().values()]])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    # images that augmentation has changed are encoded now
    changed = torch.tensor([True, False, False, True])
    altered = images.clone()
    altered[changed] = images[changed].flip(-1)
    got = cached_logits(f, "noise", indices, texts, altered, changed)
    want = f.model(f.normalise(altered), *f.tokenizer(texts))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.equal(got, found[0][0])


def test_other_methods_cache_what_they_did(tmp_path):
    f = wrap("decoder", tmp_path, 1)
    f.add_split("noise", split(), 4)
    assert [tuple(t.shape[1:]) for t in f.stores["noise"].tensors] == [(17, 128)] * 3


def test_beside_methods_that_change_the_encoder(tmp_path):
    """The ladder reads the outputs as they are changed; blocks below are cached."""
    model = learnt(method="dense+side", blocks="v:2-3,l:0")
    f, data = cache_of(model, tmp_path), split()
    assert f.depth == 2 and not f.images_frozen
    f.add_split("noise", data, 4)
    images = data.batch([0, 5, 9])[0]
    got = cached_logits(f, "noise", [0, 5, 9], ["a", "b", "a"], None)
    want = model(f.normalise(images), *f.tokenizer(["a", "b", "a"]))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    model.tuner.side.project[2].weight.data.zero_()
    assert not torch.allclose(model(f.normalise(images), *f.tokenizer(["a", "b", "a"])), want)


@pytest.mark.parametrize("model", ["cris", "san"])
def test_networks_that_have_no_place_for_it(model):
    with pytest.raises(ValueError, match=f"--peft side cannot be used on {model.upper()}"):
        vlsm.build(model, f"random:{ROOT}/tests/tiny/{model}.json", "side")


@pytest.mark.slow
def test_exported(tmp_path):
    test_export.test_what_is_exported_is_the_model(tmp_path, "clipseg", "mini", "side")


@pytest.mark.slow
def test_compiled_training_agrees(cli, quick, tmp_path, graphs):
    logs = []
    for compiled in ("off", "on"):
        out = tmp_path / compiled
        options = [*quick[:-1], out, "--peft", "side+decoder", "--epochs", 1, "--compile", compiled]
        code, said, err = cli("train", *options)
        assert code == 0 and "kept for 24 of 24" in said, err
        logs.append(vlsm.checkpoint.read_tuned(out))
    assert graphs["stats"]["unique_graphs"] > 0
    for name, tensor in logs[0].items():
        torch.testing.assert_close(logs[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)
