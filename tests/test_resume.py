"""Runs that are stopped, killed, and go on: bit for bit what one run would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import ROOT, rows, same_tensors, without_dim
from vlsm.checkpoint import read_metadata


def test_four_epochs_are_two_and_two(cli, quick, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*quick[:-1]]
    assert cli("train", *options, whole, "--epochs", 4, "--augment")[0] == 0
    assert cli("train", *options, parts, "--epochs", 2, "--augment")[0] == 0
    code, _, err = cli("train", "--out", parts, "--resume", "--epochs", 1)
    assert code == 2 and "has 2 epochs already" in err
    code, out, err = cli("train", "--out", parts, "--resume", "--epochs", 4)
    assert code == 0 and "after epoch 2" in out, err
    assert same_tensors(whole / "last.safetensors", parts / "last.safetensors")
    assert same_tensors(whole / "best.safetensors", parts / "best.safetensors")

    def strip(path):
        timed = ("seconds", "images_per_second")
        return [{k: v for k, v in r.items() if k not in timed} for r in rows(path)]

    assert strip(whole / "log.csv") == strip(parts / "log.csv")


def test_negatives_with_frozen_encoders_resume_bit_for_bit(cli, quick, tmp_path):
    """The features of negatives are not kept, so they do not depend on what was drawn before."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = without_dim(["--negatives", 2, "--peft", "decoder", *quick[:-1]])
    code, out, err = cli("train", *options, whole, "--epochs", 4)
    assert code == 0 and "--negatives 2: with each right prompt" in out and "  alarms " in out, err
    assert cli("train", *options, parts, "--epochs", 2)[0] == 0
    assert cli("train", "--out", parts, "--resume", "--negatives", 1)[0] == 2, "it would be another run"
    assert cli("train", "--out", parts, "--resume", "--epochs", 4)[0] == 0
    assert same_tensors(whole / "last.safetensors", parts / "last.safetensors")


def test_a_run_of_before_there_were_negatives_goes_on_without(cli, quick, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, epochs in ((whole, 2), (parts, 1)):
        assert cli("train", *quick[:-1], out, "--negatives", 0, "--epochs", epochs)[0] == 0
    file = parts / "config.json"
    config = json.loads(file.read_text())
    del config["options"]["negatives"], config["recipe"]["negatives"]
    file.write_text(json.dumps(config))
    code, out, err = cli("train", "--out", parts, "--resume", "--epochs", 2)
    assert code == 0 and "--negatives" not in out, err
    assert same_tensors(whole / "last.safetensors", parts / "last.safetensors")


def test_equal_seeds_give_equal_runs_and_others_do_not(cli, quick, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli("train", *quick[:-1], tmp_path / name, "--epochs", 1, "--seed", seed)[0] == 0
    assert same_tensors(tmp_path / "a" / "last.safetensors", tmp_path / "b" / "last.safetensors")
    assert not same_tensors(tmp_path / "a" / "last.safetensors", tmp_path / "c" / "last.safetensors")


def start(*argv, **env):
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if line.startswith(f"epoch {epoch:3d}/"):
            return
    raise AssertionError("the run ended early")


def test_killed_run_resumes_bit_for_bit(quick, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*quick[:-1]]
    process = start(*options, killed, "--epochs", 6)
    wait_for_epoch(process, 2)
    time.sleep(0.1)  # into a later epoch
    process.kill()
    process.wait()
    done = len(rows(killed / "log.csv"))
    assert 2 <= done < 6
    again = start("--out", killed, "--resume")
    text = again.communicate()[0]
    assert again.returncode == 0 and "Resuming" in text, text
    straight = start(*options, whole, "--epochs", 6)
    straight.communicate()
    assert same_tensors(whole / "last.safetensors", killed / "last.safetensors")
    assert same_tensors(whole / "best.safetensors", killed / "best.safetensors")


def test_ctrl_c_says_how_to_resume(quick, tmp_path):
    process = start(*quick, "--epochs", 50)
    wait_for_epoch(process, 1)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130
    assert (
        f"is saved. Continue with: python train.py --out {tmp_path / 'run'} --resume" in text
        and "Traceback" not in text
    )
    assert load_file(tmp_path / "run" / "last.safetensors")


def test_raising_epochs_of_a_finished_run_goes_on(cli, trained):
    code, out, _ = cli("train", "--out", trained, "--resume", "--epochs", 3)
    assert code == 0 and len(rows(trained / "log.csv")) == 3
    code, out, _ = cli("train", "--out", trained, "--resume")
    assert code == 0 and len(rows(trained / "log.csv")) == 3, "a finished run ends at once"


def test_data_that_moved_are_known_by_names_prompts_and_pixels(cli, folder, trained, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    resume = ("train", "--out", trained, "--resume", "--epochs", 3, "--dataset")
    code, _, err = cli(*resume[:-1])
    assert code == 2 and "pass --dataset PATH" in err
    code, out, err = cli(*resume, moved)
    assert code == 0 and "Resuming" in out and "not compared" not in out, err
    file = trained / "config.json"
    config = json.loads(file.read_text())
    assert config["dataset"] == config["options"]["dataset"] == str(moved)
    for stamp, words in (("contents", "pixels"), ("records", "names or prompts")):
        older = {name: value for name, value in config.items() if name != stamp}
        file.write_text(json.dumps(older))
        code, out, err = cli(*resume, moved)
        assert code == 0 and f"its records' {words} are not compared" in out, err
        assert json.loads(file.read_text())[stamp] == config[stamp]
    other = shutil.copytree(moved, tmp_path / "other")
    mask = next((other / "masks").iterdir())
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask)
    code, _, err = cli(*resume, other)
    assert code == 2 and "The pixels of the data set's records have changed" in err
    assert json.loads(file.read_text())["dataset"] == str(moved)
    assert cli(*resume, other, "--changed-data")[0] == 0


def test_a_run_starts_from_another_one(cli, quick, trained, tmp_path):
    start, out = ("train", *quick[:-2], "--out"), tmp_path / "second"
    code, _, err = cli(*start, out, "--init", trained, "--lr", 0, "--epochs", 1)
    assert code == 0, err
    assert same_tensors(out / "last.safetensors", trained / "best.safetensors")
    assert json.loads((out / "config.json").read_text())["options"]["init"] == str(trained)
    code, _, err = cli("train", "--out", out, "--resume", "--init", trained)
    assert code == 2 and "--init has an effect only without --resume, which goes on from the run's own" in err
    first = trained.rename(tmp_path / "moved")
    code, said, err = cli("train", "--out", out, "--resume", "--epochs", 2)
    assert code == 0 and "Resuming" in said, err
    start = ("train", *without_dim(quick)[:-1], tmp_path / "third", "--init")
    code, _, err = cli(*start, first, "--dim", 4)
    assert code == 2 and f"--init '{first}' was tuned by --peft dense" in err and " [8] instead of [4]" in err
    code, _, err = cli(*start, first, "--peft", "shallow")
    assert code == 2 and "not those of --peft shallow" in err
    code, _, err = cli(*start, trained)
    assert code == 2 and "There is no checkpoint" in err and not (tmp_path / "third").exists()


def test_a_run_stopped_in_its_first_save_begins_anew(cli, quick, tmp_path):
    run = tmp_path / "run"
    assert cli("train", *quick, "--epochs", 1)[0] == 0
    for file in run.iterdir():
        if file.name != "config.json":
            file.unlink()
    code, said, err = cli("train", "--out", run, "--resume")
    assert code == 0 and "epoch   1/1" in said, err
    (run / "state.pt").unlink()
    code, _, err = cli("train", "--out", run, "--resume")
    assert code == 2 and "has a log.csv and no state.pt" in err, "somebody deleted it"


def test_what_follows_from_the_state_is_written_again(cli, quick, tmp_path):
    """A run that is stopped between its state and the files that follow from it."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert cli("train", *quick, "--epochs", 1)[0] == 0
    shutil.copytree(run, whole)
    for name in ("best.safetensors", "last.safetensors", "log.csv", "curves.png"):
        (run / name).unlink()
    assert cli("train", "--out", run, "--resume")[0] == 0
    for name in ("log.csv", "curves.png"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("best.safetensors", "last.safetensors"):
        assert same_tensors(run / name, whole / name), name
        assert read_metadata(run / name) == read_metadata(whole / name)


def test_a_log_changed_by_hand_is_not_replaced(cli, trained):
    log = trained / "log.csv"
    log.write_text(log.read_text() + "my notes")
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 3)
    assert code == 2 and "log.csv' was changed since this program wrote it" in err
    assert "my notes" in log.read_text()


def test_a_log_saved_by_a_spreadsheet_does_not_end_the_run(quick, tmp_path):
    log = tmp_path / "run" / "log.csv"
    process = start(*quick, "--epochs", 4, "--min-epochs", 4)
    wait_for_epoch(process, 1)
    log.write_bytes(log.read_bytes().replace(b"\n", b"\r\n"))
    text = process.communicate()[0]
    assert process.returncode == 0 and "was changed, and is left so" in text, text
    assert b"\r\n" in log.read_bytes()
    log.rename(tmp_path / "saved.csv")
    again = start("--out", tmp_path / "run", "--resume")
    assert again.communicate() and again.returncode == 0 and len(rows(log)) == 4


def test_a_flipped_bit_is_told(cli, trained):
    state = trained / "state.pt"
    with zipfile.ZipFile(state) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    inside = largest.header_offset + largest.file_size // 2
    best = trained / "best.safetensors"
    for file, place, argv in (
        (state, inside, ("train", "--out", trained, "--resume", "--epochs", 3)),
        (best, best.stat().st_size - 99, ("evaluate", "--ckpt", trained)),
        (best, best.read_bytes().index(b'"image_size":"48"') + 15, ("evaluate", "--ckpt", trained)),
    ):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[place] ^= 0x04
        file.write_bytes(flipped)
        code, _, err = cli(*argv)
        assert code == 2 and str(file) in err, (file.name, place, err)
        file.write_bytes(data)


def test_a_folder_that_is_renamed_stops_the_run(quick, tmp_path):
    process = start(*quick, "--epochs", 50, "--patience", 50)
    wait_for_epoch(process, 1)
    (tmp_path / "run").rename(tmp_path / "renamed")
    text = process.communicate()[0]
    assert process.returncode == 2 and "was renamed or deleted while it is written to" in text, text
    assert not (tmp_path / "run").exists()


def test_a_file_deleted_meanwhile_is_missed_at_the_end(cli, trained):
    (trained / "best.safetensors").unlink()
    log = rows(trained / "log.csv")
    best = max(log, key=lambda row: float(row["val_dsc"]))
    code, _, err = cli("train", "--out", trained, "--resume")
    if best is log[-1]:
        assert code == 0 and (trained / "best.safetensors").is_file()
    else:
        assert code == 2 and "lacks best.safetensors at the end of the run" in err
