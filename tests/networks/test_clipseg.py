"""CLIPSeg and the adapters against the references: stored golden cases, and transformers built beside ours."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vlsm
from tests.conftest import GOLDEN
from vlsm.networks.clipseg import CLIPSegConfig


def golden(case):
    path = GOLDEN / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["config"])


def our_name(name):
    """A reference parameter's name in DESIGN.md's terms."""
    name = name.replace(".fc1.", ".down.").replace(".fc2.", ".up.")
    name = re.sub(
        r"^v_(attn|out)_adapters\.(\d+)",
        lambda m: f"vision.{m[2]}.{'attn' if m[1] == 'attn' else 'mlp'}",
        name,
    )
    name = re.sub(
        r"^l_(attn|out)_adapters\.(\d+)", lambda m: f"text.{m[2]}.{'attn' if m[1] == 'attn' else 'mlp'}", name
    )
    return (
        name.replace("vision_extract_adapters", "vision")
        .replace("text_extract_adapters", "text")
        .replace("cond_adapter", "cond")
    )


def enlarged(logits, pixels):
    """Logits as large as the pictures `[B, 3, H, W]`: a three-layer head's are smaller, unless patches are 16."""
    same = logits.shape[-2:] == pixels.shape[-2:]
    return (
        logits
        if same
        else F.interpolate(
            logits[:, None] if logits.dim() == 3 else logits, pixels.shape[-2:], mode="bilinear"
        ).view(*logits.shape[:-2], *pixels.shape[-2:])
    )


def run(model, g):
    return model(g["in.pixel_values"], g["in.input_ids"], g["in.attention_mask"])


def assert_gradients(model, g, rename=lambda n: n):
    """Every stored gradient, to 1e-3 of the tensor's largest entry."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = model.network.published_names(gradients)
    names = [n[5:] for n in g if n.startswith("grad.")]
    assert names
    for name in names:
        (ours,) = [gradient for n, gradient in gradients.items() if n.endswith("." + rename(name))]
        want = g["grad." + name]
        assert (ours - want).abs().max() <= 1e-3 * want.abs().max(), name


def assert_golden(model, g, rename):
    """Logits, loss and gradients, which none but the tuner's parameters have."""
    logits = run(model, g)
    torch.testing.assert_close(logits, g["out.logits"], atol=2e-5, rtol=0)
    loss = vlsm.dice_bce_loss(logits, g["in.target"])
    torch.testing.assert_close(loss, g["out.loss"].reshape(()), atol=1e-5, rtol=0)
    loss.backward()
    assert_gradients(model, g, rename)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("tuner."))


@pytest.mark.parametrize("case", ["vlsm-zeroshot", "vlsm-zeroshot-simple"])
def test_zeroshot_golden(case):
    g, config = golden(case)
    model = vlsm.build("clipseg", GOLDEN / config["base"], "decoder")
    logits = run(model, g)
    torch.testing.assert_close(logits, g["out.logits"], atol=2e-5, rtol=0)
    loss = vlsm.dice_bce_loss(logits, g["in.target"])
    torch.testing.assert_close(loss, g["out.loss"].reshape(()), atol=1e-5, rtol=0)
    loss.backward()
    assert_gradients(model, g)
    assert all(p.grad is None for n, p in model.named_parameters() if "decoder." not in n)


@pytest.mark.parametrize("case, method", [("vlsm-dense-vl", "dense"), ("vlsm-shallow-vlc", "shallow")])
def test_adapter_golden(case, method):
    g, config = golden(case)
    branches = "".join(
        letter
        for letter, key in zip("vlc", ("adapter_in_v", "adapter_in_l", "adapter_in_cond"))
        if config[key]
    )
    model = vlsm.build(
        "clipseg", GOLDEN / config["base"], method, branches=branches, dim=config["adapter_dim"]
    )
    model.load_tuned({our_name(n[6:]): t for n, t in g.items() if n.startswith("param.")})
    assert_golden(model, g, our_name)


def random_config(seed):
    """A small CLIPSeg of random sizes, as transformers describes it."""
    from transformers import CLIPSegConfig

    r = random.Random(seed)
    heads, layers, patch = r.choice([1, 2, 4]), r.randint(2, 5), r.choice([4, 8, 16])
    return CLIPSegConfig(
        projection_dim=r.choice([16, 24]),
        reduce_dim=r.choice([8, 16]),
        decoder_num_attention_heads=r.choice([1, 2, 4]),
        decoder_intermediate_size=r.choice([16, 32]),
        extract_layers=sorted(r.sample(range(layers), r.randint(1, min(3, layers)))),
        conditional_layer=0,
        use_complex_transposed_convolution=r.random() < 0.5,
        text_config=dict(
            hidden_size=8 * heads,
            intermediate_size=24,
            num_hidden_layers=r.randint(1, 4),
            num_attention_heads=heads,
            vocab_size=60,
            max_position_embeddings=16,
            bos_token_id=58,
            eos_token_id=r.choice([2, 59]),
            pad_token_id=59,
        ),
        vision_config=dict(
            hidden_size=12 * heads,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=2 * patch,
            patch_size=patch,
            hidden_act=r.choice(["quick_gelu", "gelu"]),
        ),
    )


def random_inputs(config, seed, batch=3, grid=(3, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(
        batch, 3, *(n * config.vision_config.patch_size for n in grid), generator=generator, dtype=dtype
    )
    ids, mask = torch.full((batch, 12), 59), torch.zeros(batch, 12, dtype=torch.long)
    for row, length in enumerate(torch.randint(3, 13, (batch,), generator=generator).tolist()):
        ids[row, 1 : length - 1] = torch.randint(3, 58, (length - 2,), generator=generator)
        mask[row, :length] = 1
    ids[:, 0] = 58
    return pixels, ids, mask


@pytest.fixture
def pair(tmp_path):
    """transformers' network of a random configuration, with weights away from their initialisation, and ours from its files."""
    from transformers import CLIPSegForImageSegmentation

    def make(seed, method="none", **save):
        torch.manual_seed(seed)
        theirs = CLIPSegForImageSegmentation(random_config(seed)).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.05 * torch.randn_like(p))
            head = (
                theirs.decoder.transposed_convolution
            )  # scaled so that logits stay within about 20, as a trained network's do
            (head[-1] if isinstance(head, torch.nn.Sequential) else head).weight.mul_(0.05)
        theirs.save_pretrained(tmp_path / str(seed), **save)
        return theirs, vlsm.build("clipseg", tmp_path / str(seed), method)

    return make


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("seed", range(8))
def test_equals_transformers(pair, seed, dtype, tolerance):
    theirs, ours = (m.to(dtype) for m in pair(seed))
    for batch in (1, 3):
        pixels, ids, mask = random_inputs(theirs.config, seed, batch, dtype=dtype)
        with torch.no_grad():
            want = enlarged(theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits, pixels)
        got = ours(pixels, ids, mask)
        torch.testing.assert_close(got.reshape(want.shape), want, atol=tolerance, rtol=0)
        assert got.dim() == 4 and got.shape[:2] == (batch, 1)


def test_every_gradient_equals_transformers(pair):
    """With `full`, gradients reach both encoders, and are those of transformers' own modules run without their no_grad."""
    theirs, ours = (m.double() for m in pair(3, "full"))
    pixels, ids, mask = random_inputs(theirs.config, 3, dtype=torch.float64)
    hidden = theirs.clip.vision_model(pixels, output_hidden_states=True).hidden_states
    text = theirs.clip.get_text_features(ids, attention_mask=mask)
    cond = getattr(text, "pooler_output", text)
    want = enlarged(
        theirs.decoder([hidden[i + 1] for i in theirs.config.extract_layers], cond).logits, pixels
    )
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    (ours(pixels, ids, mask).reshape(want.shape) * weight).sum().backward()
    named = dict(theirs.named_parameters())
    tuned = ours.tuned_parameters()
    assert {
        "clip.vision_model.encoder.layers.0.mlp.fc1.weight",
        "clip.text_model.encoder.layers.0.mlp.fc1.weight",
    } <= set(tuned)
    for name, p in tuned.items():
        torch.testing.assert_close(p.grad, named[name].grad, atol=1e-9, rtol=1e-9, msg=name)
        if not name.endswith("k_proj.bias"):
            assert p.grad.abs().sum() > 0, name
    assert tuned["clip.text_model.embeddings.token_embedding.weight"].grad.abs().sum() > 0


def test_reference_full_trains_the_decoder_only():
    ours = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "full", reference=True)
    assert all(n.startswith("decoder.") for n in ours.tuned_parameters())


def test_pickled_weights_load_like_safetensors(pair, tmp_path):
    theirs, ours = pair(1)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "1" / "config.json").read_text())
    # older files also hold buffers that are not needed
    extra = {"clip.text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save({**theirs.state_dict(), **extra}, old / "pytorch_model.bin")
    again = vlsm.build("clipseg", old)
    assert again.info["fingerprint"] == ours.info["fingerprint"]


def test_non_square_and_larger_images(pair):
    _, ours = pair(2)
    config = ours.network.config
    pixels = torch.randn(2, 3, 2 * config.vision.patch_size, 5 * config.vision.patch_size)
    ids = torch.tensor([[58, 5, 59]]).expand(2, 3)
    h, w = ours(pixels, ids).shape[-2:]
    assert w / h == 2.5
    with pytest.raises(ValueError, match="multiples of"):
        ours(pixels[..., :-1], ids)


def test_padding_and_repetition_change_nothing():
    g, config = golden("vlsm-dense-vl")
    model = vlsm.build("clipseg", GOLDEN / config["base"], "dense", dim=4).double()
    pixels, ids, mask = g["in.pixel_values"].double(), g["in.input_ids"], g["in.attention_mask"]
    want = model(pixels, ids, mask)
    longer = torch.cat([ids, ids.new_full((3, 8), 199)], 1), torch.cat([mask, mask.new_zeros(3, 8)], 1)
    torch.testing.assert_close(model(pixels, *longer), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(pixels, ids), want, atol=1e-12, rtol=0)
    same = model(pixels, ids[[1, 1, 1]], mask[[1, 1, 1]])
    torch.testing.assert_close(same[1], want[1], atol=1e-12, rtol=0)


def test_equal_prompts_are_encoded_once(monkeypatch):
    g, config = golden("vlsm-dense-vl")
    model, seen = vlsm.build("clipseg", GOLDEN / config["base"]), []
    encode = model.network.encode_text
    monkeypatch.setattr(
        model.network, "encode_text", lambda ids, *rest: seen.append(ids.shape) or encode(ids, *rest)
    )
    model(g["in.pixel_values"], g["in.input_ids"][[0, 1, 0]], g["in.attention_mask"][[0, 1, 0]])
    assert seen[0][0] == 2


def test_a_mask_that_hides_a_token_before_the_end_is_honoured(pair):
    theirs, ours = pair(0)
    pixels, ids, mask = random_inputs(theirs.config, 5)
    mask[:, 1] = 0
    with torch.no_grad():
        want = enlarged(theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits, pixels)
    torch.testing.assert_close(ours(pixels, ids, mask).reshape(want.shape), want, atol=1e-4, rtol=0)


def test_padding_on_the_left_is_masked(pair):
    theirs, ours = pair(0)
    pixels, ids, mask = random_inputs(theirs.config, 5)
    ids, mask = (
        torch.cat([torch.full((3, 3), 57), ids], 1),
        torch.cat([torch.zeros(3, 3, dtype=torch.long), mask], 1),
    )
    with torch.no_grad():
        want = enlarged(theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits, pixels)
    torch.testing.assert_close(ours(pixels, ids, mask).reshape(want.shape), want, atol=1e-4, rtol=0)


def test_blocks_above_the_last_extracted_never_run(pair):
    theirs, ours = pair(4)
    last = max(ours.network.config.extract_layers)
    for block in ours.network.clip.vision_model.encoder.layers[last + 1 :]:
        block.forward = None  # calling it would raise
    pixels, ids, mask = random_inputs(theirs.config, 4)
    ours(pixels, ids, mask)


def test_prompt_without_end_is_refused():
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny")
    with pytest.raises(ValueError, match="no end-of-text token"):
        model(torch.zeros(1, 3, 64, 64), torch.tensor([[198, 5, 6]]))


@pytest.mark.parametrize(
    "change, message",
    [("drop", "missing: decoder.film_add.bias"), ("add", "left over: extra"), ("reshape", "instead of")],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = load_file(GOLDEN / "clipseg-tiny" / "model.safetensors")
    if change == "drop":
        del tensors["decoder.film_add.bias"]
    elif change == "add":
        tensors["extra"] = torch.zeros(1)
    else:
        tensors["decoder.film_add.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "clipseg-tiny" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        vlsm.build("clipseg", tmp_path)


def test_config_files_of_all_ages():
    raw = dict(text_config=None, text_config_dict=dict(eos_token_id=2), vision_config=dict(patch_size=32))
    old = CLIPSegConfig.from_dict(dict(raw, vision_config_dict=dict(patch_size=16)))
    assert old.text.eos_token_id == 2 and old.vision.patch_size == 16
    assert old.vision.hidden_size == 768 and old.text.hidden_size == 512 and old.extract_layers == (3, 6, 9)


@pytest.mark.parametrize(
    "raw, message",
    [
        (dict(extract_layers=[3, 12]), "must be indices of the 12 vision layers"),
        (dict(text_config=dict(hidden_act="mish")), "text_config.hidden_act is 'mish'; known are quick_gelu"),
        (dict(vision_config=dict(hidden_size=100)), "hidden_size 100 is no multiple of 12 heads"),
    ],
)
def test_configurations_that_cannot_work(raw, message):
    with pytest.raises(ValueError, match=message):
        CLIPSegConfig.from_dict(raw)


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object"),
        ('{"model_type": "clip"}', "describes a 'clip' model"),
        (None, "holds no config.json"),
    ],
)
def test_folders_that_hold_no_clipseg(tmp_path, config, message):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vlsm.build("clipseg", tmp_path)


def test_weights_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text((GOLDEN / "clipseg-tiny" / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        vlsm.build("clipseg", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        (GOLDEN / "clipseg-tiny" / "model.safetensors").read_bytes()[:5000]
    )
    with pytest.raises(ValueError, match="cannot be read .* Is the file complete"):
        vlsm.build("clipseg", tmp_path)


def test_a_pickle_that_would_execute_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "config.json").write_text((GOLDEN / "clipseg-tiny" / "config.json").read_text())
    torch.save({"decoder.film_add.bias": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        vlsm.build("clipseg", tmp_path)
    assert not (tmp_path / "executed").exists()
