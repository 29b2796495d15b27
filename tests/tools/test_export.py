"""ONNX files: ONNX Runtime gives what the model gives, for any number of images, whatever was tuned."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from tests.conftest import ROOT, normalise
from vlsm.data.images import read_mask
from vlsm.tools.export import to_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxscript onnxruntime")
IMAGES = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)


def run(path, pixels):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": pixels.float().numpy()})[0]), session


@pytest.mark.parametrize(
    "name, weights, method",
    [
        pytest.param("clipseg", "mini", "dense+vpt+cocoop", marks=pytest.mark.slow),
        pytest.param("cris", None, "full", marks=pytest.mark.slow),
        pytest.param("san", None, "full", marks=pytest.mark.slow),
    ],
)
def test_what_is_exported_is_the_model(tmp_path, name, weights, method):
    model = vlsm.build(name, weights or f"random:{ROOT / 'tests' / 'tiny' / name}.json", method).eval()
    with torch.no_grad():
        for p in model.tuned_parameters().values():
            p += 0.01 * torch.randn_like(p)
        pixels = normalise(IMAGES, mean=model.network.mean, std=model.network.std)
        want = {prompt: model(pixels, *model.tokenizer()([prompt] * 5)) for prompt in ("a red disk", "polyp")}
    gap = to_onnx(model, "a red disk", 64, tmp_path / "one.onnx", dict(prompt="a red disk", image_size=64))
    found, session = run(tmp_path / "one.onnx", IMAGES)
    torch.testing.assert_close(found, want["a red disk"], atol=1e-4, rtol=1e-4)
    assert gap < 1e-4 and (found - want["polyp"]).abs().max() > 10 * gap  # the prompt is in it
    assert session.get_modelmeta().custom_metadata_map == dict(prompt="a red disk", image_size="64")
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_what_differs_is_not_written(cli, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("vlsm.tools.export.TOLERANCE", -1)
    code, _, err = cli("vlsm.tools.export", trained, "--prompt", "red disk", "--out", tmp_path / "polyp.onnx")
    assert (
        code == 2
        and "so '" in err
        and "was not written" in err
        and not list(tmp_path.glob("*.onnx"))
        and not list(tmp_path.glob(".*.tmp"))
    )


def test_on_the_command_line(cli, folder, trained, tmp_path, monkeypatch):
    file = tmp_path / "polyp.onnx"
    argv = [trained, "--out", file]
    code, _, err = cli("vlsm.tools.export", *argv)
    assert code == 2 and "--prompt" in err
    code, said, err = cli("vlsm.tools.export", *argv, "--prompt", "red disk")
    assert (
        code == 0
        and "differ from PyTorch's by at most" in said
        and "pixels float32 [batch, 3, 48, 48]" in said
    ), err
    picture = Image.open(folder / "images" / "d1.png").resize((48, 48))
    mask = run(file, torch.from_numpy(np.asarray(picture).transpose(2, 0, 1)[None].copy()))[0][0, 0] > 0
    assert mask.shape == (48, 48)
    masks = ["--images", folder / "images" / "d1.png", "--prompt", "red disk", "--save-masks", tmp_path]
    assert cli("evaluate", "--ckpt", trained, *masks)[0] == 0
    large = np.asarray(Image.fromarray(mask.numpy()).resize(read_mask(tmp_path / "d1.png").shape[::-1]))
    assert (large == read_mask(tmp_path / "d1.png")).mean() > 0.9  # another way to make it larger and smaller
    assert (
        json.loads(run(file, IMAGES[:, :, :48, :48])[1].get_modelmeta().custom_metadata_map["image_size"])
        == 48
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = cli("vlsm.tools.export", *argv, "--prompt", "red disk")
    assert code == 2 and "pip install onnxscript onnxruntime" in err
