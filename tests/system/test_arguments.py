"""Command lines: the examples of each --help are right, the version, and typing mistakes."""

import importlib
import shlex
from importlib.metadata import version

import pytest
import torch

from tests.tools.test_leaves import NAMES
from vlsm.system.arguments import VERSION, Parser
from vlsm.training.arguments import train_parser

PROGRAMS = ["train", "evaluate", "datasets", *(f"vlsm.tools.{name}" for name in NAMES)]


class Parsed(Exception):
    """A command line was parsed."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_examples_of_help_can_be_typed(cli, monkeypatch, program):
    code, said, _ = cli(program, "--help")
    assert code == 0
    command = f"python -m {program}" if "." in program else f"python {program}.py"
    lines = said.split("xamples:\n")[1].splitlines()
    examples = [line.strip() for line in lines if line.startswith(f"  {command} ")]
    assert 3 <= len(examples) <= 7 and max(map(len, examples)) <= 100
    parse = Parser.parse_args

    def parse_alone(parser, argv=None, namespace=None):
        raise Parsed(parse(parser, argv, namespace))

    monkeypatch.setattr(Parser, "parse_args", parse_alone)
    for example in examples:
        words = shlex.split(example.removeprefix(command))
        with pytest.raises(Parsed):
            importlib.import_module(program).main(words)
        if "--" in words:
            parse(train_parser(), words[words.index("--") + 1 :])


@pytest.mark.parametrize("program", ["train", "evaluate", "datasets", "vlsm.tools.score"])
def test_version(cli, program):
    code, said, err = cli(program, "--version")
    assert code == 0 and said == f"vlsm {VERSION} (PyTorch {version('torch')})\n", err
    assert torch.__version__.startswith(version("torch"))  # a build from PyPI also says +cu130


@pytest.mark.parametrize(
    "program, argv, message",
    [
        ("train", ["--epoch", "3"], "There is no option --epoch. Did you mean '--epochs'?"),
        ("train", ["--epoch=3"], "Did you mean '--epochs'?"),
        ("train", ["--model", "clipsegg"], "Did you mean 'clipseg'?"),
        ("datasets", ["--import", "nifti", "x", "--axis", "7"], "--axis: invalid choice: 7"),
        ("train", ["--peft", "dens", "--weights", "mini"], "Did you mean 'dense'?"),
        ("train", ["--dataset", "kvazir"], "Did you mean 'kvasir'?"),
        ("train", ["--dataset", "kvasir"], "python datasets.py --prepare kvasir --src"),
        ("evaluate", ["--ckpt", "x", "--splitt", "val"], "Did you mean '--split'?"),
        ("vlsm.tools.score", ["a", "b", "--grup", "x"], "Did you mean '--group'?"),
    ],
)
def test_a_typing_mistake_is_one_line_with_a_guess(cli, program, argv, message):
    code, said, err = cli(program, *argv)
    assert code == 2 and message in err and "usage:" not in err and not said


def test_a_run_that_is_not_there(cli, trained, tmp_path):
    code, _, err = cli("evaluate", "--ckpt", tmp_path / "rum")
    assert code == 2 and f"Did you mean 'run'? Runs in '{tmp_path}': run." in err
    (tmp_path / "new").mkdir()
    code, _, err = cli("evaluate", "--ckpt", tmp_path / "new")
    assert code == 2 and f"Runs in '{tmp_path}': run." in err and "Did you mean" not in err


def test_what_is_in_the_way_is_said_before_weights_are_read(cli, trained, quick, monkeypatch, tmp_path):
    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("train.build", read)
    monkeypatch.setattr("evaluate.load_ensemble", read)
    monkeypatch.setattr("vlsm.tools.merge.load", read)
    code, _, err = cli("train", *quick)
    assert code == 2 and "exists and is not empty" in err
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metrics.csv").write_text("mine")
    code, _, err = cli("evaluate", "--ckpt", trained, "--out", tmp_path / "own")
    assert code == 2 and "metrics.csv" in err
    code, _, err = cli("vlsm.tools.merge", trained, tmp_path / "own")
    assert code == 2 and "exists and is not empty" in err
