"""The terminal: names that would move its cursor, a lack of memory, bars in a notebook, guesses."""

import io
import sys
import types

import pytest
import torch

import vlsm
from vlsm.system.console import did_you_mean, friendly_errors, progress, say, say_once
from vlsm.training.run import describe_time

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"


def fail(error):
    """Return a function that raises an error, whatever it is called with."""

    def raise_it(*_, **__):
        raise error

    return raise_it


def test_control_characters_are_printed_as_escapes(capsys):
    name = "a\x1b[2J\rb\x9b\u202ec.png"
    seen = "a\\x1b[2J\\rb\\x9b\\u202ec.png"
    say(f"Wrote\n\t{name}")
    say_once(name, name)
    with pytest.raises(SystemExit), friendly_errors():
        raise FileNotFoundError(2, "No such file", name)
    out = capsys.readouterr()
    assert out.out == f"Wrote\n\t{seen}\n", "line breaks and tabs stay"
    assert out.err == f"{seen}\nerror: No such file ('{seen}').\n"


def test_a_folder_of_a_strange_name(cli):
    code, _, err = cli("train", "--dataset", "new\x1b[31m\rfolder")
    assert code == 2 and "'new\\x1b[31m\\rfolder'" in err and "\x1b" not in err and "\r" not in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line"),
        RuntimeError(ALLOCATOR),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_names_what_helps(cli, monkeypatch, tmp_path, error):
    monkeypatch.setattr("train.build", fail(error))
    code, _, err = cli("train", "--out", tmp_path / "x")
    assert code == 2 and err.startswith("error: There is not enough memory (")
    for option in ("--batch-size", "--accumulate 4", "--checkpoint-activations", "--cache-gb 0"):
        assert option in err
    monkeypatch.setattr("evaluate.load_ensemble", fail(error))
    code, _, err = cli("evaluate", "--ckpt", "x")
    assert code == 2 and "smaller --batch-size; of train.py also --accumulate" in err


def test_other_errors_of_pytorch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="sizes differ"), friendly_errors():
        raise RuntimeError("sizes differ")


def test_a_bar_is_shown_in_a_terminal_or_a_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress(3, "epoch").disable, "a log file needs no bar"
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with progress(3, "epoch\x1b") as bar:
        assert not bar.disable
    assert "epoch\\x1b:" in sys.stderr.getvalue()


def test_a_guess():
    assert did_you_mean("kvazir", ["demo", "kvasir"]) == " Did you mean 'kvasir'?"
    assert did_you_mean("liver", ["demo", "kvasir"]) == ""


def test_times_of_epochs():
    assert describe_time([0, 60], 2) == "01:00, 02:00 left"
    assert describe_time([0, 60, 70], 3) == "01:10, 00:30 left", "the first epoch also compiles"


def test_where_a_model_runs(monkeypatch):
    model = vlsm.build("clipseg", "mini").place_on(torch.device("cpu"), torch.bfloat16)
    text = model.describe_place()
    assert text.startswith("CPU, ") and text.endswith("; torch.bfloat16; PyTorch kernels; compiled: False")
    monkeypatch.setattr("kernels.dispatch.runs_triton", lambda weight: True)
    model.compute_dtype = None
    model.compile_blocks()
    assert model.describe_place().endswith("; torch.float32; Triton kernels; compiled: True")
