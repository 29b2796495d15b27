"""CRIS's folder from the files that people have; nothing in a file runs but in OpenAI's own archive."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vlsm
from tests.conftest import ROOT, folder_of_golden
from vlsm.networks.cris import CRIS
from vlsm.system.console import friendly_errors
from vlsm.tools import convert_cris
from vlsm.tools.convert_cris import OPENAI_RN50, main

CONFIG = ROOT / "tests" / "tiny" / "cris.json"
MINI = ROOT / "vlsm" / "mini"


def published(network):
    return CRIS.published_names(network.state_dict())


def state():
    tensors = published(vlsm.build("cris", f"random:{CONFIG}").network)
    return {n: torch.randn_like(t) if t.is_floating_point() else t + 5 for n, t in tensors.items()}


def run(capsys, source, folder, *more):
    code = 0
    try:
        with friendly_errors():
            main([str(source), str(folder), "--config", str(CONFIG), *map(str, more)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


class Executes:
    """What a hostile file holds: to unpickle it is to call a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def in_training_layout(tensors):
    """What the published training script writes."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35])
    wrapped = {f"module.{n}": t for n, t in tensors.items()}
    return dict(
        epoch=3,
        cur_iou=0.5,
        best_iou=0.6,
        prec={},
        state_dict=wrapped,
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
    )


@pytest.mark.parametrize("kind", ["training", "older", "bare", "safetensors"])
def test_a_cris_checkpoint(tmp_path, capsys, kind):
    tensors, source = state(), tmp_path / ("x.safetensors" if kind == "safetensors" else "cris_best.pth")
    if kind == "safetensors":
        save_file(tensors, source)
    else:
        torch.save(
            tensors if kind == "bare" else in_training_layout(tensors),
            source,
            _use_new_zipfile_serialization=kind != "older",
        )
    code, out, err = run(capsys, source, tmp_path / "cris", "--tokenizer", MINI)
    assert code == 0, err
    prefix = "" if kind in ("bare", "safetensors") else "module."
    assert (
        f"{prefix}neck.aggr.0.weight -> neck.aggr.0.weight" in out
        and out.count(" -> ") == len(tensors)
        and "(random)" not in out
    )
    model = vlsm.build("cris", tmp_path / "cris", "full")
    assert all(torch.equal(t, tensors[n]) for n, t in published(model.network).items())
    assert set(load_file(tmp_path / "cris" / "model.safetensors")) == set(tensors)
    assert model.tokenizer().end == 994 and not model.updated_buffers
    assert json.loads((tmp_path / "cris" / "config.json").read_text())["model_type"] == "cris"


def test_the_golden_network_survives(tmp_path, capsys):
    folder = folder_of_golden("cris-tiny", tmp_path / "golden")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "c.pth")
    main([str(tmp_path / "c.pth"), str(tmp_path / "out"), "--config", str(folder / "config.json")])
    assert "Before training, copy vocab.json and merges.txt" in capsys.readouterr().out
    names = (
        vlsm.build("cris", folder).info["fingerprint"],
        vlsm.build("cris", tmp_path / "out").info["fingerprint"],
    )
    assert names[0] == names[1]


class Tree(nn.Module):
    """Modules with given tensors in half precision, and OpenAI's three numbers, as their archives hold them."""

    def __init__(self, tensors):
        super().__init__()
        self.numbers_here = True
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            at = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            if tensor.is_floating_point() and "running" not in last:
                setattr(at, last, nn.Parameter(tensor))
            else:
                at.register_buffer(last, tensor)
        for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return x + 1


def openai_archive(path, tensors):
    torch.jit.save(torch.jit.script(Tree(tensors)), path)


def clip_alone(tensors):
    return {
        n.removeprefix("backbone."): t.half() if t.is_floating_point() else t
        for n, t in tensors.items()
        if n.startswith("backbone.") and ".connect." not in n
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_openais_archive(tmp_path, capsys, monkeypatch):
    tensors, source = clip_alone(state()), tmp_path / "RN50.pt"
    openai_archive(source, tensors)
    monkeypatch.setattr(convert_cris, "OPENAI_RN50", hashlib.sha256(source.read_bytes()).hexdigest())
    code, out, err = run(capsys, source, tmp_path / "cris", "--tokenizer", MINI)
    assert code == 0, err
    assert "visual.conv1.weight -> backbone.visual.conv1.weight" in out and "input_resolution" not in out
    assert "(random) -> backbone.visual.attnpool.connect.0.weight" in out and "-> proj.txt.bias" in out
    model = vlsm.build("cris", tmp_path / "cris", "full")
    read = published(model.network)
    assert all(
        torch.equal(read[f"backbone.{n}"], t.to(read[f"backbone.{n}"].dtype)) for n, t in tensors.items()
    )
    moving = {n.rsplit(".", 1)[0] for n in model.updated_buffers}  # what is random has no statistics yet
    assert "backbone.visual.attnpool.connect.1" in moving and "neck.txt_proj.1" not in moving
    assert not [n for n in moving if n.startswith("backbone.") and ".connect." not in n]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_another_archive_is_refused_unread(tmp_path, capsys, monkeypatch):
    source = tmp_path / "RN50.pt"
    openai_archive(source, clip_alone(state()))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the archive was run"))
    code, _, err = run(capsys, source, tmp_path / "cris")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert code == 2 and OPENAI_RN50 in err and digest in err and not (tmp_path / "cris").exists()


def test_tensors_missing_or_left_over(tmp_path, capsys):
    tensors = state()
    cases = {
        "1 missing: decoder.norm.bias": {n: t for n, t in tensors.items() if n != "decoder.norm.bias"},
        "1 left over: extra.weight": {**tensors, "extra.weight": torch.zeros(2)},
        "1 of another shape: proj.txt.bias [3] instead of [289]": {
            **tensors,
            "proj.txt.bias": torch.zeros(3),
        },
        "visual.bn1.bias": {n: t for n, t in clip_alone(tensors).items() if n != "visual.bn1.bias"},
    }
    for message, given in cases.items():
        torch.save(given, tmp_path / "c.pth")
        code, out, err = run(capsys, tmp_path / "c.pth", tmp_path / "out")
        assert (
            code == 2
            and message in err
            and "is no checkpoint of this network" in err
            and not (tmp_path / "out").exists()
        )


def test_the_wrong_checkpoint_is_named(tmp_path, capsys):
    for source, message in (
        (MINI / "model.safetensors", "It looks like a CLIPSeg checkpoint (--model clipseg)."),
        (ROOT / "tests" / "golden" / "san-tiny.safetensors", "It looks like a SAN checkpoint (--model san)."),
    ):
        code, _, err = run(capsys, source, tmp_path / "out")
        assert code == 2 and message in err and not (tmp_path / "out").exists()
    torch.save(dict(epoch=1), tmp_path / "c.pth")
    code, _, err = run(capsys, tmp_path / "c.pth", tmp_path / "out")
    assert code == 2 and "holds no state dictionary" in err
    code, _, err = run(capsys, tmp_path / "none.pth", tmp_path / "out")
    assert code == 2 and "There is no file" in err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    torch.save(state(), tmp_path / "c.pth")
    code, _, err = run(capsys, tmp_path / "c.pth", tmp_path / "out")
    assert code == 2 and "exists and is not empty" in err


@pytest.mark.parametrize("kind", ["zip", "older"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys, kind):
    source, code_in_it = tmp_path / "cris_best.pth", Executes(tmp_path / "executed")
    checkpoint = dict(state_dict=state(), args=code_in_it)
    torch.save(checkpoint, source, _use_new_zipfile_serialization=kind == "zip")
    code, _, err = run(capsys, source, tmp_path / "out")
    assert code == 2 and "nothing in it was run" in err and "mkdir" in err and "Traceback" not in err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
    torch.load(source, weights_only=False)
    assert (tmp_path / "executed").exists(), "the file is what the test says"


@pytest.mark.parametrize("kind", ["zip", "older", "torchscript", "safetensors", "text"])
def test_a_truncated_file(tmp_path, capsys, kind):
    source = tmp_path / ("c.safetensors" if kind == "safetensors" else "c.pth")
    if kind == "torchscript":
        openai_archive(source, clip_alone(state()))
    elif kind == "safetensors":
        save_file(state(), source)
    else:
        torch.save(state(), source, _use_new_zipfile_serialization=kind == "zip")
    whole = source.read_bytes()
    source.write_bytes(b"404: Not Found" if kind == "text" else whole[: len(whole) // 2])
    code, _, err = run(capsys, source, tmp_path / "out")
    assert code == 2 and str(source) in err and "Traceback" not in err and not (tmp_path / "out").exists()
    assert "Is the file complete?" in err


def test_the_command_as_people_type_it(tmp_path):
    import subprocess
    import sys

    torch.save(state(), tmp_path / "c.pth")
    command = [
        sys.executable,
        "-m",
        "vlsm.tools.convert_cris",
        tmp_path / "c.pth",
        tmp_path / "out",
        "--config",
        CONFIG,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "out" / "model.safetensors").is_file()


def test_nothing_else_unpickles_freely():
    text = "".join(p.read_text() for p in (ROOT / "vlsm").rglob("*.py") if p.stem != "convert_cris")
    assert "jit.load" not in text and "weights_only=False" not in text and "pickle.load" not in text
