"""The audit of prompts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vlsm
from vlsm.data.cache import CachedSplit
from vlsm.data.negatives import ABSENT_SETS
from vlsm.data.normalise import normalise
from vlsm.data.records import Record
from vlsm.tools import audit


def test_prompts_of_the_audit():
    texts = ["", "polyp", "two small red round polyp, located in top left of the image"]
    records = [
        Record("a.png", "a.png", None, None, {f"p{k}": t for k, t in enumerate(texts)}, "polyp"),
        Record("b.png", "b.png", None, None, {"p0": "", "p1": "polyp", "p2": "large green polyp"}, "polyp"),
    ]
    found = audit.audit_prompts(records, [texts[2], "large green polyp"], ["bone"])
    assert list(found) == [*audit.CONDITIONS, *ABSENT_SETS]
    assert found["right"][0] == texts[2] and found["paraphrase"] == ["polyp", "polyp"]
    assert found["swapped"] == ["large green polyp", texts[2]]
    changed = found["contradictory"][0]
    assert changed.startswith("one large ") and "red" not in changed and "bottom right of" in changed
    assert found["contradictory"][1] == "small green polyp" and found["class word"] == ["polyp"] * 2
    assert found["absent word"] == ["bone"] * 2 and found["absent class"] == [None] * 2
    in_prompt = [texts[2].replace("polyp", "bone"), "large green bone"]
    assert found["absent word in the prompt"] == in_prompt
    assert audit.audit_prompts(records[:1], ["polyp"], ["bone"])["swapped"] == [None]
    assert audit.contradict("polyp") is None


def test_verdicts():
    def verdict(absent_class, absent_word, in_the_prompt, nonsense=0.1, n=60, found=1):
        summaries = {
            name: dict(dsc=dict(mean=0), alarms=dict(mean=share), n=n)
            for name, share in zip(ABSENT_SETS, (absent_class, absent_word, in_the_prompt))
        }
        for name, dsc in (("right", 0.723), ("nonsense", nonsense)):
            summaries[name] = dict(dsc=dict(mean=dsc), alarms=dict(mean=found), n=n)
        return audit.verdict(summaries)

    assert verdict(0, 0.01, 0.02) == (
        "This run listens: it refuses what is not there (images with a mask: absent class 0.0 %, absent word "
        "1.0 %, absent word in the prompt 2.0 %)."
    )
    assert verdict(0, 0, 0, found=0.2).startswith("This run mostly gives no mask for the right prompt")
    assert verdict(0.9, 0.98, 0.98).startswith("This run gives a mask for a word of what is not there (")
    assert "refuses an absent word, but not an absent word in the prompt (" in verdict(0, 0.01, 0.8)
    assert "but not an absent class or an absent word in the prompt (" in verdict(0.3, 0.01, 0.8)
    deaf = verdict(0, 0, 0, nonsense=0.7)
    assert deaf.endswith("; nonsense scores like the right prompt (DSC 70.0 and 72.3).")
    assert verdict(0, 0, 0, n=12).endswith("; of 12 records alone, so this is uncertain.")


COLOURS = dict(red=(220, 40, 40), green=(40, 180, 60), blue=(40, 70, 220), yellow=(235, 215, 40))


def two_objects(seed):
    """Return (image uint8 `[96, 96, 3]`, mask of the larger of two objects, a phrase that describes it)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    image = np.full((96, 96, 3), 190) + rng.normal(0, 6, (96, 96, 3))
    names = rng.permutation(list(COLOURS))
    shapes = rng.permutation(["circle", "square"])
    masks = []
    for name, shape, at, radius in zip(names, shapes, (28, 70), (20, 12)):
        dy = np.abs(y - rng.integers(28, 68))
        dx = np.abs(x - at)
        inside = np.hypot(dy, dx) <= radius if shape == "circle" else np.maximum(dy, dx) <= radius
        image[inside] = COLOURS[name]
        masks.append(inside)
    return image.clip(0, 255).astype(np.uint8), masks[0], f"a {names[0]} {shapes[0]}"


def test_the_embedded_base_listens():
    """On drawn scenes of two objects: the phrase of the larger one, and another scene's phrase."""
    records = []
    for i in range(24):
        image, mask, text = two_objects(i)
        records.append(Record(f"{i}.png", f"{i}.png", image, mask, {"p1": text}))
    images = np.stack([r.image.transpose(2, 0, 1) for r in records])
    data = CachedSplit(
        records, images, np.stack([r.mask.astype(np.uint8) for r in records]), range(len(records))
    )
    model = vlsm.build("clipseg", "mini")
    tokenizer = model.tokenizer()

    @torch.inference_mode()
    def logits(images, prompts):
        return model(normalise(images, model.network.mean, model.network.std), *tokenizer(prompts))

    predictor = SimpleNamespace(device=torch.device("cpu"), logits=logits, vocabulary=tokenizer.words)
    found = audit.audit(predictor, data, [r.prompts["p1"] for r in records])
    dsc = {condition: summary["dsc"]["mean"] for condition, summary in found.items()}
    assert dsc["right"] - dsc["swapped"] > 0.55 and dsc["right"] - dsc["contradictory"] > 0.6
    assert found["right"]["alarms"]["mean"] > 0.95 > 0.1 + found["contradictory"]["alarms"]["mean"]


def test_lines_of_the_audit_are_short_and_end_at_words():
    stats = dict(mean=0.5, ci95=[0.25, 1])
    summary = dict(dsc=stats, alarms=stats, n=60, example="large polyp " * 50)
    lines = audit.describe({name: summary for name in ("right", "nonsense", *ABSENT_SETS)}).splitlines()
    assert max(map(len, lines)) <= audit.COLUMNS
    examples = [line for line in lines if line.startswith("- ")]
    assert len(examples) == 5 and all(line.endswith(("large ...", "polyp ...")) for line in examples)


def test_an_audited_run(cli, trained):
    code, said, err = cli("vlsm.tools.audit", trained)
    assert code == 0 and cli("evaluate", "--ckpt", trained)[0] == 0, err
    audited = json.loads((trained / "eval-test" / "audit.json").read_text())
    scores = json.loads((trained / "eval-test" / "metrics.json").read_text())
    assert list(audited["prompts"])[0] == "right" and audited["verdict"] in " ".join(said.split())
    assert max(map(len, said.splitlines()[:-1])) <= audit.COLUMNS and "- paraphrase: " in said
    assert audited["prompts"]["right"]["dsc"]["mean"] == pytest.approx(scores["dsc"]["mean"])
    for name, alarms in scores["alarms"].items():
        assert audited["prompts"][name]["alarms"]["mean"] == pytest.approx(alarms["mean"])
