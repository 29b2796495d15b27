"""Two processes over gloo give what one gives: losses, weights, metrics, files; and go on where the other number stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, rows
from vlsm.data.augment import augment
from vlsm.system import parallel

SINGLE = dict(os.environ, OMP_NUM_THREADS="1")


def torchrun(program, *argv, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
        "--standalone",
    ]
    command += [ROOT / f"{program}.py", *map(str, argv), "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SINGLE, cwd=ROOT
    ) as running:
        try:
            said, err = running.communicate(timeout=240)
        finally:
            running.terminate()  # processes that wait for each other; it ends its own
    return running.returncode, said, err


def losses(out):
    return [
        [float(row[k]) for k in ("train_loss", "train_dsc", "val_loss", "val_dsc", "val_iou")]
        for row in rows(out / "log.csv")
    ]


def options(quick, *more):
    """Batches of 7 of 24 records: parts of 4 and 3, and at the end 2 and 1. (Of 11 by three: at the end 1, 1 and none.)"""
    at = quick.index("--batch-size")
    size = [] if "--batch-size" in more else ["--batch-size", 7]
    return [*quick[:at], *size, *quick[at + 2 : -2], *more]


CASES = [
    pytest.param(["--batch-size", 11], 3, marks=pytest.mark.slow),
    pytest.param(["--augment"], 2, marks=pytest.mark.slow),
    # (a seed under which no gradient lies so near zero that Adam's sign depends on its rounding)
    pytest.param(["--batch-size", 2, "--seed", 1], 2, marks=pytest.mark.slow),
    (["--peft", "shallow"], 2),
]


@pytest.mark.parametrize("more, processes", CASES)
def test_several_processes_train_as_one(cli, quick, tmp_path, more, processes):
    argv = options(quick, "--epochs", 2, *more)
    code, said, err = torchrun(
        "train",
        *argv,
        "--out",
        tmp_path / "two",
        "--cache-dir",
        tmp_path / "cache",
        processes=processes,
    )
    assert code == 0, err
    assert (
        said.count("epoch   2/2") == 1
        and err.count("Gradients of the first step") + said.count("Gradients of the first step") == 1
    )
    assert cli("train", *argv, "--out", tmp_path / "one")[0] == 0
    assert len(list((tmp_path / "cache").glob("*-train-*"))) == 1
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-2, msg=name)


def test_metrics_are_exactly_those_of_one_process(cli, quick, trained, tmp_path):
    argv = [
        "--ckpt",
        trained,
        "--batch-size",
        2,
        "--figure",
        3,
    ]  # 6 records: two batches for one process, one for the other
    code, said, err = torchrun(
        "evaluate", *argv, "--out", tmp_path / "two", "--save-masks", tmp_path / "masks2"
    )
    assert code == 0, err
    assert said.count("records: 6;") == 1
    assert cli("evaluate", *argv, "--out", tmp_path / "one", "--save-masks", tmp_path / "masks1")[0] == 0
    for name in ("metrics.csv", "figure.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one == two
    masks = [
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.png")} for name in ("masks1", "masks2")
    ]
    assert len(masks[0]) == 6 and masks[0] == masks[1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(cli, quick, tmp_path):
    argv = options(quick, "--epochs")
    assert cli("train", *argv, 3, "--out", tmp_path / "straight")[0] == 0
    assert cli("train", *argv, 1, "--out", tmp_path / "parts")[0] == 0
    code, _, err = torchrun("train", "--out", tmp_path / "parts", "--resume", "--epochs", 2)
    assert code == 0, err
    assert cli("train", "--out", tmp_path / "parts", "--resume", "--epochs", 3)[0] == 0
    for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
def test_statistics_that_move_are_those_of_all(cli, tmp_path, folder):
    """The first BatchNorm's running mean is a mean over pictures: of two equal shares, whose statistics are averaged, as of the whole."""
    weights = f"random:{ROOT / 'tests' / 'tiny' / 'cris.json'}"
    argv = [
        "--model",
        "cris",
        "--weights",
        weights,
        "--dataset",
        folder,
        "--image-size",
        64,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--lr",
        0,
    ]
    code, _, err = torchrun("train", *argv, "--out", tmp_path / "two")
    assert code == 0, err
    assert cli("train", *argv, "--out", tmp_path / "one")[0] == 0
    one, two = (
        load_file(tmp_path / name / "last.safetensors")["backbone.visual.bn1.running_mean"]
        for name in ("one", "two")
    )
    assert one.any()
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


def test_mistakes_are_sentences(cli, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 16)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    code, _, err = cli("train", *quick)
    assert code == 2 and "--batch-size 8" in err and "16 processes" in err
    assert not (tmp_path / "run").exists()


def test_pictures_without_truth_are_shared_out(cli, folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "shut_down", lambda: None)
    monkeypatch.setattr(parallel, "barrier", lambda: None)
    written = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        argv = [
            "--images",
            folder / "images",
            "--prompt",
            "polyp",
            "--save-masks",
            tmp_path / str(rank),
            "--batch-size",
            7,
        ]
        code, _, err = cli("evaluate", "--ckpt", trained, *argv)
        assert code == 0, err
        written.append({p.name for p in (tmp_path / str(rank)).glob("*.png")})
    assert not written[0] & written[1] and written[0] | written[1] == {
        p.name for p in (folder / "images").iterdir()
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_a_killed_torchrun_takes_its_processes_along(quick, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += [
        "--standalone",
        ROOT / "train.py",
        *map(str, options(quick, "--epochs", 999, "--patience", 999)),
    ]
    command += ["--device", "cpu", "--out", tmp_path / "out"]
    with subprocess.Popen(command, env=SINGLE, cwd=ROOT) as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
        while not (tmp_path / "out" / "log.csv").exists() and agent.poll() is None:
            time.sleep(0.1)
        workers = children.read_text().split()
        agent.kill()
    assert len(workers) == 2
    running = workers
    for _ in range(50):  # a killed process may be a zombie until its new parent looks
        running = [pid for pid in running if is_running(pid)]
        time.sleep(0.1 if running else 0)
    for pid in running:
        os.kill(int(pid), signal.SIGKILL)
    assert not running


def is_running(pid):
    """Tell whether a process of this number is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        parallel.dist, "init_process_group", lambda *args, **options: started.append((args, options))
    )
    monkeypatch.setattr(parallel.ctypes, "CDLL", lambda name: Mock())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.join_processes("auto") == "cuda:1"
    [(backend, options)] = started
    assert backend == ("nccl",) and options["device_id"] == torch.device("cuda:1")
    assert options["timeout"] > timedelta(hours=1), "the others wait for a download"
    with pytest.raises(ValueError, match="--device cuda:0: each of several processes"):
        parallel.join_processes("cuda:0")


def test_bf16_is_not_emulated(monkeypatch):
    """A T4 has no matrix units for it, and torch says that it is supported all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(1))
    assert parallel.choose_device("cuda", "auto") == (torch.device("cuda"), torch.float16)
    with pytest.raises(ValueError, match="--amp bf16: Tesla T4 only emulates it"):
        parallel.choose_device("cuda", "bf16")
    assert parallel.choose_device("cpu", "bf16")[1] == torch.bfloat16


def test_a_gpu_without_code_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    absent = Mock(side_effect=RuntimeError("no kernel image is available for execution on the device"))
    monkeypatch.setattr(torch, "ones", lambda *size, device: Mock(add_=absent))
    with pytest.raises(ValueError, match="--device cuda is not available .no kernel image"):
        parallel.choose_device("auto", "auto")


def test_one_process_needs_nothing():
    assert (parallel.world_size(), parallel.rank(), parallel.join_processes("auto")) == (1, 0, "auto")
    assert parallel.share_batch([3, 1, 2]) == [([3, 1, 2], 3, 1.0, slice(0, None, 1), 3)]
    parts = [(p.indices, p.weight, p.part) for p in parallel.share_batch([3, 1, 2], 2)]
    assert parts == [([3, 2], 2 / 3, slice(0, None, 2)), ([1], 1 / 3, slice(1, None, 2))]
    alone = [(p.indices, p.count, p.weight) for p in parallel.share_batch([7], 2)]
    assert alone == [([7], 1, 1.0)], "no part is empty in every process"
    assert parallel.own_batches(["a", "b"]) == [(0, "a"), (1, "b")]
    tensor = torch.randn(3)
    before = tensor.clone()
    parallel.all_reduce_mean([tensor])
    assert torch.equal(tensor, before) and parallel.all_reduce_sum([1.5, 2], None) == [1.5, 2]
    assert parallel.gather_sorted([(1, "b"), (0, "a")]) == [(0, "a"), (1, "b")]


def test_a_part_of_a_batch_is_augmented_as_in_the_whole():
    pixels, masks = (
        torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8),
        torch.randint(0, 2, (7, 1, 16, 16), dtype=torch.uint8),
    )
    whole = augment(pixels, masks, torch.Generator().manual_seed(3))
    assert 0 < whole[2].sum() < 7
    for k in (0, 1, 2):
        part = slice(k, None, 3)
        found = augment(pixels[part], masks[part], torch.Generator().manual_seed(3), 7, part)
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole))
