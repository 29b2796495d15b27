"""SAM 3 against transformers' `Sam3Model`, and the methods on it."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Sam3Config
from transformers.models.sam3.modeling_sam3 import Sam3Model

import vlsm
from tests.conftest import ROOT, same_tensors
from vlsm.methods.adapters import ShallowAdapters
from vlsm.methods.registry import METHODS
from vlsm.networks import weights
from vlsm.networks.sam3 import SAM3, SAM3Config
from vlsm.networks.weights import MINI
from vlsm.tools.merge import save_merged

TINY = ROOT / "tests" / "tiny" / "sam3.json"
TRAINABLE = [name for name in SAM3.methods if name != "none"]


def config_of(side=70, window=2, whole=(1,), pretrained=42, layers=3, width=16, patch=14):
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    part = dict(hidden_size=width, num_attention_heads=2, intermediate_size=32)
    backbone = dict(
        model_type="sam3_vit_model", num_hidden_layers=layers, image_size=side, patch_size=patch,
        window_size=window, global_attn_indexes=list(whole), pretrain_image_size=pretrained, **small,
    )  # fmt: skip
    text = dict(num_hidden_layers=2, vocab_size=200, max_position_embeddings=12, hidden_act="gelu",
                projection_dim=16, eos_token_id=199, bos_token_id=198, **small)  # fmt: skip
    return Sam3Config(
        vision_config=dict(fpn_hidden_size=width, backbone_config=backbone),
        text_config=text,
        geometry_encoder_config=dict(num_layers=1, **part),
        detr_encoder_config=dict(num_layers=2, **part),
        detr_decoder_config=dict(num_layers=1, num_queries=3, **part),
        mask_decoder_config=dict(hidden_size=width, num_attention_heads=2),
    )


CASES = {
    "windows that fit": dict(side=84, window=2, whole=(1,), pretrained=42),
    "windows with a rest": dict(side=70, window=3, whole=(2,), pretrained=28),
    "all global": dict(side=56, window=2, whole=(0, 1, 2), pretrained=56),
    "all windows": dict(side=112, window=4, whole=(), pretrained=42),
    "one window holds all": dict(side=42, window=5, whole=(0,), pretrained=84),
    "another grid": dict(side=128, window=3, whole=(0, 2), pretrained=64, patch=16, width=32),
    "deeper": dict(side=70, window=2, whole=(2, 4), pretrained=70, layers=5),
}


@pytest.fixture(params=CASES)
def pair(request):
    """(transformers' network, ours with its weights, images, ids, mask): padded prompts, two of them equal."""
    torch.manual_seed(0)
    config = config_of(**CASES[request.param])
    theirs = Sam3Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = SAM3(SAM3Config.from_dict(config.to_dict())).eval()
    ours.load_state_dict(SAM3.own_names(SAM3.rename(theirs.state_dict())))
    ids = torch.randint(1, 190, (3, 12))
    ids[:, 0] = 198
    for row, end in ((0, 4), (1, 11), (2, 4)):
        ids[row, end:] = 199
    ids[2] = ids[0]
    mask = (torch.arange(12) <= torch.tensor([4, 11, 4])[:, None]).long()
    side = config.vision_config.backbone_config.image_size
    return theirs, ours, torch.randn(3, 3, side, side), ids, mask


def semantic(theirs, images, ids, mask):
    logits = theirs(pixel_values=images, input_ids=ids, attention_mask=mask).semantic_seg
    return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def test_equals_transformers(pair):
    theirs, ours, images, ids, mask = pair
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        theirs.to(dtype), ours.to(dtype)
        with torch.no_grad():
            want, got = semantic(theirs, images.to(dtype), ids, mask), ours(images.to(dtype), ids, mask)
        assert want.std() > 1e-3 and got.shape == (3, 1, *images.shape[2:])
        torch.testing.assert_close(got, want, atol=bound, rtol=0)
    assert (want[0] - want[1]).abs().max() > 1e-4


def test_every_gradient_equals_transformers(pair):
    theirs, ours, images, ids, mask = (
        t.double() if t is not pair[3] and t is not pair[4] else t for t in pair
    )
    semantic(theirs, images, ids, mask).square().mean().backward()
    ours(images, ids, mask).square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = SAM3.own_names(SAM3.rename(gradients))
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name or name not in wanted, name
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-9, rtol=1e-6, msg=name)


def test_shallow_acts_on_the_necks_maps_and_the_prompts_tokens(pair):
    theirs, ours, images, ids, mask = pair
    tuner = ShallowAdapters(ours.config, branches="vlc", dim=5).double()
    maps = theirs.vision_encoder.neck.fpn_layers
    for k, adapter in tuner.vision.items():

        def adapt(module, given, out, adapter=adapter):
            return adapter(out.movedim(1, -1)).movedim(-1, 1)

        maps[int(k)].register_forward_hook(adapt)
    theirs.text_projection.register_forward_hook(lambda module, given, out: tuner.text["0"](tuner.cond(out)))
    theirs.double(), ours.double()
    with torch.no_grad():
        want = semantic(theirs, images.double(), ids, mask)
        got = ours(images.double(), ids, mask, tuner)
        assert (ours(images.double(), ids, mask) - got).abs().max() > 1e-4
    assert sorted(tuner.vision) == ["0", "1", "2"]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prefix", ["", "detector_model."])
def test_a_folder_of_transformers_loads(prefix, tmp_path):
    torch.manual_seed(0)
    config = config_of()
    theirs = Sam3Model(config).eval()
    tensors = {prefix + name: t for name, t in theirs.state_dict().items()}
    if prefix:  # the video model's file
        tensors |= {"tracker_model.x": torch.zeros(2), "tracker_neck.y": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = config.to_dict()
    raw = dict(model_type="sam3_video", detector_config=raw) if prefix else raw
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((MINI / name).read_bytes())
    model = vlsm.build("sam3", tmp_path)
    images, ids = torch.randn(1, 3, 70, 70), torch.tensor([[198, 5, 199] + [199] * 9])
    mask = (torch.arange(12) < 3).long()[None]
    with torch.no_grad():
        torch.testing.assert_close(model(images, ids, mask), semantic(theirs, images, ids, mask))


def test_counts_at_real_size():
    with torch.device("meta"):
        network = SAM3(SAM3Config.from_dict({}))
        theirs = Sam3Model(Sam3Config())
    ours = SAM3.own_names(SAM3.rename(theirs.state_dict()))
    assert {n: tuple(t.shape) for n, t in ours.items()} == {
        n: tuple(t.shape) for n, t in network.state_dict().items()
    }
    counts = {}
    for name in TRAINABLE:
        if name in ("decoder", "full"):
            names = METHODS[name](network.config).trained_network_parameters(network)
            counts[name] = sum(network.get_parameter(n).numel() for n in names)
        else:
            with torch.device("meta"):
                counts[name] = sum(p.numel() for p in METHODS[name](network.config).parameters())
    assert counts == dict(
        decoder=10_917_633, full=817_304_321, dense=14_537_600, shallow=1_051_648,
        telescopic=2_464_193, lora=3_670_016, side=366_080, coop=36_864, cocoop=783_936,
    )  # fmt: skip


def some_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("method", some_slow(TRAINABLE, ("decoder",)))
def test_two_pictures_are_learnt_by_heart(method):
    torch.manual_seed(0)
    model = vlsm.build("sam3", f"random:{TINY}", method)
    tokenizer = model.tokenizer()
    images, ids = torch.randn(2, 3, 112, 112), tokenizer(["red disk", "blue ring"])
    target = torch.zeros(2, 1, 112, 112, dtype=torch.uint8)
    target[0, :, :56], target[1, :, 56:] = 1, 1
    model.eval()  # dropout off
    rate = 3e-2 if method in ("coop", "cocoop") else 3e-3
    optimizer = torch.optim.AdamW(model.tuned_parameters().values(), rate)
    losses = []
    for _ in range(60):
        loss = vlsm.dice_bce_loss(model(images, *ids), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < (0.98 if method in ("coop", "cocoop") else 0.6) * losses[0], losses[::10]


@pytest.mark.parametrize("method", ["vpt", "maple"])
def test_methods_that_cannot_act_say_why(method):
    with pytest.raises(ValueError, match="no place for vision contexts"):
        vlsm.build("sam3", f"random:{TINY}", method)


def test_other_sizes_and_recomputing():
    torch.manual_seed(0)
    model = vlsm.build("sam3", f"random:{TINY}", "dense")
    ids = model.tokenizer()(["disk"])
    for side in (42, 126):
        assert model(torch.randn(1, 3, side, side), *ids).shape == (1, 1, side, side)
    with pytest.raises(ValueError, match="multiples of 14"):
        model(torch.randn(1, 3, 100, 100), *ids)
    images = torch.randn(2, 3, 112, 112)
    ids = model.tokenizer()(["disk", "ring"])
    found = []
    for recompute in (False, True):
        model.recompute_activations(recompute)
        model.train().zero_grad()
        model(images, *ids).square().mean().backward()
        found.append([p.grad.clone() for p in model.tuned_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("method", some_slow(("coop", "cocoop", "decoder", "dense", "shallow"), ("coop",)))
def test_a_run(method, cli, quick, folder, tmp_path):
    """From training to scores; resumed, it is the same; what is frozen is kept."""
    options = ["--dataset", folder, "--model", "sam3", "--weights", f"random:{TINY}", "--peft", method]
    options += ["--image-size", 112, "--batch-size", 8]
    for name, epochs in (("once", 2), ("twice", 1)):
        code, said, err = cli("train", *options, "--epochs", epochs, "--out", tmp_path / name)
        assert code == 0, err
        assert ("image encoder's output is kept for 24 of 24" in said) == (method != "dense")
    assert cli("train", "--out", tmp_path / "twice", "--resume", "--epochs", 2)[0] == 0
    assert same_tensors(*(tmp_path / name / "last.safetensors" for name in ("once", "twice")))
    code, said, err = cli("evaluate", "--ckpt", tmp_path / "once")
    assert code == 0 and "DSC" in said, err


def test_gated_weights_say_what_to_do(monkeypatch):
    import huggingface_hub

    class GatedRepoError(Exception):
        pass

    def refuse(*args, **how):
        raise GatedRepoError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="accept their licence.*hf auth login"):
        weights._download("facebook/sam3")


@pytest.mark.parametrize("method", some_slow(("lora", "lora+decoder", "full"), ("lora",)))
def test_merged_weights_are_the_network(method, tmp_path):
    torch.manual_seed(0)
    model = vlsm.build("sam3", f"random:{TINY}", method)
    with torch.no_grad():
        for p in model.tuned_parameters().values():
            p += 0.02 * torch.randn_like(p)
    save_merged(tmp_path / "merged", model)
    plain = vlsm.build("sam3", tmp_path / "merged")
    pixels, ids = torch.randn(2, 3, 112, 112), model.tokenizer()(["a red disk", "x"])
    with torch.no_grad():
        want = model(pixels, *ids)
        torch.testing.assert_close(plain(pixels, *ids), want, atol=1e-4, rtol=1e-4)
        moved = want - vlsm.build("sam3", f"random:{TINY}")(pixels, *ids)
    assert moved.abs().max() > 0.01


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    model = vlsm.build("sam3", f"random:{TINY}", "dense")
    pixels, (ids, mask) = torch.randn(3, 3, 112, 112), model.tokenizer()(["a red disk"] * 3)
    want = model(pixels, ids, mask)
    for block in model.network.compilable_blocks():
        block.compile(dynamic=model.network.compile_dynamic, backend="eager")
    for n in (3, 2):
        torch.testing.assert_close(model(pixels[:n], ids[:n], mask[:n]), want[:n])
