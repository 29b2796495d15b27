"""Nothing of a user's is lost, overwritten or misread: the readers, the guard on targets, a run's folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import datasets
from tests.conftest import ROOT
from vlsm.checkpoint import load, read_tuned
from vlsm.data.describe import components, describe
from vlsm.data.images import ImageError, image_files, read_image, read_mask
from vlsm.networks.clipseg import CLIPSegConfig
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI
from vlsm.results.scores import summarise, write_results
from vlsm.system import files
from vlsm.tools.score import score_folders
from vlsm.training.run import delete_run

BLOB = np.zeros((40, 60), np.uint8)
BLOB[10:30, 20:45] = 1


def palette(colours, numbers=BLOB):
    image = Image.fromarray(numbers, "P")
    image.putpalette(sum(map(list, colours), []))
    return image


def stencil(colour):
    return Image.fromarray(np.dstack([np.full((*BLOB.shape, 3), colour, np.uint8), BLOB * 255]))


MASKS = {
    "0 and 255": Image.fromarray(BLOB * 255),
    "0 and 1": Image.fromarray(BLOB),
    "1 bit": Image.fromarray(BLOB * 255).convert("1"),
    "16 bit": Image.fromarray(BLOB.astype(np.uint16) * 65535),
    "16 bit, 0 and 1": Image.fromarray(BLOB.astype(np.uint16)),
    "colour": Image.fromarray(np.dstack([BLOB * 255, BLOB * 0, BLOB * 0])),
    "palette by colour": palette([(0, 0, 0), (255, 255, 255)]),
    "palette by colour, turned": palette([(255, 255, 255), (0, 0, 0)], 1 - BLOB),
    "palette by number": palette([(0, 0, 0), (128, 0, 0)]),
    "LA": Image.fromarray(BLOB * 255).convert("LA"),
    "stencil, black": stencil(0),
    "stencil, white": stencil(255),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_all_kinds_are_read_alike(name, tmp_path):
    MASKS[name].save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == (BLOB > 0)).all()
    assert (read_mask((tmp_path / "m.png").read_bytes(), "m.png") == (BLOB > 0)).all()


@pytest.mark.parametrize(
    "values, named", [((0, 128, 255), "128"), ((0, 38), "38"), ((0, 1, 2), "2"), ((0, 1, 200), "200")]
)
def test_a_mask_of_other_values_is_refused(values, named, tmp_path):
    levels = np.zeros(BLOB.shape, np.uint8)
    for k, value in enumerate(values):
        levels[:, 20 * k :] = value
    Image.fromarray(levels).save(tmp_path / "three.png")
    with pytest.raises(ImageError, match=f"three.png.* also {named}"):
        read_mask(tmp_path / "three.png")


def test_noise_of_jpeg_is_no_third_value(tmp_path):
    big = np.kron(BLOB, np.ones((7, 7), np.uint8)) * 255
    Image.fromarray(big).save(tmp_path / "m.jpg", quality=75)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "m.jpg")))) > 2
    assert (read_mask(tmp_path / "m.jpg") == (big > 0)).mean() > 0.999


def test_orientation_counts(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "phone.png")))
    assert read_image(tmp_path / "phone.png").shape == (50, 30, 3)
    assert (read_image(tmp_path / "phone.png") == want).all()


def test_deep_pictures_keep_their_range(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for name, values in (("unit", ramp), ("ct", ramp * 2000 - 1000), ("byte", ramp * 255)):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        assert abs(read_image(tmp_path / f"{name}.tif")[..., 0].astype(float) - 255 * ramp).max() <= 1
    ramp[3, 3] = np.nan
    Image.fromarray(ramp).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="nan.tif.*NaN"):
        read_image(tmp_path / "nan.tif")


def test_unreadable_pictures_have_a_reason(tmp_path, monkeypatch):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    Image.fromarray(BLOB).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for data, reason in (
        (pointer, "git LFS"),
        (b"", "an empty file"),
        (b"text", "no image"),
        (whole[:80], ""),
    ):
        (tmp_path / "x.png").write_bytes(data)
        with pytest.raises(ImageError, match=f"x.png.*{reason}"):
            read_image(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="megapixels"):
        read_image(tmp_path / "whole.png")
    for name in ("._a.png", ".ipynb_checkpoints/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(whole)
    assert [p.name for p in image_files(tmp_path)] == ["whole.png", "x.png"]


def test_colours_are_named_of_coloured_pictures_alone():
    grey, red = np.full((*BLOB.shape, 3), 75, np.uint8), np.full((*BLOB.shape, 3), (190, 50, 45), np.uint8)
    assert describe(grey, BLOB > 0, "tumor")["p3"].split()[0] in ("circle", "oval", "round", "irregular")
    assert describe(red, BLOB > 0, "polyp")["p3"].startswith("red ")
    found = components(BLOB > 0)
    assert len(found) == 1 and (found[0] == (BLOB > 0)).all() and components(BLOB > 1) == []


# What may be overwritten


def test_masks_are_not_written_over_the_pictures(cli, folder, trained, tmp_path):
    before = {p: p.read_bytes() for p in (folder / "images").iterdir()}
    ask = ("evaluate", "--ckpt", trained, "--images", folder / "images", "--prompt", "x", "--save-masks")
    for more in ((), ("--overwrite",)):
        code, _, err = cli(*ask, folder / "images", *more)
        assert code == 2 and "is itself read" in err
    code, _, err = cli("evaluate", "--ckpt", trained, "--save-masks", folder / "masks", "--overwrite")
    assert code == 2 and "is itself read" in err
    out = tmp_path / "out"
    out.mkdir()
    (out / "d0.png").write_bytes(b"mine")
    code, _, err = cli(*ask, out)
    assert code == 2 and "d0.png' exists, and was not written by this program" in err
    assert (out / "d0.png").read_bytes() == b"mine" and not (out / "d1.png").exists()
    assert cli(*ask, out, "--overwrite")[0] == 0 and cli(*ask, out)[0] == 0, "our own are replaced"
    Image.fromarray(BLOB).save(out / "d1.png")  # corrected by hand
    assert "d1.png' exists" in cli(*ask, out)[2]
    assert before == {p: p.read_bytes() for p in (folder / "images").iterdir()}


def test_a_broken_picture_costs_its_own_mask_alone(cli, folder, trained, tmp_path):
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    ask = ("--images", folder / "images", "--prompt", "x", "--save-masks", tmp_path / "out")
    code, _, err = cli("evaluate", "--ckpt", trained, *ask)
    assert code == 1 and "broken.png' cannot be used: no image" in err
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list((folder / "images").iterdir())) - 1


def test_subfolders_stay_in_names(tmp_path):
    for part in ("images/p1", "images/p2", "masks/p1", "masks/p2"):
        (tmp_path / part).mkdir(parents=True)
        Image.fromarray(BLOB * 255).save(tmp_path / part / "frame.png")
    found = [r for s in datasets.SPLITS for r in datasets.records(str(tmp_path), s)]
    assert sorted(r.mask_name for r in found) == ["p1/frame.png", "p2/frame.png"]


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path, capsys):
    for name in (
        "config.json",
        "best.safetensors",
        "eval-test/mine.txt",
        "notes.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    files.write_text(tmp_path / "eval-test" / "metrics.csv", "x")
    delete_run(tmp_path)
    left = sorted(p.name for p in tmp_path.rglob("*"))
    assert left == ["config.json", "eval-test", "mine.txt", "notes.md"], "a new run replaces config.json"
    assert "also holds eval-test, notes.md" in capsys.readouterr().out


def test_nothing_of_a_users_is_replaced_without_overwrite(cli, folder, trained, tmp_path):
    assert cli("evaluate", "--ckpt", trained)[0] == 0
    table = trained / "eval-test" / "metrics.csv"
    table.write_text(table.read_text() + "my notes")
    code, _, err = cli("evaluate", "--ckpt", trained)
    assert code == 2 and "was changed since" in err and "my notes" in table.read_text()
    assert cli("evaluate", "--ckpt", trained, "--overwrite")[0] == 0 and "my notes" not in table.read_text()
    audit = trained / "eval-test" / "audit.json"
    audit.write_text("mine")
    for _ in range(2):  # a refusal allows nothing later in the same process
        code, _, err = cli("vlsm.tools.audit", trained)
        assert code == 2 and audit.read_text() == "mine", err


@pytest.mark.parametrize("program", ["export", "compare"])
def test_what_was_read_is_never_replaced(program, cli, folder, trained):
    picture = folder / "images" / "d30.png"  # of the test split
    file, argv = {
        "export": (trained / "best.safetensors", (trained, "--prompt", "disk")),
        "compare": (picture, (trained, trained)),
    }[program]
    before = file.read_bytes()
    code, _, err = cli(f"vlsm.tools.{program}", *argv, "--out", file, "--overwrite")
    assert code == 2 and f"'{file}' is itself read" in err and file.read_bytes() == before, err


def test_a_run_that_was_read_is_not_deleted(cli, quick, trained):
    load(trained)
    code, _, err = cli("train", *quick, "--epochs", 1, "--init", trained, "--overwrite")
    assert code == 2 and "best.safetensors' is itself read" in err and (trained / "state.pt").is_file()
    assert cli("train", "--out", trained, "--resume", "--epochs", 3)[0] == 0
    assert cli("train", *quick, "--epochs", 1, "--overwrite")[0] == 0, "another command did not read it"


def test_a_checkpoint_without_state_is_not_replaced(cli, trained):
    for name in ("state.pt", "log.csv", "curves.png", "last.safetensors"):
        (trained / name).unlink()
    before = (trained / "best.safetensors").read_bytes()
    code, _, err = cli("train", "--out", trained, "--resume")
    assert code == 2 and "has a best.safetensors and no state.pt" in err
    assert (trained / "best.safetensors").read_bytes() == before


def test_results_in_a_runs_own_folder_go_with_it(cli, quick, trained):
    assert cli("evaluate", "--ckpt", trained, "--out", trained)[0] == 0
    (trained / "notes.csv").write_text("mine")
    assert cli("train", *quick, "--epochs", 1, "--overwrite")[0] == 0
    assert not (trained / "metrics.csv").exists() and (trained / "notes.csv").read_text() == "mine"
    assert cli("evaluate", "--ckpt", trained, "--out", trained)[0] == 0


def test_the_ledger_is_not_written_through_a_link(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / files.LEDGER).symlink_to("../notes.txt")
    with pytest.raises(FileExistsError, match="is a link"):
        files.write_text(tmp_path / "out" / "x", "x")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "out" / "x").exists()


def test_one_place_by_two_names_is_one_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Several images would be written to"):
        files.check_targets([Path("a.png"), tmp_path / "a.png"])


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\x85b", "a\\nb"])
def test_names_with_line_breaks_are_known_again(name, tmp_path):
    for text in ("first", "second"):
        files.write_text(tmp_path / name, text)
    assert files.is_owned(tmp_path / name)


def test_links_of_a_run_lead_nowhere(cli, quick, trained, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("metrics.csv", "events.out.tfevents.1"):
        files.write_text(outside / name, "mine")
    (trained / "eval-test").symlink_to(outside)
    (trained / "tensorboard").symlink_to(outside)
    (trained / "curves.png").unlink()
    (trained / "curves.png").symlink_to(outside / "metrics.csv")
    code, _, err = cli("train", *quick, "--epochs", 1, "--overwrite")
    assert code == 0, err
    assert [(outside / name).read_text() for name in ("metrics.csv", "events.out.tfevents.1")] == ["mine"] * 2
    assert (trained / "eval-test").is_symlink() and (trained / "tensorboard").is_symlink()


def test_only_what_this_program_wrote_is_deleted(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for name in ("a.txt", "b.txt", "deep/c.txt", "deep/er/d.txt"):
        files.write_text(out / name, name)
    files.write_text(elsewhere / "e.txt", "e")
    (out / "b.txt").write_text("changed by hand")
    (out / "mine.txt").write_text("mine")
    (out / "link").symlink_to(elsewhere)
    (out / "a-link.txt").symlink_to(elsewhere / "e.txt")
    left = files.delete_owned(out)
    assert left == [out / name for name in ("a-link.txt", "b.txt", "link", "mine.txt")]
    assert sorted(out.rglob("*")) == left and (elsewhere / "e.txt").is_file()
    assert files.delete_owned(elsewhere) == [] and not elsewhere.exists()


def test_overwrite_spares_what_is_no_run(cli, quick, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "clipseg"}')
    code, _, err = cli("train", *quick, "--overwrite")
    assert code == 2 and "is not the config.json of a run" in err and (out / "config.json").is_file()


@pytest.mark.parametrize(
    "key, value, said",
    [("lr", "fast", "--lr"), ("epochs", -1, "--epochs"), ("dim", "wide", "--dim")],
)
def test_a_run_resumes_with_values_that_can_be(key, value, said, cli, trained):
    config = json.loads((trained / "config.json").read_text())
    config["options"].update({key: value, "out": "/elsewhere", "overwrite": True})
    (trained / "config.json").write_text(json.dumps(config))
    code, _, err = cli("train", "--out", trained, "--resume")
    assert code == 2 and "config.json' holds a value that no run can have" in err and said in err


def test_a_run_without_its_state_does_not_begin_anew(cli, trained):
    (trained / "state.pt").unlink()
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 9)
    assert code == 2 and "has a log.csv and no state.pt" in err


def test_changed_records_are_said(cli, folder, trained):
    names = [(r.image, r.mask) for r in datasets.records(str(folder), "train")]
    if (folder / "anns" / "train.json").is_file():
        rows = json.loads((folder / "anns" / "train.json").read_text())
        (folder / "anns" / "train.json").write_text(json.dumps(rows[1:]))
    else:
        for file in names[0]:
            Path(file).unlink()
    code, _, err = cli("train", "--out", trained, "--resume", "--epochs", 9)
    assert code == 2 and "records have changed" in err
    assert cli("train", "--out", trained, "--resume", "--epochs", 3, "--changed-data")[0] == 0


def test_a_live_run_is_left_alone(cli, trained):
    with files.locked(trained, "is writing a run into"):
        for how in ("--resume", "--overwrite"):
            code, _, err = cli("train", "--out", trained, how, "--epochs", 9)
            assert code == 2 and "Another process is writing a run into" in err


def test_tuned_tensors_are_finite(trained, tmp_path):
    tensors = load_file(trained / "best.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="nan.safetensors': NaN"):
        read_tuned(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("key, value", [("std", [0, 1, 1]), ("image_size", "big"), ("options", None)])
def test_metadata_is_checked(key, value, trained, tmp_path):
    from safetensors import safe_open

    with safe_open(trained / "best.safetensors", "pt") as file:
        about = {**file.metadata(), key: json.dumps(value)}
    save_file(load_file(trained / "best.safetensors"), tmp_path / "x.safetensors", about)
    with pytest.raises(ValueError, match=f"'metadata of .*x.safetensors': '{key}'"):
        load(tmp_path / "x.safetensors")


def test_sizes_that_cannot_be_are_refused_at_once():
    for part, key, value in (
        ("text_config", "num_hidden_layers", 10**9),
        ("vision_config", "hidden_size", "x"),
    ):
        with pytest.raises(ValueError, match=f"{part}.{key}"):
            CLIPSegConfig.from_dict({part: {key: value}})


def test_prompt_keys_are_no_paths(tmp_path):
    entry = dict(img_name="a.png", mask_name="a.png", prompts={"../../x": "polyp"})
    for part in ("images", "masks", "anns"):
        (tmp_path / part).mkdir()
    (tmp_path / "anns" / "test.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="key '../../x' should be letters"):
        datasets.records(str(tmp_path), "test")


# Names and packages


def test_file_names_that_are_no_text(tmp_path, capsys):
    odd = os.fsdecode(b"p\xff.png")
    for folder in ("pred", "target"):
        (tmp_path / folder).mkdir()
        MASKS["0 and 255"].save(tmp_path / folder / odd, format="PNG")
    scores = score_folders(tmp_path / "pred", tmp_path / "target")
    assert scores[0]["dsc"] == 1
    write_results(tmp_path, scores, summarise(scores), {})
    assert "p\\udcff.png" in (tmp_path / "metrics.csv").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        Tokenizer(MINI).encode("p\udcff")


@pytest.mark.parametrize("first", ["vlsm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_another_package_named_kernels_is_no_obstacle(first, tmp_path):
    """transformers imports names of Hugging Face's `kernels` where its metadata is found."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "from kernels.layer import get_kernel\n__version__ = '0.18.2'\n"
        "def __getattr__(name):\n"
        "    decorator = lambda *args, **how: lambda made: made\n"
        "    return decorator if name[0].islower() else type(name, (), {'__init__': lambda *args, **how: None})\n"
    )
    (tmp_path / "kernels" / "layer.py").write_text("def get_kernel(name):\n    return name\n")
    about = tmp_path / "kernels-0.18.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    second = {"vlsm": "transformers", "transformers": "vlsm"}[first]
    code = (
        f"import {first}, {second}; from transformers import CLIPSegModel; from kernels import get_kernel\n"
        "import sys; assert 'kernels.dice_bce' not in sys.modules\n"
        "assert vlsm.dice_bce_loss and get_kernel('x') == 'x'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_half_of_another_package_named_kernels_does_not_stay(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("import nothing_of_that_name\n")
    code = (
        "import kernels, sys\n"
        "for _ in range(2):\n"
        "    try:\n        kernels.get_kernel\n"
        "    except ModuleNotFoundError as error:\n        print(error.name)\n"
        "assert 'kernels.installed' not in sys.modules and len(kernels.__path__) == 1 and kernels.use_kernels"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.split() == ["nothing_of_that_name"] * 2, done.stderr[-2000:]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("vocab.json", "{", "The tokenizer in .* cannot be read"),
        ("vocab.json", "[]", "The tokenizer in .* cannot be read"),
        ("preprocessor_config.json", '{"size": "big"}', "'size' should be a side in pixels, and is 'big'"),
        ("preprocessor_config.json", '{"size": {"height": null}}', "'height' should be a side in pixels"),
        ("preprocessor_config.json", '{"size": -8}', "a side of -8 pixels"),
        ("preprocessor_config.json", "[1]", "should hold a JSON object"),
    ],
)
def test_files_beside_the_weights_are_checked(name, text, said, cli, quick, tmp_path):
    shutil.copytree(MINI, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "*.png", "*.md"))
    (tmp_path / "base" / name).write_text(text)
    options = [str(o) for o in quick]
    at = options.index("--image-size")
    options[options.index("mini")] = str(tmp_path / "base")
    code, _, err = cli("train", *options[:at], *options[at + 2 :])
    assert code == 2 and re.search(said, err), err
