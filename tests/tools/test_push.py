"""Checkpoints to the hub and back, against a hub that is a folder."""

import shutil

import pytest
import torch

import vlsm


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub's calls, on a folder."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id)

    def download(repo, file, local_files_only):
        assert not local_files_only
        if not (root / repo / file).is_file():
            raise RemoteEntryNotFoundError(repo)
        return str(root / repo / file)

    class RemoteEntryNotFoundError(EntryNotFoundError):
        pass

    monkeypatch.setattr("vlsm.checkpoint.hub_answers", lambda: True)
    monkeypatch.setattr("vlsm.tools.push.hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root, calls


def test_there_and_back(cli, trained, hub, folder, tmp_path):
    root, calls = hub
    code, said, err = cli("vlsm.tools.push", trained, "someone/disks")
    assert code == 0 and "https://huggingface.co/someone/disks" in said, err
    assert calls == [("someone/disks", True)], "private, unless --public is given"
    assert sorted(p.name for p in (root / "someone" / "disks").iterdir()) == ["README.md", "best.safetensors"]
    card = (root / "someone" / "disks" / "README.md").read_text()
    assert "base_model: mini" in card and "`dense`, trained on `disks`" in card
    assert str(tmp_path) not in card
    there, here = vlsm.load("hub:someone/disks"), vlsm.load(trained)
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), here.state_dict().values()))
    options = ["--images", folder / "images" / "d0.png", "--prompt", "disk", "--save-masks", tmp_path / "m"]
    code, _, err = cli("evaluate", "--ckpt", "hub:someone/disks", *options)
    assert code == 0 and (tmp_path / "m" / "d0.png").is_file(), err
    code, _, err = cli("evaluate", "--ckpt", "hub:someone/else", *options)
    assert (
        code == 2 and "'hub:someone/else' could not be fetched from the hub: the repository lacks this" in err
    )
    code, _, err = cli("evaluate", "--ckpt", "typo/run", *options)  # a path, so no hub is asked
    assert code == 2 and "no checkpoint 'typo/run'" in err and "hub:OWNER/NAME" in err
    assert cli("vlsm.tools.push", trained, "someone/public", "--public")[0] == 0
    assert calls[-1] == ("someone/public", False)


def test_mistakes(cli, trained, hub, monkeypatch):
    code, _, err = cli("vlsm.tools.push", trained, "disks")
    assert code == 2 and "'disks'" in err and "owner/name" in err

    def refuse(*_, **__):
        raise RuntimeError("not logged in")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    code, _, err = cli("vlsm.tools.push", trained, "someone/disks")
    assert code == 2 and "RuntimeError: not logged in" in err and "hf auth login" in err
    for name, value, message in (
        ("vlsm.tools.push.hub_answers", False, "cannot be reached"),
        ("huggingface_hub.get_token", None, "Log in with `hf auth login`"),
    ):
        monkeypatch.setattr(name, lambda value=value: value)
        code, _, err = cli("vlsm.tools.push", "no-such-run", "someone/disks")  # said before it is read
        assert code == 2 and message in err
