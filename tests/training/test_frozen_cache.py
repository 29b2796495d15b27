"""What is computed once must be what would have been computed each time."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vlsm
from tests.conftest import normalise, rows, same_tensors, same_tensors_nearly, without_dim
from vlsm.data.cache import device_batches, open_split
from vlsm.data.records import Record
from vlsm.training import frozen_cache as frozen
from vlsm.training.frozen_cache import FeatureStore, FrozenCache

CPU = torch.device("cpu")


def wrap(method, tmp_path, cache_gb=None, **options):
    torch.manual_seed(0)
    model = vlsm.build("clipseg", "mini", method, **options)
    return cache_of(model, tmp_path, cache_gb)


def cache_of(model, folder, cache_gb=1):
    return FrozenCache(model, CPU, None, cache_gb, folder)


def cached_logits(f, name, indices, prompts, images, changed=None):
    """Logits of records by way of what is kept, as train.py has them."""
    return f.model(*f.model_inputs(name, indices, images, prompts, changed))


def split(count=11, side=32):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    records = [Record(f"{i}", f"{i}", image, image[..., 0] > 127) for i, image in enumerate(pixels)]
    return open_split([*records, records[3]], side, None, "noise")


@pytest.mark.parametrize(
    "method, options, images, prompts",
    [
        ("shallow", {}, True, True),
        ("shallow", dict(branches="v"), True, True),
        ("decoder", {}, True, True),
        ("dense", {}, False, False),
        ("dense", dict(branches="v"), False, True),
        ("dense", dict(branches="l"), True, False),
        ("dense", dict(branches="c"), True, True),
        ("coop", {}, True, False),
        ("cocoop", {}, True, False),
        ("vpt", {}, False, True),
        ("maple", {}, False, False),
        ("coop+vpt", {}, False, False),
        ("lora", dict(branches="l"), True, False),
        ("full", {}, False, False),
        ("full", dict(reference=True), True, True),
    ],
)
def test_what_is_frozen_is_found_out(tmp_path, method, options, images, prompts):
    f = wrap(method, tmp_path, **options)
    assert (f.images_frozen, f.prompts_frozen) == (images, prompts)


@pytest.mark.parametrize(
    "method, options, depth",
    [
        ("dense", dict(blocks="1-2"), 1),
        ("dense", dict(blocks="v:2-3,l:0"), 2),
        ("dense", dict(blocks="3"), 3),
        ("lora", dict(blocks="v:2,l:3"), 2),
        ("telescopic", dict(blocks="1-3"), 1),
        ("dense", dict(blocks="0-1"), 0),
        ("dense", dict(blocks="l:2"), 0),
        ("vpt", {}, 0),
        ("full", {}, 0),
        ("dense+vpt", {}, 0),
    ],
)
def test_the_first_blocks_are_computed_once(tmp_path, method, options, depth):
    """Below the first block that training changes; logits and gradients are the model's own."""
    f, data = wrap(method, tmp_path, 1, **options), split()
    assert f.depth == depth
    said = f.add_split("noise", data, 4)
    assert (said is None) == (depth == 0) and (depth == 0 or f"output of {depth} image blocks" in said)
    assert f.needs_pixels("noise") == (depth == 0)
    indices, prompts = [0, 5, 11, 3], ["a", "b", "a", "red disk"]
    images, found = data.batch(indices)[0], []
    changed = torch.tensor([False, True, False, False])
    altered = images.clone()
    altered[1] = images[1].flip(-1)
    f.model.train()
    for own in (True, False):
        f.model.zero_grad()
        torch.manual_seed(3)  # dropout
        if own:
            logits = f.model(f.normalise(altered), *f.tokenizer(prompts))
        else:
            logits = cached_logits(f, "noise", indices, prompts, altered, changed)
        logits.square().mean().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in f.model.tuned_parameters().items()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("held", [11, 4, 0])
@pytest.mark.parametrize("method", ["shallow", "dense", "cocoop"])
def test_logits_and_gradients_are_those_of_the_model(tmp_path, monkeypatch, method, held):
    options = dict(shallow=dict(branches="vlc"), dense=dict(branches="lc"), cocoop={})[method]
    f, data = wrap(method, tmp_path, 1, **options), split()
    side = data.images.shape[-1]
    # bytes of one image's activations (and features)
    image = (3 * ((side // 8) ** 2 + 1) * 128 + 96 * (method == "cocoop")) * 4
    monkeypatch.setattr(frozen, "SHARE", 1)
    monkeypatch.setattr(frozen, "free_bytes", lambda *_: (0, held * image + 7))
    assert f"kept for {held} of 11" in f.add_split("train", data, 4)
    assert f.needs_pixels("train") == (held < 11)
    indices, prompts = [5, 11, 0, 3, 9], ["red disk", "a polyp", "red disk", "", "x"]
    pixels = data.batch(indices)[0]
    want = f.model(normalise(pixels), *f.tokenizer(prompts))
    wanted = torch.autograd.grad(want.square().mean(), f.model.tuned_parameters().values())
    for given in (pixels, None)[: 1 + (held == 11)]:
        got = cached_logits(f, "train", indices, prompts, given)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for a, b in zip(
            torch.autograd.grad(got.square().mean(), f.model.tuned_parameters().values()), wanted
        ):
            assert (a - b).norm() <= 1e-4 * b.norm()
    assert not list(tmp_path.glob("activations-*")), "the file must have no name while it is in use"


@pytest.mark.parametrize("method", ["shallow", "decoder", "dense", "cocoop", "vpt"])
def test_several_prompts_of_an_image_are_those_of_the_model(tmp_path, method):
    """Only the first prompt of each image is kept; what was kept before changes no bit."""
    f, data = wrap(method, tmp_path, 1), split()
    f.add_split("train", data, 4)
    indices = [5, 0, 9]
    prompts = [
        "red disk",
        "bone",
        "one small red bone",
        "a polyp",
        "red disk",
        "cell",
        "red disk",
        "",
        "x y z",
    ]
    pixels = data.batch(indices)[0]
    want = f.model(normalise(pixels), *f.tokenizer(prompts))
    got = cached_logits(f, "train", indices, prompts, pixels)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert set(f.texts) == ({"red disk", "a polyp"} if f.prompts_frozen else set())
    f.text_features(["cell", "x y z"], ["cell", "x y z"]) if f.prompts_frozen else None
    assert torch.equal(got, cached_logits(f, "train", indices, prompts, pixels))


@pytest.mark.parametrize("method, ahead", [("shallow", [["x", "bone", "one bone"], ["bone"]]), ("dense", [])])
def test_texts_of_many_batches_are_encoded_together(tmp_path, monkeypatch, method, ahead):
    """With the features that they have alone; a prompt that comes again is kept, not encoded ahead."""
    monkeypatch.setattr(frozen, "AHEAD", 2)
    f = wrap(method, tmp_path)
    encoded = []
    encode_texts = f.encode_texts
    monkeypatch.setattr(f, "encode_texts", lambda texts: encoded.append(texts) or encode_texts(texts))
    batches = [
        ["red disk", "bone", "blue", "one bone"],
        ["blue", "x", "red disk", "bone"],
        ["blue", "bone", "blue", "bone"],
    ]
    yielded = []
    for prompts in f.encode_ahead(iter(batches), slice(None, None, 2)):
        yielded.append(prompts)
        if f.prompts_frozen:
            (got, *_), (want, *_) = f.text_features(prompts, prompts[::2]), encode(f, prompts)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert yielded == batches
    assert [texts for texts in encoded if texts not in (["red disk"], ["blue"])] == ahead


def encode(f, prompts):
    """Return the text features of prompts by the model itself."""
    return f.model.network.encode_prompts(*f.tokenizer(prompts), f.model.tuner)


def test_a_budget_holds_for_all_splits_together(tmp_path):
    data = split()
    image = 3 * 17 * 128 * 4
    f = wrap("shallow", tmp_path, cache_gb=15 * image / frozen.GB)
    f.add_split("train", data, 4)
    f.add_split("val", data, 4)
    assert f.stores["train"].held == 11 and f.stores["val"].held == 4
    assert wrap("shallow", tmp_path, cache_gb=0).add_split("train", data, 4) is None
    assert wrap("dense", tmp_path).add_split("train", data, 4) is None


def test_images_and_prompts_are_encoded_once(tmp_path, monkeypatch):
    f, data = wrap("shallow", tmp_path), split()
    seen = []
    for name in ("encode_image", "encode_text"):
        encode = getattr(f.model.network, name)
        monkeypatch.setattr(
            f.model.network,
            name,
            lambda x, *rest, encode=encode, name=name: seen.append((name, len(x))) or encode(x, *rest),
        )
    f.add_split("train", data, 4)
    assert seen == [("encode_image", 4), ("encode_image", 4), ("encode_image", 3)]
    for _ in range(3):
        cached_logits(f, "train", [1, 2, 3], ["a", "b", "a"], None)
    assert seen[3:] == [("encode_text", 1)] * 2


def test_store_of_half_precision(tmp_path):
    """Under bf16 features are kept in bf16: what the decoder would make of them anyway."""
    shapes = [(5, 4), (3, 2, 2), (8,)]
    store = FeatureStore(6, shapes, torch.bfloat16, CPU, 0, 5 * 2 * 40 + 1, tmp_path)
    values = [torch.randn(6, 5, 4), torch.randn(6, 3, 2, 2), torch.randn(6, 8)]
    store.put(0, [v[:3] for v in values])
    store.put(3, [v[3:] for v in values])
    assert store.held == 5 and store.nbytes == 400 and not store.on_gpu
    for got, value in zip(store.get(torch.tensor([4, 0, 3, 4])), values):
        assert torch.equal(got, value[[4, 0, 3, 4]].bfloat16())


def test_features_lie_on_the_gpu_if_all_fit(tmp_path):
    for count, on_gpu in ((6, True), (7, False)):
        store = FeatureStore(count, [(5, 4)], torch.float32, CPU, 6 * 80, 1 << 20, tmp_path)
        assert store.on_gpu == on_gpu and store.held == count


def test_free_memory_is_a_number_of_bytes(tmp_path):
    on_gpu, on_disk = frozen.free_bytes(CPU, tmp_path / "not" / "there")
    assert on_gpu == 0 and on_disk > 0


@pytest.mark.parametrize(
    "peft", [["shallow"], ["decoder"], ["dense", "--branches", "v"], ["dense", "--branches", "l"]]
)
def test_training_with_and_without_the_cache_agrees(cli, quick, tmp_path, peft):
    options = (without_dim(quick) if peft[0] == "decoder" else quick)[:-2]
    weights = []
    for gb in ("0", "1"):
        out = tmp_path / f"cache{gb}"
        code, said, err = cli(
            "train", *options, "--peft", *peft, "--epochs", 2, "--cache-gb", gb, "--out", out
        )
        assert code == 0, err
        assert ("output is kept for 24 of 24" in said) == (gb == "1" and peft[-1] != "v")
        weights.append(
            (load_file(out / "last.safetensors"), [float(r["val_loss"]) for r in rows(out / "log.csv")])
        )
    for name, tensor in weights[0][0].items():
        torch.testing.assert_close(weights[1][0][name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    assert weights[0][1] == pytest.approx(weights[1][1], abs=1e-5)


def test_a_cached_run_resumes_bit_for_bit(cli, quick, tmp_path):
    options = [*quick[:-2], "--peft", "shallow", "--lr", "1e-3"]
    assert cli("train", *options, "--epochs", 3, "--out", tmp_path / "straight")[0] == 0
    assert cli("train", *options, "--epochs", 1, "--out", tmp_path / "parts")[0] == 0
    code, _, err = cli("train", "--out", tmp_path / "parts", "--resume", "--epochs", 3)
    assert code == 0, err
    assert same_tensors(tmp_path / "straight" / "last.safetensors", tmp_path / "parts" / "last.safetensors")


@pytest.mark.parametrize("method", ["shallow", "cocoop"])
def test_what_is_kept_is_not_taken_for_changed_pictures(tmp_path, method):
    f, data = wrap(method, tmp_path, 1), split()
    f.add_split("train", data, 4)
    indices, prompts = [5, 11, 0, 3], ["red disk"] * 4
    pixels, changed = data.batch(indices)[0].float(), torch.tensor([False, True, False, True])
    pixels[changed] = 255 - pixels[changed]
    want = f.model(normalise(pixels), *f.tokenizer(prompts))
    torch.testing.assert_close(
        cached_logits(f, "train", indices, prompts, pixels, changed), want, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        cached_logits(f, "train", indices, prompts, pixels, ~changed & changed)[~changed], want[~changed]
    )
    wrong = cached_logits(f, "train", indices, prompts, pixels)
    assert (wrong - want)[changed].abs().amax() > 1e-3


def test_a_run_with_augmentation_is_the_same_with_and_without_what_is_kept(cli, quick, tmp_path):
    """Pictures that are left as they are come from what is kept; the others are encoded."""
    losses = []
    for gb in (0, 1):
        out = tmp_path / str(gb)
        code, said, err = cli(
            "train",
            *without_dim(quick)[:-1],
            out,
            "--peft",
            "coop",
            "--epochs",
            2,
            "--cache-gb",
            gb,
            "--prompts",
            "p1",
        )
        assert code == 0 and ("kept for 24 of 24 images" in said) == bool(gb), err
        losses.append([float(r["train_loss"]) for r in rows(out / "log.csv")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_feed_reads_ahead_and_in_order():
    data = split()
    parts = [[4, 1, 9], [0, 11], [7]]
    for with_pixels in (True, False):
        for (part, pixels, masks), want in zip(device_batches(data, parts, CPU, with_pixels), parts):
            assert part == want and torch.equal(masks, data.batch(part)[1])
            assert torch.equal(pixels, data.batch(part)[0]) if with_pixels else pixels is None


def test_pixels_of_tensors_are_the_same():
    data, moved = split(), split()
    moved.images, moved.masks = torch.from_numpy(moved.images), torch.from_numpy(moved.masks)
    for a, b in zip(data.batch([3, 11, 0]), moved.batch([3, 11, 0])):
        assert torch.equal(a, b)
    assert moved.batch([1], with_images=False)[0] is None


def test_what_cannot_be_on_a_cpu(cli, quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = cli("train", *quick, "--kernels", "triton")
    assert code == 2 and "there is no GPU" in err and "Traceback" not in err
    code, _, err = cli("train", *quick, "--cache-gb", "-1")
    assert code == 2 and "--cache-gb" in err and "out of range" in err
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    code, _, err = cli("train", *quick, "--compile", "on")
    assert code == 2 and "C++ compiler" in err


@pytest.mark.slow
def test_compiled_training_agrees(cli, quick, tmp_path, graphs):
    """The same run, its layers compiled: few graphs for all of them, and the same numbers. (No C++ is built, which takes minutes.)"""
    for mode in ("off", "on"):
        code, _, err = cli("train", *quick[:-1], tmp_path / mode, "--epochs", 2, "--compile", mode)
        assert code == 0, err
    assert 0 < graphs["stats"]["unique_graphs"] <= 14 and not graphs["graph_break"], graphs
    same_tensors_nearly(tmp_path / "off", tmp_path / "on", atol=1e-4, rtol=1e-3)
