"""The search for hyper-parameters: sweeps of small runs, interruptions, pruning, spaces, mistakes. (README's test command has Optuna.)"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import train
from tests.conftest import ROOT, rows, without_dim
from tests.training.test_claims import claimed, free
from vlsm.methods.registry import METHODS
from vlsm.model import read_config
from vlsm.networks.sam3 import SAM3
from vlsm.tools import sweep
from vlsm.training.arguments import parse_arguments
from vlsm.training.run import Diverged, Run


@pytest.fixture
def searched(quick):
    """Arguments of train.py for short runs, behind --."""
    pytest.importorskip("optuna")
    return ["--", *without_dim(quick)[:-2], "--epochs", 2, "--prompts", "p1", "--peft", "maple"]


def run(cli, *argv):
    return cli("vlsm.tools.sweep", *argv)


def test_a_sweep_is_runs_a_table_and_a_picture(cli, searched, tmp_path):
    out = tmp_path / "s"
    code, said, err = run(cli, "--trials", 4, "--out", out, *searched, "--weight-decay", 0.5)
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
    assert f"python evaluate.py --ckpt {best}" in said and "trial 4 of 4: {'lr': " in said
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
    assert (run(cli, "--out", out, "--resume", "--trials", 4)[0], len(rows(out / "sweep.csv"))) == (0, 4), (
        "a finished sweep shows its table again"
    )
    code, said, err = run(cli, "--out", out, "--resume", "--trials", 5)
    assert code == 0 and len(rows(out / "sweep.csv")) == 5 and said.count("\ntrial ") == 1, err


def test_an_interrupted_sweep_ends_as_if_it_was_not(cli, searched, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(cli, "--trials", 3, "--out", whole, *searched)[0] == 0
    save, calls = Run.save, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:  # the second trial's second epoch
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as m:
        m.setattr(Run, "save", killed)
        assert run(cli, "--trials", 3, "--out", parts, *searched)[0] == 130
    code, said, err = run(cli, "--out", parts, "--resume", "--trials", 3)
    assert code == 0 and "Resuming" in said and said.count("\ntrial ") == 2, err
    assert (parts / "sweep.csv").read_text() == (whole / "sweep.csv").read_text()


def test_ctrl_c_names_the_sweep(cli, searched, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Interrupt, "leave", lambda self, message: sys.exit(130))
    code, said, _ = run(cli, "--trials", 3, "--out", tmp_path / "s", *searched)
    assert code == 130 and f"vlsm.tools.sweep --out {tmp_path / 's'} --resume" in said


def sweep_coop(tmp_path, *more, trials="8"):
    """Run a sweep of CoOp, whose training is faked."""
    method = ["--", "--weights", "mini", "--peft", "coop"]
    own = [word for word in more if word != "--reference"]
    sweep.main(["--out", str(tmp_path / "s"), "--trials", trials, *own, *method, *more[len(own) :]])


def fake(score, epochs=8):
    """A stand-in for train.main: validation DSC by (learning rate, epoch)."""

    def trained(argv, after_epoch):
        lr = parse_arguments(argv).lr
        run = SimpleNamespace(history=[], best=0)
        for epoch in range(1, epochs + 1):
            value = score(lr, epoch)
            run.history.append(dict(val_dsc=value, val_loss=1 - value / 2))
            run.best = max(run.best, value)
            after_epoch(run)
        return run

    return trained


@pytest.mark.parametrize("reference", [False, True])
def test_trials_below_the_median_are_pruned_and_the_best_wins(tmp_path, capsys, monkeypatch, reference):
    optuna = pytest.importorskip("optuna")
    rates = []

    def score(lr, epoch):
        if lr not in rates:
            rates.append(lr)
        return 0.5 - 0.05 * rates.index(lr) + 0.01 * epoch  # each trial is worse than the one before

    monkeypatch.setattr(train, "main", fake(score))
    sweep_coop(tmp_path, *["--reference"] * reference)
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


def test_a_trial_that_was_interrupted_behind_its_last_epoch_counts(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    finished = SimpleNamespace(
        history=[dict(val_dsc=0.4, val_loss=0.6), dict(val_dsc=0.3, val_loss=0.5)], best=0.4
    )

    def interrupted(argv, after_epoch):
        raise SystemExit(130)

    monkeypatch.setattr(train, "main", interrupted)
    with pytest.raises(SystemExit):
        sweep_coop(tmp_path, trials="1")
    monkeypatch.setattr(train, "main", lambda argv, after_epoch: finished)
    sweep.main(["--out", str(tmp_path / "s"), "--trials", "1", "--resume"])
    (row,) = rows(tmp_path / "s" / "sweep.csv")
    assert (row["state"], row["val_dsc"], row["epochs"]) == ("complete", "40.00", "2")


def test_trials_that_diverge_are_set_aside(tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    count = []

    def diverging(argv, after_epoch):
        count.append(1)
        if len(count) % 2:
            raise Diverged("The loss became nan")
        return fake(lambda lr, epoch: 0.5, 2)(argv, after_epoch)

    monkeypatch.setattr(train, "main", diverging)
    sweep_coop(tmp_path)
    assert len(rows(tmp_path / "s" / "sweep.csv")) == 4
    assert "failed: The loss became nan" in capsys.readouterr().out

    def always(argv, after_epoch):
        raise Diverged("The loss became nan")

    monkeypatch.setattr(train, "main", always)
    with pytest.raises(ValueError, match="No trial finished an epoch"):
        sweep_coop(tmp_path / "2")


def space_of(*argv):
    words = [*argv] if "--weights" in argv else ["--weights", "mini", *argv]
    return sweep.choose_space(vars(parse_arguments(words)), words)


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
def test_the_space_is_the_papers_and_what_fits(method, more, want):
    space = space_of("--peft", method, *more)
    assert set(space) == want | {"lr", "weight_decay"}
    assert space["lr"] == dict(low=1e-5, high=5e-3, log=True) and space["weight_decay"] == dict(
        low=1e-5, high=1e-2, log=True
    )
    if "prompt_depth" in want:
        deepest = read_config("clipseg", "mini")[2].max_prompt_depth(METHODS[method].encoders)
        assert space["prompt_depth"] == dict(low=1, high=deepest) and deepest <= 11
    if "heads" in want:
        assert space["heads"] == [16, 32], "20 heads do not divide this base's width"
    no_decay = space_of("--peft", "vpt", "--no-upsampler", "--reference")
    assert "weight_decay" not in no_decay
    assert "weight_decay" in space_of("--peft", "vpt", "--reference")


@pytest.mark.parametrize("peft, depth", [("coop", 4), ("cocoop", 4), ("full", None), ("coop+decoder", 4)])
def test_the_space_of_cris(peft, depth):
    """Three text layers, and one set more: it may stand over the last layer's output."""
    more = ["--model", "cris", "--weights", f"random:{ROOT / 'tests' / 'tiny' / 'cris.json'}", "--peft"]
    space = space_of(*more, peft)
    assert space.get("prompt_depth") == (depth and dict(low=1, high=depth))
    with pytest.raises(ValueError, match="cannot be used on CRIS"):
        space_of(*more, "maple")


def test_every_method_on_sam3_has_a_space():
    more = ["--model", "sam3", "--weights", f"random:{ROOT / 'tests' / 'tiny' / 'sam3.json'}"]
    for method in (*SAM3.methods[1:], "dense+cocoop"):  # all but none
        space = space_of(*more, "--peft", method)
        assert {"lr", "weight_decay"} <= set(space) and ("prompt_depth" in space) == ("coop" in method), (
            method
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("{}", "Nothing is left to search"),
        ('{"widths": [4]}', "train.py has no such option"),
        ('{"lr": []}', "'lr' should be a list of choices, or an interval"),
        ('{"lr": {"low": 1}}', "should be a list of choices"),
        ('{"lr": {"low": 2, "high": 1}}', "should be a list of choices"),
        ('{"lr": {"low": 0, "high": 1, "log": true}}', "should be a list of choices"),
        ('{"lr": {"low": 0, "high": 1, "lag": true}}', "should be a list of choices"),
        ('{"context": 3}', "should be a list of choices"),
    ],
)
def test_spaces_that_mean_nothing(cli, searched, tmp_path, text, message):
    file = tmp_path / "space.json"
    file.write_text(text)
    code, _, err = run(cli, "--space", file, "--out", tmp_path / "s", *searched)
    assert code == 2 and message in err and not (tmp_path / "s").exists()


@pytest.mark.parametrize("text", ['{"dim": [4]}', '{"lr": ["fast"]}', '{"dims": [["a"]]}'])
def test_values_that_no_run_can_have_stop_the_sweep(cli, searched, tmp_path, text):
    """The first trial goes through the command line of train.py, which refuses them."""
    (tmp_path / "space.json").write_text(text)
    code, _, err = run(cli, "--space", tmp_path / "space.json", "--out", tmp_path / "s", *searched)
    name = text.split('"')[1]
    assert code == 2 and name in err and "Traceback" not in err


def test_a_space_of_ones_own(cli, searched, tmp_path):
    file = tmp_path / "space.json"
    file.write_text(
        '{"context": {"low": 2, "high": 3}, "lr_factor": {"low": 0.1, "high": 0.5}, "augment": [true, '
        'false], "lr": [1e-3]}'
    )
    code, _, err = run(cli, "--trials", 2, "--space", file, "--out", tmp_path / "s", *searched)
    assert code == 0, err
    for row in rows(tmp_path / "s" / "sweep.csv"):
        assert row["context"] in "23" and row["lr"] == "0.001" and 0.1 <= float(row["lr_factor"]) <= 0.5


def test_widths_of_blocks_are_searched(cli, searched, tmp_path):
    file, allocations = tmp_path / "space.json", [[4, 8, 16], [16, 8, 4]]
    file.write_text(json.dumps({"dims": allocations}))
    own = ["--trials", 4, "--space", file, "--out", tmp_path / "s"]
    code, said, err = run(cli, *own, *searched[:-1], "telescopic")
    assert code == 0 and "[4, 8, 16]" in said, err
    for row in rows(tmp_path / "s" / "sweep.csv"):
        config = json.loads((tmp_path / "s" / f"trial-{row['trial']}" / "config.json").read_text())
        assert config["options"]["dims"] == json.loads(row["dims"]) and json.loads(row["dims"]) in allocations


def test_studies_that_cannot_go_on(cli, searched, tmp_path):
    out = tmp_path / "s"
    assert run(cli, "--trials", 1, "--out", out, *searched)[0] == 0
    study = out / "study.db"
    code, _, err = run(cli, "--trials", 1, "--out", out, *searched)
    assert code == 2 and "--resume" in err
    whole = study.read_bytes()
    for content in (b"no study", whole[: len(whole) // 2]):
        study.write_bytes(content)
        code, _, err = run(cli, "--out", out, "--resume", "--trials", 2)
        assert code == 2 and "Optuna cannot read the study" in err and "another --out" in err, err
    study.write_bytes(b"")
    assert "is missing or empty" in run(cli, "--out", out, "--resume")[2]
    study.unlink()
    assert "is missing or empty" in run(cli, "--out", out, "--resume")[2]
    code, _, err = run(cli, "--out", out / "trial-000", "--resume", "--trials", 3)
    assert code == 2 and "arguments of a sweep" in err
    assert cli("train", "--out", out / "trial-000", "--resume", "--epochs", 3)[0] == 0, (
        "a trial is a run like any other"
    )


def test_without_optuna_the_command_is_named(cli, searched, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run(cli, "--out", tmp_path / "s", *searched)
    assert code == 2 and "pip install optuna" in err and not (tmp_path / "s").exists()


def test_nothing_to_search(cli, quick, tmp_path):
    pytest.importorskip("optuna")
    own, method = ["--out", tmp_path / "s"], ["--", *without_dim(quick)[:-2], "--peft"]
    assert "--peft none trains nothing" in run(cli, *own, *method, "none")[2]
    assert "--trials" in run(cli, *own, "--trials", 0, *method, "coop")[2]
    given = ["--lr", 1e-3, "--weight-decay", 0, "--prompt-depth", 1]
    assert "Nothing is left to search" in run(cli, *own, *method, "coop", *given)[2]


def words_of(tmp_path, *more, trials=4):
    """The words of a sweep of CoOp that may be begun or joined."""
    own = ["--out", tmp_path / "s", "--trials", trials, "--resume"]
    return ["vlsm.tools.sweep", *own, *more, "--", "--weights", "mini", "--peft", "coop"]


def parameters(tmp_path, storage="sqlite:///{}/study.db", name="sweep"):
    """The parameters of a sweep's trials, and their states."""
    optuna = pytest.importorskip("optuna")
    trials = optuna.load_study(study_name=name, storage=storage.format(tmp_path / "s")).trials
    return [trial.params for trial in trials], [trial.state.name for trial in trials]


@pytest.mark.parametrize("place", ["file", "journal", "database"])
def test_a_trial_of_another_process_is_left_to_it(cli, tmp_path, monkeypatch, place):
    pytest.importorskip("optuna")
    more = dict(file=[], journal=["--study", "journal"], database=["--study", f"sqlite:///{tmp_path}/all.db"])

    def interrupted(argv, after_epoch):
        raise SystemExit(130)

    alone = tmp_path / "alone"
    monkeypatch.setattr(train, "main", fake(lambda lr, epoch: lr, 2))
    assert cli(*words_of(alone))[0] == 0
    monkeypatch.setattr(train, "main", interrupted)
    code, said, _ = cli(*words_of(tmp_path, *more[place]))
    assert code == 130 and (" --study ..." in said) == (place != "file")
    monkeypatch.setattr(train, "main", fake(lambda lr, epoch: lr, 2))
    free(tmp_path / "s")
    with claimed(tmp_path / "s" / "trial-000"):
        code, said, err = cli(*words_of(tmp_path, *more[place]))
        assert code == 0 and "Other processes still run trials" in said, err
        assert said.count("\ntrial ") == 3 and "trial 1 of 4" not in said
        assert not (tmp_path / "s" / "sweep.csv").exists()
    code, said, err = cli(*words_of(tmp_path, *more[place]))  # its process was killed
    assert code == 0 and said.count("\ntrial ") == 1 and "trial 1 of 4" in said, err
    if place == "file":
        params, states = parameters(tmp_path)
        assert states == ["COMPLETE"] * 4
        assert params[:2] == parameters(alone)[0][:2], "the first draws are by the trial's number"
    assert len(rows(tmp_path / "s" / "sweep.csv")) == 4


def test_a_trial_without_all_parameters_gets_them(cli, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    monkeypatch.setattr(train, "main", fake(lambda lr, epoch: lr, 2))
    assert cli(*words_of(tmp_path, trials=1))[0] == 0
    with monkeypatch.context() as m:
        m.setattr(optuna.trial.Trial, "_suggest", lambda *args: sys.exit(9))  # killed in the midst of it
        assert cli(*words_of(tmp_path, trials=2))[0] == 9
    assert parameters(tmp_path)[0][1] == {}
    assert cli(*words_of(tmp_path, trials=2))[0] == 0
    first, second = parameters(tmp_path)[0]
    assert second.keys() == first.keys() and second != first


def test_studies_that_are_not_the_sweeps(cli, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(train, "main", fake(lambda lr, epoch: lr, 2))
    database = f"sqlite:///{tmp_path}/all.db"
    assert cli(*words_of(tmp_path, "--study", database, trials=1))[0] == 0
    code, _, err = cli(*words_of(tmp_path / "other", "--study", database))
    assert code == 2 and "has a sweep 's' already" in err
    code, _, err = cli(*words_of(tmp_path / "other", "--study", database))
    assert code == 2 and "has a sweep 's' already" in err, "at every start"
    code, _, err = cli(*words_of(tmp_path / "2", "--study", "nonsense://secret@nowhere/x"))
    assert code == 2 and "The database of --study cannot be used" in err and "secret" not in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = cli(*words_of(tmp_path / "3"))
    assert code == 2 and "no program for torchrun" in err and not (tmp_path / "3").exists()


def test_other_options_of_a_sweep_that_was_begun_are_refused(cli, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(train, "main", fake(lambda lr, epoch: lr, 2))
    assert cli(*words_of(tmp_path, trials=1))[0] == 0
    code, _, err = cli(*words_of(tmp_path, trials=2), "--seed", "7")
    assert code == 2 and "was begun with other options of train.py" in err
    assert cli(*words_of(tmp_path, trials=2))[0] == 0


def test_an_error_ends_the_sweep_and_a_second_time_its_trial_alone(cli, tmp_path, monkeypatch):
    """It may be of the data, which the user mends, or of this trial's values, which no start can mend."""
    pytest.importorskip("optuna")
    begun = []
    works = fake(lambda lr, epoch: lr, 2)

    def first_fails(argv, after_epoch):
        begun.append(argv)
        if any("trial-000" in word for word in argv):
            raise ValueError("--dim 0 leaves an adapter without a hidden unit")
        return works(argv, after_epoch)

    monkeypatch.setattr(train, "main", first_fails)
    code, _, err = cli(*words_of(tmp_path, trials=3))
    assert code == 2 and "without a hidden unit" in err and len(begun) == 1
    code, said, err = cli(*words_of(tmp_path, trials=3))
    assert code == 0 and "failed: --dim 0" in said and len(begun) == 4, err
    assert parameters(tmp_path)[1] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_another_study_in_the_same_folder_is_refused(cli, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(train, "main", fake(lambda lr, epoch: lr, 2))
    with claimed(tmp_path / "s" / "trial-000"):  # in a study elsewhere
        code, _, err = cli(*words_of(tmp_path))
    assert code == 2 and "with another --study" in err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--study", "journal"]], ids=["file", "journal"])
def test_processes_share_a_sweep_and_a_killed_one_loses_nothing(cli, searched, tmp_path, more):
    """All trials but the killed one's end in the other two processes, and that one is continued there."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    searched[searched.index("--epochs") + 1] = 4
    options = ["--trials", 4, *searched, "--min-epochs", 4]
    assert run(cli, "--out", alone, *options)[0] == 0
    words = [sys.executable, "-m", "vlsm.tools.sweep", "--out", shared, "--resume", *more, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = []
    for number in range(3):
        with open(tmp_path / f"{number}.txt", "w") as log:
            workers.append(
                subprocess.Popen(list(map(str, words)), cwd=ROOT, env=environment, stdout=log, stderr=log)
            )
    log = tmp_path / "0.txt"
    while "epoch   1/4" not in log.read_text() and workers[0].poll() is None:
        time.sleep(0.05)
    workers[0].send_signal(signal.SIGKILL)
    assert [worker.wait() for worker in workers] == [-signal.SIGKILL, 0, 0]
    said = "".join((tmp_path / f"{number}.txt").read_text() for number in (1, 2))
    assert said.count("Resuming") == 1 and said.count("\ntrial ") == 4
    one, two = (sorted(rows(out / "sweep.csv"), key=lambda row: row["trial"]) for out in (alone, shared))
    assert len(two) == 4 and {row["epochs"] for row in two} == {"4"}
    assert one[:2] == two[:2], "drawn at random by their numbers, and trained alike"
