"""Runs of several seeds or folds in one folder, and their means."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from tests.conftest import rows, same_tensors
from tests.training.test_claims import claimed
from vlsm.system import parallel
from vlsm.training.claims import CLAIMS
from vlsm.training.run import Diverged


def repeat(cli, quick, out, *seeds, epochs=1, more=()):
    return cli(
        "vlsm.tools.repeat", "--seeds", *seeds, "--out", out, *more, "--", *quick[:-2], "--epochs", epochs
    )


def test_each_seed_is_a_run_of_its_own(cli, quick, tmp_path):
    code, said, err = repeat(cli, quick, tmp_path / "group", 1, 2, 1)
    assert code == 0 and "All runs are done" in said, err
    assert sorted(p.name for p in (tmp_path / "group").iterdir()) == [CLAIMS, "config.json", "seed1", "seed2"]
    assert cli("train", *quick, "--epochs", 1, "--seed", 2)[0] == 0
    assert same_tensors(
        tmp_path / "run" / "last.safetensors", tmp_path / "group" / "seed2" / "last.safetensors"
    )


def test_seeds_go_on_after_an_interruption(cli, quick, tmp_path):
    assert repeat(cli, quick, tmp_path / "group", 1, epochs=2)[0] == 0
    code, said, err = repeat(cli, quick, tmp_path / "group", 1, 2, epochs=2, more=["--resume"])
    assert code == 0 and "Resuming" in said, err
    assert all(len(rows(tmp_path / "group" / f"seed{seed}" / "log.csv")) == 2 for seed in (1, 2))
    code, _, err = repeat(cli, quick, tmp_path / "group", 1, 2, epochs=2)
    assert code == 2 and "exists and is not empty" in err


def test_a_group_goes_on_with_its_own_options(cli, quick, tmp_path):
    group = tmp_path / "group"
    assert repeat(cli, ["--dataset", tmp_path / "nowhere", *quick[2:]], group, 1)[0] == 2
    stored = (group / "config.json").read_bytes()
    assert cli("vlsm.tools.repeat", "--out", group, "--resume", "--seeds", 1)[0] == 2, "not the demo"
    assert (group / "config.json").read_bytes() == stored
    assert repeat(cli, quick, group, 1)[0] == 0, "options are the group's once a run exists"
    code, _, err = repeat(cli, [*quick[:-2], "--lr", 0.5, *quick[-2:]], group, 1, 2, more=["--resume"])
    assert code == 2 and "--lr 0.5 differs from the run in" in err and not (group / "seed2").exists()
    assert repeat(cli, quick, group, 1, epochs=2, more=["--resume"])[0] == 0, "epochs may differ on resuming"
    code, said, err = cli("vlsm.tools.repeat", "--out", group, "--resume", "--seeds", 1, 2)
    assert code == 0 and "Resuming" in said, err
    of_seed = [json.loads((group / f"seed{k}" / "config.json").read_text())["options"] for k in (1, 2)]
    assert of_seed[0] | {"seed": 2} == of_seed[1]
    (group / "config.json").unlink()  # as of earlier versions
    code, _, err = cli("vlsm.tools.repeat", "--out", group, "--resume", "--seeds", 1, 3)
    assert code == 2 and "give the options of the runs behind --" in err and not (group / "seed3").exists()


def test_the_config_of_something_else_is_no_groups(cli, quick, trained):
    before = (trained / "config.json").read_bytes()
    code, _, err = repeat(cli, quick, trained, 1)
    assert code == 2 and "'arguments' should be the options of a group" in err
    assert (trained / "config.json").read_bytes() == before and not (trained / "seed1").exists()


def folds(cli, quick, dataset, out):
    options = ["--dataset", dataset, *quick[2:-2], "--prompts", "a red disk", "--epochs", 1]
    code, said, err = cli("vlsm.tools.repeat", "--folds", 3, "--out", out, "--", *options)
    assert code == 0 and "All runs are done" in said, err
    assert sorted(path.name for path in out.glob("[!.]*")) == ["config.json", "fold1", "fold2", "fold3"]


def test_folds_are_tested_on_each_record_once(cli, quick, folder, tmp_path):
    own, out = tmp_path / "own", tmp_path / "group"
    for file in sorted((folder / "images").iterdir())[:10]:
        for part in ("images", "masks"):
            (own / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / part / file.name, own / part / file.name)
    folds(cli, quick, own, out)
    code, said, err = cli("evaluate", "--ckpt", out)
    assert code == 0 and "over 10 records" in said, err
    scores = {}
    for path in out.glob("fold*/eval-test/metrics.csv"):
        scores |= {row["image"]: float(row["dsc"]) for row in rows(path)}
    result = json.loads((out / "eval-test" / "means.json").read_text())[""]["dsc"]
    assert len(scores) == result["n"] == 10
    assert result["mean"] == pytest.approx(np.mean(list(scores.values())))
    low, high = result["ci95"]
    assert low < result["mean"] < high
    assert f"DSC % {100 * result['mean']:.2f} +- " in " ".join(said.split())
    code, said, err = cli("vlsm.tools.report", out)
    assert code == 0 and f"| {100 * result['mean']:.2f}" in said.replace("*", ""), err
    for same in ([], ["--dataset", own]):
        code, _, err = cli("evaluate", "--ckpt", out, "--ensemble", *same)
        assert code == 2 and "--ensemble: the runs have different test records" in err
    assert cli("evaluate", "--ckpt", out, "--ensemble", "--dataset", folder, "--prompts", "a disk")[0] == 0


def test_folds_with_a_test_split_of_its_own_are_averaged(cli, quick, folder, tmp_path):
    out = tmp_path / "group"
    folds(cli, quick, folder, out)
    code, said, err = cli("evaluate", "--ckpt", out)
    assert code == 0 and "over 3 runs" in said and "over 6 records" in said, err
    tables = [rows(out / f"fold{i}" / "eval-test" / "metrics.csv") for i in (1, 2, 3)]
    means = [np.mean([float(table[k]["dsc"]) for table in tables]) for k in range(6)]
    result = json.loads((out / "eval-test" / "means.json").read_text())[""]["dsc"]
    assert result["mean"] == pytest.approx(np.mean(means)) and result["std"] == pytest.approx(np.std(means))
    assert cli("evaluate", "--ckpt", out, "--ensemble")[0] == 0


def test_runs_lie_in_a_folder_named_after_them(cli, monkeypatch):
    calls = []
    monkeypatch.setattr("train.main", calls.append)
    assert cli("vlsm.tools.repeat", "--seeds", 41, 7, "--", "--peft", "coop", "--prompt-depth", 3)[0] == 0
    assert cli("vlsm.tools.repeat", "--folds", 2, "--", "--dim", 8, "--seed", 5)[0] == 0
    seeds, folds = "runs/demo-coop-depth3-seeds", "runs/demo-dense-8-folds"
    wanted = [f"{seeds}/seed41", f"{seeds}/seed7", f"{folds}/fold1", f"{folds}/fold2"]
    assert [words[-1] for words in calls] == [f"--out={folder}" for folder in wanted]


@pytest.fixture
def trained_words(monkeypatch):
    """The command lines that train.main got, which is replaced."""
    calls = []
    monkeypatch.setattr(train, "main", calls.append)
    return calls


def test_runs_of_other_processes_are_left_to_them(cli, tmp_path, trained_words):
    command = ["vlsm.tools.repeat", "--seeds", 1, 2, 3, "--out", tmp_path / "group", "--resume", "--"]
    with claimed(tmp_path / "group" / "seed2"):
        code, said, err = cli(*command, "--peft", "coop")
        assert code == 0 and "Other processes have seed2." in said and "All runs are done" not in said, err
    assert [Path(words[-1]).name for words in trained_words] == ["seed1", "seed3"]
    trained_words.clear()
    code, said, err = cli(*command, "--peft", "coop")
    assert code == 0 and "All runs are done" in said and len(trained_words) == 3, err


def test_a_run_that_diverges_does_not_stop_the_others(cli, tmp_path, monkeypatch):
    seeds = []

    def diverging(words):
        seeds.append(words[-2])
        if words[-2] == "--seed=1":
            raise Diverged("The loss became nan")

    monkeypatch.setattr(train, "main", diverging)
    command = ["vlsm.tools.repeat", "--seeds", 1, 2, "--out", tmp_path / "group", "--", "--peft", "coop"]
    code, said, err = cli(*command)
    assert code == 2 and "failed: The loss became nan" in said and "seed1: failed" in err
    assert seeds == ["--seed=1", "--seed=2"] and "All runs are done" not in said
    monkeypatch.setattr(parallel, "world_size", lambda: 2)  # the other rank would wait for ever
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda numbers, device: numbers)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    assert cli(*command)[0] == 2 and seeds[2:] == ["--seed=1"]
