"""Checkpoints to the hub and back, against a hub that is a folder; TensorBoard; a share of the training
records.
"""

import shutil
import sys
import types

import pytest
import torch

import vlsm
from tests.conftest import rows, same_tensors


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub's calls, on a folder."""
    import huggingface_hub

    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id)

    def download(repo, file):
        if not (root / repo / file).is_file():
            raise ConnectionError(repo)
        return str(root / repo / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root, calls


def test_there_and_back(cli, trained, hub, folder, tmp_path):
    root, calls = hub
    assert vlsm.push_to_hub(trained, "someone/disks") == "https://huggingface.co/someone/disks" and calls == [
        ("someone/disks", True)
    ]
    assert sorted(p.name for p in (root / "someone" / "disks").iterdir()) == ["README.md", "best.safetensors"]
    card = (root / "someone" / "disks" / "README.md").read_text()
    assert (
        "base_model: mini" in card
        and "What `dense` has learnt on `disks`" in card
        and str(tmp_path) not in card
    )
    there, here = vlsm.load("hub:someone/disks"), vlsm.load(trained)
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), here.state_dict().values()))
    options = ["--images", folder / "images" / "d0.png", "--prompt", "disk", "--save-masks", tmp_path / "m"]
    code, _, err = cli("evaluate", "--ckpt", "hub:someone/disks", *options)
    assert code == 0 and (tmp_path / "m" / "d0.png").is_file(), err
    code, _, err = cli("evaluate", "--ckpt", "hub:someone/else", *options)
    assert code == 2 and "'hub:someone/else' could not be fetched from the hub (ConnectionError)" in err
    code, _, err = cli("evaluate", "--ckpt", "typo/run", *options)  # a path, so no hub is asked
    assert code == 2 and "no checkpoint 'typo/run'. A repository of the hub is named hub:typo/run" in err
    with pytest.raises(ValueError, match="no name of a hub repository"):
        vlsm.push_to_hub(trained, "disks")


def test_tensorboard(cli, quick, tmp_path, monkeypatch):
    class Writer:
        made = []

        def __init__(self, folder, purge_step, flush_secs):
            self.folder, self.purge_step, self.scalars = folder, purge_step, []
            self.made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr("vlsm.training.options.find_spec", lambda name: name)
    assert cli("train", *quick, "--epochs", 2, "--tensorboard")[0] == 0
    assert cli("train", "--out", tmp_path / "run", "--resume", "--epochs", 3)[0] == 0
    first, second = Writer.made
    assert first.folder == str(tmp_path / "run" / "tensorboard") and (
        first.purge_step,
        second.purge_step,
    ) == (1, 3)
    logged = [(v, s) for name, v, s in first.scalars + second.scalars if name == "val_dsc"]
    assert logged == [
        (pytest.approx(float(r["val_dsc"])), int(r["epoch"])) for r in rows(tmp_path / "run" / "log.csv")
    ]
    monkeypatch.setattr("vlsm.training.options.find_spec", lambda name: None)
    code, _, err = cli("train", *quick[:-1], tmp_path / "other", "--epochs", 1, "--tensorboard")
    assert code == 2 and "pip install tensorboard" in err and not (tmp_path / "other").exists()


def test_a_share_of_the_training_records(cli, quick, tmp_path):
    import datasets

    root = quick[1]
    shares = {
        s: {r.name for r in datasets.open_dataset(str(root), ["train"], 32, limit_train=s)["train"].records}
        for s in (0.25, 0.5, 1)
    }
    assert [len(v) for v in shares.values()] == [6, 12, 24] and shares[0.25] < shares[0.5] < shares[1]
    code, said, err = cli("train", *quick, "--epochs", 1, "--limit-train", 0.5)
    assert code == 0 and "12 train, 6 val, 6 test" in said, err
    code, _, err = cli("train", "--out", tmp_path / "run", "--resume", "--limit-train", 1)
    assert code == 2 and "--limit-train 1.0 differs from the run" in err
    for wrong in (0, 1.5):
        code, _, err = cli("train", *quick, "--limit-train", wrong)
        assert code == 2 and "more than 0 and at most 1" in err
    assert cli("train", *quick[:-1], tmp_path / "same", "--epochs", 1, "--limit-train", 0.5)[0] == 0
    assert same_tensors(tmp_path / "run" / "last.safetensors", tmp_path / "same" / "last.safetensors")
