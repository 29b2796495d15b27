"""SAN against its golden case, transformers' CLIP and a restatement, and what is right where the published code is not."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import vlsm
from tests.conftest import GOLDEN, ROOT, close, folder_of_golden, tiny_batch
from tests.methods.test_adapters import count
from tests.networks.test_clipseg import assert_gradients, golden, run
from vlsm.networks.hooks import Tuner
from vlsm.networks.san import SAN, SANConfig, SideNetwork
from vlsm.training.run import check_gradients

TINY = f"random:{ROOT / 'tests' / 'tiny' / 'san.json'}"


@pytest.fixture
def weights(tmp_path):
    return folder_of_golden("san-tiny", tmp_path / "san")


def test_golden(weights):
    g, config = golden("san-tiny")
    model = vlsm.build("san", weights, "full", reference=True)
    base, pixels = model.network, g["in.pixel_values"]
    activations = base.encode_image(pixels, Tuner()).activations
    features = dict(zip(base.kept_layers, activations))
    assert base.kept_layers == [0, 2, 3, 4]
    for layer in (0, 2, 3):
        close(features[layer][:, 1:].mT.unflatten(2, (3, 3)), g[f"out.clip_feat.{layer}"])
    close(features[3][:, 0], g["out.clip_cls"][0])
    masks, bias = base.side_adapter_network(pixels, features, (3, 3))
    close(masks, g["out.mask_preds"], 1e-4)  # of the size of 20
    close(bias, g["out.attn_bias"], 1e-4)
    (text,) = base.encode_text(g["in.input_ids"], g["in.attention_mask"], Tuner())
    close(text, g["out.text_features"])
    embeddings = base.embed_masks(bias, features, (3, 3))
    close(embeddings, g["out.mask_embs"])
    close(base.weigh_masks(embeddings, text), g["out.mask_logits"])
    logits = run(model, g)
    close(logits, g["out.logits"])
    loss = vlsm.dice_bce_loss(logits, g["in.target"])
    close(loss, g["out.loss"].reshape(()), 1e-5)
    loss.backward()
    assert_gradients(model, g)
    gradients = {n: p.grad for n, p in base.named_parameters() if p.grad is not None}
    assert set(base.published_names(gradients)) == {n[5:] for n in g if n.startswith("grad.")}
    assert "ZERO, so not learning yet" in check_gradients(
        model
    )  # the published code trains what nothing reads


@pytest.mark.parametrize("reference", [False, True])
def test_real_size(reference):
    with torch.device("meta"):
        base = SAN(SANConfig.from_dict({}), reference)
    side = base.side_adapter_network
    assert (count(base.clip_model), count(base.clip_model.visual), count(side)) == (
        149_620_737,
        86_192_640,
        8_219_058,
    )
    assert (count(side.vit_model), count(side.fusion_layers), count(side.mask_decoder)) == (
        6_123_120,
        744_384,
        1_303_554,
    )
    assert (
        count(side.mask_decoder.attn_mlp) == 916_992 and len(base.published_names(base.state_dict())) == 439
    )
    trained = [
        sum(base.get_parameter(n).numel() for n in names)
        for names in (base.decoder_names(), base.full_tuning_names())
    ]
    assert trained == [8_219_058, 8_370_354]
    assert base.kept_layers == ([0, 1, 2, 9, 10, 11] if reference else [0, 3, 6, 9, 10, 11])
    assert set(side.fusion_layers) == (
        {"layer_0", "layer_3", "layer_6", "layer_9"} if reference else {f"layer_{n}" for n in range(4)}
    )
    assert base.config.stride == 16


def test_recognition_is_clip_with_biased_tokens():
    """The whole sequence of mask, class and patch tokens under the published attention mask, head by head, in float64."""
    base = vlsm.build("san", TINY).network.double()
    visual, c = base.clip_model.visual, base.config
    pixels, Q, L = torch.randn(2, 3, 64, 96, dtype=torch.double), c.num_queries, 24
    features = dict(zip(base.kept_layers, base.encode_image(pixels, Tuner()).activations))
    bias = torch.randn(2, 4, Q, 8, 12, dtype=torch.double)
    K = Q + 1 + L
    mask = torch.zeros(2, 4, K, K, dtype=torch.double)
    mask[:, :, :Q, : Q + 1] = -100
    mask[:, :, range(Q), range(Q)] = 0
    mask[:, :, Q:, :Q] = -100
    mask[:, :, :Q, Q + 1 :] = F.max_pool2d(bias.flatten(0, 1), 2).view(2, 4, Q, L)
    x = features[3]
    x = torch.cat([x[:, :1].expand(-1, Q, -1), x], 1)
    for i in (3, 4):
        block = visual.transformer.resblocks[i]
        assert torch.allclose(x[:, Q:], features[i], atol=1e-12)
        normed, attention = block.layer_norm1(x), block.self_attn
        q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        heads = [
            ((q[..., p] @ k[..., p].mT) / 4 + mask[:, n]).softmax(-1) @ v[..., p]
            for n in range(4)
            for p in [slice(16 * n, 16 * n + 16)]
        ]
        x = x + attention.out_proj(torch.cat(heads, -1))
        x = x + block.mlp(block.layer_norm2(x))
    want = visual.ln_post(x[:, :Q]) @ visual.proj
    close(base.embed_masks(bias, features, (4, 6)), want / want.norm(dim=-1, keepdim=True), 1e-10)


def test_everything_of_the_side_network_learns():
    model = vlsm.build("san", TINY, "full").train()
    model(*tiny_batch()).square().mean().backward()
    tuned = model.tuned_parameters()
    assert all(p.grad is not None and p.grad.any() for p in tuned.values())
    assert "clip_model.visual.positional_embedding" in tuned and not [n for n in tuned if "clip_model.t" in n]
    decoder = vlsm.build("san", TINY, "decoder")
    assert set(tuned) - set(decoder.tuned_parameters()) == {"clip_model.visual.positional_embedding"}


def test_weights_are_cosines():
    base = vlsm.build("san", TINY).network
    e, t = F.normalize(torch.randn(2, 5, 64), dim=-1), 7 * torch.randn(2, 64)
    close(base.weigh_masks(e, t), F.cosine_similarity(e, t[:, None], dim=-1))
    base.reference = True
    close(base.weigh_masks(e, t), (e * t[:, None]).mean(-1))


def test_enlarging_after_the_sum_is_the_same():
    """Logits, sample by sample, of enlarged masks."""
    base = vlsm.build("san", TINY).network.double()
    pixels, ids = tiny_batch()
    pixels = pixels.double()
    features = dict(zip(base.kept_layers, base.encode_image(pixels, Tuner()).activations))
    masks, bias = base.side_adapter_network(pixels, features, (4, 4))
    weights = base.weigh_masks(
        base.embed_masks(bias, features, (4, 4)), *base.encode_text(ids, None, Tuner())
    )
    large = F.interpolate(masks, size=(64, 64), mode="bilinear", align_corners=False)
    close(base(pixels, ids), (weights[..., None, None] * large).sum(1, keepdim=True), 1e-12)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A small CLIP that transformers has written, with the tiny SAN's other sizes in its configuration, and the mini base's tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=995,
        eos_token_id=994,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(folder)
    own = {
        k: v
        for k, v in json.loads((ROOT / "tests" / "tiny" / "san.json").read_text()).items()
        if not k.startswith("clip_")
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((ROOT / "vlsm" / "mini" / name).read_bytes())
    return folder, theirs


def test_clip_of_a_hugging_face_folder(hugging_face):
    folder, theirs = hugging_face
    model = vlsm.build("san", folder, "decoder")
    pixels, ids = tiny_batch(side=96)
    with torch.no_grad():
        small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", align_corners=False)
        want = theirs(pixel_values=small, input_ids=ids, output_hidden_states=True)
        found = model.network.encode_image(pixels, model.tuner).activations
        for layer, x in zip(model.network.kept_layers, found):
            close(x, want.vision_model_output.hidden_states[layer], 1e-4)
        (text,) = model.network.encode_text(ids, None, model.tuner)
        close(F.normalize(text, dim=-1), want.text_embeds, 1e-5)
        visual = model.network.clip_model.visual
        whole = visual.ln_post(visual.transformer.resblocks[4](found[-1])[:, 0]) @ visual.proj
        close(F.normalize(whole, dim=-1), want.image_embeds, 1e-5)


def test_side_networks_of_two_seeds_have_one_base(hugging_face):
    folder, _ = hugging_face
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(vlsm.build("san", folder, "full"))
    assert models[0].info["fingerprint"] == models[1].info["fingerprint"]
    assert not torch.equal(*(m.network.side_adapter_network.query_embed for m in models))
    models[1].load_tuned(models[0].tuned_state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values())
    )
    with pytest.raises(
        ValueError, match="SAN's frozen part alone; the rest starts at random, and --peft none"
    ):
        vlsm.build("san", folder, "none")


def test_published_start():
    torch.manual_seed(0)
    side = SideNetwork(SANConfig.from_dict(dict(fusion_map={"0": 0, "2": 6})))
    assert 0.018 < side.vit_model.pos_embed.std() < 0.02 and side.vit_model.pos_embed.abs().max() < 2
    assert 0.019 < side.query_embed.std() < 0.021 and not side.vit_model.blocks[3].self_attn.q_proj.bias.any()
    weight = side.fusion_layers["layer_2"].input_proj[1].weight.detach()
    assert weight.abs().max() <= (3 / 768) ** 0.5 and weight.std().item() == pytest.approx(
        (1 / 768) ** 0.5, rel=0.02
    )


def test_published_checkpoints_hold_every_tensor_twice(weights, tmp_path):
    """Lightning's prefix and the aliases of CLIP's layers are dropped; anything else is left over."""
    g, _ = golden("san-tiny")
    want = run(vlsm.build("san", weights), g)
    tensors = load_file(weights / "model.safetensors")
    aliases = {
        "clip_visual_extractor.conv1.weight": tensors["clip_model.visual.conv1.weight"],
        "clip_rec_head.resblocks.0.ln_1.weight": tensors[
            "clip_model.visual.transformer.resblocks.3.ln_1.weight"
        ],
    }
    save_file(
        {f"net.{n}": t.clone() for n, t in {**tensors, **aliases}.items()}, weights / "model.safetensors"
    )
    assert torch.equal(run(vlsm.build("san", weights), g), want)
    save_file({**tensors, "ov_classifier.bg_embed": torch.zeros(1, 4)}, weights / "model.safetensors")
    with pytest.raises(
        ValueError, match="1 left over: ov_classifier.bg_embed. It looks like a SAN checkpoint"
    ):
        vlsm.build("san", weights)


def test_incomplete_clip(hugging_face, tmp_path):
    folder, _ = hugging_face
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_model.encoder.layers.2.self_attn.k_proj.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 missing: clip_model.visual.transformer.resblocks.2.self_attn.k_proj.weight"
    ):
        vlsm.build("san", tmp_path, "full")
    save_file(load_file(GOLDEN / "clipseg-tiny" / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="It looks like a CLIPSeg checkpoint"):
        vlsm.build("san", tmp_path, "full")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(split_layer=5), "split_layer 5 and fusion_map .* must name some of CLIP's 5 layers"),
        (dict(fusion_map={"0": 7}), "must name some of CLIP's 5 layers"),
        (dict(side_vit=dict(width=50, depth=2, heads=4)), "width 50 is no multiple of 4 heads"),
        (dict(clip_vision=dict(width=65, layers=5, heads=4)), "hidden_size 65 is no multiple of 4 heads"),
    ],
)
def test_bad_sizes(tmp_path, change, message):
    config = json.loads((ROOT / "tests" / "tiny" / "san.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        vlsm.build("san", f"random:{tmp_path / 'c.json'}")


def test_what_cannot_act_on_san():
    for method in ("dense", "coop", "full+lora"):
        with pytest.raises(
            ValueError,
            match="cannot be used on SAN, which takes none, decoder, full. SAN is an adapter itself",
        ):
            vlsm.build("san", TINY, method)
    with pytest.raises(ValueError, match="no features to enlarge"):
        vlsm.build("san", TINY, "full", upsampler=True)
    with pytest.raises(
        ValueError, match="Images of 44 x 64 pixels do not fit; resize their sides to multiples of 8"
    ):
        vlsm.build("san", TINY)(torch.zeros(1, 3, 44, 64), torch.tensor([[1, 994]]))


def test_clips_input_is_cut_to_whole_patches():
    """Sides of whole side-network patches will do, as in the specification (336 at real size)."""
    model = vlsm.build("san", "random:tests/tiny/san.json", "decoder")
    ids, mask = model.tokenizer()(["polyp"])
    for side in (24, 72):
        assert model(torch.randn(1, 3, side, side), ids, mask).shape == (1, 1, side, side)
    with pytest.raises(ValueError, match="8 x 8 pixels do not fit; .* multiples of 8, 16 at least"):
        model(torch.randn(1, 3, 8, 8), ids, mask)
