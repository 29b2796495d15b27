"""P prompts of each image in one pass equal P passes with one, for every network and method."""

import pytest
import torch

import vlsm
from tests.conftest import ROOT, tiny_batch
from vlsm.methods.registry import METHODS
from vlsm.model import NETWORKS

P = 3


def model_of(network, method):
    weights = "mini" if network == "clipseg" else f"random:{ROOT}/tests/tiny/{network}.json"
    model = vlsm.build(network, weights, method).double()
    torch.manual_seed(0)
    with torch.no_grad():  # adapters start as the identity, which would hide a wrong row
        for tensor in model.tuner.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def cases():
    for name, network in NETWORKS.items():
        for method in network.methods or METHODS:
            yield name, method


@pytest.mark.parametrize("network, method", cases())
def test_prompts_at_once_equal_separate_passes(network, method):
    model = model_of(network, method)
    pixels, _ = tiny_batch(2, side=70 if network == "sam3" else 64)
    pixels = pixels.double()
    _, ids = tiny_batch(2 * P)
    mask = torch.ones_like(ids)
    calls = []
    encode = model.network.encode_image
    model.network.encode_image = lambda *a: calls.append(len(a[0])) or encode(*a)
    with torch.no_grad():
        together = model(pixels, ids, mask)
        assert calls == [2] and together.shape[:2] == (2 * P, 1)
        for k in range(P):
            alone = model(pixels, ids[k::P], mask[k::P])
            torch.testing.assert_close(together[k::P], alone, atol=1e-9, rtol=1e-9)
    assert (together[0] - together[1]).abs().max() > 1e-6


def test_kept_text_features_come_for_each_prompt():
    model = model_of("clipseg", "dense")
    pixels, _ = tiny_batch(2)
    _, ids = tiny_batch(4)
    network, tuner = model.network, model.tuner
    text = network.encode_prompts(ids, None, tuner)
    kept = network.encode_image(pixels.double(), tuner)
    logits = model(None, None, image_features=kept, text_features=text)
    torch.testing.assert_close(logits, model(pixels.double(), ids), atol=1e-9, rtol=0)


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_number_of_prompts_that_fits_no_image(prompts):
    pixels, ids = tiny_batch(3)
    with pytest.raises(ValueError, match=f"2 images came with {prompts} prompts"):
        vlsm.build("clipseg", "mini")(pixels[:2], ids[:prompts])
