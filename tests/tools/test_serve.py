"""The page to try prompts on: what it computes, whom it answers, and the page itself if gradio is installed."""

import asyncio
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from vlsm.data.images import read_image, read_mask, read_target
from vlsm.metrics import dsc
from vlsm.results.predict import load_predictors
from vlsm.segment import image_logits
from vlsm.tools.serve import NEEDS, ask, build_page, own_page, read_upload, run_examples, save, show


@pytest.fixture
def runs(trained):
    return {str(trained): load_predictors([trained], device="cpu")[0]}


@pytest.fixture
def answer(runs, trained, folder, tmp_path):
    """Ask the run for prompts on one of the data set's images, uploaded as `frame 1.png`."""

    def answer(text, example=None, file=folder / "images" / "d30.png"):
        return ask(runs, tmp_path, str(trained), (str(file), "frame 1.png"), text, example)

    return answer


def test_everything_is_of_the_threshold(answer, runs, trained, folder, tmp_path, monkeypatch):
    kept, probabilities = answer("red disk")
    assert probabilities.endswith("/frame-1_probability.png") and Image.open(probabilities).width > 200
    monkeypatch.setattr(type(runs[str(trained)]), "logits", None)  # no other pass of the network
    model = vlsm.load(trained / "best.safetensors")
    image = read_image(folder / "images" / "d30.png")
    sizes = set()
    for threshold in (0.05, 0.5, 0.9):
        result, legend, (file,) = show(tmp_path, kept, threshold)
        assert file.endswith("/frame-1_red-disk_mask.png")
        mask = read_mask(file)
        assert (mask == model.predict(image, "red disk", threshold)).all()
        assert f"red disk: {100 * mask.mean():.1f} % of the image" in legend
        changed = (read_image(result) != image).any(2)
        assert (changed == mask).all()
        sizes.add(mask.sum())
    assert len(sizes) == 3


def test_several_prompts_in_colours(answer, tmp_path, monkeypatch):
    passes = []

    def counted(model, images, prompts):
        passes.append((len(images), prompts))
        return image_logits(model, images, prompts)

    monkeypatch.setattr("vlsm.results.predict.image_logits", counted)
    kept, _ = answer(" a disk;<b>,; a disk\nred disk, below;; ")
    assert passes == [(1, ["a disk", "<b>,", "red disk, below"])]
    _, legend, files = show(tmp_path, kept, 0.3)
    assert len(files) == len(set(re.findall("#[0-9a-f]{6}", legend))) == 3
    assert "&lt;b&gt;,: " in legend and "names none of that" in legend and "DSC" not in legend
    assert answer("a;b;c;d;e;f;g") == answer(" ; ") == (NEEDS, None)
    assert show(tmp_path, NEEDS, 0.5) == (None, NEEDS, None)


def test_names_of_files_fit_the_disk(tmp_path):
    def write(path):
        Path(path).write_bytes(b"")

    assert save(write, tmp_path, "a b", "../c", "mask").endswith("/a-b_c_mask.png")
    assert Path(save(write, tmp_path, "息" * 99, "肉" * 99, "mask")).is_file(), "letters of three bytes"


def test_an_example_shows_its_truth(answer, runs, trained, tmp_path):
    record, prompt = run_examples(runs[str(trained)])[0]
    truth = torch.from_numpy(read_target(record.mask))
    kept, _ = answer(prompt, (str(record.image), truth, prompt), record.image)
    result, legend, (file,) = show(tmp_path, kept, 0.4)
    score = dsc(torch.from_numpy(read_mask(file))[None], truth[None]).item()
    assert f"DSC {100 * score:.1f} %" in legend and f"the truth of “{prompt}”" in legend
    inside = truth.numpy() == 1
    plain, _, _ = show(tmp_path, (*kept[:4], None, "", ""), 0.4)
    outline = (read_image(result) != read_image(plain)).any(2)
    assert outline.any() and not outline[~inside].any() and outline.sum() < 0.9 * inside.sum()
    kept, _ = answer(prompt, ("another upload", truth, prompt))
    assert "DSC" not in show(tmp_path, kept, 0.4)[1]


def test_uploads_go_through_the_one_reader(answer, folder, tmp_path):
    deep = np.linspace(0, 3000, 600).reshape(20, 30).astype(np.uint16)
    pixels = Image.open(folder / "images" / "d30.png")
    exif = pixels.getexif()
    exif[0x112] = 6
    files = {"deep.png": (Image.fromarray(deep), {}), "turned.jpg": (pixels, {"exif": exif})}
    for mode, name in (("CMYK", "print.tif"), ("P", "palette.png"), ("LA", "alpha.png")):
        files[name] = (pixels.convert(mode), {})
    for name, (image, settings) in files.items():
        image.save(tmp_path / name, **settings)
        assert (read_upload(tmp_path / name, name) == read_image(tmp_path / name)).all()
    assert read_upload(tmp_path / "turned.jpg", "").shape == (60, 44, 3)


def test_what_is_no_image_is_a_sentence(answer, tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(data, "PNG")
    bomb = data.getvalue()[:2000]  # refused before its pixels are read: they are missing
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for content, reason in ((bomb, "16 megapixels"), (b"\x89PNG\r\n", "damaged"), (program, "is no PNG")):
        (tmp_path / "upload").write_bytes(content)
        sentence, nothing = answer("disk", file=tmp_path / "upload")
        assert sentence.startswith("'frame 1.png' cannot be used: ") and reason in sentence
        assert str(tmp_path) not in sentence and nothing is None
        assert show(tmp_path, sentence, 0.5)[0] is None
    assert "deleted" in answer("disk", file=tmp_path / "missing")[0]


def test_examples_are_of_the_test_split(runs, trained, folder):
    predictor = runs[str(trained)]
    examples = run_examples(predictor)
    assert len(examples) == 6 and all("disk" in prompt for _, prompt in examples)
    assert examples[0][0].name == "d30.png"
    folder.rename(folder.with_name("moved"))
    assert run_examples(predictor) == []


def test_runs_share_one_base(cli, quick, trained, tmp_path):
    at = quick.index("--dim")
    options = [*quick[:at], *quick[at + 2 : -1], tmp_path / "lora"]
    assert cli("train", *options, "--peft", "lora", "--epochs", 1)[0] == 0
    predictors = load_predictors([trained, tmp_path / "lora"], device="cpu")
    first, second = (dict(predictor.model.network.named_parameters()) for predictor in predictors)
    assert all(first[name] is second[name] for name in first)


def test_without_gradio(cli, trained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, _, err = cli("vlsm.tools.serve", trained)
    assert code == 2 and "pip install --upgrade gradio" in err


@pytest.mark.parametrize(
    "host, origin, allowed",
    [
        ("127.0.0.1:7860", None, True),
        ("LocalHost:7860", "http://LocalHost:7860", True),
        ("[::1]:7860", None, True),
        ("lab.example", "https://lab.example", True),
        ("evil.example:7860", None, False),
        ("127.0.0.1.evil.example", None, False),
        ("", None, False),
        ("127.0.0.1:7860", "http://evil.example", False),
        ("127.0.0.1:7860", "null", False),
    ],
)
def test_other_sites_are_refused(host, origin, allowed):
    pytest.importorskip("starlette")
    answers = []

    async def app(scope, receive, send):
        answers.append(200)

    async def send(message):
        answers.append(message.get("status"))

    headers = [(b"host", host.encode())]
    if origin:
        headers.append((b"origin", origin.encode()))
    guarded = own_page(app, "lab.example")
    asyncio.run(guarded({"type": "http", "headers": headers}, None, send))
    assert answers[0] == (200 if allowed else 403)
    answers.clear()
    asyncio.run(guarded({"type": "lifespan"}, None, send))
    assert answers == [200]


def test_the_page(runs, trained):
    gradio = pytest.importorskip("gradio")
    page = build_page(gradio, runs, run_examples(runs[str(trained)]))
    blocks = {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}
    upload = gradio.data_classes.ImageData(path="a/b.png", orig_name="frame.png")
    assert blocks["image"].preprocess(upload) == ("a/b.png", "frame.png")
    assert blocks["image"].preprocess(None) is None
    assert len(blocks["examples of the test split"].value) == 6
    assert not page.get_api_info()["named_endpoints"] and not page.get_api_info()["unnamed_endpoints"]
    changes = [
        f for f in page.fns.values() if (blocks["threshold of the probability"]._id, "change") in f.targets
    ]
    assert [output.label for output in changes[0].outputs] == ["result", None, "masks at this threshold"]
