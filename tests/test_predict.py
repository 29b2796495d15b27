"""`model.predict`, several prompts of one image on the command line, and one encoding for all of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from tests.conftest import close
from vlsm.data.images import read_image, read_mask
from vlsm.networks.clipseg import CLIPSeg
from vlsm.results.predict import Ensemble, Predictor, class_colours, clean_mask, prompt_folders
from vlsm.segment import prompt_notice
from vlsm.system import console

PROMPTS = ["red disk", "a disk", "the dark ground"]


@pytest.fixture
def model(trained):
    return vlsm.load(trained)


@pytest.fixture
def encodings(monkeypatch):
    """The numbers of images that the image encoder was called with."""
    counts = []
    encode = CLIPSeg.encode_image

    def counted(self, pixel_values, *rest):
        counts.append(len(pixel_values))
        return encode(self, pixel_values, *rest)

    monkeypatch.setattr(CLIPSeg, "encode_image", counted)
    return counts


def predictor_of(model, mirror=False):
    return Predictor(model, mirror)


# In Python


def test_predict_gives_the_masks_of_evaluate(cli, trained, model, folder, tmp_path):
    file = folder / "images" / "d31.png"
    code, _, err = cli(
        "evaluate",
        "--ckpt",
        trained,
        "--images",
        file,
        "--prompt",
        "red disk",
        "--save-masks",
        tmp_path / "m",
    )
    assert code == 0, err
    mask = model.predict(file, "red disk")
    assert mask.dtype == bool and mask.shape == (44, 60) and mask.any()
    assert (mask == read_mask(tmp_path / "m" / "d31.png")).all()
    probability = model.predict(file, "red disk", probability=True)
    assert probability.dtype == np.float32 and probability.shape == (44, 60)
    assert ((probability > 0.5) == mask).all()
    wide = model.predict(str(file), "red disk", threshold=0.1)
    assert (wide == (probability > 0.1)).all() and wide.sum() > mask.sum()


def test_predict_of_a_list_is_a_label_map(model, folder, encodings):
    file = folder / "images" / "d31.png"
    labels = model.predict(file, PROMPTS, threshold=0.3)
    assert encodings == [1]
    probabilities = model.predict(file, PROMPTS, probability=True)
    assert labels.dtype == np.uint8 and labels.shape == (44, 60) and probabilities.shape == (3, 44, 60)
    expected = np.where(probabilities.max(0) > 0.3, 1 + probabilities.argmax(0), 0)
    assert (labels == expected).mean() > 0.999 and labels.any() and not labels.all()
    alone = model.predict(file, PROMPTS[1], probability=True)
    np.testing.assert_allclose(probabilities[1], alone, atol=1e-6)


def test_predict_reads_what_people_have(model, folder):
    file = folder / "images" / "d31.png"
    expected = model.predict(file, "red disk", probability=True)
    pixels = read_image(file)
    for image in (pixels, Image.fromarray(pixels), Image.open(file).convert("RGBA")):
        assert (model.predict(image, "red disk", probability=True) == expected).all()
    grey = pixels[..., 0]
    shades = [model.predict(image, "red disk") for image in (grey, Image.fromarray(grey))]
    assert (shades[0] == shades[1]).all()
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (model.predict(deep, "red disk") == shades[0]).mean() > 0.99
    for wrong in (np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))):
        with pytest.raises(ValueError, match="uint8"):
            model.predict(wrong, "red disk")
    with pytest.raises(FileNotFoundError):
        model.predict("nowhere.png", "red disk")
    for prompts, threshold in (([], 0.5), (["x"] * 256, 0.5), ("x", 1), ("x", 50)):
        with pytest.raises(ValueError, match="prompts|threshold"):
            model.predict(file, prompts, threshold)


@pytest.mark.parametrize("network", ["clipseg", "sam3"])
def test_a_built_model_predicts_and_stays_in_training(network):
    weights = "mini" if network == "clipseg" else f"random:tests/tiny/{network}.json"
    model = vlsm.build(network, weights, "dense").train()
    image = np.random.default_rng(0).integers(0, 255, (50, 41, 3)).astype(np.uint8)
    assert model.predict(image, ["polyp", "bone"]).shape == (50, 41)
    assert model.training and model.tuner.training


def test_frozen_weights_in_half_precision(folder):
    model = vlsm.build("clipseg", "mini")
    file = folder / "images" / "d31.png"
    expected = model.predict(file, "a red circle", probability=True)
    model.place_on(torch.device("cpu"), torch.bfloat16)
    np.testing.assert_allclose(model.predict(file, "a red circle", probability=True), expected, atol=0.05)


def test_a_strange_prompt_is_noticed_once(model, folder, capsys, monkeypatch):
    monkeypatch.setattr(console, "_printed", set())
    model.metadata["class_words"] = ["polyp"]
    for _ in range(2):
        model.predict(folder / "images" / "d31.png", "a tumour")
    model.predict(folder / "images" / "d31.png", "Polyps")
    assert capsys.readouterr().err.count("trained on 'polyp'") == 1
    assert "'ear'" in prompt_notice(dict(class_words=["ear"]), ["heart", "ear"])
    assert not prompt_notice({}, ["heart"]) and not prompt_notice(dict(class_words=[]), ["heart"])


def test_names_of_the_package():
    assert {"build", "load", "metrics", "dice_bce_loss"} <= set(dir(vlsm))


# One encoding


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("members", [1, 2])
def test_many_prompts_are_as_many_passes(trained, model, encodings, mirror, members):
    predictor = predictor_of(model, mirror)
    if members > 1:
        other = vlsm.load(trained)
        with torch.no_grad():
            for tensor in other.tuner.parameters():
                tensor.add_(0.05)
        predictor = Ensemble([predictor, predictor_of(other, mirror)])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (2, 3, 48, 48), dtype=torch.uint8, generator=generator)
    prompts = [*PROMPTS, "disk on the left"]
    found = predictor.logits(images, prompts * 2).sigmoid().view(2, 4, 48, 48)
    assert encodings == [2] * members * (1 + mirror)
    for k, prompt in enumerate(prompts):
        close(found[:, k], predictor.logits(images, [prompt] * 2).sigmoid()[:, 0], 1e-6)


def test_all_prompts_and_the_audit_encode_an_image_once(cli, trained, encodings, tmp_path):
    code, _, err = cli("evaluate", "--ckpt", trained, "--all-prompts", "--batch-size", 8)
    assert code == 0 and encodings == [2, 2, 2], err
    together = json.loads((trained / "eval-test" / "prompts.json").read_text())["prompts"]
    for key, summary in together.items():
        code, _, err = cli("evaluate", "--ckpt", trained, "--prompts", key, "--out", tmp_path / key)
        assert code == 0, err
        alone = json.loads((tmp_path / key / "metrics.json").read_text())
        for metric in ("dsc", "iou", "nsd", "brier"):
            assert summary[metric]["mean"] == pytest.approx(alone[metric]["mean"], abs=1e-6)
    encodings.clear()
    assert cli("vlsm.tools.audit", trained)[0] == 0 and sum(encodings) == 6


# --images


@pytest.fixture
def segment(cli, trained, folder, tmp_path):
    """Run evaluate.py on three images; returns (exit code, stdout, stderr)."""
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    for name, source in (("x.png", "d30"), ("a/y.jpg", "d31"), ("z.bmp", "d32")):
        Image.open(folder / "images" / f"{source}.png").save(photos / name)

    def run(*options):
        return cli("evaluate", "--ckpt", trained, "--images", photos, *options)

    return run


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))


TWO = ("--prompt", "red disk", "--prompt", "a disk: of grey?")


def test_a_folder_for_each_prompt(segment, tmp_path, encodings):
    out, deep = tmp_path / "out", tmp_path / "deep"
    code, said, err = segment(*TWO, "--save-masks", out, "--save-probabilities", deep)
    assert code == 0 and f"Wrote masks to '{out}': 6" in said and sum(encodings) == 3, err
    names = [f"{prompt}/{name}" for prompt in ("a-disk-of-grey", "red-disk") for name in ("a/y", "x", "z")]
    assert files_in(out) == files_in(deep) == [f"{name}.png" for name in names]
    one = tmp_path / "one"
    assert segment(*TWO[:2], "--save-masks", one, "--save-probabilities", tmp_path / "p")[0] == 0
    assert files_in(one) == files_in(tmp_path / "p") == ["a/y.png", "x.png", "z.png"]
    for name in files_in(one):
        mask = read_mask(out / "red-disk" / name)
        assert (mask == read_mask(one / name)).mean() > 0.999
        probability = np.asarray(Image.open(deep / "red-disk" / name)) / 65535
        assert ((probability > 0.5) == mask).mean() > 0.999 and 0.1 < probability.max() <= 1


def test_label_maps(segment, model, tmp_path):
    out = tmp_path / "maps"
    options = [*TWO, "--label-map", "--threshold", 0.3, "--overlay", "--save-masks", out]
    code, said, err = segment(*options)
    assert code == 0 and f"Wrote label maps to '{out}': 3" in said, err
    names = {"background": 0, "red disk": 1, "a disk: of grey?": 2}
    assert json.loads((out / "dataset.json").read_text()) == {"labels": names}
    picture = Image.open(out / "x.png")
    assert picture.mode == "P" and picture.size == (60, 44) and (out / "x.overlay.png").is_file()
    assert picture.getpalette()[:9] == [0, 0, 0, 0, 114, 178, 230, 159, 0]
    labels = model.predict(tmp_path / "photos" / "x.png", list(names)[1:], threshold=0.3)
    assert (np.asarray(picture) == labels).mean() > 0.999 and labels.any()
    assert segment(*options)[0] == 0, "our own files are replaced"
    (out / "dataset.json").write_text("{}")
    code, _, err = segment(*options)
    assert code == 2 and "dataset.json' exists" in err and (out / "dataset.json").read_text() == "{}"
    code, _, err = segment(*TWO, "--label-map", "--upsample", "mask", "--save-masks", tmp_path / "nearest")
    assert code == 0 and Image.open(tmp_path / "nearest" / "x.png").size == (60, 44), err


@pytest.mark.parametrize(
    "options, word",
    [
        (("--prompt", "a b", "--prompt", "a-b"), "share the folder"),
        (("--prompt", "x", "--prompt", "x"), "share the folder"),
        (("--prompt", "x", "--prompt", "x", "--label-map"), "differ"),
        (("--prompt", "background", "--label-map"), "background"),
        (("--prompt", "x", "--prompt", ""), "--prompt"),
        (("--prompt", "x", "--figure", 3), "--figure"),
        (("--prompt", "x", "--all-prompts"), "--all-prompts"),
    ],
)
def test_what_is_refused(segment, tmp_path, options, word):
    code, _, err = segment(*options, "--save-masks", tmp_path / "out")
    assert code == 2 and word in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--prompt", "x"), ("--label-map",), ("--threshold", 0.3), ("--overlay",)]
)
def test_options_of_images_alone(cli, trained, option):
    code, _, err = cli("evaluate", "--ckpt", trained, *option)
    assert code == 2 and option[0] in err and "--images" in err


def test_pieces_of_a_mask():
    mask = np.zeros((9, 12), bool)
    mask[:3, :3] = True
    mask[3, 3] = True  # touches at a corner
    mask[6:8, 6:8] = True
    mask[0, 11] = True
    assert clean_mask(mask, min_area=2).sum() == 14 and clean_mask(mask, min_area=5).sum() == 10
    largest = clean_mask(mask, keep_largest=True)
    assert largest.sum() == 10 and largest[3, 3] and (clean_mask(mask) == mask).all()
    assert not clean_mask(mask, True, 11).any()
    empty = np.zeros((4, 4), bool)
    assert not clean_mask(empty, keep_largest=True).any()


def test_masks_and_metrics_are_cleaned(cli, segment, trained, tmp_path):
    out = tmp_path / "out"
    options = ("--out", out, "--save-masks", out, "--min-area", 44 * 60 + 1)
    code, _, err = cli("evaluate", "--ckpt", trained, *options)
    assert code == 0 and json.loads((out / "metrics.json").read_text())["dsc"]["mean"] == 0, err
    assert not any(read_mask(out / f"d3{k}.png").any() for k in range(6))
    masks = tmp_path / "masks"
    assert segment(*TWO, "--save-masks", masks, "--keep-largest")[0] == 0
    for name in files_in(masks):
        mask = read_mask(masks / name)
        assert (clean_mask(mask, keep_largest=True) == mask).all()
    maps = tmp_path / "maps"
    assert segment(*TWO, "--label-map", "--save-masks", maps, "--min-area", 44 * 60 + 1)[0] == 0
    assert not np.asarray(Image.open(maps / "x.png")).any()


def test_a_strange_prompt_in_images(segment, trained, tmp_path):
    code, _, err = segment("--prompt", "green cross", "--save-masks", tmp_path / "out")
    assert code == 0 and err.count("trained on 'disk'") == 1
    assert segment("--prompt", "disks", "--save-masks", tmp_path / "out")[2] == ""


def test_names_and_colours(tmp_path):
    assert prompt_folders("out", ["Leber", "läsion 2"])[1].name == "läsion-2"
    assert prompt_folders("out", ["..", "a/../b"])[0].name == "prompt"
    assert len(prompt_folders("out", ["x" * 300, "y"])[0].name) <= 60
    colours = class_colours(16)
    assert len(set(map(tuple, colours))) == 16 and colours[1].tolist() == [230, 159, 0]
