"""The host waits for the GPU where the loop reads its sums, and nowhere else in a step."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.pretended import build_driver

LARGE = 80 << 30
SMALL = 1 << 20  # bytes of GPU memory: too few to keep features or images there
SAN = ["--model", "san", "--weights", f"random:{ROOT}/tests/tiny/san.json", "--image-size", "72"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda, reason="needs the CUDA build of torch")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)")
@pytest.mark.parametrize(
    "memory, options",
    [
        (LARGE, ["--weights", "mini", "--peft", "dense", "--blocks", "2-3"]),
        (SMALL, ["--weights", "mini", "--peft", "coop", "--augment"]),
        (LARGE, [*SAN, "--peft", "full"]),
    ],
    ids=["dense", "coop, augmented, kept features in a file", "san full"],
)
def test_a_step_never_waits(tmp_path, memory, options):
    environment = dict(os.environ, LD_PRELOAD=str(build_driver(tmp_path)), CUDA_VISIBLE_DEVICES="")
    folders = ["--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path), "--dataset", "demo"]
    command = [sys.executable, "-m", "tests.pretended", str(memory), *options, *folders]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    waits = json.loads(ended.stdout.splitlines()[-1])
    # of three steps: the loop's look at its sums after the last one, and the epoch's result
    assert [wait.split()[1] for wait in waits] == ["train_epoch:"] * 2, waits
