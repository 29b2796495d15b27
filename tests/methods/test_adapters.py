"""Adapters at real size and small: counts, places, gradients, what is trained and what is saved."""

import pytest
import torch

import vlsm
from tests.conftest import GOLDEN
from vlsm.methods.adapters import Adapter
from vlsm.methods.registry import METHODS
from vlsm.networks.clipseg import CLIPSeg, CLIPSegConfig
from vlsm.training.run import check_gradients

REAL = CLIPSegConfig.from_dict(
    dict(vision_config=dict(patch_size=16), use_complex_transposed_convolution=True)
)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "method, branches, dim, trained",
    [
        ("dense", "v", 64, 1_784_448),
        ("dense", "l", 64, 1_190_016),
        ("dense", "vl", 64, 2_974_464),
        ("dense", "vlc", 64, 3_237_376),
        ("dense", "c", 64, 262_912),
        ("shallow", "v", 512, 2_363_136),
        ("shallow", "l", 512, 1_575_936),
        ("shallow", "vl", 512, 3_939_072),
        ("shallow", "vlc", 512, 4_201_984),
    ],
)
def test_published_parameter_counts(method, branches, dim, trained):
    with torch.device("meta"):
        assert count(METHODS[method](REAL, branches=branches, dim=dim)) == trained


def test_whole_clipseg_at_real_size():
    with torch.device("meta"):
        base = CLIPSeg(REAL)
    assert count(base) == 150_747_746
    assert (
        sum(base.get_parameter(n).numel() for n in METHODS["decoder"](REAL).trained_network_parameters(base))
        == 1_127_009
    )


def test_adapter_is_equation_1():
    adapter, f = Adapter(6, 3).double(), torch.randn(4, 6, dtype=torch.double)
    W1, b1, W2, b2 = adapter.down.weight.T, adapter.down.bias, adapter.up.weight.T, adapter.up.bias
    want = f + torch.clamp(torch.clamp(f @ W1 + b1, min=0) @ W2 + b2, min=0)
    torch.testing.assert_close(adapter(f), want)


def test_zero_initialised_up_projection_would_be_dead():
    """Why adapters do not start as the identity: under the outer ReLU nothing would ever learn."""
    adapter, f = Adapter(6, 3), torch.randn(4, 6)
    adapter(f).square().sum().backward()
    assert adapter.down.weight.grad.any() and adapter.up.weight.grad.any()
    dead = Adapter(6, 3)
    torch.nn.init.zeros_(dead.up.weight)
    torch.nn.init.zeros_(dead.up.bias)
    dead(f).square().sum().backward()
    assert not dead.down.weight.grad.any() and not dead.up.weight.grad.any()


def batch(n=2):
    torch.manual_seed(0)
    return torch.randn(n, 3, 64, 64), torch.randint(3, 198, (n, 6)).index_fill_(1, torch.tensor([5]), 199)


@pytest.mark.parametrize("method", ["dense", "shallow"])
@pytest.mark.parametrize("branches", ["v", "l", "c", "vl", "vc", "lc", "vlc", "cl"])
def test_exactly_the_chosen_branches_learn(method, branches):
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", method, branches=branches, dim=6)
    model(*batch()).square().mean().backward()
    with_gradient = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {dict(v="vision", l="text", c="cond")[b] for b in branches}
    tuned = model.tuned_parameters()
    assert all(p.grad.abs().sum() > 0 for p in tuned.values())
    assert "finite and non-zero, 0 of" in check_gradients(model)


def test_names_of_tuned_tensors():
    dense = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "dense", branches="vlc", dim=6).tuned_state_dict()
    shallow = vlsm.build(
        "clipseg", GOLDEN / "clipseg-tiny", "shallow", branches="vlc", dim=6
    ).tuned_state_dict()
    ends = [f"{m}.{p}" for m in ("down", "up") for p in ("weight", "bias")]
    assert set(dense) == {
        f"{b}.{i}.{s}.{e}"
        for b in ("vision", "text")
        for i in range(9)
        for s in ("attn", "mlp")
        for e in ends
    } | {f"cond.{e}" for e in ends}
    assert set(shallow) == {f"{b}.{k}.{e}" for b in ("vision", "text") for k in range(3) for e in ends} | {
        f"cond.{e}" for e in ends
    }
    assert dense["cond.down.weight"].shape == (256, 32)


@pytest.mark.parametrize("method", ["dense", "shallow", "decoder", "full"])
def test_one_step_moves_every_trained_tensor_and_no_other(method):
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", method)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.tuned_parameters().values(), lr=1e-2)
    model(*batch()).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.endswith("k_proj.bias")} <= moved <= trained


def test_leaking_and_missing_gradients_are_refused():
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "dense", dim=4)
    with pytest.raises(ValueError, match="without a finite gradient"):
        check_gradients(model)
    model.network.decoder.film_add.bias.requires_grad_(True)
    model(*batch()).mean().backward()
    with pytest.raises(ValueError, match="1 frozen ones with one .network.decoder.film_add.bias"):
        check_gradients(model)


def test_load_tuned_is_strict():
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "dense", dim=4)
    tensors = model.tuned_state_dict()
    with pytest.raises(ValueError, match="1 missing: vision.0.attn.down.bias"):
        model.load_tuned({n: t for n, t in tensors.items() if n != "vision.0.attn.down.bias"})
    with pytest.raises(ValueError, match="of another shape"):
        model.load_tuned(vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "dense", dim=5).tuned_state_dict())


def test_shallow_text_needs_equal_widths():
    with pytest.raises(ValueError, match="Use --branches v, c or vc"):
        vlsm.build("clipseg", GOLDEN / "clipseg-tiny-simple", "shallow", branches="vl")
    vlsm.build("clipseg", GOLDEN / "clipseg-tiny-simple", "shallow", branches="v")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="lorra"), "Choose one of: none, decoder, full, dense, shallow"),
        (dict(method="dense", dim=0), "--dim 0"),
        (dict(method="dense", branches="vx"), "--branches 'vx'"),
        (dict(method="dense", branches=""), "--branches ''"),
        (dict(method="decoder", dim=3), "takes no options; it has no dim"),
        (dict(model="sam"), "Model 'sam' is not known"),
    ],
)
def test_wrong_options_are_sentences(options, message):
    with pytest.raises(ValueError, match=message):
        vlsm.build(**dict(dict(model="clipseg", weights=GOLDEN / "clipseg-tiny"), **options))


def test_frozen_weights_in_half_precision_leave_the_trained_ones_alone():
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "dense", dim=4)
    model.hold_frozen_weights_in(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch()).float().mean().backward()
    assert all(
        p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.tuned_parameters().values()
    )
    assert model.network.decoder.film_add.weight.dtype == torch.bfloat16
