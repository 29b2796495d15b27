"""Runs of several seeds in one folder."""

from tests.conftest import rows, same_tensors


def repeat(cli, quick, out, *seeds, epochs=1, more=()):
    return cli(
        "vlsm.tools.repeat", "--seeds", *seeds, "--out", out, *more, "--", *quick[:-2], "--epochs", epochs
    )


def test_each_seed_is_a_run_of_its_own(cli, quick, tmp_path):
    code, said, err = repeat(cli, quick, tmp_path / "group", 1, 2, 1)
    assert code == 0 and "All seeds are done" in said, err
    assert sorted(p.name for p in (tmp_path / "group").iterdir()) == ["seed1", "seed2"]
    assert cli("train", *quick, "--epochs", 1, "--seed", 2)[0] == 0
    assert same_tensors(
        tmp_path / "run" / "last.safetensors", tmp_path / "group" / "seed2" / "last.safetensors"
    )


def test_seeds_go_on_after_an_interruption(cli, quick, tmp_path):
    assert repeat(cli, quick, tmp_path / "group", 1, epochs=2)[0] == 0
    code, said, err = repeat(cli, quick, tmp_path / "group", 1, 2, epochs=2, more=["--resume"])
    assert code == 0 and "Resuming" in said, err
    assert all(len(rows(tmp_path / "group" / f"seed{seed}" / "log.csv")) == 2 for seed in (1, 2))
    code, _, err = repeat(cli, quick, tmp_path / "group", 1, 2)
    assert code == 2 and "exists and is not empty" in err
