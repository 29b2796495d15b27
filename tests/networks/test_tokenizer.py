"""The tokenizer and prompts."""

import numpy as np
import pytest
import torch

from vlsm.data.describe import components, describe
from vlsm.data.records import Record, choose_prompt, class_word
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI

TEXTS = [
    "",
    "polyp",
    "One medium white ROUND polyp,  located in right of the image",
    "it's a 12cm tumour; isn't it?",
    "naïve façade — 50%",
    "p3: <b>x</b> 3.14 #@!",
    "  tabs\tand\nlines ",
    "Ein Größenmaß",
    "皮膚",
    "a" * 60,
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(text):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(MINI)
    assert Tokenizer(MINI).encode(text) == theirs(text, truncation=True, max_length=77)["input_ids"]


def test_batch_is_padded_to_its_longest():
    tokenizer = Tokenizer(MINI)
    ids, mask = tokenizer(["polyp", "a large red circle"])
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert ids[0, 2:].tolist() == [tokenizer.end] * 4


def test_long_prompts_are_cut_and_it_is_said_once(capsys):
    tokenizer = Tokenizer(MINI, limit=10)
    ids, _ = tokenizer(["red " * 30, "blue " * 40])
    assert ids.shape == (2, 10) and ids[0, -1] == tokenizer.end
    said = capsys.readouterr().err
    assert said.count("cut off") == 1 and "32 tokens and the model takes 10" in said


def test_a_prompt_of_megabytes_is_refused_at_once():
    with pytest.raises(ValueError, match=r"'aaa.{57}\.\.\.' has 10000001 characters"):
        Tokenizer(MINI)(["a polyp", "a" * 10_000_001])
    assert len(Tokenizer(MINI).encode("a " * 5000)) == 77


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        Tokenizer(tmp_path)


PROMPTS = {"p0": "", "p1": "polyp", "p2": ["round polyp", "oval polyp"], "p3": "red polyp"}


def record_of(prompts, class_word=None):
    return Record("a.png", "a.png", None, None, prompts, class_word)


def test_random_prompts_are_uniform_over_keys_without_the_first():
    record, n = record_of(PROMPTS), 6000
    drawn = [choose_prompt(record, "random", i) for i in range(n)]
    share = {text: drawn.count(text) / n for text in ("", "polyp", "round polyp", "oval polyp", "red polyp")}
    assert share[""] == 0
    for text, want in (("polyp", 1 / 3), ("round polyp", 1 / 6), ("oval polyp", 1 / 6), ("red polyp", 1 / 3)):
        assert share[text] == pytest.approx(want, abs=0.03)


def test_other_ways_to_choose():
    record, bare = record_of(PROMPTS, "polyp"), record_of({})
    assert choose_prompt(record, "p3", 0) == "red polyp"
    assert choose_prompt(record, "p0", 0) == ""
    assert choose_prompt(record, "anything else", 0) == "anything else"
    assert choose_prompt(record, "class", 0) == "polyp"
    with pytest.raises(ValueError, match="Known here: p0, p1, p2, p3"):
        choose_prompt(record, "p7", 0)
    with pytest.raises(ValueError, match="came without prompts"):
        choose_prompt(bare, "random", 0)
    with pytest.raises(ValueError, match="no class word"):
        choose_prompt(bare, "class", 0)


@pytest.mark.parametrize(
    "p1, word",
    [
        ("skin melanoma", "skin melanoma"),
        ("Airspace Opacity in a chest Xray.", "Airspace Opacity"),
        (["Left ventricular cavity of the heart.", "..."], "Left ventricular cavity"),
        ("Myocardium in the cardiac ultrasound.", "Myocardium"),
    ],
)
def test_class_words(p1, word):
    assert class_word(dict(p1=p1)) == word


def test_components():
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], bool)
    assert [int(m.sum()) for m in components(mask)] == [6, 3, 1]
    snake = np.zeros((9, 9), bool)
    snake[0], snake[:, 8], snake[8], snake[2:, 0], snake[2, :6] = True, True, True, True, True
    assert len(components(snake)) == 1


def test_prompts_from_a_mask():
    y, x = np.mgrid[:60, :90]
    mask = np.hypot(y - 12, x - 15) < 9
    image = np.zeros((60, 90, 3), np.uint8)
    image[mask] = (230, 140, 135)
    mask[59, 89] = True  # a speck, not counted
    prompts = describe(image, mask, "polyp", ["a lump"])
    assert prompts["p6"] == "one small pink circle polyp, located in top left of the image"
    assert prompts["p9"] == ["one small pink circle polyp which is a lump located in top left of the image"]
    two = mask | (np.hypot(y - 30, (x - 75) / 1.6) < 8)
    assert describe(image, two, "polyp")["p6"].endswith("located in right, top left of the image")
    assert list(describe(image, mask & False, "polyp")) == [f"p{i}" for i in range(7)]
