"""--tensorboard and --limit-train."""

import sys
import types

import pytest

from tests.conftest import rows, same_tensors


def test_tensorboard(cli, quick, tmp_path, monkeypatch):
    class Writer:
        made = []

        def __init__(self, folder, purge_step, flush_secs):
            self.folder, self.purge_step, self.scalars = folder, purge_step, []
            self.made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr("vlsm.training.arguments.find_spec", lambda name: name)
    assert cli("train", *quick, "--epochs", 2, "--tensorboard")[0] == 0
    assert cli("train", "--out", tmp_path / "run", "--resume", "--epochs", 3)[0] == 0
    first, second = Writer.made
    assert first.folder == str(tmp_path / "run" / "tensorboard") and (
        first.purge_step,
        second.purge_step,
    ) == (1, 2), "the last saved epoch is written again, as the run may have been stopped before"
    logged = {step: value for name, value, step in first.scalars + second.scalars if name == "val_dsc"}
    for row in rows(tmp_path / "run" / "log.csv"):
        assert logged.pop(int(row["epoch"])) == pytest.approx(float(row["val_dsc"]))
    assert not logged
    monkeypatch.setattr("vlsm.training.arguments.find_spec", lambda name: None)
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
