"""Fixtures: a small data set on disk, and the command line run in this process."""

import csv
import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import datasets
from vlsm.data.images import mask_image, read_mask
from vlsm.data.normalise import normalise as normalise_images
from vlsm.networks.base import IMAGENET_MEAN, IMAGENET_STD
from vlsm.system.console import friendly_errors

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several tests at a time: a thread each, and so their child processes
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Pixel values by CLIPSeg's mean and deviation, unless others are given."""
    return normalise_images(images, mean, std)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def close(a, b, atol=3e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def tiny_batch(n=3, side=64):
    """Pictures, and prompts of the embedded tokenizer, for the networks in tests/tiny."""
    torch.manual_seed(1)
    ids = torch.randint(0, 990, (n, 6))
    ids[:, 5] = 994
    return torch.randn(n, 3, side, side), ids


def without_dim(options):
    at = options.index("--dim")
    return options[:at] + options[at + 2 :]


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def same_tensors_nearly(a, b, **bars):
    """The last checkpoints of two runs agree."""
    a, b = (load_file(run / "last.safetensors") for run in (a, b))
    assert list(a) == list(b)
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, msg=name, **bars)


@pytest.fixture
def graphs(monkeypatch):
    """`--compile on` without building C++, which takes minutes; what torch counts of its graphs."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how)
    )
    monkeypatch.setattr(shutil, "which", lambda name: name)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def disk(rng, h, w):
    """A picture with a bright disk, and the disk's mask."""
    y, x = np.mgrid[:h, :w]
    cy, cx, r = rng.uniform(0.3, 0.7) * h, rng.uniform(0.3, 0.7) * w, rng.uniform(0.15, 0.25) * min(h, w)
    mask = np.hypot(y - cy, x - cx) < r
    image = rng.integers(0, 90, (h, w, 3)).astype(np.uint8)
    image[mask] = (220, 60, 50)
    return image, mask


def write_pair(root, stem, image, mask):
    for part, pixels in (("images", image), ("masks", mask.astype(np.uint8) * 255)):
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / f"{stem}.png")


@pytest.fixture
def folder(tmp_path):
    """A data set in MedVLSM's layout: 24 training, 6 validation and 6 test pictures of 60 x 44."""
    root, rng, n = tmp_path / "disks", np.random.default_rng(0), 0
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        entries = []
        for _ in range(count):
            write_pair(root, f"d{n}", *disk(rng, 44, 60))
            prompts = {"p0": "", "p1": "disk", "p2": "red disk", "p3": ["one red disk", "a red disk"]}
            entries.append(
                dict(img_name=f"d{n}.png", mask_name=f"d{n}.png", prompts=prompts, bbox=[1, 2, 3, 4])
            )
            n += 1
        (root / "anns").mkdir(exist_ok=True)
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries))
    return root


def write_demo(root):
    """Write the demo in MedVLSM's layout."""
    for part in ("images", "masks", "anns"):
        (root / part).mkdir(parents=True)
    for split in datasets.SPLITS:
        entries = []
        for record in datasets.records("demo", split):
            Image.fromarray(record.image).save(root / "images" / record.name)
            file = root / "masks" / record.mask_name
            file.parent.mkdir(exist_ok=True)
            mask_image(read_mask(record.mask)).save(file)
            entries.append(dict(img_name=record.name, mask_name=record.mask_name, prompts=record.prompts))
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries, indent=1))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo data set as files: drawing it takes seconds."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return folder


@pytest.fixture
def cli(capsys):
    """Run `train` or `evaluate` with arguments as a user would: (exit code, stdout, stderr)."""

    def run(program, *argv):
        main = importlib.import_module(program).main
        capsys.readouterr()
        code = 0
        try:
            with friendly_errors():
                main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def quick(folder, tmp_path):
    """Arguments of a small run on the folder, with the mini base at half its size."""
    return [
        "--dataset",
        folder,
        "--weights",
        "mini",
        "--image-size",
        48,
        "--batch-size",
        8,
        "--dim",
        8,
        "--out",
        tmp_path / "run",
    ]


@pytest.fixture
def trained(cli, quick, tmp_path):
    code, _, err = cli("train", *quick, "--epochs", 2)
    assert code == 0, err
    return tmp_path / "run"


def folder_of_golden(case, folder):
    """A golden case's network as a folder for --weights."""
    path = GOLDEN / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = file.metadata()["config"]
    folder.mkdir()
    (folder / "config.json").write_text(config)
    tensors = {
        name.removeprefix("param."): t for name, t in load_file(path).items() if name.startswith("param.")
    }
    save_file(tensors, folder / "model.safetensors")
    return folder
