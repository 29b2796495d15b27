"""A run of two processes of which one is killed goes on with --resume to the same end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, rows, same_tensors
from tests.system.test_parallel import SINGLE, losses, options, torchrun


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children of a process are read in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_after_one_of_two_processes_was_killed(quick, tmp_path, rank):
    argv = options(quick, "--epochs", 5, "--augment", "--cache-dir", tmp_path / "cache")
    code, _, err = torchrun("train", *argv, "--out", tmp_path / "whole")
    assert code == 0, err
    parts = tmp_path / "parts"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]
    command += [ROOT / "train.py", *argv, "--device", "cpu", "--out", parts]
    with subprocess.Popen(list(map(str, command)), env=SINGLE, cwd=ROOT) as agent:
        while not (parts / "log.csv").exists() and agent.poll() is None:
            time.sleep(0.02)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(workers[rank]), signal.SIGKILL)
        assert agent.wait(120) == 1, "torchrun ends the other process, too"
    assert 1 <= len(rows(parts / "log.csv")) < 5
    code, said, err = torchrun("train", "--out", parts, "--resume")
    assert code == 0 and "Resuming" in said, err
    assert losses(parts) == losses(tmp_path / "whole")
    assert same_tensors(parts / "last.safetensors", tmp_path / "whole" / "last.safetensors")
