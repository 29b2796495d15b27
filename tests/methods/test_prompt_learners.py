"""Prompt learners: golden cases, a restatement in the simplest terms, counts, gradients, what is decayed,
where contexts start.
"""

import pytest
import torch
import torch.nn.functional as F

import vlsm
from tests.conftest import GOLDEN
from tests.methods.test_adapters import REAL, batch, count
from tests.networks.test_clipseg import assert_golden, golden, run
from vlsm.methods.registry import METHODS
from vlsm.methods.upsampler import Upsampler
from vlsm.networks.transformer import patch_tokens
from vlsm.training.run import check_gradients

TINY = GOLDEN / "clipseg-tiny"
LEARNERS = ("coop", "cocoop", "vpt", "maple", "shared_separate", "shared_attention")
SMALL = dict(shared_attention=dict(heads=4, feed_forward=20))


def build(method, **options):
    torch.manual_seed(0)
    return vlsm.build("clipseg", TINY, method, **{**SMALL.get(method, {}), **options})


def our_name(name):
    name = (
        name.removeprefix("context_learner.")
        .replace("context_vectors", "context")
        .replace("projection_layers", "project")
    )
    return name.replace("textual_project", "text_project").replace("visual_project", "vision_project")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("method", ["coop", "vpt", "maple"])
def test_golden(method, reference):
    g, config = golden(f"tune-{method}")
    learner = config["learner"]
    options = dict(prompt_depth=learner["prompt_depth"], context=learner["num_context"], upsampler=False)
    if method == "maple":
        options.update(intermediate_dim=learner["intermediate_dim"], proj_norm=learner["use_proj_norm"])
    model = vlsm.build("clipseg", GOLDEN / config["base"], method, reference=reference, **options)
    model.load_tuned({our_name(n[6:]): t for n, t in g.items() if n.startswith("param.")})
    contexts = model.tuner.contexts()
    activations = model.network.encode_image(g["in.pixel_values"], model.tuner, contexts.vision).activations
    for layer, activation in zip(model.network.config.extract_layers, activations):
        torch.testing.assert_close(activation, g[f"out.vision_activation.{layer}"], atol=2e-5, rtol=1e-5)
    cond, *_ = model.network.encode_prompts(
        g["in.input_ids"], g["in.attention_mask"], model.tuner, contexts.text
    )
    torch.testing.assert_close(cond, g["out.conditional_embeddings"], atol=2e-5, rtol=0)
    assert_golden(model, g, our_name)
    plain = vlsm.build("clipseg", GOLDEN / config["base"])
    torch.testing.assert_close(run(plain, g), g["out.logits_without_prompts"], atol=2e-5, rtol=0)


def embedded(vision, pixels):
    """Tokens `[B, 1+N, D]` of images: the class token, then the patches, with their positions."""
    e = vision.embeddings
    return patch_tokens(e.patch_embedding(pixels), e.class_embedding, e.position_embedding.weight)


def restated(base, pixels, ids, text, vision):
    """Logits of each sample by itself, contexts written over the tokens in place: TuneVLSeg's rules with
    nothing shared or skipped.

    text, vision: for each sample the sets of vectors `[J, n, D]`, or None.
    """
    clip, config, out = base.clip, base.config, []
    plain = (torch.add, torch.add)
    for i in range(len(pixels)):
        x = embedded(clip.vision_model, pixels[i : i + 1])
        N = x.shape[1]
        if vision is not None:
            x = torch.cat([x, vision[i][:1]], 1)
        x, states = clip.vision_model.pre_layrnorm(x), []
        for k, block in enumerate(clip.vision_model.encoder.layers):
            x = block(x, plain).clone()
            if vision is not None and k + 1 < len(vision[i]):
                x[:, N:] = vision[i][k + 1]
            states.append(x)
        words, limit = ids[i].tolist(), config.text.max_position_embeddings
        words = words[: words.index(config.text.eos_token_id) + 1]
        n = 0 if text is None else text[i].shape[1]
        if len(words) + n > limit:
            words = words[: limit - n - 1] + [config.text.eos_token_id]
        t = clip.text_model.embeddings.token_embedding(torch.tensor([words]))
        if text is not None:
            t = torch.cat([t[:, :1], text[i][:1], t[:, 1:]], 1)
        t = t + clip.text_model.embeddings.position_embedding.weight[: t.shape[1]]
        for k, block in enumerate(clip.text_model.encoder.layers):
            t = block(t, plain, causal=True).clone()
            if text is not None and k + 1 < len(text[i]):
                t[:, 1 : 1 + n] = text[i][k + 1]
        cond = clip.text_projection(clip.text_model.final_layer_norm(t))[:, -1]
        grid = (pixels.shape[2] // config.vision.patch_size, pixels.shape[3] // config.vision.patch_size)
        reduced = [base.decoder.reduces[k](states[e]) for k, e in enumerate(config.extract_layers[::-1])]
        out.append(base.decoder(reduced, cond, grid)[0])
    return torch.cat(out)


def features(base, pixels):
    """CoCoOp's f: the projected class token of the whole unprompted tower."""
    vision = base.clip.vision_model
    x = vision.pre_layrnorm(embedded(vision, pixels))
    for block in vision.encoder.layers:
        x = block(x, (torch.add, torch.add))
    return base.clip.visual_projection(vision.post_layernorm(x[:, 0]))


def sets(model, method, pixels):
    """The vectors that the specification's table asks for: (text, vision) for each sample."""
    t, B = model.tuner, len(pixels)
    pick = lambda modules, i: modules[i if len(modules) > 1 else 0]  # noqa: E731
    V = t.context
    if method == "coop":
        return [V] * B, None
    if method == "vpt":
        return None, [V] * B
    if method == "maple":
        return [V] * B, [torch.stack([pick(t.project, i)(v) for i, v in enumerate(V)])] * B
    if method == "cocoop":
        f = features(model.network, pixels)
        f = f / f.norm(dim=1, keepdim=True) if model.info["options"]["norm_image_features"] else f
        return [torch.stack([v + pick(t.project, i)(f[b]) for i, v in enumerate(V)]) for b in range(B)], None
    if method == "shared_separate":
        both = [
            [torch.stack([pick(p, i)(v) for i, v in enumerate(V)])] * B
            for p in (t.text_project, t.vision_project)
        ]
        return both[0], both[1]
    E = torch.stack([pick(t.mixer, i)(v[None])[0] for i, v in enumerate(V)])
    return [E[..., :32]] * B, [E[..., 32:]] * B


CASES = [
    ("coop", dict(prompt_depth=11)),
    ("coop", dict(prompt_depth=1, context=9)),
    ("cocoop", dict(prompt_depth=3)),
    ("cocoop", dict(prompt_depth=2, lora_proj=True, norm_image_features=True, unified_proj=True)),
    ("cocoop", dict(intermediate_dim=0)),
    ("vpt", dict(prompt_depth=11)),
    ("vpt", dict(prompt_depth=10, context=1)),
    ("maple", dict(prompt_depth=11, intermediate_dim=[8, 12])),
    ("maple", dict(prompt_depth=4, lora_proj=True, intermediate_dim=60, unified_proj=True)),
    ("shared_separate", dict(prompt_depth=5)),
    (
        "shared_separate",
        dict(prompt_depth=2, shared_dim=7, intermediate_dim=9, unified_proj=True, proj_norm=False),
    ),
    ("shared_attention", dict(prompt_depth=3)),
    ("shared_attention", dict(prompt_depth=2, norm_first=False, unified_proj=True)),
]


@pytest.mark.parametrize("method, options", CASES)
def test_equals_the_restatement(method, options):
    model = build(method, upsampler=False, **options).double()
    pixels, ids, _ = inputs()
    with torch.no_grad():
        for p in model.tuned_parameters().values():  # away from a start at which much is equal
            p.add_(0.1 * torch.randn_like(p))
    want = restated(model.network, pixels, ids, *sets(model, method, pixels))
    got = model(pixels, ids)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    weight = torch.randn_like(want)
    tuned = list(model.tuned_parameters().values())
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), tuned), torch.autograd.grad((want * weight).sum(), tuned)
    ):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def inputs():
    """Four prompts: short, equal to it, long enough to be cut, and one whose end falls where the cut is."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(4, 3, 64, 48, generator=generator, dtype=torch.double)
    ids, mask = torch.full((4, 20), 199), torch.zeros(4, 20, dtype=torch.long)
    for row, length in enumerate((6, 6, 20, 17)):
        ids[row, 1 : length - 1] = torch.randint(3, 198, (length - 2,), generator=generator)
        mask[row, :length] = 1
    ids[:, 0] = 198
    ids[1] = ids[0]
    return pixels, ids, mask


@pytest.mark.parametrize("method", LEARNERS)
def test_padding_and_mask_change_nothing(method):
    model = build(method).double().eval()
    pixels, ids, mask = inputs()
    want = model(pixels, ids)
    torch.testing.assert_close(model(pixels, ids, mask), want, atol=1e-10, rtol=0)
    longer = F.pad(ids, (0, 9), value=199), F.pad(mask, (0, 9))
    torch.testing.assert_close(model(pixels, *longer), want, atol=1e-10, rtol=0)
    other = torch.where(
        mask > 0, ids, 7
    )  # behind the end stands another id: it must not be taken for the end of a prompt that is cut
    torch.testing.assert_close(model(pixels, other, mask), want, atol=1e-10, rtol=0)
    for i in range(4):
        torch.testing.assert_close(model(pixels[i : i + 1], ids[i : i + 1])[0], want[i], atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["coop", "cocoop", "maple"])
def test_a_mask_that_hides_a_word_hides_that_word(method):
    model = build(method).double().eval()
    pixels, ids, mask = inputs()
    mask[:, 3] = 0
    want = model(pixels, ids, mask)
    for column in (2, 3, 4):
        other = ids.clone()
        other[:, column] = 50
        assert torch.equal(model(pixels, other, mask), want) == (column == 3)


# specs: counts at real size for J = 1, J = 11, and J = 11 with one projection for all
@pytest.mark.parametrize(
    "method, options, counts",
    [
        ("coop", {}, (2_048, 22_528, None)),
        ("vpt", {}, (3_072, 33_792, None)),
        ("cocoop", {}, (68_160, 749_760, 88_640)),
        ("cocoop", dict(lora_proj=True), (68_096, 749_056, 88_576)),
        ("maple", {}, (85_568, 941_248, 106_048)),
        ("maple", dict(lora_proj=True), (85_504, 940_544, 105_984)),
        ("shared_separate", {}, (83_456, 918_016, 86_016)),
        ("shared_attention", {}, (10_503_936, 115_543_296, 10_555_136)),
    ],
)
def test_published_parameter_counts(method, options, counts):
    with torch.device("meta"):
        for depth, unified, want in zip((1, 11, 11), (False, False, True), counts):
            if want is None:
                continue
            more = dict(unified_proj=True) if unified else {}
            assert count(METHODS[method](REAL, prompt_depth=depth, **options, **more)) == want
        assert count(Upsampler(REAL)) == 1_602


def test_shared_attention_attends_and_the_published_code_does_not():
    for reference in (False, True):
        tuner = build("shared_attention", reference=reference).tuner.eval()
        before = tuner.contexts().text[0]
        with torch.no_grad():
            tuner.context[0, 0] += 1.0
        moved = (tuner.contexts().text[0] - before).abs().amax(1) > 1e-6
        assert moved.tolist() == ([True, False, False, False] if reference else [True] * 4)


def test_shared_attention_mixes_once_a_forward():
    """Both encoders get their part of the same dropout draw."""
    model, seen = build("shared_attention", prompt_depth=2, dropout=0.5).train(), []
    for mixer in model.tuner.mixer:
        mixer.register_forward_hook(lambda *_: seen.append(1))
    model(*batch())
    assert len(seen) == 2


@pytest.mark.parametrize("method", [*LEARNERS, "lora", "dense+vpt", "shallow+coop", "lora+decoder+maple"])
def test_gradients_reach_the_tuner_alone_and_all_of_it(method):
    options = {} if method == "lora" else dict(dense=dict(dim=4)) if "dense" in method else {}
    model = build(method, **options)
    model(*batch()).square().mean().backward()
    assert "0 of" in (line := check_gradients(model)) and "ZERO" not in line
    tuned = {id(p) for p in model.tuned_parameters().values()}
    assert all((p.grad is not None) == (id(p) in tuned) for p in model.parameters())


def test_names_of_tuned_tensors():
    def names(method, **options):
        return set(build(method, prompt_depth=2, **options).tuned_state_dict())

    up = {"upsampler.conv.weight", "upsampler.conv.bias", "upsampler.ratio"}
    mlp = ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias")
    assert names("coop") == names("vpt") == {"context"} | up
    assert names("maple", upsampler=False) == {"context"} | {f"project.{i}.{p}" for i in (0, 1) for p in mlp}
    assert names("cocoop", unified_proj=True) == {"context"} | {f"project.0.{p}" for p in mlp[:4]} | up
    linear = {f"{b}_project.{i}.{p}" for b in ("text", "vision") for i in (0, 1) for p in ("weight", "bias")}
    assert names("shared_separate") == {"context"} | linear | up
    assert "mixer.1.self_attn.in_proj_weight" in names("shared_attention")
    both = build("dense+vpt", dim=4, context=3)
    assert {"dense.vision.0.attn.down.weight", "vpt.context", "upsampler.ratio"} <= set(
        both.tuned_state_dict()
    )
    assert (
        both.info["options"]["vpt"] == dict(prompt_depth=9, context=3)
        and both.info["options"]["dense"]["dim"] == 4
    )
    assert build("dense", dim=4, upsampler=True).info["options"]["upsampler"]
    assert build("coop").tuned_state_dict()["context"].shape == (9, 4, 32)


@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_text_learners_leave_nothing_of_the_vision_encoder_in_the_graph(method):
    """What is kept for the backward pass is as large with one vision block as with ten."""
    kept = []
    for learner in (method, "vpt"):
        model, size = build(learner), 0

        def pack(t):
            nonlocal size
            size += (
                t.numel() if t.dim() == 3 and t.shape[-1] in (48, 96) else 0
            )  # activations of the vision encoder's widths
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(*batch())
        kept.append(size)
    assert kept[0] == 0 and kept[1] > 0


def test_weight_decay_acts_on_contexts_and_matrices():
    def decayed(reference=False, method="maple", **options):
        tuner = build(method, prompt_depth=1, reference=reference, **options).tuner
        return {n for n, p in tuner.named_parameters() if tuner.uses_weight_decay(n, p)}

    matrices = {"project.0.0.weight", "project.0.2.weight", "upsampler.conv.weight"}
    assert decayed() == {"context"} | matrices
    assert decayed(reference=True) == matrices
    assert decayed(reference=True, method="coop") == set()
    both = decayed(method="dense+maple", dim=3)
    assert both >= {"maple.context", "dense.vision.0.attn.down.bias", "upsampler.conv.bias"}
    assert not both & {"maple.project.0.0.bias", "upsampler.ratio"}


def test_contexts_start_from_text():
    model = vlsm.build("clipseg", "mini", "coop", context_init="red circle", prompt_depth=3)
    ids = model.tokenizer().encode("red circle")[1:-1]
    words = model.network.clip.text_model.embeddings.token_embedding.weight[ids]
    assert torch.equal(model.tuner.context[0], words) and model.tuner.context.shape == (3, 2, 96)
    assert model.info["options"]["context"] == 2 and model.tuner.context[1].std() < 0.03
    model = vlsm.build("clipseg", "mini", "maple", context_init=["red circle", "blue square"], prompt_depth=2)
    assert not torch.equal(*model.tuner.context) and model.tokenizer().limit == 75
    again = vlsm.build("clipseg", "mini", "maple", **model.info["options"])
    assert torch.equal(again.tuner.context, model.tuner.context)


def test_depth_of_the_published_code_follows_its_own_rule():
    config = build("none").network.config
    assert config.max_prompt_depth(["vision"]) == 11 == config.max_prompt_depth(["vision"], reference=True)
    assert (
        REAL.max_prompt_depth(["vision"]),
        REAL.max_prompt_depth(["text"]),
        REAL.max_prompt_depth(["vision", "text"], reference=True),
    ) == (11, 12, 12)
