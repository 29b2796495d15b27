"""Published names of tensors to our modules' names and back; tuned tensors under the published names load."""

import pytest
import torch
from safetensors.torch import load_file

import vlsm
from tests.conftest import ROOT, folder_of_golden, tiny_batch
from vlsm.checkpoint import save_tuned


@pytest.mark.parametrize("model", ["cris", "san", "sam3"])
def test_names_there_and_back(model):
    network = vlsm.build(model, f"random:{ROOT / 'tests' / 'tiny' / model}.json").network
    own = network.state_dict()
    published = network.published_names(own)
    assert set(published) != set(own)
    for tensors in (published, own):
        again = network.own_names(tensors)
        assert set(again) == set(own)
        assert all(torch.equal(again[name], own[name]) for name in own)


@pytest.mark.parametrize("model, case", [("cris", "cris-tiny"), ("san", "san-tiny")])
def test_runs_that_hold_published_names_load(model, case, tmp_path):
    network = vlsm.build(model, folder_of_golden(case, tmp_path / "base"), "full")
    with torch.no_grad():
        for parameter in network.tuned_parameters().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    metadata = dict(
        dataset="set", data_root=".", prompts="disk", split_seed=0, image_size=64, mean=[0, 0, 0], std=[1, 1, 1],
        recipe=dict(seed=0),
    )  # fmt: skip
    save_tuned(tmp_path / "run.safetensors", network, **metadata)
    tensors = load_file(tmp_path / "run.safetensors")
    published = network.network.published_names(tensors)
    assert set(published) != set(tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "tuned_state_dict", lambda: published)
        save_tuned(tmp_path / "run.safetensors", network, **metadata)
    pixels, ids = tiny_batch()
    ids = ids.clamp(max=network.network.config.text.vocab_size - 1)
    loaded = vlsm.load(tmp_path / "run.safetensors")
    assert torch.equal(loaded(pixels, ids), network(pixels, ids))
