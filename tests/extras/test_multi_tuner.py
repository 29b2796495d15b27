"""Several tuners on one base: each gives what it gives alone, switching leaves nothing behind, batches may
mix.
"""

import pytest
import torch

import vlsm
from tests.conftest import ROOT, close, without_dim
from vlsm.checkpoint import save_tuned

METHODS = {"a": "dense", "b": "decoder", "c": "coop", "d": "full", "e": "lora+decoder", "f": "none"}


def saved(tmp_path, model="clipseg", weights="mini", methods=METHODS, **options):
    """Checkpoints of methods whose tensors were moved at random."""
    paths = {}
    for seed, (name, method) in enumerate(methods.items()):
        torch.manual_seed(seed)
        vlm = vlsm.build(model, weights, method, **options)
        with torch.no_grad():
            for tensor in vlm._tuned_tensors().values():
                tensor.add_(0.05 * torch.rand_like(tensor))
        paths[name] = tmp_path / f"{name}.safetensors"
        save_tuned(paths[name], vlm, image_size=48)
    return paths


def batch(model, n=6):
    torch.manual_seed(3)
    return torch.randn(n, 3, 64, 64), *model.tokenizer()(
        ["red disk", "a polyp", "", "x", "red disk", "a small polyp"][:n]
    )


@pytest.mark.parametrize("order", ["abcdef", "fdbeca", "dbdadfb"])
def test_each_gives_what_it_gives_alone(tmp_path, order):
    paths = saved(tmp_path)
    bank = vlsm.load_many(paths)
    with torch.no_grad():
        for name in order:
            alone = vlsm.load(paths[name])
            inputs = batch(alone)
            close(bank.use(name)(*inputs), alone(*inputs), 1e-6)
            assert (bank.active, bank.info["method"], bank.about["image_size"]) == (name, METHODS[name], 48)
            assert bank.tokenizer().limit == alone.tokenizer().limit


def test_a_batch_of_several(tmp_path):
    paths = saved(tmp_path)
    bank = vlsm.load_many(paths)
    names, inputs = ["d", "a", "d", "b", "f", "a"], batch(bank)
    with torch.no_grad():
        got = bank.use("c")(*inputs, tuner=names)
        assert bank.active == "c"
        for i, name in enumerate(names):
            close(got[i : i + 1], vlsm.load(paths[name])(*(t[i : i + 1] for t in inputs)), 5e-5)
        close(bank(*inputs, tuner="b"), vlsm.load(paths["b"])(*inputs), 1e-6)
        close(bank(inputs[0], inputs[1], tuner=names), bank(*inputs, tuner=names), 5e-5)
        close(bank(*inputs), vlsm.load(paths["c"])(*inputs), 1e-6)
    with pytest.raises(ValueError, match="6 images came with 2 names"):
        bank(*inputs, tuner=["a", "b"])
    with pytest.raises(ValueError, match="no tuner 'kvasir' here; known are a, b, c, d, e, f"):
        bank.use("kvasir")


def test_one_base_in_memory(tmp_path):
    """Eight adapters cost their own size; they share every tensor of the base."""
    paths = saved(tmp_path, methods={str(i): "dense" for i in range(8)})
    bank = vlsm.load_many(paths)
    unique = {p.data_ptr(): p.numel() for p in bank.parameters()}
    one = vlsm.load(paths["0"])
    trained, total = one.count_parameters()
    assert sum(unique.values()) == total + 7 * trained
    assert not any(p.requires_grad for p in bank.parameters())


def test_a_bank_in_half_precision(tmp_path):
    """Moved and cast after loading: what a tuner has learnt in the base follows."""
    paths = saved(tmp_path)
    bank = vlsm.load_many(paths).hold_frozen_weights_in(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name in "bdabd":
            alone = vlsm.load(paths[name])
            inputs = batch(alone)
            close(bank.use(name)(*inputs).float(), alone(*inputs).float(), 0.15)


@pytest.mark.parametrize(
    "model, methods", [("cris", dict(a="full", b="coop", c="decoder")), ("san", dict(a="full", b="decoder"))]
)
def test_of_other_networks(tmp_path, model, methods):
    paths = saved(tmp_path, model, f"random:{ROOT / 'tests' / 'tiny' / model}.json", methods)
    bank = vlsm.load_many(paths)
    with torch.no_grad():
        for name in [*methods, *methods]:
            alone = vlsm.load(paths[name])
            close(bank.use(name)(*batch(alone)), alone(*batch(alone)), 1e-5)


def test_other_bases_are_refused(tmp_path):
    a = saved(tmp_path, methods=dict(a="dense"))
    b = saved(tmp_path, weights=ROOT / "tests" / "golden" / "clipseg-tiny", methods=dict(b="dense"))
    with pytest.raises(
        ValueError, match=r"b.safetensors' was tuned on the base .*clipseg-tiny.* and 'mini' is another base"
    ):
        vlsm.load_many({**a, **b})
    c = saved(tmp_path, methods=dict(c="dense"), reference=True)
    with pytest.raises(
        ValueError, match=r"\(clipseg with --reference, fingerprint .* and 'mini' is another base \(clipseg, "
    ):
        vlsm.load_many({**a, **c})
    with pytest.raises(ValueError, match="at least one checkpoint"):
        vlsm.load_many({})


def test_evaluate_routes_by_name_and_by_word(cli, quick, folder, tmp_path):
    """Three runs; pictures go to the one that is named, or whose class word the prompt holds."""
    runs = []
    for peft, word in (("decoder", "disk"), ("lora", "polyp"), ("dense", "Foot ulcer")):
        for split in ("train", "val", "test"):
            file = folder / "anns" / f"{split}.json"
            file.write_text(
                file.read_text()
                .replace('"p1": "disk"', f'"p1": "{word}"')
                .replace('"p1": "polyp"', f'"p1": "{word}"')
            )
        runs.append(tmp_path / f"run-{peft}")
        options = without_dim(quick)[:-1]
        assert cli("train", *options, runs[-1], "--peft", peft, "--epochs", 1)[0] == 0

    def predict(out, *more):
        options = ["--images", folder / "images" / "d0.png", "--save-masks", tmp_path / out]
        return cli("evaluate", "--ckpt", *runs, *options, *more)

    code, said, err = predict("x", "--prompt", "a large Polyp in the left")
    assert code == 0 and "run-lora" in said and (tmp_path / "x" / "d0.png").is_file(), err
    code, said, err = predict("y", "--prompt", "two foot ulcers")
    assert code == 0 and "run-dense" in said, err
    code, said, err = predict("z", "--prompt", "two foot ulcers", "--route", "run-decoder")
    assert code == 0 and "run-decoder" in said, err
    code, _, err = predict("n", "--prompt", "a shoe")
    assert (
        code == 2
        and "run-decoder (disk), run-lora (polyp), run-dense (Foot ulcer)" in err
        and "--route NAME" in err
    )
    code, _, err = predict("n", "--prompt", "a polyp on a disk")
    assert code == 2 and "of several" in err
    code, _, err = predict("n", "--prompt", "a polyp", "--route", "kvasir")
    assert code == 2 and "There is no checkpoint 'kvasir'" in err
    code, _, err = cli("evaluate", "--ckpt", *runs)
    assert code == 2 and "Several checkpoints are for --images" in err
