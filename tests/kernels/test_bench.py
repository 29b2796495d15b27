"""The benchmark's own arithmetic: what it compares with must be the same network."""

import pytest
import torch
from transformers import CLIPSegForImageSegmentation

import vlsm
from tests.bench import __main__ as program
from tests.bench.frame import Bench
from tests.bench.hd95 import lesions
from tests.bench.published import published_network
from tests.bench.training import prompts_of, stepper
from tests.conftest import GOLDEN


@pytest.mark.parametrize("method", ["dense", "shallow", "coop", "vpt"])
def test_the_papers_way_is_the_same_network(method, tmp_path):
    """Logits, and losses of four training steps; the logits in float64, where rounding is of no account."""
    torch.manual_seed(0)
    network = CLIPSegForImageSegmentation.from_pretrained(
        GOLDEN / "clipseg-tiny", attn_implementation="eager"
    ).eval()
    adapters = method in ("dense", "shallow")
    ours = vlsm.build(
        "clipseg", GOLDEN / "clipseg-tiny", method, **dict(dim=8) if adapters else dict(prompt_depth=5)
    )
    theirs = published_network(network, ours.tuner, method)
    pixels, target = torch.randn(3, 3, 64, 64), torch.rand(3, 1, 64, 64) < 0.3
    ids = torch.tensor([[198, 5, 6, 199, 199], [198, 7, 199, 199, 199], [198, 9, 8, 7, 199]])
    for model in (ours, theirs):
        model.double()
    torch.testing.assert_close(
        ours(pixels.double(), ids), theirs(pixels.double(), ids), atol=5e-6, rtol=0
    )  # its softmax is float32
    for model in (ours, theirs):
        model.float()
    steps = [
        stepper(parameters, lambda f=f: vlsm.dice_bce_loss(f(pixels, ids), target), torch.device("cpu"))
        for f, parameters in (
            (ours, ours.tuned_parameters().values()),
            (theirs, theirs.parameters()),
        )
    ]
    before = [s().item() for s in steps]
    assert before[0] == pytest.approx(before[1], abs=1e-5)
    for _ in range(3):
        after = [s().item() for s in steps]
    assert after[0] == pytest.approx(after[1], abs=1e-4) and after[0] != before[0]


def test_prompts_end_and_are_padded():
    ids = prompts_of(4)
    assert (
        ids.shape == (4, 77)
        and (ids[:, 0] == 49406).all()
        and (ids[:, -1] == 49407).all()
        and len({tuple(i.tolist()) for i in ids}) == 4
    )


def test_rows_and_floors(capsys):
    b = Bench(device="cpu", dtype="fp32", runs=3)
    b.machine.update(bandwidth_GBs=10.0, matrix_TFLOPs=0.1)
    assert b.floor(1e9) == pytest.approx(0.1) and b.floor(1e9, 1e11) == pytest.approx(1.0)
    calls = []
    times = b.time(dict(ours=lambda: calls.append("ours"), eager=lambda: calls.append("eager")), warm=1)
    assert calls == ["ours", "eager"] * 4 and times["ours"] > 0
    b.row("a row", dict(ours=0.5, eager=2.0), floor=0.25)
    assert b.rows[0]["ratios"] == dict(eager=4.0) and b.rows[0]["share_of_floor"] == 0.5
    assert "(4.00x)" in capsys.readouterr().out


def test_hd95_rows_of_lesions():
    masks = lesions(6, 64, torch.Generator().manual_seed(0))
    assert masks.dtype == torch.bool and all(
        0.05 < share < 0.5 for share in masks.float().mean((1, 2)).tolist()
    )


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        program.main(["speed"])
    assert "there is no row speed" in capsys.readouterr().err
