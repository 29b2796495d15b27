"""The search for hyper-parameters: sweeps of small runs, interruptions, pruning, spaces, mistakes. (README's test command has Optuna.)"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from tests.conftest import ROOT, rows, without_dim
from vlsm.methods.registry import METHODS
from vlsm.model import read_config
from vlsm.networks.sam3 import SAM3
from vlsm.training import sweep
from vlsm.training.job import Diverged


@pytest.fixture
def searched(quick):
    """Arguments of a sweep of short runs, but for --out."""
    pytest.importorskip("optuna")
    return [*without_dim(quick)[:-2], "--epochs", 2, "--prompts", "p1", "--peft", "maple"]


def test_a_sweep_is_runs_a_table_and_a_picture(cli, searched, tmp_path):
    out = tmp_path / "s"
    code, said, err = cli("train", *searched, "--weight-decay", 0.5, "--sweep", 4, "--out", out)
    assert code == 0, err
    table = rows(out / "sweep.csv")
    assert len(table) == 4 and set(table[0]) == {
        "trial",
        "state",
        "val_dsc",
        "epochs",
        "lr",
        "prompt_depth",
        "intermediate_dim",
        "lora_proj",
    }
    assert [float(r["val_dsc"]) for r in table] == sorted((float(r["val_dsc"]) for r in table), reverse=True)
    assert {r["state"] for r in table} == {"complete"} and len({r["lr"] for r in table}) == 4
    best = out / f"trial-{table[0]['trial']}"
    assert f"python evaluate.py --ckpt {best}" in said and "trial 4 of 4: lr " in said
    options = json.loads((best / "config.json").read_text())["options"]
    assert options["lr"] == pytest.approx(float(table[0]["lr"]), rel=1e-2) and options["weight_decay"] == 0.5
    assert options["prompt_depth"] == int(table[0]["prompt_depth"]) <= 4 and options["lora_proj"] == (
        table[0]["lora_proj"] == "True"
    )
    log = rows(best / "log.csv")
    assert len(log) == 2 and 100 * max(float(r["val_dsc"]) for r in log) == pytest.approx(
        float(table[0]["val_dsc"]), abs=0.01
    )
    assert cli("evaluate", "--ckpt", best)[0] == 0
    picture = np.asarray(Image.open(out / "sweep.png"))
    assert picture.shape[0] == 760 and abs(picture.shape[1] - 1680) <= 1  # matplotlib's rounding differs
    assert (cli("train", "--out", out, "--resume")[0], len(rows(out / "sweep.csv"))) == (0, 4), (
        "a finished sweep shows its table again"
    )
    code, said, err = cli("train", "--out", out, "--resume", "--sweep", 5)
    assert code == 0 and len(rows(out / "sweep.csv")) == 5 and said.count("\ntrial ") == 2, err


def test_an_interrupted_sweep_ends_as_if_it_was_not(cli, searched, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli("train", *searched, "--sweep", 3, "--out", whole)[0] == 0
    save, calls = train.save_epoch, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:  # the second trial's second epoch
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as m:
        m.setattr(train, "save_epoch", killed)
        assert cli("train", *searched, "--sweep", 3, "--out", parts)[0] == 130
    code, said, err = cli("train", "--out", parts, "--resume")
    assert code == 0 and "Resuming" in said and said.count("\ntrial ") == 3, (
        err
    )  # two trials and the table's head
    assert (parts / "sweep.csv").read_text() == (whole / "sweep.csv").read_text()


def test_ctrl_c_names_the_sweep(cli, searched, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Interrupt, "leave", lambda self, message: (print(message), sys.exit(130)))
    code, said, _ = cli("train", *searched, "--sweep", 3, "--out", tmp_path / "s")
    assert code == 130 and f"Go on with: python train.py --out {tmp_path / 's'} --resume" in said


def arguments(tmp_path, *more):
    return train.complete(
        train.parse_options(
            ["--weights", "mini", "--peft", "coop", "--out", str(tmp_path / "s"), "--sweep", "8", *more]
        )
    )


def fake(score, epochs=8):
    """A stand-in for train.train: validation DSC by (learning rate, epoch)."""

    def run(args, after_epoch):
        job = SimpleNamespace(history=[], best=0)
        for epoch in range(1, epochs + 1):
            value = score(args.lr, epoch)
            job.history.append(dict(val_dsc=value, val_loss=1 - value / 2))
            job.best = max(job.best, value)
            after_epoch(job)
        return job

    return run


@pytest.mark.parametrize("reference", [False, True])
def test_trials_below_the_median_are_pruned_and_the_best_wins(tmp_path, capsys, reference):
    optuna = pytest.importorskip("optuna")
    args = arguments(tmp_path, *["--reference"] * reference)
    rates = []

    def score(lr, epoch):
        if lr not in rates:
            rates.append(lr)
        return 0.5 - 0.05 * rates.index(lr) + 0.01 * epoch  # each trial is worse than the one before

    sweep.run_sweep(args, fake(score))
    table = rows(tmp_path / "s" / "sweep.csv")
    assert [r["state"] for r in table] == ["complete"] * 5 + ["pruned"] * 3 and [
        int(r["epochs"]) for r in table
    ] == [8] * 5 + [5] * 3
    assert "--ckpt " + str(tmp_path / "s" / "trial-000") in capsys.readouterr().out
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}")
    assert study.best_value == pytest.approx(0.58 if not reference else -(1 - 0.58 / 2))
    assert ("weight_decay" in study.best_params) == (not reference), (
        "in the published code it acts on nothing that CoOp trains"
    )


def test_a_trial_that_was_interrupted_behind_its_last_epoch_counts(tmp_path):
    pytest.importorskip("optuna")
    finished = SimpleNamespace(
        history=[dict(val_dsc=0.4, val_loss=0.6), dict(val_dsc=0.3, val_loss=0.5)], best=0.4
    )

    def interrupted(args, after_epoch):
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        sweep.run_sweep(arguments(tmp_path, "--sweep", "1"), interrupted)
    again = arguments(tmp_path, "--sweep", "1", "--resume")
    sweep.run_sweep(again, lambda args, after_epoch: finished)
    (row,) = rows(tmp_path / "s" / "sweep.csv")
    assert (row["state"], row["val_dsc"], row["epochs"]) == ("complete", "40.00", "2")


def test_trials_that_diverge_are_set_aside(tmp_path, capsys):
    pytest.importorskip("optuna")
    count = []

    def diverging(args, after_epoch):
        count.append(1)
        if len(count) % 2:
            raise Diverged("The loss became nan")
        return fake(lambda lr, epoch: 0.5, 2)(args, after_epoch)

    sweep.run_sweep(arguments(tmp_path), diverging)
    assert (
        len(rows(tmp_path / "s" / "sweep.csv")) == 4
        and "failed: The loss became nan" in capsys.readouterr().out
    )

    def always(args, after_epoch):
        raise Diverged("The loss became nan")

    with pytest.raises(ValueError, match="No trial finished an epoch"):
        sweep.run_sweep(arguments(tmp_path / "2"), always)


@pytest.mark.parametrize(
    "method, more, want",
    [
        ("coop", [], {"prompt_depth"}),
        ("vpt", [], {"prompt_depth"}),
        ("cocoop", [], {"prompt_depth", "intermediate_dim", "lora_proj"}),
        ("maple", ["--no-lora-proj"], {"prompt_depth", "intermediate_dim"}),
        ("shared_separate", [], {"prompt_depth", "shared_dim"}),
        ("shared_attention", [], {"prompt_depth", "heads", "dropout", "feed_forward", "norm_first"}),
        ("dense+vpt", ["--prompt-depth", "2"], {"dim"}),
        ("full", [], set()),
    ],
)
def test_the_space_is_the_papers_and_what_fits(tmp_path, method, more, want):
    space = sweep.default_space(arguments(tmp_path, "--peft", method, *more))
    assert set(space) == want | {"lr", "weight_decay"}
    assert space["lr"] == dict(low=1e-5, high=5e-3, log=True) and space["weight_decay"] == dict(
        low=1e-5, high=1e-2, log=True
    )
    if "prompt_depth" in want:
        deepest = read_config("clipseg", "mini")[2].max_prompt_depth(METHODS[method].encoders)
        assert space["prompt_depth"] == dict(low=1, high=deepest) and deepest <= 11
    if "heads" in want:
        assert space["heads"] == [16, 32], "20 heads do not divide this base's width"
    no_decay = sweep.default_space(arguments(tmp_path, "--peft", "vpt", "--no-upsampler", "--reference"))
    assert "weight_decay" not in no_decay
    assert "weight_decay" in sweep.default_space(arguments(tmp_path, "--peft", "vpt", "--reference"))


@pytest.mark.parametrize("peft, depth", [("coop", 4), ("cocoop", 4), ("full", None), ("coop+decoder", 4)])
def test_the_space_of_cris(tmp_path, peft, depth):
    """Three text layers, and one set more: it may stand over the last layer's output."""
    more = ["--model", "cris", "--peft", peft, "--weights", f"random:{ROOT / 'tests' / 'tiny' / 'cris.json'}"]
    space = sweep.default_space(arguments(tmp_path, *more))
    assert space.get("prompt_depth") == (depth and dict(low=1, high=depth))
    with pytest.raises(ValueError, match="cannot be used on CRIS"):
        sweep.default_space(arguments(tmp_path, *more, "--peft", "maple"))


def test_every_method_on_sam3_has_a_space(tmp_path):
    more = ["--model", "sam3", "--weights", f"random:{ROOT / 'tests' / 'tiny' / 'sam3.json'}"]
    for method in (*SAM3.methods[1:], "dense+cocoop"):  # all but none
        space = sweep.default_space(arguments(tmp_path, *more, "--peft", method))
        assert {"lr", "weight_decay"} <= set(space) and ("prompt_depth" in space) == ("coop" in method), (
            method
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("{}", "names nothing to search"),
        ('{"dim": [4]}', "--peft coop has no 'dim' to search; known are"),
        ('{"lr": []}', "'lr' should be a list of choices, or an interval"),
        ('{"lr": {"low": 1}}', "should be a list of choices"),
        ('{"lr": {"low": 2, "high": 1}}', "with low <= high"),
        ('{"lr": {"low": 0, "high": 1, "log": true}}', "log: above 0"),
        ('{"lr": [[1]]}', "should be a list of choices"),
        ('{"context": 3}', "should be a list of choices"),
    ],
)
def test_spaces_that_mean_nothing(tmp_path, text, message):
    file = tmp_path / "space.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        sweep.read_space(file, arguments(tmp_path))


def test_a_space_of_ones_own(cli, searched, tmp_path):
    file = tmp_path / "space.json"
    file.write_text(
        '{"context": {"low": 2, "high": 3}, "lr_factor": {"low": 0.1, "high": 0.5}, "augment": [true, '
        'false], "lr": [1e-3]}'
    )
    code, _, err = cli("train", *searched, "--sweep", 2, "--sweep-space", file, "--out", tmp_path / "s")
    assert code == 0, err
    assert all(
        r["context"] in "23" and r["lr"] == "0.001" and 0.1 <= float(r["lr_factor"]) <= 0.5
        for r in rows(tmp_path / "s" / "sweep.csv")
    )


@pytest.mark.parametrize("choices", ['[["a"]]', "[[]]", '["8 8"]', "[[8, true]]"])
def test_widths_that_mean_nothing(tmp_path, choices):
    (tmp_path / "space.json").write_text(f'{{"dims": {choices}}}')
    with pytest.raises(ValueError, match="'dims' should be a list of choices"):
        sweep.read_space(tmp_path / "space.json", arguments(tmp_path, "--peft", "telescopic"))


def test_widths_of_blocks_are_searched(cli, searched, tmp_path):
    file, allocations = tmp_path / "space.json", [[4, 8, 16], [16, 8, 4]]
    file.write_text(json.dumps({"dims": allocations}))
    options = ["--peft", "telescopic", "--sweep-space", file, "--out", tmp_path / "s"]
    code, said, err = cli("train", *searched, *options, "--sweep", 4)
    assert code == 0 and "dims [4, 8, 16]" in said, err
    for row in rows(tmp_path / "s" / "sweep.csv"):
        config = json.loads((tmp_path / "s" / f"trial-{row['trial']}" / "config.json").read_text())
        assert config["options"]["dims"] == json.loads(row["dims"]) and json.loads(row["dims"]) in allocations


def test_studies_that_cannot_go_on(cli, searched, tmp_path):
    out = tmp_path / "s"
    assert cli("train", *searched, "--sweep", 1, "--out", out)[0] == 0
    study = out / "study.db"
    code, _, err = cli("train", *searched, "--sweep", 1, "--out", out)
    assert code == 2 and "Use --resume to go on" in err
    (tmp_path / "space.json").write_text('{"lr": [1e-3]}')
    code, _, err = cli("train", "--out", out, "--resume", "--sweep-space", tmp_path / "space.json")
    assert code == 2 and "keeps its search space" in err
    whole = study.read_bytes()
    for content in (b"no study", whole[: len(whole) // 2]):
        study.write_bytes(content)
        code, _, err = cli("train", "--out", out, "--resume", "--sweep", 2)
        assert code == 2 and "is no study that Optuna can read" in err and "another --out" in err, err
    study.write_bytes(b"")
    assert "is missing or empty. Start again with --overwrite" in cli("train", "--out", out, "--resume")[2]
    study.unlink()
    assert "is missing or empty" in cli("train", "--out", out, "--resume")[2]
    code, _, err = cli("train", "--out", out / "trial-000", "--resume", "--sweep", 3)
    assert code == 2 and "holds a single run, not a sweep" in err
    assert cli("train", "--out", out / "trial-000", "--resume", "--epochs", 3)[0] == 0, (
        "a trial is a run like any other"
    )


def test_without_optuna_the_command_is_named(cli, quick, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = cli("train", *without_dim(quick), "--peft", "coop", "--sweep", 2)
    assert code == 2 and "pip install optuna" in err and not (tmp_path / "run").exists()


def test_nothing_to_search(cli, quick, tmp_path):
    pytest.importorskip("optuna")
    assert (
        "--peft none trains nothing" in cli("train", *without_dim(quick), "--peft", "none", "--sweep", 2)[2]
    )
    assert "--sweep 0: give 1 or more" in cli("train", *without_dim(quick), "--peft", "coop", "--sweep", 0)[2]
    given = ["--lr", 1e-3, "--weight-decay", 0, "--prompt-depth", 1]
    assert (
        "nothing is left to search"
        in cli("train", *without_dim(quick), "--peft", "coop", *given, "--sweep", 2)[2]
    )
