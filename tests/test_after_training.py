"""What a trained run is used for: evaluation, prediction without a ground truth, merged weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from tests.conftest import rows, without_dim
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI


def test_saved_run_gives_the_same_logits_in_a_new_model(trained):
    torch.manual_seed(5)
    pixels, ids = torch.randn(2, 3, 48, 48), Tokenizer(MINI)(["red disk"] * 2)[0]
    logits = [vlsm.load(trained)(pixels, ids), vlsm.load(trained / "best.safetensors")(pixels, ids)]
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], vlsm.build("clipseg", "mini", "none")(pixels, ids))


def test_evaluation_is_reproducible_and_options_have_effects(cli, trained, tmp_path):
    def result(*more):
        out = tmp_path / "e"
        code, printed, err = cli("evaluate", "--ckpt", trained, "--out", out, *more)
        assert code == 0, err
        return json.loads((out / "metrics.json").read_text()), rows(out / "metrics.csv"), printed

    first, table, _ = result()
    assert result()[1] == table
    assert {r["prompt"] for r in result("--prompts", "class")[1]} == {"disk"}
    assert {r["prompt"] for r in result("--prompts", "a bright thing")[1]} == {"a bright thing"}
    assert [r["prompt"] for r in result("--seed", 7)[1]] != [r["prompt"] for r in table]
    assert result("--upsample", "mask")[0]["dsc"] != first["dsc"]
    assert result("--split", "train")[0]["dsc"]["n"] == 24
    small = result("--batch-size", 2)[0]["dsc"]
    assert small.pop("ci95") == pytest.approx(first["dsc"]["ci95"], abs=1e-6)
    assert small == pytest.approx({k: v for k, v in first["dsc"].items() if k != "ci95"}, abs=1e-6)
    printed = cli("evaluate", "--ckpt", trained, "--out", tmp_path / "all", "--all-prompts")[1]
    assert [line.split()[0] for line in printed.splitlines()][2:] == ["prompt", "p0", "p1", "p2", "p3"]
    assert (tmp_path / "all" / "p2" / "metrics.csv").is_file()


def test_prediction_without_ground_truth(cli, trained, folder, tmp_path):
    out = tmp_path / "out"
    Image.open(folder / "images" / "d0.png").resize((33, 71)).convert("L").save(
        folder / "images" / "tall.jpg"
    )
    ask = ("evaluate", "--ckpt", trained, "--prompt", "red disk", "--images")
    code, said, err = cli(*ask, folder / "images", "--save-masks", out, "--overlay")
    assert code == 0 and f"Wrote masks to '{out}': 37" in said, err
    assert Image.open(out / "tall.png").size == (33, 71)
    assert Image.open(out / "tall.overlay.png").size == (33, 71)
    one = tmp_path / "one"
    assert cli(*ask, folder / "images" / "d1.png", "--save-masks", one)[0] == 0
    assert (np.asarray(Image.open(one / "d1.png")) == np.asarray(Image.open(out / "d1.png"))).mean() > 0.999
    Image.open(folder / "images" / "d0.png").save(folder / "images" / "d0.bmp")
    code, _, err = cli(*ask, folder / "images", "--save-masks", out)
    assert code == 2 and "d0.png" in err and "equal stems" in err
    code, _, err = cli("evaluate", "--ckpt", trained, "--images", folder / "images")
    assert code == 2 and "--prompt" in err


@pytest.mark.parametrize("method", ["lora", "decoder", "full", "none", "lora+decoder"])
def test_merged_weights_are_a_plain_clipseg(cli, quick, folder, tmp_path, method):
    from transformers import CLIPSegForImageSegmentation

    options = without_dim(quick)
    more = [] if method == "none" else ["--lr", 5e-3, "--negatives", 0]
    assert cli("train", *options, "--peft", method, "--epochs", 2, *more)[0] == 0
    code, said, err = cli("vlsm.tools.merge", tmp_path / "run", tmp_path / "merged")
    assert code == 0 and "(transformers loads it, too)" in said, err
    tuned, plain = vlsm.load(tmp_path / "run"), vlsm.build("clipseg", tmp_path / "merged")
    theirs = CLIPSegForImageSegmentation.from_pretrained(tmp_path / "merged").eval()
    pixels, (ids, mask) = torch.randn(2, 3, 96, 96), plain.tokenizer()(["red disk", "a blue thing"])
    with torch.no_grad():
        want = tuned(pixels, ids, mask)
        torch.testing.assert_close(plain(pixels, ids, mask), want, atol=1e-4, rtol=0)
        logits = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(logits.reshape(want.shape), want, atol=1e-4, rtol=0)
        moved = (want - vlsm.build("clipseg", "mini")(pixels, ids, mask)).abs().max()
    assert (moved > 0.1) == (method != "none")
    again = [*options[:2], *options[4:-1], tmp_path / "again", "--weights", tmp_path / "merged"]
    assert cli("train", *again, "--peft", "coop", "--epochs", 1)[0] == 0
    code, _, err = cli("vlsm.tools.merge", tmp_path / "run", tmp_path / "merged")
    assert code == 2 and "is not empty" in err


def test_adapters_are_not_merged(cli, trained, tmp_path):
    code, _, err = cli("vlsm.tools.merge", trained, tmp_path / "merged")
    assert code == 2 and "possible for lora, decoder and full" in err and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["dense", "decoder", "lora+decoder"])
def test_a_shared_base_stays_as_it_is(cli, quick, trained, tmp_path, method):
    """Two models share frozen tensors, predict as if loaded alone, and keep what is trained in float32."""
    assert cli("train", *without_dim(quick)[:-1], tmp_path / "two", "--epochs", 1, "--peft", method)[0] == 0
    base = vlsm.load(trained).place_on(torch.device("cpu"), torch.bfloat16)
    frozen = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    model = vlsm.load(tmp_path / "two", base=base)
    alone = vlsm.load(tmp_path / "two").place_on(torch.device("cpu"), torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in model.tuned_parameters().values())
    for name, tensor in alone.tuned_state_dict().items():
        assert torch.equal(model.tuned_state_dict()[name], tensor)
    shared = {id(p) for p in base.network.parameters()} & {id(p) for p in model.network.parameters()}
    assert len(shared) == len(list(base.network.parameters())) - len(model.tuned_names)
    with torch.no_grad():
        for tensor in model.tuned_parameters().values():
            tensor.add_(1)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in base.network.state_dict().items())
