"""What a user can get wrong, and what a disk can: each is a sentence, exit code 2, and nothing lost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kernels
from tests.conftest import ROOT, rows
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI, hub_answers


@pytest.mark.parametrize(
    "call, message",
    [
        (6, "The loss in epoch 2 became nan"),
        (7, "The loss in epoch 2 became nan"),
        (8, "The validation loss after epoch 2 became nan"),
    ],
)
def test_loss_that_is_not_finite_stops_with_a_sentence(cli, quick, tmp_path, monkeypatch, call, message):
    real, calls = kernels.dice_bce_loss, []

    def broken(*args, **kw):
        calls.append(1)
        return real(*args, **kw) * (
            float("nan") if len(calls) == call else 1
        )  # 3 steps and 1 validation batch an epoch

    monkeypatch.setattr(kernels, "dice_bce_loss", broken)
    code, _, err = cli("train", *quick, "--epochs", 4)
    assert code == 2 and f"{message}, at learning rate 0.001" in err and "after epoch 1, is kept" in err
    assert load_file(tmp_path / "run" / "best.safetensors") and len(rows(tmp_path / "run" / "log.csv")) == 1


def test_folder_of_another_run_is_refused(cli, quick, trained, tmp_path):
    code, _, err = cli("train", *quick, "--epochs", 1)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    code, _, err = cli("train", *quick, "--resume", "--lr", 0.5)
    assert code == 2 and "--lr 0.5 differs from the run" in err
    assert cli("train", *quick, "--epochs", 1, "--overwrite")[0] == 0 and len(rows(trained / "log.csv")) == 1
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    code, _, err = cli("train", *quick[:-1], other, "--overwrite")
    assert code == 2 and "holds no run" in err and (other / "thesis.txt").exists()
    code, _, err = cli("train", "--out", trained, "--resume", "--overwrite")
    assert (
        code == 2
        and "--overwrite has an effect only without --resume" in err
        and (trained / "state.pt").is_file()
    )
    code, _, err = cli("train", "--out", tmp_path / "nothing", "--resume")
    assert code == 2 and "There is no run to resume" in err


def test_disk_full_keeps_the_last_good_file(cli, quick, trained, monkeypatch):
    before = load_file(trained / "last.safetensors")

    def full(tensors, metadata=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlsm.checkpoint.save", full)
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 3)
    assert code == 2 and "No space left on the disk" in err and "--resume" in err
    after = load_file(trained / "last.safetensors")
    assert all(torch.equal(before[n], after[n]) for n in before) and not list(trained.glob(".*.tmp"))


def rewrite(path, tensors=None, **metadata):
    """The same checkpoint with some tensors or metadata exchanged."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    old.pop("digest", None)  # as if it had been written so
    save_file(tensors or load_file(path), path, {**old, **{k: json.dumps(v) for k, v in metadata.items()}})


def test_broken_and_foreign_checkpoints(cli, trained, tmp_path):
    best = trained / "best.safetensors"
    whole = best.read_bytes()

    def error(*more):
        code, _, err = cli("evaluate", "--ckpt", best, *more)
        assert code == 2 and "Traceback" not in err
        return err

    best.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in error() and "Is the file complete" in error()
    best.write_bytes(whole)
    rewrite(best, method="shallow", options=dict(branches="vl", dim=8))
    assert "not those of --peft shallow" in error()
    best.write_bytes(whole)
    rewrite(best, fingerprint="0123456789abcdef")
    assert (
        "was tuned on the base 'mini' (clipseg, fingerprint 0123456789abcdef)" in error()
        and "is another base" in error()
    )
    best.write_bytes((MINI / "model.safetensors").read_bytes())
    assert "is no checkpoint of this program" in error()
    best.unlink()
    assert "There is no checkpoint" in error()


def test_another_base_on_resume_is_refused(cli, trained, tmp_path):
    tensors = load_file(MINI / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    for file in MINI.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file({**tensors, "clip.logit_scale": tensors["clip.logit_scale"] + 1}, other / "model.safetensors")
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 3, "--weights", other)
    assert code == 2 and "another base" in err
    assert json.loads((trained / "config.json").read_text())["options"]["weights"] == "mini"
    code, _, err = cli("evaluate", "--ckpt", trained, "--weights", other)
    assert code == 2 and "another base" in err


def test_state_that_would_execute_is_refused(cli, trained, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save(dict(tuned=Trap()), trained / "state.pt")
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 3)
    assert code == 2 and "cannot be read" in err and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dataset", "kvasirr"], "neither known (demo, kvasir, clinicdb"),
        (["--dataset", "kvasir"], "There is no folder 'data/kvasir_polyp'"),
        (["--peft", "lora9"], "Choose one of: none, decoder, full, dense, shallow"),
        (["--prompts", "p77"], "Known here: p0, p1; or"),
        (["--dim", "0"], "--dim 0 leaves an adapter without a hidden unit"),
        (["--branches", "x"], "--branches 'x' is not known"),
        (["--peft", "decoder", "--dim", "4"], "takes no options; it has no dim"),
        (["--peft", "coop", "--prompt-depth", "0"], "Give 1 to 4"),
        (["--peft", "vpt", "--prompt-depth", "6"], "Give 1 to 5"),
        (["--peft", "coop", "--context", "76"], "give 1 to 75"),
        (
            ["--peft", "coop", "--context-init", " "],
            "--context-init ' ' holds nothing that the tokenizer knows",
        ),
        (["--peft", "coop+cocoop"], "both put context vectors into the text encoder"),
        (["--image-size", "50"], "no multiple of the model's patch size 8; try 48"),
        (["--batch-size", "0"], "--batch-size: 0 is out of range"),
        (["--weights", "./nowhere"], "There is no folder './nowhere'"),
        (["--device", "cuda:99"], "is not available"),
        (["--amp", "fp16", "--device", "cpu"], "needs a GPU"),
    ],
)
def test_mistakes_are_sentences(cli, tmp_path, argv, message):
    weights = [] if "--weights" in argv else ["--weights", "mini"]
    code, _, err = cli("train", *weights, "--out", tmp_path / "r", *argv)
    assert code == 2 and message in err and err.startswith("error: ") and "Traceback" not in err


def test_weights_without_a_tokenizer(cli, quick, tmp_path):
    code, _, err = cli(
        "train", *quick[:2], "--weights", ROOT / "tests" / "golden" / "clipseg-tiny", "--image-size", 64,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert (
        code == 2
        and "holds no tokenizer (vocab.json and merges.txt" in err
        and not (tmp_path / "run").exists()
    )


def test_hub_that_cannot_be_reached_says_what_to_do(cli, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it tries again"))
    code, _, err = cli(
        "train", "--dataset", "demo", "--weights", "CIDAS/clipseg-rd64-refined", "--out", tmp_path / "r"
    )
    assert code == 2 and "it cannot be reached (no network, or HF_HUB_OFFLINE is set)" in err
    assert "hf download CIDAS/clipseg-rd64-refined --local-dir DIR" in err
    assert "--weights mini runs offline" in err
    code, _, err = cli("evaluate", "--ckpt", "hub:someone/disks")
    assert code == 2 and "'hub:someone/disks' could not be fetched from the hub: it cannot be reached" in err


@pytest.mark.parametrize("error", ["ConnectError", "ReadTimeout"])
def test_a_hub_without_a_network_is_asked_once(monkeypatch, error):
    import huggingface_hub

    calls = []

    def head(url, timeout):
        calls.append(timeout)
        raise type(error, (Exception,), {})

    session = type("Session", (), {"head": staticmethod(head)})
    monkeypatch.setattr(huggingface_hub, "get_session", session)
    assert not hub_answers() and len(calls) == 1 and calls[0] <= 5
    monkeypatch.setattr(session, "head", staticmethod(lambda url, timeout: None))
    assert hub_answers()


@pytest.mark.parametrize(
    "key, value",
    [
        ("context_init", ["a photo of a", "--overwrite"]),
        ("augment", "yes"),
        ("reference", "true"),
        ("dataset", None),
        ("peft", None),
        ("lr", None),
        ("lr", [1e-3]),
        ("monitor", "accuracy"),
        ("dims", 8),
    ],
)
def test_edited_options_never_reach_the_command_line(cli, trained, key, value):
    """A value in config.json is checked by type, and is no word of a command line: nothing is deleted."""
    config = json.loads((trained / "config.json").read_text())
    config["options"][key] = value
    (trained / "config.json").write_text(json.dumps(config))
    before = sorted(path.name for path in trained.iterdir())
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 3)
    assert code == 2 and "Traceback" not in err and key.split("_")[0] in err
    assert sorted(path.name for path in trained.iterdir()) == before


def test_empty_options_are_refused(cli, trained, tmp_path):
    for argv in (["--ckpt", trained, "--images", ""], ["--ckpt", trained, "--save-masks", " "]):
        code, _, err = cli("evaluate", *argv)
        assert code == 2 and "is empty" in err
    assert cli("train", "--peft", "", "--out", tmp_path / "x")[0] == 2


def test_a_state_of_something_else_is_refused(cli, trained):
    for state, key in (({"tuned": {}}, "optimizer"), ([1], "tuned")):
        torch.save(state, trained / "state.pt")
        code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 3)
        assert code == 2 and f"state.pt': '{key}' should be a dictionary, and is None" in err, err


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_file_of_pytorch_is_named_and_not_loaded(cli, tmp_path, as_zip):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save(dict(state_dict=Trap()), tmp_path / "x.ckpt", _use_new_zipfile_serialization=as_zip)
    code, _, err = cli("evaluate", "--ckpt", tmp_path / "x.ckpt")
    assert code == 2 and "is a file of PyTorch (.ckpt, .pt), not a checkpoint of this program" in err
    assert not (tmp_path / "executed").exists()


def test_an_option_given_twice_replaces_nothing(cli, quick, trained, tmp_path):
    code, _, err = cli("train", *quick[:-1], tmp_path / "x", "--prompts", "a", "--lr", 1, "--prompts", "b")
    assert code == 2 and "--prompts 'a' and 'b': give one" in err and not (tmp_path / "x").exists()
    code, _, err = cli("train", *quick[:-1], tmp_path / "x", "--dry-run", "--lr", "0.10", "--lr", "0.1")
    assert code == 0, err
    code, _, err = cli("evaluate", "--ckpt", trained, "--split", "val", "--split", "test")
    assert code == 2 and "--split 'val' and 'test': give one" in err
    code, _, err = cli("vlsm.tools.repeat", "--seeds", 1, "--", *quick, "--seed", 3)
    assert code == 2 and "--seed 3 and 1: give one" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--overlay"], "--overlay has an effect only with --images"),
        (["--threshold", 0.3], "--threshold has an effect only with --images"),
        (["--figure-format", "pdf"], "--figure-format has an effect only with --figure"),
        (["--images", "x", "--gallery"], "--gallery has an effect only without --images"),
        (["--images", "x", "--split", "val"], "--split has an effect only without --images"),
        (["--all-prompts", "--save-masks", "x"], "--save-masks has an effect only without --all-prompts"),
    ],
)
def test_options_without_an_effect_are_refused(cli, argv, message):
    code, _, err = cli("evaluate", "--ckpt", "nothing", *argv)
    assert code == 2 and message in err


def test_changed_data_is_for_resuming(cli, quick):
    code, _, err = cli("train", *quick, "--changed-data")
    assert code == 2 and "--changed-data has an effect only with --resume" in err


def test_a_run_that_predicts_nothing_says_what_to_do(cli, quick, monkeypatch):
    monkeypatch.setattr("train.validate", lambda *_: (1.0, 0.004, 0.002, 0.0))
    code, out, err = cli("train", *quick, "--epochs", 1)
    assert code == 0 and "smaller --lr than 0.001" in out, err
    monkeypatch.setattr("train.validate", lambda *_: (1.0, 0.006, 0.003, 0.0))
    code, out, _ = cli("train", *quick, "--epochs", 1, "--overwrite")
    assert code == 0 and "smaller --lr" not in out and out.splitlines()[-1].startswith("  python evaluate.py")


def test_letters_that_are_not_english_are_noticed_once(capsys):
    tokenizer = Tokenizer(MINI)
    tokenizer(["a polyp", "5 \u00b5m", "\u4e00 polyp?"])
    said = capsys.readouterr().err
    assert said.count("letters that are not English") == 1 and "5 \u00b5m" in said
    Tokenizer(MINI)(["a polyp, 3 \u2013 4 mm"])
    assert not capsys.readouterr().err


def test_without_a_network_only_kept_files_are_looked_for(cli, monkeypatch):
    import huggingface_hub

    def look(name, *_, local_files_only, **__):
        assert local_files_only
        raise FileNotFoundError(name)

    for module in ("vlsm.checkpoint", "vlsm.networks.weights"):
        monkeypatch.setattr(f"{module}.hub_answers", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", look)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", look)
    code, _, err = cli("train", "--dataset", "demo", "--weights", "owner/weights", "--out", "nowhere")
    assert code == 2 and "FileNotFoundError: owner/weights" in err
    code, _, err = cli("evaluate", "--ckpt", "hub:owner/run")
    assert code == 2 and "FileNotFoundError: owner/run" in err
